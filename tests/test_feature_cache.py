"""The cache of a frozen backbone's features and taps: what it gives, what it refuses, what survives a kill."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from cl_plugins import fit_stream
from cl_plugins.cached_stream import CachedRows, CachedStream, uncached
from cl_plugins.callbacks import (
    CacheFeatures,
    FrozenBackbone,
    HierarchicalSideTuning,
    LadderSideTuning,
    LeanHierarchicalSideTuning,
    NearestMean,
    OnePrompt,
    RanPAC,
    Sherl,
    SideTuning,
)
from cl_plugins.feature_cache import CacheKey, FeatureCache, tensor_digest
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit

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
    for chosen in (torch.tensor([7, 0, 3, 3]), torch.arange(2, 6), torch.arange(n), torch.tensor([], dtype=torch.int64)):
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
        return sum(f is torch.index_select for f in calls)

    assert count(2) == count(9) == 2


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


def test_digests_tell_values_names_shapes_and_dtypes_apart():
    base = torch.arange(4.0)
    others = [("b", base), ("a", base + 1), ("a", base.view(2, 2)), ("a", base.double()), ("a", base.to(torch.bfloat16))]
    digests = {tensor_digest([pair]) for pair in [("a", base), *others]}
    assert len(digests) == 6
    assert tensor_digest([("a", base)]) == tensor_digest([("a", base[::1].clone())])


@pytest.mark.parametrize(
    ("options", "match"),
    [({"byte_budget": -1}, "`byte_budget` must be 0 or more"), ({"dtype": torch.int8}, "`dtype` must hold floating point")],
)
def test_bad_options_are_told(options, match):
    with pytest.raises(ValueError, match=match):
        FeatureCache(**options)


# streams


class CountingVit(PlainModule):
    """Counts images that pass the first block of the backbone."""

    def __init__(self, **options) -> None:
        super().__init__(tiny_vit(depth=4), **options)
        self.images = 0
        self.model.blocks[0].register_forward_hook(self._count)

    def _count(self, block, args, output) -> None:
        self.images += len(output)


PYRAMID = {"widths": (8, 8, 8, 16), "heads": (1, 2, 2, 2)}
METHODS = {
    "lst": lambda: LadderSideTuning(reduction=2),
    "lst-per-task": lambda: LadderSideTuning(reduction=2, regime="per_task"),
    "lst-fisher": lambda: LadderSideTuning(reduction=2, init="fisher", fisher_samples=4, regime="per_task_dense"),
    "sherl": lambda: Sherl(reduction=4),
    "lean-hst": lambda: LeanHierarchicalSideTuning(**PYRAMID),
    "side-tuning": lambda: SideTuning(width=4),
    "frozen": lambda: FrozenBackbone(),
    "nearest-mean": lambda: NearestMean(),
    "ranpac": lambda: RanPAC(projection=20),
}


def run(method, cache=None, first=False, **options):
    module = CountingVit(weight_decay=0.1)
    callbacks = [method] if cache is None else [cache, method] if first else [method, cache]
    stream = tiny_stream(**options)
    result = fit_stream(quiet_trainer(callbacks=callbacks, max_epochs=3), module, stream)
    return module, result, stream


@pytest.mark.parametrize("name", METHODS)
def test_cached_training_equals_uncached_training(name):
    plain, expected, _ = run(METHODS[name]())
    for first in (False, True):
        module, result, stream = run(METHODS[name](), CacheFeatures(progress=False), first=first)
        assert result.correct.tolist() == expected.correct.tolist()
        state = plain.state_dict()
        for key, value in module.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        assert module.images < plain.images
        assert "train_dataloader" not in vars(stream)
        assert module.plugins["taps"].reader is None


def test_each_sample_passes_the_backbone_once():
    module, _, _ = run(FrozenBackbone(), CacheFeatures(progress=False))
    samples = 6 * 16 + 6 * 5
    checks = 2 * 8  # the first batch of a split is run once more with gradients on, to see that none arrive
    assert samples <= module.images <= samples + checks


def test_a_second_run_reads_the_folder(tmp_path):
    first, expected, _ = run(METHODS["lst"](), CacheFeatures(tmp_path, progress=False))
    second, result, _ = run(METHODS["lst"](), CacheFeatures(tmp_path, progress=False, byte_budget=0))
    assert first.images > 0
    assert second.images == 0
    assert result.correct.tolist() == expected.correct.tolist()


def test_another_backbone_or_transform_is_refused(tmp_path):
    run(FrozenBackbone(), CacheFeatures(tmp_path, progress=False))
    module = PlainModule(tiny_vit(depth=4, seed=1))
    trainer = quiet_trainer(callbacks=[FrozenBackbone(), CacheFeatures(tmp_path, progress=False)])
    with pytest.raises(ValueError, match="stale: `weights`"):
        fit_stream(trainer, module, tiny_stream())
    with pytest.raises(ValueError, match="stale: `transform`"):
        run(FrozenBackbone(), CacheFeatures(tmp_path, progress=False), train_transform=lambda x: x.flip(-1))
    with pytest.raises(ValueError, match="stale: `arrays`"):
        run(METHODS["lst"](), CacheFeatures(tmp_path, progress=False))
    with pytest.raises(ValueError, match="stale: `dtype`"):
        run(FrozenBackbone(), CacheFeatures(tmp_path, progress=False, dtype="float16"))


@pytest.mark.parametrize("method", [lambda: OnePrompt({0: 2}), lambda: HierarchicalSideTuning(**PYRAMID)])
def test_what_still_trains_in_front_of_the_classifier_is_refused(method):
    with pytest.raises(RuntimeError, match="everything in front of the classifier is frozen"):
        run(method(), CacheFeatures(progress=False))


def test_views_are_augmentation_seeds():
    def noisy(x):
        return x + torch.randn(x.shape)

    stream = tiny_stream(train_transform=noisy)
    module = PlainModule(tiny_vit(depth=4))
    method = FrozenBackbone()
    method.install(module)
    cached = CacheFeatures(views=2, progress=False).open(module, stream)
    module.model.eval()

    def feature(x):
        return module.model.forward_head(module.model.forward_features(x), pre_logits=True)

    loader, images = cached.train_dataloader(), stream.train_dataloader()
    with torch.no_grad():
        for epoch in (0, 1, 2):
            loader.sampler.set_epoch(epoch)
            got = cached.read(torch.cat([i for i, _ in loader]))[1]
            n = len(images.dataset)
            loader.sampler.set_epoch(epoch)
            numbers = [(epoch % 2) * n + number % n for number in loader.sampler]
            expected = feature(torch.stack([images.dataset[i][0] for i in numbers]))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="sampler that does not count epochs"):
        cached.cached(DataLoader(stream.train_dataloader().dataset, batch_size=4), "train-0", views=2)


def test_loaders_keep_order_batches_and_labels():
    stream = tiny_stream()
    module = PlainModule(tiny_vit(depth=4))
    FrozenBackbone().install(module)
    cached = CacheFeatures(progress=False).open(module, stream)
    for got, images in (
        (cached.train_dataloader(), stream.train_dataloader()),
        (cached.test_loader(1), stream.test_loader(1)),
        (cached.train_loader_for_features(0), stream.train_loader_for_features(0)),
    ):
        assert len(got) == len(images)
        assert type(uncached(got)) is type(images)
        for (ids, labels), (x, y) in zip(got, images, strict=True):
            assert ids.dtype == torch.int64
            assert torch.equal(labels, y)
            base = module.model.forward_head(type(module.model).forward_features(module.model, x), pre_logits=True)
            torch.testing.assert_close(cached.read(ids)[1], base)
            torch.testing.assert_close(module(ids), module(x))
    ids = torch.cat([next(iter(cached.test_loader(t)))[0][:2] for t in (1, 0, 1)])  # rows of several entries
    expected = torch.cat([cached.read(i[None])[1] for i in ids])
    assert torch.equal(cached.read(ids)[1], expected)


def test_no_sample_passes_through_python(monkeypatch):
    calls = []
    original = CachedRows.__getitems__
    monkeypatch.setattr(CachedRows, "__getitems__", lambda self, n: calls.append(len(n)) or original(self, n))
    monkeypatch.setattr(CachedRows, "__getitem__", lambda self, n: pytest.fail("one sample at a time"))
    stream, module = tiny_stream(), PlainModule(tiny_vit(depth=4))
    FrozenBackbone().install(module)
    for _ in CacheFeatures(progress=False).open(module, stream).train_dataloader():
        pass
    assert calls == [8, 8, 8, 8]


def test_row_ids_without_a_cache_are_told():
    module = PlainModule(tiny_vit(depth=4))
    CacheFeatures().install(module)
    with pytest.raises(RuntimeError, match="put CacheFeatures into the callbacks"):
        module(torch.arange(3))


def test_bad_data_is_told():
    class Endless(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 8, 8), 0

    module = PlainModule(tiny_vit(depth=4))
    FrozenBackbone().install(module)
    cached = CacheFeatures().open(module, tiny_stream())
    with pytest.raises(TypeError, match="got an IterableDataset"):
        cached.cached(DataLoader(Endless()), "train-0")
    for options, match in (({"views": 0}, "`views`"), ({"dtype": "int8"}, "`dtype`")):
        with pytest.raises(ValueError, match=match):
            CacheFeatures(**options)
    with pytest.raises(ValueError, match="`views` must be 1 or more"):
        CachedStream(module, cached.backbone, nn.Identity(), tiny_stream(), FeatureCache(), views=0)


def test_progress_is_shown_where_there_is_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def slow():
        for batch in batches():
            time.sleep(0.06)
            yield batch

    FeatureCache().fill(KEY, slow(), 10, label="caching train 0")
    assert "caching train 0" in capsys.readouterr().err
    FeatureCache(progress=False).fill(KEY, batches(), 10)
    assert capsys.readouterr().err == ""
