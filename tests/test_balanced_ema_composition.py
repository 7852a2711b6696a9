"""BalancedEMA beside the methods that own what it averages: the order of the callbacks changes nothing."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from cl_plugins import callbacks, fit_stream
from cl_plugins.callbacks import BalancedEMA, TaskGroups
from tests._helpers import PlainModule, quiet_trainer, tiny_stream
from tests._regression import all_equal, weights_of


@pytest.mark.parametrize("rule", ["released", "dimension_free"])
@pytest.mark.parametrize("method", ["OVOR", "LoRA", "MoRA"])
def test_either_order_gives_the_same_weights(method, rule):
    outcomes = []
    for order in (1, -1):
        torch.manual_seed(0)
        module, ema = PlainModule(), BalancedEMA(rule, active="always")
        trainer = quiet_trainer(max_epochs=3, callbacks=[getattr(callbacks, method)(), ema][::order])
        result = fit_stream(trainer, module, tiny_stream(n_per_class=32))
        outcomes.append((weights_of(module), result.correct, ema.report_events(module)))
    assert all_equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert outcomes[0][2] == outcomes[1][2]
    assert [e["task"] for e in outcomes[0][2]] == [0, 1, 2]


@pytest.mark.parametrize("method", ["OVOR", "LoRA", "MoRA"])
def test_frozen_backbones_are_not_copied(method):
    torch.manual_seed(0)
    module, ema = PlainModule(), BalancedEMA("released", finalize=False)
    before = module.model.blocks[0].mlp.fc1.weight.detach().clone()
    fit_stream(
        quiet_trainer(callbacks=[getattr(callbacks, method)(), ema], max_epochs=3),
        module,
        tiny_stream(2, n_per_class=32),
    )
    assert torch.equal(before, module.model.blocks[0].mlp.fc1.weight)
    assert not any(n.startswith("model.blocks") for n in ema.average.averager.names)
    trained = sum(a.numel() for a in ema.average.averager.averages)
    assert ema.average.averager.state_bytes() == 2 * 4 * trained


def _texts(task):
    return [("Sort the letters", "Count the vowels", "Sort the words")[task.index]]


def test_the_whole_method_with_adapters_does_not_depend_on_the_order():
    """Adapters, groups and averages, in each order: the adapters alone belong to a group, the backbone stays."""
    outcomes = []
    for order in permutations(range(3)):
        torch.manual_seed(0)
        module, groups = PlainModule(), TaskGroups(threshold=0.2, texts=_texts, exclude="head")
        frozen = module.model.blocks[0].mlp.fc1.weight.detach().clone()
        parts = [callbacks.LoRA(), groups, BalancedEMA(active="reused")]
        trainer = quiet_trainer(max_epochs=2, callbacks=[parts[i] for i in order])
        result = fit_stream(trainer, module, tiny_stream(n_per_class=32))
        assert [h["group"] for h in groups.groups.history] == [0, 1, 0]
        assert [e["task"] for e in parts[2].report_events(module)] == [2]
        assert torch.equal(frozen, module.model.blocks[0].mlp.fc1.weight)
        assert not any(n.startswith("model.blocks") for n in groups.weights[0])
        outcomes.append((weights_of(module), [w for g in groups.weights for w in g.values()], result.correct))
    for weights, stored, correct in outcomes[1:]:
        assert all_equal(weights, outcomes[0][0])
        assert all_equal(stored, outcomes[0][1])
        assert torch.equal(correct, outcomes[0][2])


def test_parameters_that_grow_cannot_belong_to_a_group():
    """A filter that does not leave them out is seen before the first step: the outcome would depend on the order."""
    module = PlainModule()
    groups = TaskGroups(texts=_texts, exclude="head")
    with pytest.raises(RuntimeError, match="`exclude` must leave out what MoRA adds with each task, got 'plugins"):
        fit_stream(quiet_trainer(callbacks=[callbacks.MoRA(), groups]), module, tiny_stream())
    assert groups.groups.history == []
