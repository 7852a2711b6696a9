"""Few-shot, blurry, repeated, online and task-incremental streams."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from cl_plugins import fit_stream
from cl_plugins.scenarios import Blurry, ClassIncremental, FewShot, Joint, Repetition, TaskIncremental, build_scenario
from tests._helpers import PlainModule, quiet_trainer, tiny_stream

quick = settings(max_examples=30, deadline=None)


def pair(counts, test=2):
    def data(n_of):
        labels = np.random.Generator(np.random.PCG64(3)).permutation(np.repeat(np.arange(len(n_of)), n_of))
        return TensorDataset(torch.arange(len(labels))[:, None].float(), torch.from_numpy(labels))

    return data(counts), data([test] * len(counts))


def labels_of(stream, task):
    return stream.train.labels[stream.train.of(task)]


def assert_each_sample_once(stream, n):
    assert sorted(stream.train.indices.tolist()) == list(range(n))
    for task in stream.tasks:
        assert set(labels_of(stream, task.index).tolist()) == set(task.classes)


@quick
@given(
    counts=st.lists(st.integers(5, 12), min_size=4, max_size=12),
    base=st.integers(1, 4),
    ways=st.integers(1, 4),
    shots=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_few_shot_tasks_have_ways_and_shots(counts, base, ways, shots, seed):
    stream = FewShot(pair(counts), base, ways, shots, shot_seed=seed)
    sizes = [len(t.classes) for t in stream.tasks]
    assert sizes[0] == base
    assert sum(sizes) == len(counts)
    assert set(sizes[1:-1]) <= {ways}
    assert len(stream.train.of(0)) == sum(counts[:base])
    for task in stream.tasks[1:]:
        assert np.bincount(labels_of(stream, task.index))[list(task.classes)].tolist() == [shots] * len(task.classes)
    assert sum(stream.provenance()["sizes"]["test"]) == 2 * len(counts)


def test_shots_follow_their_own_seed():
    draws = [FewShot(pair([9] * 6), 2, 2, 3, **seeds) for seeds in ({}, {"data_seed": 5}, {"shot_seed": 1})]
    chosen = [set(s.train.indices.tolist()) for s in draws]
    assert chosen[0] == chosen[1] != chosen[2]
    ordered = FewShot(pair([9] * 6), 6, 2, 3, order_seed=1)
    assert len(ordered.tasks) == 1
    assert draws[2].provenance()["seeds"]["shot"] == 1


def test_few_shot_glyphs_have_the_published_shape():
    stream = build_scenario("fewshot-glyphs")
    assert [len(t.classes) for t in stream.tasks] == [60] + [5] * 8
    assert stream.provenance()["sizes"]["train"] == [3600] + [25] * 8
    assert stream.name == "fewshot-glyphs"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"base_classes": 7}, "`base_classes` must be at most 6, the number of classes, got 7"),
        ({"ways": 0}, "`ways` must be an integer of 1 or more, got 0"),
        ({"shots": 10}, "`shots` must be at most the samples of every later class, got 10 for class 2 with 9"),
        ({"shot_seed": -1}, "`shot_seed` must be an integer of 0 or more, got -1"),
    ],
)
def test_faulty_few_shot_arguments_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        FewShot(pair([9] * 6), **{"base_classes": 2, "ways": 2, "shots": 3, **options})


@quick
@given(
    counts=st.lists(st.integers(10, 30), min_size=4, max_size=10),
    n_tasks=st.integers(1, 4),
    disjoint=st.sampled_from([0, 50, 100]),
    blurry=st.sampled_from([0, 10, 40]),
    seed=st.integers(0, 5),
)
def test_blurry_tasks_share_the_named_part_of_the_samples(counts, n_tasks, disjoint, blurry, seed):
    stream = Blurry(pair(counts), n_tasks, disjoint, blurry, mixing_seed=seed)
    assert_each_sample_once(stream, sum(counts))
    assert sorted(c for t in stream.evaluation_tasks for c in t.classes) == list(range(len(counts)))
    own = {c: t.index for t in stream.evaluation_tasks for c in t.classes}
    away = np.zeros(len(counts), int)
    for task in range(n_tasks):
        for label in labels_of(stream, task).tolist():
            away[label] += own[label] != task
    expected = np.round(np.array(counts) * blurry / 100) if n_tasks > 1 else np.zeros(len(counts))
    n_blurred = len(counts) - round(len(counts) * disjoint / 100)
    if blurry and n_tasks > 1:
        assert (away > 0).sum() == n_blurred
    assert all(a in (0, e) for a, e in zip(away, expected, strict=True))


def test_moved_samples_are_spread_evenly_over_the_other_tasks():
    stream = Blurry(pair([300] * 5), 5, disjoint=0, blurry=40)
    for label in range(5):
        elsewhere = [int((labels_of(stream, t) == label).sum()) for t in range(5) if t != label]
        assert elsewhere == [30] * 4


def test_blurry_refuses_faulty_percentages_and_empty_tasks():
    with pytest.raises(ValueError, match="`disjoint` must be a percentage from 0 to 100, got 101"):
        Blurry(pair([3, 3]), 2, disjoint=101)
    with pytest.raises(ValueError, match="`blurry` must be a percentage from 0 to 100, got -1"):
        Blurry(pair([3, 3]), 2, blurry=-1)


@quick
@given(
    counts=st.lists(st.integers(1, 12), min_size=3, max_size=9),
    n_tasks=st.integers(1, 3),
    repeat=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 5),
)
def test_repeated_classes_divide_their_samples(counts, n_tasks, repeat, seed):
    stream = Repetition(pair(counts), n_tasks, repeat, mixing_seed=seed)
    assert_each_sample_once(stream, sum(counts))
    first = {c: t.index for t in stream.evaluation_tasks for c in t.classes}
    for task in stream.tasks:
        assert all(first[c] <= task.index for c in task.classes)
        assert set(stream.evaluation_tasks[task.index].classes) <= set(task.classes)
    if repeat == 0:
        assert stream.tasks == stream.evaluation_tasks
    with pytest.raises(ValueError, match="`repeat` must be a probability from 0 to 1, got 2"):
        Repetition(pair(counts), n_tasks, 2)


def test_mixing_has_its_own_seed():
    def mixed(**seeds):
        return Blurry(pair([20] * 6), 3, disjoint=0, blurry=30, **seeds).train.indices.tolist()

    assert mixed() == mixed(data_seed=4) != mixed(mixing_seed=4)


def test_an_online_stream_gives_every_sample_once():
    stream = build_scenario("online-glyphs")
    assert stream.single_pass
    assert stream.batch_size == 10
    loader = stream.train_dataloader()
    assert sum(len(y) for _, y in loader) == 600
    with pytest.raises(RuntimeError, match="a single-pass stream must be read once, got a second epoch"):
        next(iter(loader))
    online = tiny_stream(single_pass=True)
    with pytest.raises(
        ValueError, match=r"`max_epochs` must be 1 for 'split-tensordataset', which gives every sample once"
    ):
        fit_stream(quiet_trainer(max_epochs=2), PlainModule(), online)
    result = fit_stream(quiet_trainer(max_epochs=1), PlainModule(), tiny_stream(single_pass=True))
    assert len(result.rows) == 3
    assert Joint(online).single_pass


def test_task_incremental_is_the_same_stream_with_the_task_known():
    task_known, plain = TaskIncremental("digits", n_tasks=5, order_seed=2), ClassIncremental("digits", 5, order_seed=2)
    assert task_known.task_known
    assert not plain.task_known
    assert task_known.tasks == plain.tasks
    assert task_known.train.indices.tolist() == plain.train.indices.tolist()
    assert task_known.name == "task-digits"


@pytest.mark.parametrize("name", ["blurry-glyphs", "repetition-glyphs", "task-glyphs-100"])
def test_registered_glyph_streams_hold_all_images(name):
    stream = build_scenario(name)
    sizes = stream.provenance()["sizes"]
    assert sum(sizes["train"]) == 6000
    assert sizes["test"] == [200] * 10
    images, labels = next(iter(stream.train_dataloader()))
    assert images.shape[1:] == (3, 32, 32)
    assert set(labels.tolist()) <= set(stream.tasks[0].classes)


@pytest.mark.parametrize(
    "build",
    [
        lambda data: Blurry(data, 3, disjoint=0, blurry=20, batch_size=8),
        lambda data: Repetition(data, 3, 0.5, batch_size=8),
        lambda data: FewShot(data, 2, 2, 5, batch_size=8),
    ],
)
def test_the_runner_trains_over_them(build):
    from tests._helpers import image_data

    stream = build((image_data(16), image_data(5, seed=1)))
    result = fit_stream(quiet_trainer(max_epochs=1), PlainModule(), stream)
    assert result.total.tolist()[-1] == [10, 10, 10]
    assert result.total.tolist()[0] == [10, -1, -1]
