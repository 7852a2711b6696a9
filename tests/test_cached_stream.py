"""Streams of cached features: the same training as on images, without the backbone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from cl_plugins import Task, fit_stream
from cl_plugins._cache_inputs import fingerprint, same_samples
from cl_plugins.cached_rows import CachedRows, uncached
from cl_plugins.cached_stream import CachedStream
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
from cl_plugins.feature_cache import FeatureCache
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit
from tests._side import PYRAMID

# streams


class CountingVit(PlainModule):
    """Counts images that pass the first block of the backbone."""

    def __init__(self, **options) -> None:
        super().__init__(tiny_vit(depth=4), **options)
        self.images = 0
        self.model.blocks[0].register_forward_hook(self._count)

    def _count(self, block, args, output) -> None:
        self.images += len(output)


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


def test_starting_weights_routing_and_training_share_one_pass():
    for transform in (None, lambda x: x.flip(-1)):
        module, _, _ = run(METHODS["lst-fisher"](), CacheFeatures(progress=False), train_transform=transform)
        fisher, samples = 3 * 4, 6 * 16 + 6 * 5
        passes = samples if transform is None else samples + 6 * 16  # augmented images are others
        assert passes <= module.images - fisher <= passes + 2 * 3 * 8


def test_rare_augmentation_is_augmentation():
    def rare(x):
        return x.flip(-1) * 3 if torch.rand(()) < 0.05 else x

    ends = [run(NearestMean(), *cache, train_transform=rare)[0] for cache in ([], [CacheFeatures(progress=False)])]
    for name, value in ends[0].state_dict().items():
        torch.testing.assert_close(ends[1].state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_a_computed_classifier_reads_one_view():
    images = [run(NearestMean(), CacheFeatures(views=v, progress=False))[0].images for v in (1, 4)]
    assert images[0] == images[1]


def test_training_data_that_nobody_asks_for_need_no_items():
    class Endless(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 8, 8), 0

    stream, results = tiny_stream(), []
    stream.train_dataloader = lambda: DataLoader(Endless())
    for cache in ([], [CacheFeatures(progress=False)]):
        trainer = quiet_trainer(callbacks=[NearestMean(), *cache])
        results.append(fit_stream(trainer, PlainModule(tiny_vit(depth=4)), stream).correct.tolist())
    assert results[0] == results[1]


def test_same_samples_are_told_by_what_loaders_hold():
    class Shifted(TensorDataset):
        shift = 0

    plain, turned = tiny_stream(), tiny_stream(train_transform=lambda x: x.flip(-1))
    assert same_samples(plain.train_dataloader(), plain.train_loader_for_features(0))
    assert not same_samples(plain.train_dataloader(), plain.train_loader_for_features(1))
    assert not same_samples(plain.train_dataloader(), plain.test_loader(0))
    assert not same_samples(turned.train_dataloader(), turned.train_loader_for_features(0))
    x = torch.zeros(4, 2)
    a, b = Shifted(x), Shifted(x)
    assert same_samples(DataLoader(a), DataLoader(a, batch_size=2))
    assert same_samples(DataLoader(a), DataLoader(b))
    assert not same_samples(DataLoader(a), DataLoader(Shifted(x.clone())))
    assert not same_samples(DataLoader(a), DataLoader(TensorDataset(x)))
    assert not same_samples(DataLoader(a), DataLoader(a, collate_fn=list))
    b.shift = 1
    assert not same_samples(DataLoader(a), DataLoader(b))
    assert not same_samples([DataLoader(a)], DataLoader(a))


def test_digests_tell_which_samples_an_entry_is_of():
    data = TensorDataset(torch.randn(200, 2, generator=torch.Generator().manual_seed(0)), torch.arange(200))
    inputs = data.tensors[0]
    members = [*range(99), 150, *range(100, 149)]
    loaders = {
        "whole": DataLoader(data, batch_size=7),
        "one": DataLoader(Subset(data, [3])),
        "other end": DataLoader(TensorDataset(torch.cat([data.tensors[0][:-1], inputs[:1]]), data.tensors[1])),
        "another member": DataLoader(Subset(data, members)),
        "members": DataLoader(Subset(data, [*range(149)])),
        "another order": DataLoader(Subset(data, range(148, -1, -1))),
    }
    digests = {name: fingerprint(loader, 0) for name, loader in loaders.items()}
    assert len(set(digests.values())) == len(loaders), digests
    assert fingerprint(DataLoader(Subset(data, range(149)), batch_size=50), 0) == digests["members"]
    data.indices = [f"{i}.png" for i in range(200)]  # some data sets mean something else by the name
    assert fingerprint(DataLoader(data), 0) == digests["whole"]


def test_a_second_run_reads_the_folder(tmp_path):
    first, expected, _ = run(METHODS["lst"](), CacheFeatures(tmp_path, progress=False))
    second, result, _ = run(METHODS["lst"](), CacheFeatures(tmp_path, progress=False, byte_budget=0))
    assert first.images > 0
    assert second.images == 2 * 8  # a few samples, compared with what is stored; once more to see that no weight trains
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
    with pytest.raises(ValueError, match="features change while"):
        run(method(), CacheFeatures(progress=False))


def test_a_backbone_that_a_side_network_adapts_is_not_cached_by_hand():
    module, method = tiny_vit(depth=4), HierarchicalSideTuning(**PYRAMID, regime="per_task")
    method.install(module)
    method.start_task(module, Task(0, (0, 1)))
    cached = CacheFeatures(progress=False).open(module, tiny_stream())
    with pytest.raises(RuntimeError, match="prompts, norms or other weights there still train"):
        cached.test_loader(0)


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
