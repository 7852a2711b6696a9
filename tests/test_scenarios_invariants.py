"""What every kind of stream keeps to, over drawn class counts, task counts and seeds; and the page's example."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from cl_plugins.scenarios import stream_from

KINDS = ("class-incremental", "task-incremental", "few-shot", "blurry", "repetition", "online", "domain-incremental")
quick = settings(max_examples=25, deadline=None)


def build(kind, n_classes, per_class, n_tasks, order_seed, data_seed, split_seed):
    """A stream over samples whose input is their number; domains are numbered on."""
    labels = np.random.Generator(np.random.PCG64(7)).permutation(np.repeat(np.arange(n_classes), per_class))
    options = {"order_seed": order_seed, "data_seed": data_seed, "split_seed": split_seed}
    if kind == "domain-incremental":
        numbers = torch.arange(n_tasks * len(labels)).reshape(n_tasks, -1, 1)
        return stream_from([(part, labels) for part in numbers], scenario=kind, **options)
    if kind == "few-shot":
        options |= {"base_classes": n_classes - n_tasks + 1, "ways": 1, "shots": 2} if n_tasks > 1 else {}
    if kind != "few-shot" or n_tasks == 1:
        options["n_tasks"] = n_tasks
        kind = "class-incremental" if kind == "few-shot" else kind
    return stream_from((torch.arange(len(labels))[:, None], labels), scenario=kind, **options)


def contents(stream):
    """Numbers of the training samples and of the test samples of each task, in the order of iteration."""
    given_out = []
    for task in range(len(stream.tasks)):
        stream.task = task
        given_out.append([int(i) for batch in stream.train_dataloader() for i in batch[0]])
    tested = [
        [int(i) for batch in stream.test_loader(t) for i in batch[0]] for t in range(len(stream.evaluation_tasks))
    ]
    return given_out, tested


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(
    n_classes=st.integers(2, 7), per_class=st.integers(5, 9), draw=st.data(), seeds=st.tuples(*[st.integers(0, 9)] * 3)
)
def test_no_sample_is_lost_or_in_two_places_and_seeds_say_all(kind, n_classes, per_class, draw, seeds):
    shape = (kind, n_classes, per_class, draw.draw(st.integers(2, n_classes), label="tasks"))
    torch.manual_seed(draw.draw(st.integers(0, 99), label="global"))
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    stream = build(*shape, *seeds)
    train, test = contents(stream)
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    used, tested = [i for part in train for i in part], [i for part in test for i in part]
    assert len(set(used)) == len(used)
    assert len(set(tested)) == len(tested)
    assert not set(used) & set(tested)
    domains = shape[3] if kind == "domain-incremental" else 1
    if kind != "few-shot":  # shots are a choice among the samples
        assert set(used) | set(tested) == set(range(domains * n_classes * per_class))
    assert contents(build(*shape, *seeds)) == (train, test)
    other = contents(build(*shape, seeds[0], seeds[1] + 1, seeds[2]))  # another order of the same samples
    assert other[1] == test
    assert [sorted(part) for part in other[0]] == [sorted(part) for part in train]


def test_one_sample_and_one_class_a_task_train_and_are_counted():
    with pytest.warns(UserWarning, match="1 classes have no test samples: 2"):
        stream = stream_from(
            TensorDataset(torch.arange(5)[:, None], torch.tensor([0, 1, 1, 1, 2])),
            test=TensorDataset(torch.arange(2)[:, None], torch.tensor([0, 1])),
            n_tasks=3,
        )
    assert stream.classes_without_test == (2,)
    train, test = contents(stream)
    assert [sorted(part) for part in train] == [[0], [1, 2, 3], [4]]
    assert test == [[0], [1], []]


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "scenarios.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/scenarios.md", "exec"), {})
