"""Side networks beside open_clip's text towers: the mask, the token that is read, what is saved, streams and caches."""

from __future__ import annotations

import inspect

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cl_plugins import fit_stream
from cl_plugins.adapters.alpha_side import TokenSide
from cl_plugins.adapters.ladder import LadderSide
from cl_plugins.adapters.sherl import SherlSide
from cl_plugins.adapters.side_pruning import canonical_weights, initialize_ladder
from cl_plugins.backbones import find_backbone
from cl_plugins.callbacks import (
    CacheFeatures,
    FrozenBackbone,
    HierarchicalSideTuning,
    LadderSideTuning,
    LeanHierarchicalSideTuning,
    NearestMean,
    RanPAC,
)
from cl_plugins.scenarios import ClassIncremental
from cl_plugins.side_network import TapRecord
from cl_plugins.taps import tapping
from cl_plugins.tokens import TokenLayout, run_late, text_position
from tests._helpers import PlainModule, quiet_trainer
from tests._side import METHODS, PYRAMID, backward_saving_outside, started

SIZES = {"width": 16, "heads": 2, "layers": 4}
TEXT = {name: METHODS[name] for name in ("lst", "sherl", "side-tuning")}
END = 19


def text_tower(**options) -> TextTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = TextTransformer(**{"context_length": 8, "vocab_size": 20, "output_dim": 12, **SIZES, **options})
        for parameter in tower.parameters():
            nn.init.normal_(parameter, std=0.3)
    return tower


class TextModule(nn.Module):
    def __init__(self, tower: TextTransformer | None = None, classes: int = 6) -> None:
        super().__init__()
        self.tower = text_tower() if tower is None else tower
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.classifier = nn.Linear(12 if self.tower.output_dim else 16, classes)

    def forward(self, ids):
        return self.classifier(self.tower(ids))


def texts(n: int = 3, seed: int = 0) -> torch.Tensor:
    """Token ids ``(n, 8)`` that end at different positions, with zeros behind."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, END, (n, 8), generator=generator)
    ends = torch.arange(n) % 5 + 2
    ids[torch.arange(n), ends] = END
    return ids * (torch.arange(8) <= ends[:, None])


def text_stream(**options) -> ClassIncremental:
    """Six classes, each with a token of its own in the text."""

    def data(n, seed):
        ids, labels = texts(6 * n, seed), torch.arange(6).repeat_interleave(n)
        ids[:, 0] = ids[:, 1] = labels + 1
        return TensorDataset(ids, labels)

    return ClassIncremental(
        data(16, 0), test=data(5, 1), n_tasks=3, **{"batch_size": 8, "eval_batch_size": 7, **options}
    )


EOS = "eos_id" in inspect.signature(TextTransformer).parameters  # not in open_clip 3.0
POOLS = [{}, {"pool_type": "last", "no_causal_mask": True}, {"pool_type": "first"}]
POOLS += [{"pool_type": "eos", "eos_id": END}] if EOS else []


@pytest.mark.parametrize("options", [*POOLS, {"output_dim": None}, {"proj_type": "linear", "proj_bias": True}])
def test_taps_and_late_blocks_follow_the_tower(options):
    tower = text_tower(**options).double()
    found = find_backbone(tower, text=True)
    ids = texts()
    with tapping(found, range(5)) as taps:
        got = tower.train()(ids)
        record = taps.take()
    assert not tower.training
    assert not got.requires_grad
    torch.testing.assert_close(got, tower(ids).detach())
    stream = tower.token_embedding(ids) + tower.positional_embedding
    for i, block in enumerate(found.blocks):
        torch.testing.assert_close(record.taps[i], stream.detach())
        assert not record.taps[i].requires_grad
        stream = block(stream, attn_mask=tower.attn_mask)
    for late in (1, 3):
        torch.testing.assert_close(run_late(found, record.taps[4 - late], late, record.position), got)
    if not options:
        assert record.position.tolist() == [2, 3, 4]
        assert record.causal


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1]),
        ({"pool_type": "first"}, [0, 0]),
        ({"pool_type": "last"}, [3, 3]),
        *([({"pool_type": "eos", "eos_id": 5}, [2, 0])] if EOS else []),
    ],
)
def test_the_token_that_is_read_is_the_towers_own(options, expected):
    tower, ids = text_tower(context_length=4, **options), torch.tensor([[3, 9, 5, 0], [5, 9, 2, 0]])
    found = find_backbone(tower, text=True)
    assert text_position(found, ids).tolist() == expected
    with tapping(found, range(5)) as taps:
        got = tower.train()(ids)
        record = taps.take()
    torch.testing.assert_close(run_late(found, record.taps[3], 1, record.position), got)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("options", POOLS, ids=lambda o: o.get("pool_type", "argmax"))
def test_no_tensor_of_the_tower_is_saved_and_the_side_network_learns(name, options):
    module = started(TEXT[name](regime="shared"), TextModule(text_tower(**options))).train()
    backward_saving_outside(module, texts())
    assert all(p.grad is None for p in module.tower.parameters())


@pytest.mark.parametrize("name", TEXT)
def test_what_stands_behind_the_end_of_the_text_has_no_effect(name):
    module = started(TEXT[name](regime="shared"), TextModule()).eval()
    ids = texts(5)
    other = torch.where(torch.arange(8) > ids.argmax(1)[:, None], 7, ids)
    assert not torch.equal(ids, other)
    with torch.no_grad():
        torch.testing.assert_close(module(other), module(ids))
        changed = ids.clone()
        changed[:, 0] = changed[:, 0] % (END - 1) + 1
        assert not torch.allclose(module(changed)[:, :2], module(ids)[:, :2])


@pytest.mark.parametrize("fuse", ["before", "after"])
def test_ladder_against_a_written_out_causal_version(fuse):
    side = LadderSide(16, 2, 4, reduction=2, layers=[0, 3], fuse=fuse, layout=TokenLayout(0, "text")).double()
    generator = torch.Generator().manual_seed(0)
    taps = {i: torch.randn(3, 8, 16, dtype=torch.float64, generator=generator) for i in range(5)}
    position = torch.tensor([2, 7, 0])
    got = side(TapRecord(taps, position=position, causal=True), torch.zeros(0))
    for sample, end in enumerate(position.tolist()):  # alone, cut off behind the token that is read
        s = side.first(taps[0][sample, : end + 1])
        for i in (0, 3):
            down, block = side.down[str(i)](taps[i + 1][sample, : end + 1]), side.blocks[str(i)]
            s = 0.5 * (s + down) if fuse == "before" else s
            rows = []
            for t in range(end + 1):
                q, k, v = (p.unflatten(1, (2, 4)) for p in block.attn.qkv(block.norm1(s[: t + 1])).split(8, 1))
                weights = torch.einsum("hc,khc->hk", q[t], k).div(2.0).softmax(-1)
                rows.append(torch.einsum("hk,khc->hc", weights, v).flatten())
            s = s + block.attn.proj(torch.stack(rows))
            s = s + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(s))))
            s = 0.5 * (s + down) if fuse == "after" else s
        torch.testing.assert_close(got[sample], side.up(side.norm(s[end])))


def test_identity_start_of_sherl_is_the_frozen_tower():
    tower = text_tower()
    found, ids = find_backbone(tower, text=True), texts()
    expected = tower.eval()(ids).detach()
    with tapping(found, range(5)) as taps:
        tower(ids)
        record = taps.take()
    side = SherlSide(found, reduction=4, late=2, gate_init="identity")
    torch.testing.assert_close(side(record, expected), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(SherlSide(found, reduction=4, late=2)(record, expected), expected)


def test_ladder_starts_with_rows_of_the_tower():
    found = find_backbone(text_tower(), text=True)
    weights = canonical_weights(found)
    assert weights["patch_embed.weight"].shape == (16, 20)
    side = LadderSide(16, 2, 4, reduction=2, layers=[1], layout=TokenLayout(0, "text"))
    initialize_ladder(side, found, 2)
    for row in side.blocks["1"].mlp.fc2.weight:
        assert any(set(row.tolist()) <= set(full.tolist()) for full in weights["blocks.1.mlp.fc2.weight"])
    assert set(side.norm.weight.tolist()) <= set(found.model.ln_final.weight.tolist())


def test_a_token_network_reads_order_and_stops_at_the_end():
    side = TokenSide(4, 20, width=8).double()
    ids, last = torch.tensor([[3, 5, END, 0, 0]]), torch.tensor([2])
    longer = torch.tensor([[3, 5, END, 0, 0, 0, 0]])
    torch.testing.assert_close(side(ids, last), side(longer, last))
    torch.testing.assert_close(side(ids, last), side(ids[:, :3]))
    assert not torch.allclose(side(ids, last), side(torch.tensor([[5, 3, END, 0, 0]]), last))


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("joint", [False, True])
def test_the_text_tower_of_a_whole_clip(name, joint):
    vision = CLIPVisionCfg(image_size=8, patch_size=4, layers=4, width=16, head_width=8)
    config = CLIPTextCfg(context_length=8, vocab_size=20, **SIZES)

    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = (CLIP if joint else CustomTextCLIP)(12, vision, config)
            self.classifier = nn.Linear(12, 6)

        def forward(self, ids):
            return self.classifier(self.clip.encode_text(ids, normalize=True))

    module = started(
        TEXT[name](regime="per_task", backbone="clip" if joint else "clip.text", head="classifier"), Texts()
    )
    cross_entropy(module.train()(texts()), torch.tensor([0, 1, 0])).backward()
    assert all(p.grad is None for p in module.clip.parameters())
    own = module.plugins["side"].active.named_parameters()
    assert all(p.grad is not None for n, p in own if p.numel() > 1)
    unnamed = TEXT[name](head="classifier")
    unnamed.install(other := Texts())
    assert other.plugins["taps"].backbone.name == "clip.visual"  # the vision tower, unless the text tower is named


@pytest.mark.parametrize("name", TEXT)
def test_a_stream_of_texts_with_and_without_the_cache(name):
    states, passed = [], []
    for cache in ([], [CacheFeatures(progress=False)]):
        module, counts = PlainModule(TextModule()), []
        options = {"init": "fisher", "fisher_samples": 8} if name == "lst" else {}
        module.model.tower.transformer.resblocks[0].register_forward_hook(lambda *a, c=counts: c.append(len(a[1][0])))
        callbacks = [TEXT[name](regime="per_task", **options), *cache]
        result = fit_stream(quiet_trainer(callbacks=callbacks, max_epochs=4), module, text_stream())
        assert result.average_accuracy > 0.5
        states.append(module.state_dict())
        passed.append(sum(counts))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)
    assert passed[1] < 0.5 * passed[0]


@pytest.mark.parametrize("name", TEXT)
def test_training_with_bf16_mixed(name):
    module = started(TEXT[name](regime="shared"), TextModule()).train()
    expected = module(texts())[:, :2]
    with torch.autocast("cpu", torch.bfloat16):
        got = module(texts())[:, :2]
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)
    module = PlainModule(TextModule())
    callbacks = [TEXT[name](regime="per_task"), CacheFeatures(progress=False, dtype="bfloat16")]
    fit_stream(quiet_trainer(callbacks=callbacks, precision="bf16-mixed"), module, text_stream())
    assert all(p.isfinite().all() for p in module.parameters())
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_baselines_beside_it_take_text_towers():
    results = []
    for cache in ([], [CacheFeatures(progress=False)]):
        trainer = quiet_trainer(callbacks=[FrozenBackbone(), *cache], max_epochs=4)
        results.append(fit_stream(trainer, PlainModule(TextModule(), lr=0.05), text_stream()))
    assert torch.equal(results[0].correct, results[1].correct)
    assert results[0].average_accuracy > 0.25
    callbacks = [LadderSideTuning(2, "none", regime="first_session"), RanPAC(64, beside=True)]
    result = fit_stream(quiet_trainer(callbacks=callbacks), module := PlainModule(TextModule()), text_stream())
    assert module.plugins["ranpac"].dim == 24  # the tower's feature and the side network's
    assert result.average_accuracy > 0.4
    result = fit_stream(quiet_trainer(callbacks=[NearestMean()]), PlainModule(TextModule()), text_stream())
    assert result.average_accuracy > 0.4


def test_what_is_no_plain_text_tower_is_refused():
    method = LadderSideTuning(2, "none")
    with pytest.raises(ValueError, match="one mask for all texts, got one with a class token"):
        method.install(TextModule(text_tower(embed_cls=True)))
    with pytest.raises(ValueError, match="one mask for all texts"):
        method.install(TextModule(text_tower(no_causal_mask=True, use_pad_mask=True)))
    windowed = text_tower()
    windowed.attn_mask[:, 0] = -torch.inf
    with pytest.raises(ValueError, match="must be causal, got another"):
        method.install(TextModule(windowed))
    with pytest.raises(ValueError, match="must give one feature, read at one token, got pool_type='none'"):
        method.install(TextModule(text_tower(pool_type="none")))
    with pytest.raises(ValueError, match="output_tokens=True"):
        method.install(TextModule(text_tower(output_tokens=True)))
    for pyramid in (HierarchicalSideTuning(**PYRAMID), LeanHierarchicalSideTuning(**PYRAMID)):
        with pytest.raises(ValueError, match=r"must read images for .*HierarchicalSideTuning, .* got a text tower"):
            pyramid.install(TextModule())
