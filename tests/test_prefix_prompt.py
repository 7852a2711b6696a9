"""Key and value prefixes in timm and open_clip attention."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from inspect import signature

import pytest
import timm
import torch
from open_clip.transformer import CustomResidualAttentionBlock
from open_clip.transformer import VisionTransformer as ClipTower
from timm.layers import Attention
from torch import Tensor, nn
from torch.testing import assert_close

from cl_plugins.adapters.prefix_prompt import ONE_PROMPT_LENGTHS, PrefixPrompt
from tests._helpers import tiny_vit


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def plain_prefix_attention(x: Tensor, qkv: nn.Linear, proj: nn.Linear, prompt: Tensor, heads: int) -> Tensor:
    """The formula of the paper, one head at a time."""
    dim = x.shape[-1] // heads
    half = len(prompt) // 2
    q, k, v = qkv(x).chunk(3, dim=-1)
    outputs = []
    for h in range(heads):
        part = slice(h * dim, (h + 1) * dim)
        keys = torch.cat([prompt[:half, part].expand(len(x), -1, -1), k[..., part]], 1)
        values = torch.cat([prompt[half:, part].expand(len(x), -1, -1), v[..., part]], 1)
        outputs.append(torch.softmax(q[..., part] @ keys.transpose(1, 2) / dim**0.5, -1) @ values)
    return proj(torch.cat(outputs, -1))


def clip_tower(batch_first: bool = True, **options: object) -> ClipTower:
    tower = ClipTower(image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp_ratio=2, output_dim=6, **options)
    tower.transformer.batch_first = batch_first
    for block in tower.transformer.resblocks:
        block.attn.batch_first = batch_first
    return tower.eval()


def test_attention_follows_the_formula() -> None:
    layer = Attention(16, num_heads=2, qkv_bias=True)
    block = nn.Module()
    block.attn = layer
    prompt = PrefixPrompt(16, {0: 6}).attach([block])
    x = torch.randn(3, 5, 16)
    expected = plain_prefix_attention(x, layer.qkv, layer.proj, prompt.slot(0).prompt, 2)
    assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_published_lengths_and_uniform_start() -> None:
    prompt = PrefixPrompt(768)
    assert sum(p.numel() for p in prompt.parameters()) == 107_520
    values = torch.cat([p.detach().flatten() for p in prompt.parameters()])
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert torch.equal(values, torch.cat([p.detach().flatten() for p in PrefixPrompt(768).parameters()]))
    assert not torch.equal(values, torch.cat([p.detach().flatten() for p in PrefixPrompt(768, seed=1).parameters()]))


def test_start_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    PrefixPrompt(16).attach(tiny_vit(depth=5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "layer",
    [
        partial(Attention, qkv_bias=True),
        partial(Attention, qk_norm=True, norm_layer=nn.LayerNorm),
        partial(Attention, scale_norm=True, norm_layer=nn.LayerNorm),
        partial(Attention, attn_head_dim=4),
        pytest.param(
            partial(Attention, gated=True, proj_bias=False),
            marks=pytest.mark.skipif("gated" not in signature(Attention).parameters, reason="a newer timm has gates"),
        ),
    ],
)
@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
def test_empty_prefix_computes_what_timm_computes(layer: partial[Attention], mask: str | None) -> None:
    layer, x = layer(16, num_heads=2).eval(), torch.randn(2, 5, 16)
    arguments = {
        None: {},
        "bool": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu()},
        "float": {"attn_mask": torch.randn(5, 5)},
        "causal": {"is_causal": True},
    }[mask]
    expected = layer(x, **arguments)
    block = nn.Module()
    block.attn = layer
    prompt = PrefixPrompt(layer.attn_dim, {0: 0}).attach([block])
    assert_close(layer(x, **arguments), expected)
    prompt.detach()
    assert torch.equal(layer(x, **arguments), expected)


def test_prefix_is_seen_by_every_token_under_a_causal_mask() -> None:
    block = nn.Module()
    block.attn = Attention(16, num_heads=2).eval()
    slot = PrefixPrompt(16, {0: 4}).attach([block]).slot(0)
    x = torch.randn(1, 5, 16)
    first = torch.autograd.grad(block.attn(x, is_causal=True)[0, 0].sum(), slot.prompt)[0]
    assert (first.abs().sum(1) > 0).all()


@pytest.mark.parametrize("batch_first", [True, False])
def test_open_clip_tower(batch_first: bool) -> None:
    tower = clip_tower(batch_first)
    expected, keys = tower(images()), list(tower.state_dict())
    empty = PrefixPrompt(16, {0: 0, 1: 0}).attach(tower)
    assert_close(tower(images()), expected)
    empty.detach()

    prompt = PrefixPrompt(16, {0: 4, 1: 6}).attach(tower)
    assert list(tower.state_dict()) == keys
    out = tower(images())
    assert not torch.allclose(out, expected)
    assert all((g != 0).any() for g in torch.autograd.grad(out.square().sum(), list(prompt.parameters())))
    x, layer = torch.randn(3, 5, 16), tower.transformer.resblocks[0].attn
    inputs = x if batch_first else x.transpose(0, 1)
    got = layer(inputs, inputs, inputs, need_weights=False)[0]
    qkv, proj = nn.Linear(16, 48), nn.Linear(16, 16)
    qkv.load_state_dict({"weight": layer.in_proj_weight, "bias": layer.in_proj_bias})
    proj.load_state_dict({"weight": layer.out_proj.weight, "bias": layer.out_proj.bias})
    plain = plain_prefix_attention(x, qkv, proj, prompt.slot(0).prompt, 2)
    assert_close(got if batch_first else got.transpose(0, 1), plain, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="`need_weights` must be False"):
        layer(inputs, inputs, inputs)


@pytest.mark.parametrize("kind", ["bool", "float", "per head"])
def test_open_clip_masks(kind: str) -> None:
    tower, x = clip_tower(), torch.randn(3, 5, 16)
    layer = tower.transformer.resblocks[0].attn
    mask = {
        "bool": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "float": torch.randn(5, 5),
        "per head": torch.randn(6, 5, 5),
    }[kind]
    expected = layer(x, x, x, need_weights=False, attn_mask=mask)[0]
    PrefixPrompt(16, {0: 0}).attach(tower)
    assert_close(layer(x, x, x, need_weights=False, attn_mask=mask)[0], expected)


def test_attach_twice_and_detach() -> None:
    vit = tiny_vit().eval()
    expected, keys = vit(images()), list(vit.state_dict())
    prompt = PrefixPrompt(16, {0: 4, 1: 4}).attach(vit)
    prompted = vit(images())
    prompt.attach(vit)
    assert torch.equal(vit(images()), prompted)
    assert not torch.allclose(prompted, expected)
    assert list(vit.state_dict()) == keys
    with pytest.raises(RuntimeError, match="attached to another layer; call `detach"):
        prompt.attach(tiny_vit())
    with pytest.raises(RuntimeError, match="`forward` of `attn` of block 0 is already replaced"):
        PrefixPrompt(16, {0: 4}).attach(vit)
    prompt.detach()
    assert torch.equal(vit(images()), expected)
    assert "forward" not in vars(vit.blocks[0].attn)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copier) -> None:
    vit = tiny_vit().eval()
    both = nn.ModuleDict({"vit": vit, "prompt": PrefixPrompt(16, {0: 4}).attach(vit)})
    other = copier(both)
    expected = vit(images())
    assert torch.equal(other["vit"](images()), expected)
    with torch.no_grad():
        other["prompt"].slot(0).prompt.add_(1)
    assert not torch.allclose(other["vit"](images()), expected)
    assert torch.equal(vit(images()), expected)
    other["prompt"].load_state_dict(both["prompt"].state_dict(), strict=True)
    assert torch.equal(other["vit"](images()), expected)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 cannot compile a replaced forward")
def test_compile_and_frozen_prompts() -> None:
    vit = tiny_vit().eval().requires_grad_(False)
    prompt = PrefixPrompt(16, {0: 4}).attach(vit)
    expected = vit(images())
    assert expected.requires_grad
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    assert_close(compiled(images()), expected)
    prompt.frozen = True
    assert prompt.frozen
    for model in (vit, compiled):
        assert not model(images()).requires_grad
        assert_close(model(images()), expected.detach())
    prompt.frozen = False
    assert compiled(images()).requires_grad


def test_autocast_gives_prefixes_the_dtype_of_the_keys() -> None:
    vit = tiny_vit().eval()
    PrefixPrompt(16, {0: 4}).attach(vit)
    with torch.autocast("cpu", torch.bfloat16):
        out = vit(images())
    assert_close(out.float(), vit(images()), atol=0.05, rtol=0.05)


def test_default_lengths_on_a_shallow_backbone() -> None:
    prompt = PrefixPrompt(16).attach(tiny_vit(depth=4))
    trained = [b for b in ONE_PROMPT_LENGTHS if prompt.slot(b).prompt.requires_grad]
    assert trained == [0, 1, 2, 3]


def test_bad_lengths() -> None:
    with pytest.raises(ValueError, match=r"`lengths` must be even, .* got 5 for block 0; use 6"):
        PrefixPrompt(16, {0: 5})
    with pytest.raises(ValueError, match="must be even"):
        PrefixPrompt(16, {0: -2})
    with pytest.raises(ValueError, match="block indices of 0 or more, got -1"):
        PrefixPrompt(16, {-1: 2})
    with pytest.raises(ValueError, match="`dim` must be 1 or more"):
        PrefixPrompt(0)
    with pytest.raises(ValueError, match=r"must name blocks of the model, 0 to 1, got \[2\]"):
        PrefixPrompt(16, {0: 2, 2: 2}).attach(tiny_vit())


class Sharpened(Attention):
    """The same parameters and arguments, another function."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(2 * x, attn_mask, is_causal)


def with_attention(layer: nn.Module) -> list[nn.Module]:
    block = nn.Module()
    block.attn = layer
    return [block]


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        (lambda: with_attention(Sharpened(16, num_heads=2)), "computes something else"),
        (lambda: with_attention(nn.MultiheadAttention(16, 2, add_bias_kv=True)), "keys and values of its own"),
        (lambda: with_attention(nn.MultiheadAttention(16, 2, kdim=8)), "another width"),
        (lambda: with_attention(timm.layers.AttentionRope(16, num_heads=2)), "forward takes `rope`"),
        (lambda: with_attention(timm.layers.DiffAttention(16, num_heads=2)), "also uses `lambda_k1`"),
        (lambda: [CustomResidualAttentionBlock(16, 2)], "it has no `qkv`"),
        (lambda: with_attention(Attention(32, num_heads=2)), "32 wide together, the prompt 16"),
        (lambda: [nn.Linear(2, 2)], "got a Linear without one"),
    ],
)
def test_unsuitable_attention_is_refused(blocks, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PrefixPrompt(16, {0: 2}).attach(blocks())


def test_a_refused_model_stays_as_it_was() -> None:
    blocks = [*with_attention(Attention(16, num_heads=2)), *with_attention(Sharpened(16, num_heads=2))]
    with pytest.raises(ValueError, match="block 1"):
        PrefixPrompt(16, {0: 2, 1: 2}).attach(blocks)
    assert "forward" not in vars(blocks[0].attn)
