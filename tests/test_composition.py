"""Callbacks beside each other: every pair works alike in both orders, or is refused before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.composition import Module, check, images, names, pairs, run, stream
from cl_plugins import callbacks, fit_stream
from cl_plugins.callbacks import (
    OVOR,
    BalancedEMA,
    CacheFeatures,
    FrozenBackbone,
    LadderSideTuning,
    LoRA,
    MoRA,
    NearestMean,
    OnePrompt,
    RanPAC,
    Sherl,
    SideTuning,
    TaskGroups,
)
from cl_plugins.composition import check_composition
from cl_plugins.plugin import ContinualCallback
from tests._helpers import quiet_trainer

REFUSED = {
    ("FrozenBackbone", "LoRA"): "the adapters freeze the backbone themselves",
    ("LadderSideTuning", "OVOR"): "no gradient past the side network",
    ("LadderSideTuning", "Sherl"): "the classifier has one input",
    ("LoRA", "MoRA"): r"both adapt 16 layers, 'model.blocks.0.attn.qkv' first",
    ("OVOR", "OnePrompt"): "both own the one prompt",
    ("NearestMean", "RanPAC"): "both compute the classifier",
    ("NearestMean", "SideTuning"): "regime='per_task' gives each task a feature of its own",
    ("MoRA", "TaskGroups"): "MoRA adds parameters with each task",
    ("CacheFeatures", "LoRA"): "features change while LoRA trains",
    ("CacheFeatures", "HierarchicalSideTuning"): "trains registers and norms",
    ("CacheFeatures", "MaskedHead"): "only be cached when everything in front of the classifier is frozen",
    ("BalancedEMA", "RanPAC"): "must hold a method that trains beside BalancedEMA, got RanPAC",
    ("LoRA", "LoRA"): "two of one kind",
}
SAMPLE = [*[p for p in pairs() if p in {tuple(sorted(r, key=names().index)) for r in REFUSED}], *pairs()[::17]]


@pytest.mark.parametrize(
    ("first", "second"),
    [pytest.param(*pair, marks=() if pair in SAMPLE else pytest.mark.slow, id="-".join(pair)) for pair in pairs()],
)
def test_pair_in_both_orders(first, second):
    outcome = check(first, second)
    expected = next((text for pair, text in REFUSED.items() if set(pair) == {first, second}), None)
    if expected is not None:
        assert outcome.refused is not None
        assert expected in outcome.refused
    elif outcome.refused is None:
        assert len(outcome.correct) == 2


def test_every_callback_is_in_the_page():
    page = (Path(__file__).parent.parent / "docs" / "composition.md").read_text(encoding="utf-8")
    missing = [n for n in names() if f"| **{n}** |" not in page]
    assert not missing, f"run: python benchmarks/composition.py docs/composition.md ({missing})"


@pytest.mark.parametrize("name", names())
def test_methods_with_adapters_say_what_they_do_to_the_feature(name):
    kind = getattr(callbacks, name)
    if kind.adapter_modules is not ContinualCallback.adapter_modules:
        assert kind.feature in ("adapted", "side"), f"`{name}.feature` must say what its adapters do to the feature"


@pytest.mark.parametrize(
    "pair",
    [
        lambda: [LoRA(2, targets=["qkv"]), MoRA(2, targets=["fc1", "fc2"])],
        lambda: [LoRA(2), OnePrompt({0: 2})],
        lambda: [LoRA(2), TaskGroups(texts=lambda t: ["sorting letters"], exclude="qkv")],
        lambda: [MoRA(2), TaskGroups(texts=lambda t: ["sorting letters"], exclude="mora")],
        lambda: [SideTuning(width=4, regime="first_session"), RanPAC(32)],
        lambda: [BalancedEMA("fixed", decay=0.5, tag="a", include="head"), BalancedEMA(tag="b", exclude="head")],
        lambda: [LadderSideTuning(2), CacheFeatures(progress=False), NearestMean(), BalancedEMA()],
    ],
)
def test_settings_make_room(pair):
    results = []
    for order in (1, -1):
        torch.manual_seed(0)
        module = Module()
        fit_stream(quiet_trainer(callbacks=pair()[::order]), module, stream())
        results.append(module.state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_refused_without_the_stream_runner_and_before_anything_is_attached():
    module, data = Module(), stream()
    with pytest.raises(ValueError, match="must not hold LadderSideTuning beside LoRA"):
        quiet_trainer(callbacks=[LoRA(), LadderSideTuning(2)]).fit(module, datamodule=data)
    assert not hasattr(module, "plugins")
    with pytest.raises(ValueError, match="must not hold LadderSideTuning beside LoRA"):
        fit_stream(quiet_trainer(callbacks=[LadderSideTuning(2), LoRA()]), module, data)
    assert not hasattr(module, "plugins")


def test_three_callbacks():
    with pytest.raises(ValueError, match="must not hold FrozenBackbone beside OVOR"):
        check_composition([BalancedEMA(), OVOR(), NearestMean(), FrozenBackbone()], Module())
    check_composition([BalancedEMA(), OVOR(), NearestMean()], Module())
    with pytest.raises(ValueError, match="Sherl"):
        check_composition([Sherl(), BalancedEMA(), LadderSideTuning()], Module())


def test_pairs_are_trained_for_real():
    outcome = run(["LoRA", "ForgettingTracker"])
    assert outcome.steps == 8  # 16 samples in batches of 8, two epochs, two tasks
    assert len(images(8, 0)) == 32
    before = Module().state_dict()
    assert torch.equal(outcome.weights["model.blocks.0.mlp.fc1.weight"], before["model.blocks.0.mlp.fc1.weight"])
    assert not torch.equal(outcome.weights["model.head.weight"], before["model.head.weight"])
