"""Order of samples, shares of processes, position of a loader."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from cl_plugins.scenarios import ClassIncremental
from cl_plugins.scenarios.data import TaskView
from cl_plugins.scenarios.sampler import EvenBatches, StreamLoader, TaskSampler

quick = settings(max_examples=40, deadline=None)


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, n: int) -> None:
        self.targets = [i % 3 for i in range(n)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.tensor([float(index)]), self.targets[index]


def jitter(x):
    return x + 0.1 * torch.rand(1) + 0.01 * float(np.random.rand()) + 0.001 * random.random()


def view_of(n, transform=None, seed=(0, 0)):
    return TaskView(Numbers(n), np.zeros(n, np.int64), np.arange(n), transform, seed)


def loader_of(n, batch_size=4, transform=None, workers=0, **sampler):
    view = view_of(n, transform)
    return StreamLoader(
        view, batch_size=batch_size, sampler=TaskSampler(n, seed=(0, 0), **sampler), collate_fn=view.collate,
        num_workers=workers, persistent_workers=workers > 0, generator=torch.Generator(),
    )  # fmt: skip


def flat(lists):
    return [i for part in lists for i in part]


def values(batches):
    return [batch[0].flatten().tolist() for batch in batches]


@quick
@given(n=st.integers(0, 50), world=st.integers(1, 7), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_evaluation_shares_hold_every_sample_once(n, world, epoch, shuffle):
    shares = []
    for rank in range(world):
        sampler = TaskSampler(n, seed=(1, 2) if shuffle else None, rank=rank, world_size=world)
        sampler.set_epoch(epoch)
        shares.append([i - epoch * n for i in sampler])
        assert len(sampler) == len(shares[-1])
    assert sorted(flat(shares)) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@quick
@given(n=st.integers(1, 50), world=st.integers(1, 7))
def test_training_shares_are_equally_long_and_lose_nothing(n, world):
    shares = [list(TaskSampler(n, seed=(0, 0), rank=r, world_size=world, pad=True)) for r in range(world)]
    assert len({len(s) for s in shares}) == 1
    assert set(flat(shares)) == set(range(n))
    assert len(flat(shares)) - n < max(world, 1)


@quick
@given(n=st.integers(1, 60), batch_size=st.integers(2, 9), world=st.integers(2, 5))
def test_validation_shares_have_the_same_number_of_batches(n, batch_size, world):
    shares = [list(EvenBatches(n, batch_size, rank, world)) for rank in range(world)]
    assert len({len(s) for s in shares}) == 1
    assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)
    drawn = [i for share in shares for batch in share for i in batch]
    assert set(drawn) == set(range(n))
    if n >= world:
        assert len(drawn) == n


def test_order_depends_on_data_seed_task_and_epoch_only():
    def order(seed, epoch):
        sampler = TaskSampler(30, seed=seed)
        sampler.set_epoch(epoch)
        return [i % 30 for i in sampler]

    first = order((0, 0), 0)
    torch.manual_seed(7)
    np.random.seed(7)
    assert order((0, 0), 0) == first
    assert len({tuple(o) for o in (first, order((1, 0), 0), order((0, 1), 0), order((0, 0), 1))}) == 4


@quick
@given(n=st.integers(1, 40), batch_size=st.integers(1, 7), stop=st.integers(0, 60), epochs=st.integers(1, 3))
def test_a_loader_goes_on_anywhere_bit_for_bit(n, batch_size, stop, epochs):
    def passes(loader, first):
        for epoch in range(first, epochs):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                yield epoch, batch[0].flatten().tolist()

    straight = list(passes(loader_of(n, batch_size, jitter), 0))
    stopped, state, seen = loader_of(n, batch_size, jitter), None, []
    for item in passes(stopped, 0):
        seen.append(item)
        state = stopped.state_dict()
        if len(seen) > stop:
            break
    resumed = loader_of(n, batch_size, jitter)
    resumed.load_state_dict(state)
    assert seen + list(passes(resumed, state["epoch"])) == straight


def test_a_pass_without_set_epoch_is_the_next_epoch():
    loader, named = loader_of(10), loader_of(10)
    unnamed = [values(loader) for _ in range(3)]
    told = []
    for epoch in range(3):
        named.sampler.set_epoch(epoch)
        told.append(values(named))
    assert unnamed == told
    assert unnamed[0] != unnamed[1]


def test_resume_at_the_end_of_an_epoch_goes_on_with_the_next():
    loader = loader_of(10)
    first, second = values(loader), values(loader)
    again = loader_of(10)
    assert values(again) == first
    fresh = loader_of(10)
    fresh.load_state_dict(again.state_dict())
    assert values(fresh) == second


def test_batches_prepared_ahead_by_workers_do_not_count():
    straight = values(loader_of(24, 4, jitter))
    loader = loader_of(24, 4, jitter, workers=2)
    batches = iter(loader)
    got = [next(batches)[0].flatten().tolist() for _ in range(2)]
    state = loader.state_dict()
    del batches
    assert state["batches"] == 2
    resumed = loader_of(24, 4, jitter, workers=2)
    resumed.load_state_dict(state)
    assert got + values(resumed) == straight


def test_workers_that_outlive_an_epoch_still_know_it():
    one, two = loader_of(12, 4, jitter), loader_of(12, 4, jitter, workers=1)
    for epoch in range(2):
        one.sampler.set_epoch(epoch)
        two.sampler.set_epoch(epoch)
        assert values(one) == values(two)


def test_a_state_inside_an_epoch_of_other_settings_is_refused():
    loader = loader_of(12)
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(ValueError, match="inside an epoch with batch_size 4, got 3; continue with the same value"):
        loader_of(12, batch_size=3).load_state_dict(state)
    with pytest.raises(ValueError, match="inside an epoch with samples 12, got 13"):
        loader_of(13).load_state_dict(state)
    loader_of(12, batch_size=3).load_state_dict({**state, "batches": 3})  # a whole epoch: nothing to continue


def test_augmentation_depends_on_neither_batch_size_nor_order():
    def images(numbers):
        view = view_of(9, jitter, seed=(3, 1))
        return {i % 9: float(view.__getitems__([i])[0][0]) for i in numbers}

    together = view_of(9, jitter, seed=(3, 1)).__getitems__(list(range(9, 18)))
    alone = images(range(17, 8, -1))
    assert [float(x) for x, _ in together] == [alone[i] for i in range(9)]
    other_epoch = images(range(9))
    assert all(other_epoch[i] != alone[i] for i in range(9))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_never_advance(workers):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    list(loader_of(12, 4, jitter, workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_an_unreadable_file_is_named():
    class Broken(Numbers):
        def __init__(self, n):
            super().__init__(n)
            self.samples = [("a.png", 0), ("b.png", 0)]

        def __getitem__(self, index):
            raise OSError("image file is truncated")

    view = TaskView(Broken(2), np.zeros(2, np.int64), np.arange(2))
    with pytest.raises(
        RuntimeError, match=r"sample 1 \(b.png\) must be readable, got OSError: image file is truncated"
    ):
        view[1]


@quick
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 3))
def test_shares_of_training_are_equal_and_say_what_they_repeat_or_drop(n, world, epoch):
    whole = TaskSampler(n, seed=(0, 0))
    whole.set_epoch(epoch)
    order = [k - epoch * n for k in whole]
    for options in ({"pad": True}, {"drop": True}):
        samplers = [TaskSampler(n, seed=(0, 0), rank=r, world_size=world, **options) for r in range(world)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [[k - epoch * n for k in s] for s in samplers]
        assert {len(s) for s in shares} == {len(samplers[0])}
        dealt = [share[i] for i in range(len(samplers[0])) for share in shares]
        missing = -n % world
        expected = [order[i % n] for i in range(n + missing)] if "pad" in options else order[: n - n % world]
        assert dealt == expected


@pytest.mark.parametrize(("n", "lengths"), [(7, {"repeat": 3, "drop": 2}), (2, {"repeat": 1, "drop": 1})])
def test_a_stream_repeats_or_drops_what_does_not_divide(monkeypatch, n, lengths):
    for uneven, length in lengths.items():
        data = TensorDataset(torch.zeros(n, 1), torch.arange(n) % 2)
        stream = ClassIncremental((data, data), n_tasks=1, uneven=uneven)
        monkeypatch.setattr(stream, "_share", lambda: (2, 3))
        assert len(stream.train_dataloader().sampler) == length
        assert len(stream.test_loader(0).sampler) == (2 if n == 7 else 0)  # evaluation: each sample once
    with pytest.raises(ValueError, match="`uneven` must be 'repeat' or 'drop', got 'join'"):
        ClassIncremental((data, data), n_tasks=1, uneven="join")
