"""``fit_stream(evaluate_old=...)``: some old tasks are evaluated at task ends, and all after the last."""

import pytest
import torch

from cl_plugins import fit_stream
from cl_plugins.callbacks import MaskedHead
from cl_plugins.evaluation import drawn_columns
from cl_plugins.scenarios import build_scenario
from tests._helpers import PlainModule, quiet_trainer, tiny_stream


def test_some_old_tasks_are_drawn_at_task_ends_and_all_after_the_last():
    def run(**options):
        stream = tiny_stream(n_tasks=6)
        return fit_stream(quiet_trainer(max_epochs=1, callbacks=[MaskedHead()]), PlainModule(), stream, **options)

    everything, drawn = run(), run(evaluate_old=2, seed=0)
    assert run(evaluate_old=9).correct.tolist() == everything.correct.tolist()
    cells = drawn.correct
    assert [(row >= 0).sum().item() for row in cells] == [1, 2, 3, 3, 3, 6]
    assert all(cells[i, i] >= 0 for i in range(6))
    assert torch.equal(cells[cells >= 0], everything.correct[cells >= 0])  # what is drawn is what was there
    for name in ("average_accuracy", "learning_accuracy", "backward_transfer"):
        assert getattr(drawn, name) == getattr(everything, name), name
    assert drawn.metrics()["forgetting"] is None
    assert drawn.metrics()["average_incremental_accuracy"] is None
    assert run(evaluate_old=2, seed=0).correct.tolist() == cells.tolist()


def test_the_seed_draws_the_old_tasks_and_any_can_be_drawn():
    stream = tiny_stream(n_tasks=6)
    draws = {tuple(drawn_columns(stream, 4, 2, seed)) for seed in range(60)}
    assert draws == {(a, b, 4) for a in range(4) for b in range(a + 1, 4)}
    assert drawn_columns(stream, 0, 2, 0) == [0]
    labels = build_scenario("multilabel-glyphs", n_classes=4, n_tasks=2, train_images=8, test_images=4)
    with pytest.raises(ValueError, match="`evaluate_old` must be None on a multi-label stream"):
        fit_stream(quiet_trainer(callbacks=[MaskedHead()]), PlainModule(), labels, evaluate_old=2)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_the_number_of_old_tasks_is_checked_before_training(count):
    with pytest.raises(ValueError, match="`evaluate_old` must be an integer of 1 or more"):
        fit_stream(quiet_trainer(callbacks=[MaskedHead()]), PlainModule(), tiny_stream(), evaluate_old=count)
