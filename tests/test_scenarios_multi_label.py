"""Multi-label streams: hidden labels, nothing lost, and what the accuracy matrix counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cl_plugins.evaluation import evaluate_tasks
from cl_plugins.scenarios import Cumulative, Joint, MultiLabel, build_scenario
from cl_plugins.scenarios.multi_label import MultiGlyphSource


class Data:
    def __init__(self, targets: np.ndarray) -> None:
        self.targets = np.asarray(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.as_tensor(self.targets[index]).float(), 0


@settings(max_examples=30, deadline=None)
@given(classes=st.integers(2, 8), n_tasks=st.integers(1, 8), seed=st.integers(0, 2**31 - 1))
def test_a_task_has_every_image_with_one_of_its_classes_and_shows_these_alone(classes, n_tasks, seed):
    n_tasks = min(n_tasks, classes)
    targets = np.random.default_rng(seed).random((40, classes)) < 0.3
    targets[np.arange(classes), np.arange(classes)] = True
    stream = MultiLabel(Data(targets), Data(targets), n_tasks, order_seed=seed % 7, batch_size=64)
    assert sorted(c for t in stream.tasks for c in t.classes) == list(range(classes))
    for task in stream.tasks:
        stream.task = task.index
        own = list(task.classes)
        others = [c for c in range(classes) if c not in own]
        inputs, shown = next(iter(stream.train_dataloader()))
        assert len(inputs) == targets[:, own].any(1).sum()
        assert torch.equal(shown[:, own], inputs[:, own])
        assert (shown[:, others] == -1).all()
        inputs, full = next(iter(stream.test_loader(task.index)))
        assert torch.equal(full, inputs)


def test_a_correct_label_is_among_the_k_highest_seen_scores():
    targets = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
    scores = torch.tensor([[4.0, 3, 2, 1], [4.0, 3, 2, 1], [1.0, 2, 3, 4]])
    stream = MultiLabel(Data(targets), Data(targets), 2)

    class Scores(nn.Module):
        def forward(self, x):
            rows = [next(i for i in range(3) if (targets[i] == r.numpy()).all()) for r in x]
            return scores[rows]

    after_first = evaluate_tasks(Scores(), stream, 0)
    assert after_first.total[0] == 2  # labels, not images: class 0 once, class 1 once
    assert after_first.correct[0] == 1  # image 1 is taken for class 0
    row = evaluate_tasks(Scores(), stream, 1)
    assert row.total == (2, 3)
    assert row.correct == (1, 2)  # image 0 asks for two: classes 0 and 1, so its class 2 is missed
    assert [sum(counts) for counts in row.confusion] == list(row.total)


def test_perfect_scores_are_all_correct_and_reversed_ones_are_not():
    stream = build_scenario("multilabel-glyphs", n_classes=6, n_tasks=3, train_images=12, test_images=30)
    data = Data(stream.test.targets.astype(np.int64))
    same = MultiLabel(data, data, 3)
    row, reverse = evaluate_tasks(nn.Identity(), same, 2), evaluate_tasks(nn.Threshold(0.5, 9.0), same, 2)
    assert row.correct == row.total
    assert sum(row.total) == data.targets.sum()
    assert sum(reverse.correct) < sum(row.total)


def test_glyph_images_are_functions_of_their_number():
    source = MultiGlyphSource([ord("a"), ord("b"), ord("c")], "train", 12)
    whole = source.read_batch(np.arange(12))
    assert whole.shape == (12, 3, 32, 32)
    assert torch.equal(whole[[5, 2]], source.read_batch(np.array([5, 2])))
    assert source.targets.any(0).all()
    assert set(source.targets.sum(1).tolist()) <= {1, 2, 3}


def test_faulty_targets_are_refused():
    good = Data(np.eye(4))
    with pytest.raises(ValueError, match="must hold 0 and 1 alone"):
        MultiLabel(Data(2 * np.eye(4)), good, 2)
    with pytest.raises(ValueError, match="one row per sample"):
        MultiLabel(Data(np.arange(4)), good, 2)
    with pytest.raises(ValueError, match="same classes in every split"):
        MultiLabel(good, Data(np.eye(3)), 2)
    with pytest.raises(ValueError, match="at most 4"):
        MultiLabel(good, good, 5)


def test_references_show_the_labels_of_all_their_classes_once_an_image():
    targets = np.random.default_rng(0).random((30, 6)) < 0.4
    targets[np.arange(6), np.arange(6)] = True
    stream = MultiLabel(Data(targets), Data(targets), 3, batch_size=64)
    joint, growing = Joint(stream), Cumulative(stream)
    inputs, shown = next(iter(joint.train_dataloader()))
    assert torch.equal(shown, inputs)
    assert joint.train.sizes() == [int(targets.any(1).sum())]
    for task in range(3):
        growing.task = task
        inputs, shown = next(iter(growing.train_dataloader()))
        so_far = 2 * (task + 1)
        assert len(inputs) == targets[:, :so_far].any(1).sum() == growing.train.sizes()[task]
        assert torch.equal(shown[:, :so_far], inputs[:, :so_far])
        assert (shown[:, so_far:] == -1).all()
    for reference in (joint, growing):
        for task in range(3):
            inputs, full = next(iter(reference.test_loader(task)))
            assert torch.equal(full, inputs)
    row = evaluate_tasks(nn.Identity(), joint, 0)
    assert row.correct == row.total
    assert (row.labels.map, row.labels.present) == (1.0, tuple(targets.sum(0)))
