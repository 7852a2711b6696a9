"""Class-incremental streams: what belongs to which task, whatever the sizes and seeds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from cl_plugins import fit_stream
from cl_plugins.scenarios import ClassIncremental, Cumulative, Joint, StreamData
from cl_plugins.scenarios.assignment import assign_classes
from cl_plugins.task import Stream
from tests._helpers import PlainModule, quiet_trainer, tiny_stream

quick = settings(max_examples=40, deadline=None)


def data(counts, first_label=0, step=1):
    """``counts[c]`` samples of each class, mixed; the input of a sample is its index."""
    labels = np.repeat(first_label + step * np.arange(len(counts)), counts)
    labels = np.random.Generator(np.random.PCG64(5)).permutation(labels)
    return TensorDataset(torch.arange(len(labels))[:, None], torch.from_numpy(labels))


def stream_of(train_counts, test_counts=None, **options):
    test = data(test_counts or [2] * len(train_counts))
    return ClassIncremental(data(train_counts), test=test, **options)


def samples(loader):
    """Inputs and labels of all samples of a loader."""
    batches = list(loader)
    return torch.cat([b[0] for b in batches]).flatten().tolist(), torch.cat([b[1] for b in batches]).tolist()


counts_of = st.lists(st.integers(1, 6), min_size=1, max_size=12)


@quick
@given(counts=counts_of, draw=st.data())
def test_every_class_is_in_one_task_and_no_sample_is_lost_or_in_two_splits(counts, draw):
    n_tasks = draw.draw(st.integers(1, len(counts)))
    first = draw.draw(st.none() | st.integers(1, len(counts) - n_tasks + 1)) if n_tasks > 1 else None
    stream = stream_of(
        counts,
        n_tasks=n_tasks,
        first_task_classes=first,
        order_seed=draw.draw(st.none() | st.integers(0, 5)),
        validation_fraction=draw.draw(st.sampled_from([0.0, 0.2, 0.5, 0.99])),
        batch_size=3,
    )
    assert sorted(c for t in stream.tasks for c in t.classes) == list(range(len(counts)))
    sizes = [len(t.classes) for t in stream.tasks][0 if first is None else 1 :]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    used, tested = [], []
    for task in stream.tasks:
        stream.task = task.index
        loaders = [stream.train_dataloader(), *([stream.val_dataloader()] if stream.val_dataloader() else [])]
        for loader in loaders:
            inputs, labels = samples(loader)
            assert set(labels) <= set(task.classes)
            used += inputs
        assert set(samples(stream.train_dataloader())[1]) == set(task.classes)  # validation leaves one of each
        inputs, labels = samples(stream.test_loader(task.index))
        assert set(labels) == set(task.classes)
        tested += inputs
    assert sorted(used) == list(range(sum(counts)))
    assert sorted(tested) == list(range(2 * len(counts)))


@quick
@given(order_seed=st.integers(0, 99), data_seed=st.integers(0, 99), split_seed=st.integers(0, 99))
def test_same_seeds_same_stream_and_each_seed_changes_its_own_thing_only(order_seed, data_seed, split_seed):
    def build(order, data_, split):
        torch.manual_seed(np.random.randint(1000))  # the global generators have no say
        stream = stream_of(
            [8] * 6, n_tasks=3, order_seed=order, data_seed=data_, split_seed=split, validation_fraction=0.25
        )
        first_class = stream.tasks[0].classes[0]
        held = set(stream.validation.indices.tolist())
        return stream.class_order, held, samples(stream.train_dataloader())[0], first_class

    base = build(order_seed, data_seed, split_seed)
    assert build(order_seed, data_seed, split_seed) == base
    other_data = build(order_seed, data_seed + 1, split_seed)
    assert other_data[:2] == base[:2]
    assert sorted(other_data[2]) == sorted(base[2])
    assert other_data[2] != base[2]
    other_split = build(order_seed, data_seed, split_seed + 1)
    assert other_split[0] == base[0]
    assert other_split[1] != base[1]
    orders = {build(seed, data_seed, split_seed)[0] for seed in range(order_seed, order_seed + 4)}
    assert len(orders) > 1


def test_validation_samples_do_not_depend_on_the_class_order():
    held = [
        {*stream_of([8] * 6, n_tasks=2, order_seed=seed, validation_fraction=0.25).validation.indices.tolist()}
        for seed in (None, 3)
    ]
    assert held[0] == held[1]


def test_labels_stay_the_original_ones_and_the_order_is_kept():
    train, test = data([3] * 4, first_label=10, step=5), data([2] * 4, first_label=10, step=5)
    stream = ClassIncremental((train, test), n_tasks=2, class_order=[25, 10, 20, 15])
    assert [t.classes for t in stream.tasks] == [(25, 10), (20, 15)]
    assert set(samples(stream.train_dataloader())[1]) == {25, 10}
    assert stream.n_classes == 26
    assert stream.class_order == (25, 10, 20, 15)
    assert stream.provenance()["class_order"] == [25, 10, 20, 15]
    assert stream.state_dict()["class_order"] == [25, 10, 20, 15]


def test_ten_classes_over_three_tasks_lose_none():
    stream = stream_of([2] * 10, n_tasks=3)
    assert [len(t.classes) for t in stream.tasks] == [4, 3, 3]


def test_one_seed_stands_for_order_and_data():
    stream = stream_of([4] * 6, n_tasks=3, seed=3)
    assert stream.seeds == {"order": 3, "data": 3, "split": 0}
    assert stream_of([4] * 6, n_tasks=3, seed=3, order_seed=1).seeds["order"] == 1
    assert stream_of([4] * 6, n_tasks=3, seed=3, class_order=range(6)).class_order == tuple(range(6))


def test_small_tasks_work_and_missing_test_classes_are_reported():
    with pytest.warns(UserWarning, match="1 classes have no test samples: 2"):
        stream = stream_of([1, 5, 1], [2, 2, 0], n_tasks=3, validation_fraction=0.5)
    assert stream.classes_without_test == (2,)
    assert stream.provenance()["sizes"] == {"train": [1, 3, 1], "validation": [0, 2, 0], "test": [2, 2, 0]}
    assert stream.val_dataloader() == []
    assert samples(stream.train_dataloader())[1] == [0]
    assert list(stream.test_loader(2)) == []


def test_test_samples_without_a_training_class_are_reported():
    with pytest.warns(UserWarning, match="2 of 8 test samples are left out, since no training sample has.* class: 3"):
        stream = stream_of([4, 4, 4], [2, 2, 2, 2], n_tasks=3)
    assert stream.provenance()["sizes"]["test"] == [2, 2, 2]


def test_explicit_lists_may_leave_classes_out():
    stream = stream_of([2] * 5, classes=[[4, 0], [2]])
    assert [t.classes for t in stream.tasks] == [(4, 0), (2,)]
    assert sum(stream.provenance()["sizes"]["train"]) == 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": [[0, 1], [1, 2]]}, "must name a class once, got class 1 in task 0 and task 1"),
        ({"classes": [[0, 1], []]}, "every task must have a class, got an empty list for task 1"),
        ({"classes": [[0, 9]]}, "must name labels of the data, got 9 in task 0; the 4 labels run from 0 to 3"),
        ({"classes": [0, 1]}, r"one list per task, got 0 for task 0; write \[\[0, 1\], \[2, 3\]\]"),
        ({"classes": []}, "must hold a list of labels for each task, got none"),
        ({"classes": [[0]], "order_seed": 1}, "`order_seed` must be None when `classes` is given"),
        ({"classes": [[0]], "n_tasks": 2}, "`n_tasks` must be 1, the length of `classes`, or None, got 2"),
        ({}, "`n_tasks` or `classes` must be given, got neither"),
        ({"n_tasks": 5}, "`n_tasks` must be at most 4, the number of classes, got 5"),
        ({"n_tasks": 0}, "`n_tasks` must be an integer of 1 or more, got 0"),
        ({"n_tasks": 2, "first_task_classes": 4}, "`first_task_classes` must be between 1 and 3.*got 4"),
        ({"n_tasks": 1, "first_task_classes": 3}, "`first_task_classes` must be between 4 and 4.*got 3"),
        ({"n_tasks": 2, "class_order": [0, 1, 2, 2]}, r"got 4: \[\] are not in the data, \[2\] stand twice, \[3\] are"),
        ({"n_tasks": 2, "class_order": [3, 2, 1, 0], "order_seed": 1}, "`order_seed` must be None when `class_order`"),
        ({"n_tasks": 2, "first_task_classes": 1.5}, "`first_task_classes` must be an integer of 1 or more, got 1.5"),
        ({"n_tasks": 2, "first_task_classes": True}, "`first_task_classes` must be an integer of 1 or more, got True"),
        ({"n_tasks": 2, "class_order": "abcd"}, "`class_order` must hold the labels as integers, got 'a'; text labels"),
        ({"n_tasks": 2, "validation_fraction": "0.1"}, r"`validation_fraction` must be in \[0, 1\), got '0.1'"),
        ({"n_tasks": 2, "order_seed": -1}, "`order_seed` must be an integer of 0 or more, got -1"),
        ({"n_tasks": 2, "data_seed": 0.5}, "`data_seed` must be an integer of 0 or more, got 0.5"),
        ({"n_tasks": 2, "validation_fraction": 1.0}, r"`validation_fraction` must be in \[0, 1\), got 1.0"),
        ({"n_tasks": 2, "batch_size": 0}, "`batch_size` must be an integer of 1 or more, got 0"),
        ({"n_tasks": 2, "num_workers": -1}, "`num_workers` must be an integer of 0 or more, got -1"),
        ({"n_tasks": 2, "labels": [0] * 12}, "`labels` must be a name or a function"),
    ],
)
def test_faulty_arguments_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        stream_of([3] * 4, **options)


def test_data_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="`test` must be given, got None; pass `test=` or a pair"):
        ClassIncremental(data([2, 2]), n_tasks=2)
    with pytest.raises(ValueError, match="got 'cifr100'; did you mean 'cifar100'"):
        ClassIncremental("cifr100", n_tasks=2)
    with pytest.raises(TypeError, match="`data` must be a data set with a length and items by index, got generator"):
        ClassIncremental((x for x in range(3)), test=data([2]), n_tasks=2)
    with pytest.raises(ValueError, match="`data` must hold training samples, got none"):
        ClassIncremental((data([]), data([2])), n_tasks=1)


def test_class_names_reach_the_tasks():
    source = StreamData(data([2, 2]), data([1, 1]), class_names=("ant", "bee"), n_tasks=2)
    assert [t.class_names for t in ClassIncremental(source).tasks] == [("ant",), ("bee",)]


def test_joint_trains_on_everything_and_is_evaluated_per_task():
    stream = stream_of([3, 4, 5, 6], n_tasks=2, order_seed=1, validation_fraction=0.2, batch_size=5)
    joint = Joint(stream)
    assert isinstance(joint, Stream)
    assert len(joint.tasks) == 1
    assert joint.tasks[0].classes == stream.class_order
    assert joint.evaluation_tasks == stream.tasks
    assert joint.learned_after(0) == 2
    assert sorted(samples(joint.train_dataloader())[0]) == sorted(stream.train.indices.tolist())
    assert sorted(samples(joint.val_dataloader())[0]) == sorted(stream.validation.indices.tolist())
    for i in range(2):
        assert samples(joint.test_loader(i)) == samples(stream.test_loader(i))
    assert joint.batch_size == 5
    assert joint.name == "split-tensordataset-joint"


def test_references_fill_the_columns_of_the_original_stream():
    stream = tiny_stream(3)
    joint = fit_stream(quiet_trainer(max_epochs=1), PlainModule(), Joint(stream))
    assert joint.total.tolist() == [[10, 10, 10]]
    cumulative = fit_stream(quiet_trainer(max_epochs=1), PlainModule(), Cumulative(stream))
    assert cumulative.total.tolist() == [[10, -1, -1], [10, 10, -1], [10, 10, 10]]


def test_cumulative_trains_on_all_data_so_far():
    stream = stream_of([3, 4, 5, 6], n_tasks=2)
    reference = Cumulative(stream)
    assert [t.classes for t in reference.tasks] == [(0, 1), (0, 1, 2, 3)]
    assert reference.provenance()["sizes"]["train"] == [7, 18]
    reference.task = 1
    assert sorted(samples(reference.train_dataloader())[0]) == list(range(18))
    assert samples(reference.test_loader(0)) == samples(stream.test_loader(0))
    with pytest.raises(TypeError, match="`stream` must be a TaskStream or the name of a scenario, got int"):
        Joint(3)


def test_assign_classes_covers_uneven_first_tasks():
    assert assign_classes(range(10), n_tasks=4, first_task_classes=5) == [[0, 1, 2, 3, 4], [5, 6], [7, 8], [9]]
    assert assign_classes(range(3), n_tasks=1, first_task_classes=3) == [[0, 1, 2]]


def test_a_thousand_tasks_of_a_million_samples_are_built_and_switched_quickly():
    import time

    class Big:
        def __init__(self, n):
            self.targets = np.random.Generator(np.random.PCG64(0)).integers(0, 5000, n)

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, index):
            return index, 0

    source = (Big(1_000_000), Big(100_000))
    started = time.process_time()
    stream = ClassIncremental(source, n_tasks=1000, order_seed=1)
    assert time.process_time() - started < 2  # about 0.4 s
    started = time.process_time()
    for index in range(1000):
        stream.task = index
        stream.train_dataloader()
    assert (time.process_time() - started) / 1000 < 0.01  # about 0.2 ms
    assert stream.train.indices.dtype == np.int64
    assert stream.train.indices.ndim == 1
