"""What may stand behind rows of a cache, and what is refused before it goes wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from cl_plugins import fit_stream
from cl_plugins._cache_inputs import fingerprint, in_order
from cl_plugins.cached_rows import CachedRows, rows_loader
from cl_plugins.callbacks import CacheFeatures, FrozenBackbone, NearestMean
from cl_plugins.feature_cache import CacheKey, FeatureCache
from tests._helpers import PlainModule, image_data, quiet_trainer, tiny_stream, tiny_vit
from tests._side import METHODS
from tests.test_batches import InHook, both, raw


def changing(change):
    class Changing(PlainModule):
        def forward(self, x):
            return change(self, x)

    return Changing(tiny_vit(depth=4))


CHANGES = {
    "flip in the evaluation": lambda m, x: m.model(x) if m.training else (m.model(x) + m.model(x.flip(-1))) / 2,
    "flip": lambda m, x: m.model(x.flip(-1)),
    "normalize": lambda m, x: m.model((x - 0.5) / 0.5),
    "float": lambda m, x: m.model(x.float()),
    "clamp": lambda m, x: m.model(x.clamp(0, 1)),
    "channels last": lambda m, x: m.model(x.to(memory_format=torch.channels_last)),
    "interpolate": lambda m, x: m.model(interpolate(x, 8)),
    "another network": lambda m, x: m.model(x) + x.flatten(1).mean(1, keepdim=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", [NearestMean, FrozenBackbone])
def test_what_changes_row_ids_is_refused(change, method):
    trainer = quiet_trainer(callbacks=[method(), CacheFeatures(progress=False)])
    with pytest.raises(RuntimeError, match=r"must hand the input to the backbone as it is, .*put what changes images"):
        fit_stream(trainer, changing(CHANGES[change]), tiny_stream())


def test_a_transfer_hook_that_changes_row_ids_is_refused():
    class Hooked(PlainModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] - 128) / 40, batch[1]

    trainer = quiet_trainer(callbacks=[FrozenBackbone(), CacheFeatures(progress=False)])
    with pytest.raises(RuntimeError, match=r"`Hooked.forward`, and its transfer hooks, must hand the input"):
        fit_stream(trainer, Hooked(tiny_vit(depth=4)), tiny_stream(**both(raw)))


@pytest.mark.parametrize("name", ["ranpac", "lst-per-task"])
def test_what_a_transfer_hook_makes_of_images_is_cached(name):
    from tests.test_cached_stream import METHODS as CACHED

    found = []
    for cache in ([], [CacheFeatures(progress=False)]):
        module = InHook(tiny_vit(depth=4))
        found.append(fit_stream(quiet_trainer(callbacks=[CACHED[name](), *cache]), module, tiny_stream(**both(raw))))
    assert found[0].correct.tolist() == found[1].correct.tolist()


@pytest.mark.parametrize("method", [FrozenBackbone, lambda: METHODS["lst"](regime="per_task")])
def test_running_statistics_in_front_of_the_classifier_are_refused(method):
    class Neck(PlainModule):
        def __init__(self):
            super().__init__(tiny_vit(depth=4))
            self.model.head, self.neck, self.fc = nn.Identity(), nn.BatchNorm1d(16), nn.Linear(16, 6)

        def forward(self, x):
            return self.fc(self.neck(self.model(x)))

    callbacks = [method(), CacheFeatures(progress=False)]
    for callback in callbacks:
        callback.head = "fc"
    with pytest.raises(RuntimeError, match="the running statistics of `neck`; take a LayerNorm"):
        fit_stream(quiet_trainer(callbacks=callbacks), Neck(), tiny_stream())


def run(folder, module=None, **options):
    module = module or PlainModule(tiny_vit(depth=4))
    trainer = quiet_trainer(callbacks=[FrozenBackbone(), CacheFeatures(folder, progress=False)], **options)
    return fit_stream(trainer, module, tiny_stream())


def pooled_by(module, pool):
    module.model.global_pool = pool
    return module


def quick(module):
    class QuickGELU(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x) + 0.1

    for block in module.model.blocks:
        block.mlp.act = QuickGELU()
    return module


@pytest.mark.parametrize(
    "change",
    [
        lambda: pooled_by(PlainModule(tiny_vit(depth=4)), "avg"),
        lambda: quick(PlainModule(tiny_vit(depth=4))),
        lambda: changing(lambda m, x: m.model(x if x.ndim == 1 else 5 * x)),
    ],
)
def test_a_folder_of_another_computation_with_the_same_weights_is_refused(tmp_path, change):
    run(tmp_path)
    run(tmp_path)
    with pytest.raises(ValueError, match="are stale: computed again from the same weights, 'feature' differs by"):
        run(tmp_path, change())


def test_a_folder_of_another_precision_is_refused(tmp_path):
    run(tmp_path, precision="bf16-mixed")
    run(tmp_path, precision="bf16-mixed")
    with pytest.raises(ValueError, match=r"`dtype` is 'as computed under torch.bfloat16' there and 'as computed' here"):
        run(tmp_path)


@pytest.mark.parametrize("own", [False, True])
def test_a_batch_sampler_of_ones_own_gives_the_batches(own):
    data = image_data(4)
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
    batches = [list(b) for b in BatchSampler(sampler, 5, False)] if own else BatchSampler(sampler, 5, False)
    images = DataLoader(data, batch_sampler=batches)
    assert torch.cat([y for _, y in in_order(images, 0)]).tolist() == data.tensors[1].tolist()
    assert fingerprint(images, 0) == fingerprint(DataLoader(data, batch_size=3), 0)
    sampler.generator.manual_seed(3)
    expected = [y.tolist() for _, y in images]
    sampler.generator.manual_seed(3)
    assert [y.tolist() for _, y in rows_loader(images, CachedRows([0], data.tensors[1]))] == expected
    assert len(expected) == 5


def test_batches_that_are_no_pairs_are_refused():
    x, y = image_data(4).tensors
    with pytest.raises(TypeError, match=r"two tensors, inputs and labels, .* got a list of Tensor, Tensor, T"):
        fingerprint(DataLoader(TensorDataset(x, y, y), batch_size=3), 0)
    dicts = [{"image": a, "label": b} for a, b in zip(x, y, strict=True)]
    with pytest.raises(TypeError, match="got a dict of Tensor, Tensor; leave CacheFeatures out"):
        fingerprint(DataLoader(dicts, batch_size=3), 0)
    with pytest.raises(TypeError, match="make batches of samples to be cached, got `batch_size=None`"):
        fingerprint(DataLoader(image_data(4), batch_size=None), 0)


def test_values_beyond_the_stored_dtype_are_refused(tmp_path):
    for folder in (None, tmp_path):
        cache = FeatureCache(folder, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"`dtype` must hold the features, which reach 1e\+05, got 'float16'"):
            cache.fill(CacheKey("a"), [({"feature": torch.tensor([[1.0], [-1e5]])}, torch.zeros(2).long())], 2)
        cache.fill(CacheKey("a"), [({"feature": torch.tensor([[65504.0]])}, torch.zeros(1).long())], 1)
