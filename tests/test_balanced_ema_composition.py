"""BalancedEMA beside the methods that own what it averages: the order of the callbacks changes nothing."""

from __future__ import annotations

import pytest
import torch

from cl_plugins import callbacks, fit_stream
from cl_plugins.callbacks import BalancedEMA
from tests._helpers import PlainModule, quiet_trainer, tiny_stream
from tests._regression import all_equal, weights_of


@pytest.mark.parametrize("rule", ["released", "dimension_free"])
@pytest.mark.parametrize("method", ["OVOR", "LoRA", "MoRA"])
def test_either_order_gives_the_same_weights(method, rule):
    outcomes = []
    for order in (1, -1):
        torch.manual_seed(0)
        module, ema = PlainModule(), BalancedEMA(rule)
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
    module, ema = PlainModule(), BalancedEMA(finalize=False)
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
