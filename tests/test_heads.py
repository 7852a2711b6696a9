import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cl_plugins.attach import CallCheck, EvalGuard, freeze, plugin_modules
from cl_plugins.backbones import create_backbone, find_backbone
from cl_plugins.heads import HIDDEN_LOGIT, HeadMask, find_head, head_mask, protect_rows
from tests._helpers import tiny_vit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masked_loss_equals_loss_on_the_slice(dtype):
    torch.manual_seed(0)
    head = nn.Linear(5, 7).to(dtype)
    mask = HeadMask(head)
    mask.start([1, 4, 5])
    x = torch.randn(9, 5, dtype=dtype, requires_grad=True)
    y = torch.tensor([1, 4, 5] * 3)
    got = cross_entropy(head(x), y)
    gradients = torch.autograd.grad(got, [x, head.weight, head.bias])
    logits = x @ head.weight.T + head.bias
    expected = cross_entropy(logits[:, [1, 4, 5]], torch.tensor([0, 1, 2] * 3))
    tolerance = {"atol": 1e-3, "rtol": 1e-2} if torch.finfo(dtype).bits == 16 else {}
    for a, b in zip(gradients, torch.autograd.grad(expected, [x, head.weight, head.bias]), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    torch.testing.assert_close(got, expected, **tolerance)
    assert gradients[1][[0, 2, 3, 6]].abs().max() == 0


def test_evaluation_shows_all_seen_classes_and_a_checkpoint_keeps_them():
    head = nn.Linear(2, 4)
    mask = HeadMask(head)
    assert (head(torch.ones(1, 2)) != HIDDEN_LOGIT).all()  # before the first task nothing is hidden
    mask.start([2])
    mask.start([0])
    mask.start([0])
    assert mask.seen() == [0, 2]
    mask.eval()
    assert (head(torch.ones(1, 2)) == HIDDEN_LOGIT).tolist() == [[False, True, False, True]]
    other = HeadMask(nn.Linear(2, 4))
    other.load_state_dict(copy.deepcopy(mask.state_dict()))
    other.start([3])
    assert other.seen() == [0, 2, 3]


def test_a_deep_copy_masks_with_its_own_buffers():
    module = nn.Sequential(nn.Linear(2, 3))
    head_mask(module, module[0]).start([0])
    twin = copy.deepcopy(module)
    head_mask(twin, twin[0]).start([1])
    assert (module[0](torch.ones(1, 2)) == HIDDEN_LOGIT).tolist() == [[False, True, True]]
    assert (twin[0](torch.ones(1, 2)) == HIDDEN_LOGIT).tolist() == [[True, False, True]]


def test_a_label_without_a_row_is_refused():
    with pytest.raises(ValueError, match=r"`classes` must be rows of the head, 0 to 2, got \[3\].*at least 4 outputs"):
        HeadMask(nn.Linear(2, 3)).start([0, 3])


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
def test_protected_rows_survive_weight_decay_bit_for_bit(optimizer_class):
    head = nn.Linear(3, 4)
    optimizer = optimizer_class(head.parameters(), lr=0.1, weight_decay=0.5)
    before = head.weight.detach().clone()
    handle = protect_rows(head, [0, 3], optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        head(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert torch.equal(head.weight[[0, 3]], before[[0, 3]])
    assert not torch.equal(head.weight[1], before[1])
    handle.remove()
    optimizer.step()
    assert not torch.equal(head.weight[0], before[0])


def test_no_protection_is_needed_without_weight_decay():
    head = nn.Linear(3, 4)
    assert protect_rows(head, [0], torch.optim.Adam(head.parameters())) is None


def test_the_head_is_found_in_timm_models_and_beside_bare_backbones():
    model = nn.ModuleDict({"net": tiny_vit()})
    name, head = find_head(model, find_backbone(model))
    assert name == "net.head"
    assert head is model["net"].head
    bare = nn.ModuleDict({"net": tiny_vit(num_classes=0), "classify": nn.Linear(16, 6)})
    assert find_head(bare, find_backbone(bare))[0] == "classify"


def test_no_head_several_heads_and_wrong_names_are_refused():
    bare = nn.ModuleDict({"net": tiny_vit(num_classes=0)})
    with pytest.raises(ValueError, match="must have one classifier, found no linear layer outside the backbone"):
        find_head(bare, find_backbone(bare))
    two = nn.ModuleDict({"net": tiny_vit(num_classes=0), "a": nn.Linear(16, 2), "b": nn.Linear(16, 2)})
    with pytest.raises(ValueError, match="found 2 linear layers outside the backbone: a, b; pass `head=`"):
        find_head(two, find_backbone(two))
    with pytest.raises(ValueError, match="`head` must be a submodule's name, got 'c'"):
        find_head(two, name="c")
    with pytest.raises(ValueError, match=r"`head` must be an nn\.Linear, got 'net'"):
        find_head(two, name="net")


def test_no_backbone_and_several_backbones_are_refused():
    with pytest.raises(ValueError, match="must hold a transformer backbone"):
        find_backbone(nn.Sequential(nn.Linear(2, 2)))
    two = nn.ModuleDict({"left": tiny_vit(), "right": tiny_vit()})
    with pytest.raises(ValueError, match="holds 2 backbones: left, right; pass `backbone="):
        find_backbone(two)
    assert find_backbone(two, "right").model is two["right"]
    with pytest.raises(ValueError, match="`backbone` must be a submodule's name, got 'rigth'; did you mean 'right'"):
        find_backbone(two, "rigth")
    with pytest.raises(
        ValueError, match=r"`backbone` must be a timm ViT or an open_clip vision tower, got 'left\.head'"
    ):
        find_backbone(two, "left.head")


def test_open_clip_vision_tower_is_found():
    import open_clip

    tower = open_clip.model.VisionTransformer(
        image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
    )
    found = find_backbone(nn.ModuleDict({"visual": tower}))
    assert (found.kind, found.name, found.embed_dim, found.num_heads, len(found.blocks)) == (
        "open_clip", "visual", 16, 2, 2,
    )  # fmt: skip


def test_the_bundled_backbone_loads_without_a_network_and_knows_glyphs():
    pretrained, fresh = create_backbone("vit_glyph", 10), create_backbone("vit_glyph", 10, pretrained=False)
    assert not torch.equal(pretrained.patch_embed.proj.weight, fresh.patch_embed.proj.weight)
    assert torch.equal(pretrained.blocks[0].attn.qkv.weight, create_backbone("vit_glyph", 0).blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match="`name` must be a timm model, got 'vit_glif'"):
        create_backbone("vit_glif", 10)


def test_the_guard_keeps_a_backbone_in_eval_mode_and_freeze_clears_gradients():
    module = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)), "head": nn.Linear(2, 2)})
    module["net"](torch.ones(1, 2)).sum().backward()
    freeze(module, except_=[module["head"]])
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True]
    assert module["net"][0].weight.grad is None
    guard = EvalGuard(module["net"])
    module.train()
    outputs = {tuple(module["net"](torch.ones(1, 2))[0].tolist()) for _ in range(8)}
    assert len(outputs) == 1
    module["net"][1].train()  # a part alone
    assert len({tuple(module["net"](torch.ones(1, 2))[0].tolist()) for _ in range(8)}) == 1
    guard.remove()
    module.train()
    assert len({tuple(module["net"](torch.ones(1, 2))[0].tolist()) for _ in range(8)}) > 1


@pytest.mark.parametrize("training", [True, False])
def test_the_guard_leaves_adapters_in_their_mode(training):
    vit, adapter = tiny_vit(), nn.Dropout()
    plugin_modules(vit)["guard"] = EvalGuard(vit)
    plugin_modules(vit)["adapter"] = adapter
    vit.train(training).blocks.train()
    vit(torch.zeros(1, 3, 8, 8))
    assert (adapter.training, vit.training, vit.blocks[0].training) == (training, False, False)


def test_an_adapter_that_is_never_called_is_named():
    used, unused = nn.Identity(), nn.Identity()
    check = CallCheck({"used": used, "unused": unused})
    used(torch.zeros(1))
    with pytest.raises(RuntimeError, match="1 of 2 adapters were never called in the first training batch: unused"):
        check.verify()
    assert not used._forward_hooks


def test_a_module_with_plugins_of_its_own_is_refused():
    module = nn.Module()
    module.plugins = ["mine"]
    with pytest.raises(RuntimeError, match=r"`Module\.plugins` must be free for adapters, got list"):
        plugin_modules(module)
