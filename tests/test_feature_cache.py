"""The cache of a frozen backbone's features and taps: what it gives, what it refuses, what survives a kill."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from cl_plugins import _cache_files
from cl_plugins._cache_files import EntryFile
from cl_plugins.cache_entry import CacheEntry
from cl_plugins.feature_cache import CacheKey, FeatureCache, tensor_digest

KEY = CacheKey("train-0", weights="w", transform="t", arrays=("feature", "tap.1"))


def rows(n=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"feature": torch.randn(n, 4, generator=g), "tap.1": torch.randn(n, 3, 4, generator=g)}, torch.arange(n)


def batches(n=10, size=4):
    arrays, labels = rows(n)
    for i in range(0, n, size):
        yield {k: v[i : i + size] for k, v in arrays.items()}, labels[i : i + size]


def check(entry, n=10, tolerance=0.0):
    arrays, labels = rows(n)
    assert torch.equal(entry.labels, labels)
    for chosen in (
        torch.tensor([7, 0, 3, 3]),
        torch.arange(2, 6),
        torch.arange(n),
        torch.tensor([], dtype=torch.int64),
    ):
        got = entry.read(chosen)
        for name, full in arrays.items():
            assert got[name].dtype == full.dtype
            torch.testing.assert_close(got[name], full[chosen], rtol=0, atol=tolerance)


# entries


@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_filled_is_read(tmp_path, budget, on_disk):
    cache = FeatureCache(tmp_path if on_disk else None, byte_budget=budget)
    assert cache.open(KEY) is None
    entry = cache.fill(KEY, batches(), 10)
    assert entry.in_memory == (budget > 0)
    assert cache.bytes_in_memory == (entry.nbytes if budget else 0)
    check(entry)
    assert cache.open(KEY) is entry
    if on_disk:
        again = FeatureCache(tmp_path, byte_budget=budget).open(KEY)
        check(again)
        assert sorted(p.suffix for p in tmp_path.iterdir()) == [".bin", ".json"]
    cache.drop(KEY)
    assert cache.open(KEY) is None
    assert not any(tmp_path.iterdir())
    cache.close()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 0.0)])
def test_stored_dtype_is_turned_back(tmp_path, dtype, tolerance):
    for folder in (None, tmp_path):
        cache = FeatureCache(folder, dtype=dtype, byte_budget=0 if folder else 1 << 20)
        entry = cache.fill(KEY, batches(), 10)
        assert entry.arrays["feature"].dtype == dtype
        check(entry, tolerance=tolerance)


def test_reading_is_one_call_an_array_and_neighbors_are_views():
    entry = FeatureCache().fill(KEY, batches(), 10)
    together = entry.read(torch.arange(3, 7))["tap.1"]
    assert together.untyped_storage().data_ptr() == entry.arrays["tap.1"].untyped_storage().data_ptr()
    calls = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    def count(n):
        calls.clear()
        with Count():
            entry.read(torch.arange(10).flip(0)[:n])
        return len(calls)

    count(9)  # takes new memory
    assert 0 < count(2) == count(9) <= 25  # of two arrays: nothing is done sample by sample


def test_memory_of_a_batch_is_used_again_once_nobody_holds_it():
    entry, order = FeatureCache().fill(KEY, batches(), 10), torch.tensor([7, 0, 3])
    arrays = rows()[0]

    def pointer(tensor):
        return tensor.untyped_storage().data_ptr()

    first = entry.read(order)["tap.1"]
    second = entry.read(order + 1)["tap.1"]
    torch.testing.assert_close(first, arrays["tap.1"][order])  # still held, so it was not written over
    assert pointer(first) != pointer(second)
    view = second[:, 0].numpy()
    del second
    third = entry.read(order + 2)["tap.1"]  # the array outside torch holds it as well
    torch.testing.assert_close(torch.from_numpy(view), arrays["tap.1"][order + 1, 0])
    weight = torch.ones(4, requires_grad=True)
    loss = (third * weight).sum()
    del third
    with torch.inference_mode():
        entry.read(order)
    loss.backward()  # autograd held it
    torch.testing.assert_close(weight.grad, arrays["tap.1"][order + 2].sum((0, 1)))
    del loss, view
    where = pointer(entry.read(order)["tap.1"])
    assert pointer(entry.read(order)["tap.1"]) == where


def pointers(read):
    return {t.untyped_storage().data_ptr() for t in read.values()}


def test_two_batches_held_in_turn_take_no_new_memory():
    entry, order = FeatureCache().fill(KEY, batches(), 10), torch.tensor([7, 0, 3])
    held = entry.read(order)
    seen = pointers(held)
    for step in range(6):
        held = entry.read((order + step) % 10)  # the last batch is held until this one is there
        seen |= pointers(held)
        torch.testing.assert_close(held["tap.1"], rows()[0]["tap.1"][(order + step) % 10])
    assert len(seen) == 4  # two for each of two arrays


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_smaller_last_batch_is_read_into_the_same_memory(dtype):
    entry = FeatureCache(dtype=dtype).fill(KEY, batches(), 10)
    order = torch.tensor([7, 0, 3, 9, 1, 2, 8, 5, 4, 6])
    before = pointers(entry.read(order[:4]))
    for chosen in (order[8:], order[4:8], order[4:5].repeat(3), order[:4]):
        found = entry.read(chosen)
        assert pointers(found) == before
        assert all(t.is_contiguous() and t.dtype == torch.float32 for t in found.values())
        torch.testing.assert_close(found["tap.1"], rows()[0]["tap.1"][chosen], rtol=0, atol=2e-3 if dtype else 0)
        del found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 30_000, 40_000])  # many rows a piece, few, and rows that are copied as they stand
def test_rows_of_any_size_are_converted(dtype, size):
    values = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    cache, order = FeatureCache(dtype=dtype), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    entry = cache.fill(replace(KEY, dtype=cache.dtype_name), [({"feature": values}, torch.zeros(40).long())], 40)
    held = [(part, entry.read(part)["feature"]) for part in (order, order[:33], order[:0], order[39:])]
    for part, found in held:
        assert torch.equal(found, values[part].to(dtype).float())


def test_converted_neighbors_do_not_overwrite_what_is_held():
    entry = FeatureCache(dtype=torch.float16).fill(KEY, batches(), 10)
    first, second, third = (entry.read(torch.arange(i, i + 3))["tap.1"] for i in range(3))
    for i, found in enumerate((first, second, third)):
        torch.testing.assert_close(found, rows()[0]["tap.1"][i : i + 3], rtol=0, atol=2e-3)


def test_the_budget_is_shared_by_entries():
    one = sum(v.numel() * 4 for v in rows()[0].values())
    cache = FeatureCache(byte_budget=int(1.5 * one))
    first = cache.fill(KEY, batches(), 10)
    second = cache.fill(CacheKey("train-1"), batches(), 10)
    assert (first.in_memory, second.in_memory) == (True, False)
    check(second)
    folder = cache._temporary
    cache.release(CacheKey("train-1"))
    assert not any(folder.iterdir())
    cache.close()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weights": "other"}, "stale: `weights` is 'w' there and 'other' here"),
        ({"transform": "other"}, "stale: `transform`"),
        ({"dtype": "float16"}, "stale: `dtype`"),
        ({"arrays": ("feature",)}, "stale: `arrays`"),
    ],
)
def test_stale_entries_are_refused(tmp_path, change, match):
    from dataclasses import replace

    cache = FeatureCache(tmp_path)
    cache.fill(KEY, batches(), 10)
    for reader in (cache, FeatureCache(tmp_path)):
        with pytest.raises(ValueError, match=match):
            reader.open(replace(KEY, **change))
    assert cache.open(replace(KEY, split="test-0")) is None
    assert cache.open(replace(KEY, view=1)) is None


def test_damage_is_refused(tmp_path):
    FeatureCache(tmp_path).fill(KEY, batches(), 10)
    data = next(tmp_path.glob("*.bin"))
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match="another checksum"):
        FeatureCache(tmp_path).open(KEY)
    assert FeatureCache(tmp_path, verify=False).open(KEY) is not None
    data.write_bytes(content[:100])
    with pytest.raises(ValueError, match="missing or short"):
        FeatureCache(tmp_path).open(KEY)
    next(tmp_path.glob("*.json")).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        FeatureCache(tmp_path).open(KEY)


def test_a_faulty_number_of_rows_leaves_nothing(tmp_path):
    for n in (9, 11):
        with pytest.raises(ValueError, match=f"`batches` must hold {n} rows"):
            FeatureCache(tmp_path).fill(KEY, batches(), n)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device; free the disk, give another folder") as raised:
        FeatureCache(tmp_path).fill(KEY, batches(), 10)
    assert raised.value.errno == errno.ENOSPC
    assert not any(tmp_path.iterdir())


def test_a_file_system_that_takes_no_more_is_told_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    FeatureCache(tmp_path).fill(KEY, batches(), 10)
    other = CacheKey("other", arrays=KEY.arrays)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the system itself refuses to write on
    try:
        with pytest.raises(OSError, match="free the disk, give another folder") as raised:
            FeatureCache(tmp_path).fill(other, batches(), 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert not list(tmp_path.glob("other*"))
    assert len(FeatureCache(tmp_path).open(KEY)) == 10  # entries from before are whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_rows_of_any_dtype_are_copied_bit_by_bit(dtype):
    array = torch.arange(60).view(5, 3, 4).to(dtype)
    for values in (array, array[:, 0, 0].contiguous()):
        entry = CacheEntry({"a": values}, {"a": dtype}, torch.zeros(5, dtype=torch.int64), True)
        assert torch.equal(entry.read(torch.tensor([4, 0, 0, 2]))["a"], values[[4, 0, 0, 2]])
        for bad in ([5, 0], [-1, 3]):
            with pytest.raises(IndexError, match="`rows` must be from 0 to 4"):
                entry.read(torch.tensor(bad))


def test_a_new_fill_replaces_an_entry_only_when_it_is_complete(tmp_path):
    FeatureCache(tmp_path).fill(KEY, batches(), 10)

    def breaks():
        yield from list(batches())[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path).fill(KEY, breaks(), 10)
    check(FeatureCache(tmp_path).open(KEY))
    assert len(list(tmp_path.iterdir())) == 2
    FeatureCache(tmp_path).fill(KEY, batches(), 10)
    assert len(list(tmp_path.iterdir())) == 2


_FILLER = """
import sys, time, torch
from cl_plugins.feature_cache import FeatureCache
from tests.test_feature_cache import KEY, batches
def slow():
    for batch in batches():
        yield batch
        print("row", flush=True)
        time.sleep(0.3)
FeatureCache(sys.argv[1]).fill(KEY, slow(), 10)
"""


@pytest.mark.parametrize("before", [False, True])
def test_a_kill_while_filling_leaves_the_old_entry_or_none(tmp_path, before):
    if before:
        FeatureCache(tmp_path).fill(KEY, batches(), 10)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", _FILLER, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    process.stdout.readline()
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(p.suffix == ".tmp" for p in tmp_path.iterdir())
    entry = FeatureCache(tmp_path).open(KEY)
    assert (entry is not None) == before
    if before:
        check(entry)
    check(FeatureCache(tmp_path).fill(KEY, batches(), 10))
    assert len(list(tmp_path.iterdir())) == 2  # what the killed process left is gone


_RACER = """
import sys
from cl_plugins.feature_cache import FeatureCache
from tests.test_feature_cache import KEY, batches, check
for _ in range(40):
    check(FeatureCache(sys.argv[1], byte_budget=0).fill(KEY, batches(), 10))
    check(FeatureCache(sys.argv[1], byte_budget=0).open(KEY))
"""


def test_two_processes_that_fill_one_folder_leave_it_whole(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", _RACER, str(tmp_path)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) for _ in range(2)]
    failures = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], failures
    check(FeatureCache(tmp_path).open(KEY))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".bin", ".json"]


@pytest.mark.parametrize("change", [{}, {"weights": "other"}])
def test_of_two_runs_at_once_the_first_entry_of_a_key_stays(tmp_path, change):
    arrays, labels = rows()
    first, second = (EntryFile(10, arrays, {}, tmp_path, KEY.name) for _ in range(2))
    first.write(0, arrays)
    first.finish(asdict(KEY), labels)
    reader = FeatureCache(tmp_path, byte_budget=0).open(KEY)
    second.write(0, {k: v + 1 for k, v in arrays.items()})  # other bits, as another processor may compute
    second.finish(asdict(replace(KEY, **change)), labels)
    check(reader)  # the mapped file, deleted or not
    found = FeatureCache(tmp_path).open(replace(KEY, **change))
    torch.testing.assert_close(found.arrays["tap.1"], arrays["tap.1"] + bool(change))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".bin", ".json"]


def test_a_refill_with_the_same_values_keeps_the_name_and_mends_the_file(tmp_path):
    FeatureCache(tmp_path).fill(KEY, batches(), 10)
    reader, data = FeatureCache(tmp_path, byte_budget=0).open(KEY), next(tmp_path.glob("*.bin"))
    FeatureCache(tmp_path).fill(KEY, batches(), 10)
    check(reader)
    assert next(tmp_path.glob("*.bin")) == data
    data.write_bytes(bytes(data.stat().st_size))
    check(FeatureCache(tmp_path).fill(KEY, batches(), 10))
    data.unlink()
    check(FeatureCache(tmp_path).fill(KEY, batches(), 10))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_lock_that_a_killed_process_left_is_taken_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(_cache_files, "_PATIENCE", 0.2)
    (tmp_path / f"{KEY.name}.lock").touch()
    started = time.monotonic()
    check(FeatureCache(tmp_path).fill(KEY, batches(), 10))
    assert time.monotonic() - started > 0.2
    assert len(list(tmp_path.iterdir())) == 2


def test_what_another_computer_writes_stays_for_a_day(tmp_path):
    other = tmp_path / f"{KEY.name}-00c0ffee.bin.00000000.{2**22 + 1}.tmp"  # no process here has that number
    other.touch()
    FeatureCache(tmp_path).fill(KEY, batches(), 10)
    assert other.exists()
    os.utime(other, (0, 0))
    FeatureCache(tmp_path).fill(KEY, batches(), 10)
    assert not other.exists()


def test_digests_tell_values_names_shapes_and_dtypes_apart():
    base = torch.arange(4.0)
    others = [
        ("b", base),
        ("a", base + 1),
        ("a", base.view(2, 2)),
        ("a", base.double()),
        ("a", base.to(torch.bfloat16)),
    ]
    digests = {tensor_digest([pair]) for pair in [("a", base), *others]}
    assert len(digests) == 6
    assert tensor_digest([("a", base)]) == tensor_digest([("a", base[::1].clone())])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"byte_budget": -1}, "`byte_budget` must be 0 or more"),
        ({"dtype": torch.int8}, "`dtype` must hold floating point"),
    ],
)
def test_bad_options_are_told(options, match):
    with pytest.raises(ValueError, match=match):
        FeatureCache(**options)


def test_progress_is_shown_where_there_is_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def slow():
        for batch in batches():
            time.sleep(0.06)
            yield batch

    FeatureCache().fill(KEY, slow(), 10, label="caching train 0")
    told = capsys.readouterr().err
    assert "caching train 0" in told
    assert "\n" not in told  # a stream of 20 tasks would leave 60 lines
    assert told.endswith("\r")
    FeatureCache(progress=False).fill(KEY, batches(), 10)
    assert capsys.readouterr().err == ""
