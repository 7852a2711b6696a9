"""Finding linear layers in models of several libraries, and reaching every one of them."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle

import open_clip
import pytest
import timm
import torch
from torch import nn

from cl_plugins import Task
from cl_plugins.attach import CallCheck
from cl_plugins.backbones import vit_glyph
from cl_plugins.callbacks import LoRA, MoRA
from cl_plugins.targets import find_sites
from tests._helpers import tiny_vit

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is the optional extra `llm`"
)


def tiny_clip(seed: int = 0) -> nn.Module:
    """An open_clip model with two blocks in each tower, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CLIP(
            embed_dim=16,
            vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16),
            text_cfg=open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=2),
        ).eval()


def _images(size: int = 16, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def _texts(n: int = 4) -> torch.Tensor:
    return torch.randint(1, 49, (n, 8), generator=torch.Generator().manual_seed(2))


def fill_values(module: nn.Module, key: str = "mora", scale: float = 0.5) -> None:
    """Give all adapters values as if they had been trained."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.plugins[key].named_parameters():
        if name.endswith(("new_values", "up")):
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def _methods(**options):
    return [
        ("mora", MoRA(rank=2, temperature=0.1, threshold=0.0, seed=0, **options)),
        ("lora", LoRA(rank=2, seed=0, **options)),
    ]


def _responds(model: nn.Module, call, method, key: str, n_sites: int | None = None) -> None:
    """Identity with zero values; every adapter called; every adapter moves the output and gets gradient."""
    base_keys = set(model.state_dict())
    with torch.no_grad():
        before = call(model)
    method.install(model)
    method.start_task(model, Task(0, (0,)))
    model.eval()
    adapters = method.adapter_modules(model)
    assert n_sites is None or len(adapters) == n_sites
    check = CallCheck(adapters)
    with torch.no_grad():
        torch.testing.assert_close(call(model), before, atol=2e-6, rtol=1e-5)
    assert min(check.verify().values()) >= 1
    assert base_keys <= set(model.state_dict())
    assert all(k.startswith("plugins.") for k in set(model.state_dict()) - base_keys)

    fill_values(model, key)
    for adapter in adapters.values():
        values = [p for n, p in adapter.named_parameters() if n in ("new_values", "up")]
        kept = [p.detach().clone() for p in values]
        with torch.no_grad():
            full = call(model)
            for p in values:
                p.zero_()
            without = call(model)
            for p, k in zip(values, kept, strict=True):
                p.copy_(k)
        assert not torch.allclose(full, without, atol=1e-7, rtol=0)
    model.train()
    call(model).square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    wanted = {n for n, p in model.named_parameters() if n.startswith("plugins.") and p.requires_grad}
    assert wanted <= trained
    assert {n for n, p in model.named_parameters() if p.grad is not None} == wanted


def _both(model: nn.Module) -> torch.Tensor:
    return torch.cat([model.encode_image(_images()).flatten(), model.encode_text(_texts()).flatten()])


@pytest.mark.parametrize(("key", "method"), _methods())
def test_both_towers_of_open_clip(key, method):
    _responds(tiny_clip(), _both, method, key, n_sites=2 * 2 * 4)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("tower", ["visual.transformer", "transformer"])
def test_query_key_value_of_open_clip_each_matter(tower, part):
    model, method = tiny_clip(), MoRA(rank=2, temperature=0.1, threshold=0.0, seed=0)
    method.install(model)
    method.start_task(model, Task(0, (0,)))
    bank = method.banks(model)[f"{tower}.resblocks.0.attn.in_proj"]
    model.eval()
    with torch.no_grad():
        before = _both(model)
        bank.new_values[part] = torch.randn(bank.new_values.shape[1:], generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(_both(model), before, atol=1e-6, rtol=0)


def test_sites_and_shapes_of_open_clip():
    sites = {s.name: s for s in find_sites(tiny_clip())}
    assert len(sites) == 16
    assert sites["visual.transformer.resblocks.1.attn.in_proj"].parts == (0, 1, 2)
    assert sites["transformer.resblocks.0.mlp.c_proj"].in_features == 128
    whole = find_sites(tiny_clip(), r"transformer\.resblocks\.0\.attn")
    assert [s.name.split(".")[-1] for s in whole] == ["in_proj", "out_proj"]
    values = find_sites(tiny_clip(), ["q_proj", "v_proj"])
    assert {s.parts for s in values} == {(0, 2)}
    assert find_sites(tiny_clip(), ["attn.in_proj"], qkv_mode="fused")[0].out_features == 96


def test_a_part_of_query_key_value():
    model, method = tiny_clip(), MoRA(rank=2, targets=["q_proj", "v_proj"], temperature=0.1, threshold=0.0, head=False)
    _responds(model, _both, method, "mora", n_sites=4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_adopted_attention_equals_the_stock_one(batch_first):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    model = nn.ModuleDict({"attn": layer})
    q, kv = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    hide = torch.ones(5, 5, dtype=torch.bool).triu(1)
    # in batches of 2 when the batch comes first, of 5 otherwise
    padding = torch.zeros(2, 5, dtype=torch.bool) if batch_first else torch.zeros(5, 2, dtype=torch.bool)
    padding[0, -1] = True
    square = hide if batch_first else hide[:2, :2]
    cases = [
        ((q, q, q), {}),
        ((q, q, q), {"need_weights": False, "attn_mask": square}),
        ((q, q, q), {"attn_mask": torch.zeros_like(square, dtype=torch.float).masked_fill(square, -1e9)}),
        ((q, kv, kv), {"key_padding_mask": padding}),
        ((q, kv, kv), {"key_padding_mask": padding, "attn_mask": square, "need_weights": False}),
        ((q, kv, kv), {"average_attn_weights": False}),
        ((q, q, q), {"attn_mask": square.expand(4 * (2 if batch_first else 5), *square.shape)}),
        ((q[0], q[0], q[0]), {}),
    ]
    before = [layer(*args, **options) for args, options in cases]
    method = MoRA(rank=2, targets=["attn"], head=False)
    method.install(model)
    method.start_task(model, Task(0, (0,)))
    for (args, options), (y, weights) in zip(cases, before, strict=True):
        own, own_weights = layer(*args, **options)
        torch.testing.assert_close(own, y)
        assert (weights is None) == (own_weights is None)
        if weights is not None:
            torch.testing.assert_close(own_weights, weights)
    assert isinstance(layer, nn.MultiheadAttention)
    with pytest.raises(ValueError, match="`attn_mask` must be given"):
        layer(q, q, q, is_causal=True)
    method.adapters(model).detach()
    assert type(layer) is nn.MultiheadAttention


def test_different_query_key_and_value_use_their_own_input():
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    model = nn.ModuleDict({"attn": layer})
    method = MoRA(rank=2, targets=["attn"], head=False, temperature=0.1, threshold=0.0)
    method.install(model)
    method.start_task(model, Task(0, (0,)))
    fill_values(model)
    q = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(q, q, q)[0], layer(q, q.clone(), q.clone())[0])


SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
TIMM = {
    "vit": (tiny_vit, 8),
    "eva": (
        lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, **SMALL),
        None,
    ),
    "eva_fused_qkv": (
        lambda: timm.create_model("eva_giant_patch14_224", img_size=28, **SMALL),
        8,
    ),
    "beit": (
        lambda: timm.create_model("beit_base_patch16_224", img_size=32, **SMALL),
        8,
    ),
    "swin": (
        lambda: timm.create_model(
            "swinv2_tiny_window8_256", img_size=64, depths=(1, 1), num_heads=(1, 2), embed_dim=8, num_classes=3
        ),
        8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize(("key", "method"), _methods())
def test_timm_transformers(name, key, method):
    build, n_sites = TIMM[name]
    torch.manual_seed(0)
    model = build().eval()
    if name == "swin":  # its norms start at zero gain, which would hide every block
        for n, p in model.named_parameters():
            if ".norm" in n and n.endswith("weight"):
                nn.init.ones_(p)
    size = {"vit": 8, "swin": 64, "beit": 32}.get(name, 28)

    def features(m):  # the classifier would be trained as well
        return m.forward_features(_images(size))

    method.headless = True
    _responds(model, features, method, key, n_sites)


@pytest.mark.parametrize("mode", ["split", "fused"])
def test_qkv_modes(mode):
    sites = find_sites(vit_glyph(), ["qkv"], qkv_mode=mode)
    assert [(s.of, s.out_features) for s in sites] == [(3, 128) if mode == "split" else (1, 384)] * 6


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_transformer_encoder_takes_no_shortcut():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, -1] = True

    def call(m):
        return m(x, src_key_padding_mask=padding)[:, :-1]

    _responds(model, call, MoRA(rank=2, temperature=0.1, threshold=0.0, head=False), "mora", n_sites=8)
    model.eval()
    with torch.no_grad():
        fast = call(model)
    torch.testing.assert_close(fast, call(model.train()))


@needs_transformers
@pytest.mark.parametrize("kind", ["clip", "llama", "gpt2"])
def test_hugging_face(kind):
    import transformers as hf

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    if kind == "clip":
        text = hf.CLIPTextConfig(**small, vocab_size=32, max_position_embeddings=8, bos_token_id=0, eos_token_id=31)
        vision = hf.CLIPVisionConfig(**small, image_size=16, patch_size=8)
        towers = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
        ids[:, -1] = 31
        model = hf.CLIPModel(hf.CLIPConfig(**towers, projection_dim=8))
        call, n_sites = (lambda m: m(input_ids=ids, pixel_values=_images()).logits_per_image), 2 * 2 * 6
    elif kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**small, vocab_size=32, num_key_value_heads=1))
        call, n_sites = (lambda m: m(input_ids=ids).logits), 2 * 4
    else:
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2))
        call, n_sites = (lambda m: m(input_ids=ids).logits), 2 * 4
    model.eval()
    if kind != "clip":
        assert not MoRA().has_head(model)
    for p in model.parameters():  # initial weights of 0.02 would make most effects vanish in rounding
        if p.ndim == 2:
            p.data.mul_(4 if kind == "clip" else 10)
    _responds(model, call, MoRA(rank=2, temperature=0.1, threshold=0.0, head=False, seed=0), "mora", n_sites)
    if kind == "gpt2":
        assert model.plugins["mora"].by_site()["transformer.h.0.attn.c_attn"].groups == 3


@pytest.mark.parametrize("targets", [r"blocks\.\d+\.mlp\.fc\d", ["fc1", "mlp.fc2"]])
def test_regular_expression_and_list(targets):
    assert [s.name.split(".")[-1] for s in find_sites(tiny_vit(), targets)] == ["fc1", "fc2"] * 2


def test_a_list_matches_whole_words():
    with pytest.raises(ValueError, match="did you mean 'qkv'"):
        find_sites(tiny_vit(), ["kv"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["fc3"], r"got \['fc3'\] and no match; did you mean 'fc\d' or 'fc\d'\?.*qkv, proj, fc1, fc2, head"),
        (r"blocks\.0\.attention\.qkv", r"did you mean 'qkv' or 'blocks.0.attn.qkv'"),
        (["attn"], r"'blocks.0.attn', a Attention: it is no linear layer but holds some; name these, such as 'blocks"),
        (["norm1"], r"'blocks.0.norm1', a LayerNorm: adapters act on nn.Linear"),
        (r"patch_embed\.proj", "a Conv2d: adapters act on nn.Linear"),
    ],
)
def test_what_cannot_be_a_target(targets, message):
    model = tiny_vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        MoRA(targets=targets).install(model)
    assert dict.fromkeys(before, True) == {k: torch.equal(v, before[k]) for k, v in model.state_dict().items()}
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.MultiheadAttention(8, 2, kdim=4, vdim=4), "another width than its queries"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "keys and values of its own"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), "keys and values of its own"),
    ],
)
@pytest.mark.parametrize("targets", [["attn"], ["out_proj"]])
def test_attention_that_cannot_be_adopted(layer, message, targets):
    with pytest.raises(ValueError, match=message):
        find_sites(nn.ModuleDict({"attn": layer, "fc": nn.Linear(2, 2)}), targets)


def test_raw_projection_of_another_attention():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.zeros(12, 4))
            self.out_proj = nn.Linear(4, 4)

    model = nn.ModuleDict({"attn": Raw()})
    with pytest.raises(ValueError, match="Raw: it multiplies a raw `in_proj_weight` by itself"):
        find_sites(model, ["in_proj"])
    assert len(find_sites(model, ["out_proj"])) == 1


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match="`Sequential` must hold linear layers"):
        find_sites(nn.Sequential(nn.ReLU()), ["fc"])
    with pytest.raises(ValueError, match="`qkv_mode` must be 'split' or 'fused', got 'both'"):
        find_sites(tiny_vit(), qkv_mode="both")


@pytest.mark.parametrize("build", [tiny_clip, tiny_vit])
def test_copies_are_independent(build):
    model = build()
    method = MoRA(rank=2, temperature=0.1, head=False, seed=0)
    method.install(model)
    method.start_task(model, Task(0, (0,)))
    fill_values(model)
    call = _both if build is tiny_clip else (lambda m: m(_images(8)))
    model.eval()
    with torch.no_grad():
        expected = call(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
            assert torch.equal(call(twin), expected)
            fill_values(twin, scale=3.0)
            assert not torch.allclose(call(twin), expected)
            assert torch.equal(call(model), expected)
            twin.load_state_dict(model.state_dict())
            assert torch.equal(call(twin), expected)


def test_detached_adapters_leave_the_model_as_it_was():
    model = tiny_clip()
    with torch.no_grad():
        before = _both(model)
        method = MoRA(rank=2)
        method.install(model)
        method.start_task(model, Task(0, (0,)))
        fill_values(model)
        method.adapters(model).detach()
        assert torch.equal(_both(model.eval()), before)
    assert not any(type(m).__name__ == "AdoptedAttention" for m in model.modules())


def test_lora_and_mora_together():
    model = tiny_clip()
    for method in (LoRA(rank=2), MoRA(rank=2)):
        method.install(model)
        method.start_task(model, Task(0, (0,)))
    assert (
        len([a for m in model.modules() for a in getattr(m, "adapters", ()) if isinstance(a, tuple)]) == 2 * 2 * 2 * 2
    )
    _both(model.train()).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "new_values" in n or ".up" in n)
