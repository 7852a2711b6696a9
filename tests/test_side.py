"""Taps and side networks: sizes, memory, formulas against small independent versions."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from cl_plugins import Task, fit_stream
from cl_plugins.adapters.alpha_side import AlphaSide
from cl_plugins.adapters.hierarchical_side import HierarchicalSide, stage_depths
from cl_plugins.adapters.ladder import LadderSide, SideBlock, kept_layers, scheduled_gate
from cl_plugins.adapters.sherl import Consolidator, SherlSide, consolidate, redundancy
from cl_plugins.adapters.side_pruning import canonical_weights, fisher_importance, initialize_ladder, prune_chain
from cl_plugins.backbones import Backbone, find_backbone, vit_glyph
from cl_plugins.callbacks import (
    HierarchicalSideTuning,
    LadderSideTuning,
    LeanHierarchicalSideTuning,
    Sherl,
    SideTuning,
)
from cl_plugins.side_network import TapRecord
from cl_plugins.side_routing import TaskRouter
from cl_plugins.taps import BackboneTaps, tapping
from cl_plugins.tokens import TokenLayout, patch_grid, project, run_late
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit
from tests._side import METHODS, backward_saving_outside, clip_tower, images, saved_bytes, started

# sizes

VIT = {"Ti": (192, 3, 12), "S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24)}


@pytest.mark.parametrize(
    ("reduction", "drop", "expected"),
    [
        (4, "none", (0.469, 1.860, 7.406, 25.78)),
        (8, "none", (0.152, 0.598, 2.376, 8.171)),
        (8, "quarter", (0.116, 0.458, 1.820, 6.194)),
        (8, "half", (0.081, 0.318, 1.263, 4.217)),
        (16, "none", (0.055, 0.216, 0.857, 2.906)),
    ],
)
def test_ladder_has_the_published_size(reduction, drop, expected):
    for (dim, heads, depth), millions in zip(VIT.values(), expected, strict=True):
        with torch.device("meta"):
            side = LadderSide(dim, heads, depth, reduction=reduction, layers=kept_layers(depth, drop))
        assert sum(p.numel() for p in side.parameters()) / 1e6 == pytest.approx(
            millions, abs=6e-4 if millions < 10 else 6e-3
        )


@pytest.mark.parametrize(("dim", "expected"), [(192, 605_864), (384, 658_856), (768, 764_840)])
def test_pyramid_has_the_published_size(dim, expected):
    blocks = [nn.ModuleDict({"norm1": nn.LayerNorm(dim), "norm2": nn.LayerNorm(dim)}) for _ in range(12)]
    side = HierarchicalSide(dim, 12, blocks=blocks)
    assert sum(p.numel() for p in side.parameters()) == expected


@pytest.mark.parametrize(
    ("dim", "reduction", "millions"),
    [(768, 2, 7.39), (768, 4, 2.81), (768, 8, 1.18), (768, 16, 0.54), (384, 8, 0.297), (192, 8, 0.075)],
)
def test_consolidator_has_the_published_size(dim, reduction, millions):
    with torch.device("meta"):
        side = Consolidator(dim, dim // reduction, 12)
    assert sum(p.numel() for p in side.parameters()) / 1e6 == pytest.approx(
        millions, abs=5.5e-3 if millions > 0.3 else 6e-4
    )


# taps


@pytest.mark.parametrize("batch_first", [True, False])
def test_taps_are_the_tokens_between_the_blocks(batch_first):
    for module in (tiny_vit(depth=3).double(), clip_tower(batch_first).double()):
        x = images().double()
        found = find_backbone(module)
        with tapping(found, range(len(found.blocks) + 1)) as taps:
            module.train()
            got = module.forward_features(x) if found.kind == "timm" else module(x)
            record = taps.take()
        assert not module.training
        assert all(not t.requires_grad for t in record.taps.values())
        if found.kind == "timm":
            stream = module.norm_pre(module.patch_drop(module._pos_embed(module.patch_embed(x))))
            expected = module.norm(stream.clone())
        else:
            stream = module._embeds(x)
        for i, block in enumerate(found.blocks):
            torch.testing.assert_close(record.taps[i], stream)
            stream = (
                block(stream) if batch_first or found.kind == "timm" else block(stream.transpose(0, 1)).transpose(0, 1)
            )
        torch.testing.assert_close(record.taps[len(found.blocks)], stream)
        expected = module.norm(stream) if found.kind == "timm" else module._pool(stream)[0] @ module.proj
        torch.testing.assert_close(got, expected)
        late = run_late(found, record.taps[len(found.blocks) - 1], 1)
        torch.testing.assert_close(
            late, module.forward_head(expected, pre_logits=True) if found.kind == "timm" else expected
        )


ODD = {
    "registers and layer scale": lambda: VisionTransformer(**TINY, reg_tokens=2, init_values=0.1, qk_norm=True),
    "average of the patches": lambda: VisionTransformer(**TINY, class_token=False, global_pool="avg"),
    "norm in front": lambda: VisionTransformer(**TINY, pre_norm=True, global_pool="avg", fc_norm=False),
    "attention pooling": lambda: VisionTransformer(**TINY, global_pool="map", class_token=False),
    "relative bias": lambda: Beit(**TINY, use_abs_pos_emb=False, use_rel_pos_bias=True),
    "relative positions": lambda: VisionTransformerRelPos(**TINY),
}
TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 6}


@pytest.mark.parametrize("name", ODD)
def test_late_blocks_end_in_the_backbones_own_feature(name):
    vit = ODD[name]()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    found = find_backbone(vit)
    with tapping(found, range(5)) as taps:
        feature = vit.forward_head(vit.train().forward_features(images()), pre_logits=True)
        record = taps.take()
    for late in (1, 3):
        torch.testing.assert_close(run_late(found, record.taps[4 - late], late), feature)
    module = started(METHODS["lst"](), vit).train()
    cross_entropy(module(images()), torch.tensor([0, 1, 0])).backward()
    assert all(p.grad is None for n, p in module.named_parameters() if not n.startswith(("plugins.", "head.")))


@pytest.mark.parametrize("name", METHODS)
def test_no_tensor_of_the_backbone_is_saved_for_backward(name):
    module = started(METHODS[name](regime="shared")).train()
    backward_saving_outside(module, images())
    assert all(p.grad is None for n, p in module.named_parameters() if not n.startswith(("plugins.", "head.")))


def test_backbone_is_in_eval_mode_inside_the_training_step():
    modes = []

    class Watching(PlainModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            modes.append((self.training, self.model.training, self.model.blocks[0].training))
            return loss

    module = Watching(tiny_vit(depth=4))
    fit_stream(quiet_trainer(callbacks=[METHODS["lst"]()]), module, tiny_stream())
    assert set(modes) == {(True, False, False)}


def test_memory_ratio_of_a_ladder_to_full_fine_tuning():
    def vit():
        return vit_glyph(num_classes=10, img_size=64, embed_dim=128, depth=6, num_heads=4)

    def run(module):
        x = images(2, 64)
        cross_entropy(module(x), torch.tensor([0, 1]))
        return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), x)}

    full, ladder, sherl = vit(), vit(), vit()
    for module, method in ((ladder, LadderSideTuning(8, "none")), (sherl, Sherl(8))):
        method.install(module)
        method.start_task(module, Task(0, tuple(range(10))))
    reference = saved_bytes(lambda: run(full.train()))
    assert saved_bytes(lambda: run(ladder.train())) <= 0.22 * reference
    assert (
        saved_bytes(lambda: run(sherl.train())) <= 0.27 * reference
    )  # one of 6 blocks is late, one of 12 as published


def test_a_pass_without_the_backbone_is_told():
    class Bypass(PlainModule):
        def forward(self, x):
            return self.model.head(self.model.norm(self.model.blocks(self.model.patch_embed(x))).mean(1))

    module = started(METHODS["lst"](), Bypass(tiny_vit(depth=4)))
    with pytest.raises(RuntimeError, match="`forward_features` must run before its classifier"):
        module(images())


def test_two_adapters_cannot_take_the_same_method():
    vit = tiny_vit()
    vit.forward_features = vit.forward_features
    with pytest.raises(RuntimeError, match="another adapter replaced it"):
        BackboneTaps(find_backbone(vit)).attach()


# formulas, against small independent versions


def test_ladder_against_a_written_out_version():
    side = LadderSide(16, 2, 4, reduction=2, layers=[0, 3]).double()
    with torch.no_grad():
        side.gates["0"].fill_(0.03)
    taps = {i: torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    s = side.first(taps[0])
    for i in (0, 3):
        mu = 1 / (1 + torch.exp(-side.gates[str(i)] / 0.1))
        s = mu * s + (1 - mu) * side.down[str(i)](taps[i + 1])
        block = side.blocks[str(i)]
        q, k, v = (t.unflatten(2, (2, 4)) for t in block.attn.qkv(block.norm1(s)).split(8, 2))
        weights = torch.einsum("bqhc,bkhc->bhqk", q, k).div(2.0).softmax(-1)
        s = s + block.attn.proj(torch.einsum("bhqk,bkhc->bqhc", weights, v).flatten(2))
        s = s + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(s))))
    torch.testing.assert_close(side(TapRecord(taps), taps[0]), side.up(side.norm(s))[:, 0])


def test_gate_variants():
    taps = {i: torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    stream, step = torch.ones(1, 3, 4), None
    for gate, weight in (("one", 1.0), ("linear", 0.1), ("hyperbolic", 0.9), ("learnable", 0.5)):
        side = LadderSide(8, 2, 2, reduction=2, gate=gate)
        step = side.down["0"](taps[1])
        torch.testing.assert_close(side._fuse("0", stream, taps[1]), weight * stream + (1 - weight) * step)
    side = LadderSide(8, 2, 2, reduction=2, gate="none")
    torch.testing.assert_close(side._fuse("0", stream, taps[1]), stream + side.down["0"](taps[1]))
    side.set_epoch(3, 10)
    assert scheduled_gate("hyperbolic", 3, 10) == 0.25
    assert scheduled_gate("hyperbolic", 30, 40) == 0.1
    after = LadderSide(8, 2, 2, reduction=2, fuse="after")
    expected = 0.5 * after.blocks["0"](stream) + 0.5 * after.down["0"](taps[1])
    torch.testing.assert_close(after.layer(0, stream, taps[1]), expected)


def test_redundancy_against_loops():
    z = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    merged = consolidate(z, scores)
    for b in range(2):
        for n in range(3):
            rows = z[:, b, n]
            r = [sum(max(float(F.cosine_similarity(rows[j], rows[k], 0)), 0.0) for k in range(4)) for j in range(4)]
            torch.testing.assert_close(
                redundancy(z)[:, b, n], torch.tensor(r, dtype=torch.float64), atol=1e-5, rtol=1e-5
            )
            q = [max(float(scores[j, b, n]), 0.0) / r[j] for j in range(4)]
            expected = sum(q[j] / (sum(q) + 1e-6) * rows[j] for j in range(4))
            torch.testing.assert_close(merged[b, n], expected, atol=1e-5, rtol=1e-5)


def test_identity_start_of_sherl_is_the_frozen_model():
    vit = tiny_vit(depth=4)
    found = find_backbone(vit)
    expected = vit.eval().forward_head(vit.forward_features(images()), pre_logits=True)
    with tapping(found, range(5)) as taps:
        vit.forward_features(images())
        record = taps.take()
    side = SherlSide(found, reduction=4, late=2, gate_init="identity")
    torch.testing.assert_close(side(record, expected), expected, rtol=1e-5, atol=1e-5)
    default = SherlSide(found, reduction=4, late=2)
    tokens = default.merge([record.taps[i] for i in range(3)])
    assert not torch.allclose(tokens, record.taps[2])  # the gate is shut: nothing but the random adapter at first
    assert Consolidator(8, 4, 3, score_bias=0.5).score.bias.item() == 0.5


def test_a_narrow_feature_meets_the_first_columns_of_the_classifier():
    backbone, narrow = find_backbone(tiny_vit()), images().flatten(1)[:, :5]
    wide = project(backbone, narrow, 16, tokens=False)
    assert torch.equal(wide, torch.cat([narrow, torch.zeros(3, 11)], 1))
    with pytest.raises(ValueError, match="must take at least 5 features, the side network's width, got 4"):
        project(backbone, narrow, 4, tokens=False)


@pytest.mark.parametrize("variant", ["gated", "norm", "mlp"])
def test_variants_of_the_merge_are_options_of_the_callback(variant):
    module = started(Sherl(4, variant=variant)).train()
    side = module.plugins["side"].active
    assert side.merge.variant == variant
    cross_entropy(module(images()), torch.tensor([0, 1, 0])).backward()
    assert all(p.grad is not None for p in side.parameters())


def test_bridge_and_resize_commute():
    maps = torch.randn(2, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bridge = nn.Linear(6, 4).double()
    wide = F.interpolate(maps, size=(12, 12), mode="bilinear", align_corners=False)
    narrow = bridge(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    narrow = F.interpolate(narrow, size=(12, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(bridge(wide.permute(0, 2, 3, 1)), narrow.permute(0, 2, 3, 1))


def test_pruning_keeps_the_rows_that_matter():
    weights = {"a.weight": torch.randn(8, 3), "n.weight": torch.arange(8.0), "b.weight": torch.randn(4, 8)}
    importance = {"a.weight": torch.zeros(8, 3), "b.weight": torch.ones(4, 8)}
    importance["a.weight"][[1, 6]] = 1e-30  # a product of such numbers underflows float32
    pruned, kept = prune_chain({**weights}, [("a",), ("n",), ("b",)], 4, importance)
    assert kept[0].tolist() == [1, 6]
    assert torch.equal(pruned["a.weight"], weights["a.weight"][[1, 6]])
    assert pruned["n.weight"].tolist() == [1.0, 6.0]
    assert torch.equal(pruned["b.weight"], weights["b.weight"][kept[1]][:, [1, 6]])


@pytest.mark.parametrize("build", [lambda: tiny_vit(depth=2), clip_tower])
def test_ladder_starts_with_rows_of_the_backbone(build):
    found = find_backbone(build())
    side = LadderSide(16, 2, len(found.blocks), reduction=2, layers=[1])
    initialize_ladder(side, found, 2)
    fc2 = canonical_weights(found)["blocks.1.mlp.fc2.weight"]
    rows = side.blocks["1"].mlp.fc2.weight
    for row in rows:  # each row of the side is part of a row of the backbone
        assert any(set(row.tolist()) <= set(full.tolist()) for full in fc2)
    assert all(g.item() == 0 for g in side.gates.values())


@pytest.mark.parametrize("hidden", [58, 59, 60, 61])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_pruning_leaves_as_many_rows_as_the_ladder_has(hidden, reduction):
    vit = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=6, mlp_ratio=hidden / 16
    )
    module = started(LadderSideTuning(reduction, "none"), vit)
    fc1 = module.plugins["side"].active.blocks["0"].mlp.fc1.weight
    assert abs(len(fc1) - hidden / reduction) < 1
    assert (fc1.shape[1], len(vit.blocks[0].mlp.fc1.weight)) == (16 // reduction, hidden)


def test_fisher_information_is_the_sum_of_squared_gradients():
    layer = nn.Linear(3, 2).requires_grad_(False)
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    got = fisher_importance({"w": layer.weight}, lambda i: cross_entropy(layer(x[i : i + 1]), y[i : i + 1]), range(5))
    p = (x @ layer.weight.T + layer.bias).softmax(1) - F.one_hot(y, 2)
    expected = (p[:, :, None] * x[:, None]).square().sum(0)
    torch.testing.assert_close(got["w"], expected.double(), rtol=1e-5, atol=1e-7)
    assert not layer.weight.requires_grad
    with pytest.raises(ValueError, match="at least one batch"):
        fisher_importance({"w": layer.weight}, lambda i: i, [])


def test_router_is_the_shared_covariance_classifier():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(40)
    x = torch.randn(6, 4, generator=g)[labels] * 2 + torch.randn(240, 4, generator=g) * torch.tensor([0.1, 1, 1, 2])
    router, parts = TaskRouter(6, 4, shrinkage=0.0), TaskRouter(6, 4, shrinkage=0.0)
    router.accumulate(x, labels)
    for c in range(6):  # class by class gives the same sums
        parts.accumulate(x[labels == c], labels[labels == c])
    torch.testing.assert_close(router.factor, parts.factor)
    means = torch.stack([x[labels == c].mean(0) for c in range(6)])
    centered = x - means[labels]
    precision = torch.linalg.inv(centered.T @ centered / 240)
    d = x[:, None] - means
    expected = -0.5 * torch.einsum("ncd,de,nce->nc", d, precision, d)
    torch.testing.assert_close(router.class_scores(x), expected, rtol=1e-3, atol=1e-3)
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    p = router.log_probabilities(x, owner, 3).exp()
    torch.testing.assert_close(p, expected.softmax(1).unflatten(1, (3, 2)).sum(2), rtol=1e-3, atol=1e-3)


# bad input


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: LadderSide(16, 2, 2, reduction=3), "`reduction` must divide the width of a head, 8, got 3"),
        (lambda: LadderSide(16, 2, 2, reduction=2, layers=[2]), r"`layers` must be distinct blocks in order, 0 to 1"),
        (lambda: LadderSide(16, 2, 2, reduction=2, gate="lernable"), "did you mean 'learnable'"),
        (lambda: LadderSide(16, 2, 2, reduction=2, fuse="in"), "`fuse` must be 'before' or 'after'"),
        (lambda: LadderSide(16, 2, 2, reduction=2, temperature=0), "`temperature` must be above 0"),
        (lambda: kept_layers(2, "three-quarters"), "`drop` must leave a layer"),
        (lambda: Consolidator(8, 4, 1), "`n_taps` must be 2 or more"),
        (lambda: Consolidator(8, 4, 2, variant="gate"), "did you mean 'gated'"),
        (lambda: Consolidator(8, 4, 2, gate_init="one"), "`gate_init` must be"),
        (lambda: SherlSide(find_backbone(tiny_vit()), late=2), "`late` must leave a block for the taps, 1 to 1"),
        (lambda: SherlSide(find_backbone(tiny_vit()), reduction=5), "`reduction` must divide the backbone's width, 16"),
        (lambda: HierarchicalSide(16, 2), "`depth` must give each of the 4 stages a block"),
        (lambda: HierarchicalSide(16, 4, depths=(1, 1, 1, 2)), "`depths` must be 4 numbers that sum to 4"),
        (lambda: HierarchicalSide(16, 4, widths=(3, 4, 4, 4), heads=(2, 2, 2, 2)), "multiples of `heads`"),
        (lambda: AlphaSide(4, merge="alfa"), "did you mean 'alpha'"),
        (lambda: prune_chain({"a.weight": torch.ones(2, 2)}, [("a",)], 0.5), "`reduction` must be 1 or more"),
        (lambda: TaskRouter(2, 2, shrinkage=2.0), "`shrinkage` must be from 0 to 1"),
        (lambda: LadderSideTuning(regime="pertask"), "did you mean 'per_task'"),
        (lambda: LadderSideTuning(init="fischer"), "did you mean 'fisher'"),
        (lambda: LadderSideTuning(layers="quater"), "did you mean 'quarter'"),
        (lambda: Sherl(variant="gate"), "did you mean 'gated'"),
        (lambda: SideTuning(routing="logit"), "did you mean 'logits'"),
        (lambda: SideTuning(distill_lr=0.0), "`distill_lr` must be above 0"),
        (lambda: LeanHierarchicalSideTuning(drop_path=1.0), "`drop_path` must be"),
        (lambda: HierarchicalSideTuning(registers=0), "LeanHierarchicalSideTuning does without them"),
        (lambda: LadderSideTuning(16).install(tiny_vit(depth=4)), "`reduction` must divide the width of a head"),
        (lambda: LadderSideTuning(2, layers=[9]).install(tiny_vit(depth=4)), r"`layers` must be .* 0 to 3, got \[9\]"),
        (lambda: LeanHierarchicalSideTuning().install(tiny_vit(depth=4)), "`widths` must end with at most 16"),
        (lambda: LadderSideTuning().install(nn.Linear(2, 2)), "must hold a transformer backbone"),
        (lambda: LadderSideTuning().bank(tiny_vit()), "`install` must come first"),
        (lambda: patch_grid(5, 8, 8), "must fill a grid"),
    ],
)  # fmt: skip
def test_bad_input_is_told(call, match):
    with pytest.raises((ValueError, RuntimeError), match=match):
        call()


def test_taps_out_of_range_are_told():
    with pytest.raises(ValueError, match=r"`indices` must be taps of the backbone, 0 to 2, got \[3\]"):
        BackboneTaps(find_backbone(tiny_vit())).want([3])


def test_a_backbone_that_cannot_be_pruned_is_told():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([SideBlock(8, 2, 16)])
            self.norm = nn.LayerNorm(8)

    with pytest.raises(ValueError, match="use init='random'"):
        canonical_weights(Backbone("", Odd(), "timm", (), 8, 2))


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("cait_xxs24_224", dict.fromkeys(("lst", "random", "sherl", "lean", "hst"), "only joins")),
        ("xcit_nano_12_p16_224", dict.fromkeys(("lst", "random", "sherl", "lean", "hst"), "only joins")),
        ("eva02_tiny_patch14_224", {"lst": "use init='random'", "sherl": "hands them rope", "hst": "hands them rope"}),
        ("eva02_base_patch14_224", {"lst": "use init='random'", "sherl": "hands them rope", "hst": "hands them rope"}),
        ("vit_small_patch16_dinov3", {"sherl": "hands them rope", "hst": "hands them rope"}),
        ("vit_srelpos_small_patch16_224", {"sherl": "hands them shared_rel_pos", "hst": "hands them shared_rel_pos"}),
        ("vit_relpos_small_patch16_224", {"hst": "with relative positions"}),
        ("beit_base_patch16_224", {"hst": "with relative positions"}),
        ("vit_small_r26_s32_224", {}),
        ("deit3_small_patch16_224", {}),
    ],
)
def test_backbones_whose_tokens_do_not_fit_are_told_at_setup(name, refused):
    """Built without memory: SHERL's late blocks and HST's registers would run them with other positions, unnoticed."""
    methods = {
        "lst": LadderSideTuning(4),
        "random": LadderSideTuning(4, init="random"),
        "sherl": Sherl(4),
        "lean": LeanHierarchicalSideTuning(),
        "hst": HierarchicalSideTuning(),
        "side": SideTuning(),
    }
    with torch.device("meta"):
        found = find_backbone(timm.create_model(name, num_classes=4))
    for kind, method in methods.items():
        if kind in refused:
            with pytest.raises(ValueError, match=refused[kind]):
                method.factory(found, found.model.get_classifier())
        else:
            side = method.factory(found, found.model.get_classifier())
            assert side().needs_image == (kind in ("lean", "hst", "side"))
            assert side.keywords.get("channels", 3) == 3


def test_stage_depths_and_layouts():
    assert [sum(stage_depths(d)) for d in (4, 5, 7, 12, 24)] == [4, 5, 7, 12, 24]
    tokens = torch.arange(12.0).view(1, 4, 3)
    assert TokenLayout(1, "token").reduce(tokens).tolist() == [[0.0, 1.0, 2.0]]
    assert TokenLayout(1, "avg").reduce(tokens).tolist() == [[6.0, 7.0, 8.0]]
    reduced = TokenLayout(1, "token").reduce(tokens)
    assert reduced.untyped_storage().nbytes() == 12  # a slice would keep all tokens alive
