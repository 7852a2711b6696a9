"""Loaders that give rows of a feature cache in place of images, for any module whose backbone is frozen.

A batch holds row ids, an int64 vector, where the images were. The module passes it on to its backbone, whose tap
(:class:`cl_plugins.taps.BackboneTaps`) answers with the stored taps and feature. So side networks, closed-form heads,
head tuning and evaluation all run on the cache, and the user's module stays as it is. The ids themselves and their
loaders are those of :mod:`cl_plugins.cached_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from cl_plugins._cache_checks import check_frozen, check_hand_over, check_same, plain
from cl_plugins._cache_inputs import count_samples, fingerprint, in_order, probed, same_samples
from cl_plugins.adapters.side_bank import SideBank
from cl_plugins.attach import plugin_modules
from cl_plugins.backbones import Backbone
from cl_plugins.batches import hand_over
from cl_plugins.cache_entry import CacheEntry
from cl_plugins.cached_rows import CachedRows, PhasedLoader, read_rows, row_ids, rows_loader
from cl_plugins.closed_form import ClosedFormHead
from cl_plugins.evaluation import evaluating, split_batch
from cl_plugins.feature_cache import CacheKey, FeatureCache, each_once, tensor_digest
from cl_plugins.features import DepthTap, feature
from cl_plugins.heads import HeadMask
from cl_plugins.plugin import module_device
from cl_plugins.side_network import TapRecord
from cl_plugins.taps import backbone_taps
from cl_plugins.task import Stream

_BEHIND = (SideBank, HeadMask, ClosedFormHead)  # modules that the feature does not depend on


class CachedStream:
    """Gives a stream's loaders as rows of a cache, which it fills the first time a split is asked for.

    Args:
        module: where the backbone is; everything in front of the classifier must be frozen.
        backbone: of the module.
        head: its classifier.
        stream: gives the images.
        cache: where features and taps are kept.
        views: augmentation seeds per training sample; epoch ``e`` sees view ``e mod views``.
        context: entered around the backbone's passes, such as a Trainer's precision.

    Raises:
        ValueError: for fewer than one view.
    """

    def __init__(
        self,
        module: nn.Module,
        backbone: Backbone,
        head: nn.Module,
        stream: Stream,
        cache: FeatureCache,
        *,
        views: int = 1,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if views < 1:
            raise ValueError(f"`views` must be 1 or more, got {views!r}")
        self.module, self.head, self.stream, self.cache = module, head, stream, cache
        self.views, self.context = views, context
        self.backbone = backbone
        self.taps = backbone_taps(module, backbone, head)
        self.taps.reader = self.read
        self._images = {  # the stream's own methods, also when these here replace them
            name: getattr(stream, name) for name in ("train_dataloader", "test_loader", "train_loader_for_features")
        }
        self.asked: list[Tensor] | None = None
        """Collects the row ids of every reading in training while it is a list."""
        self._trained: dict[int, DataLoader[Any]] = {}
        self._entries: list[CacheEntry] = []
        self._keys: dict[str, CacheKey] = {}
        self._numbers: dict[CacheKey, int] = {}
        self._digest: tuple[tuple[Any, ...], str] | None = None
        self._checked = self._compared = self._asks_for_rows = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedStream:
        return self

    # the loaders of a stream

    def images(self, name: str, *args: Any) -> DataLoader[Any]:
        """The stream's own loader by the name of its method."""
        loader: DataLoader[Any] = self._images[name](*args)
        return loader

    def train_dataloader(self) -> DataLoader[Any]:
        """Training data of the current task in the stream's own order, as row ids."""
        images = self._trained[self.stream.task] = self._images["train_dataloader"]()
        return self.cached(images, f"train-{self.stream.task}", self.views)

    def phased_train_dataloader(self, fixed: Callable[[], bool]) -> PhasedLoader:
        """Training data of the current task, as row ids in epochs in which ``fixed()`` says that features stay."""
        split, images = f"train-{self.stream.task}", self._images["train_dataloader"]()

        def rows(epoch: int) -> DataLoader[Any]:
            # in each epoch anew: no view is computed that none sees, and features that change after all are refused
            number = self._entry(images, split, epoch % self.views)
            return rows_loader(images, CachedRows([number], self._entries[number].labels))

        return PhasedLoader(images, rows, fixed)

    def test_loader(self, index: int) -> DataLoader[Any]:
        """Test data of task ``index``, as row ids."""
        return self.cached(self._images["test_loader"](index), f"test-{index}")

    def train_loader_for_features(self, index: int) -> DataLoader[Any]:
        """Training data of task ``index`` in a fixed order without augmentation, as row ids."""
        images = self._images["train_loader_for_features"](index)
        trained = self._trained.get(index)
        if trained is None and index == self.stream.task:
            trained = self._images["train_dataloader"]()
        if trained is None or not same_samples(trained, images):
            return self.cached(images, f"features-{index}")
        self._entry(trained, f"train-{index}", 0)  # in its batches, whoever asks first
        return self.cached(images, f"train-{index}")

    def cached(self, images: DataLoader[Any], split: str, views: int = 1) -> DataLoader[Any]:
        """The rows of a loader of images, in the same order and batches; fills what is missing.

        Raises:
            TypeError: for a data set without a length and items by index.
            RuntimeError: when something in front of the classifier can still train.
            ValueError: when the cache holds the split from other weights or other inputs.
        """
        if isinstance(images.dataset, IterableDataset):
            raise TypeError(f"the data of {split!r} must have items by index to be cached, got an IterableDataset")
        if views > 1 and not hasattr(images.sampler, "begin"):
            raise ValueError(
                f"`views` must be 1 for a sampler that does not count epochs, got {views!r} and"
                f" {type(images.sampler).__name__}; use a TaskStream of cl_plugins.scenarios"
            )
        numbers = [self._entry(images, split, view) for view in range(views)]
        return rows_loader(images, CachedRows(numbers, self._entries[numbers[0]].labels))

    def read(self, ids: Tensor) -> tuple[TapRecord, Tensor]:
        """Taps and features of row ids ``(batch,)``, on the ids' device."""
        if self.asked is not None and self.module.training:
            self.asked.append(ids)
        arrays = read_rows(self._entries, ids)
        taps = {int(name[4:]): value for name, value in arrays.items() if name.startswith("tap.")}
        for name, depth in self._depths():
            if f"{name}.0" in arrays:
                depth.replay([arrays[f"{name}.{i}"] for i in range(len(depth.blocks))])
        return TapRecord(taps, arrays.get("image")), arrays["feature"]

    def probe(self) -> None:
        """Raise when the module does not hand row ids on to its backbone, before epochs are spent on images.

        Raises:
            RuntimeError: saying what to change.
        """
        weight, ids = next(self.head.parameters()), torch.arange(2)

        def answer(given: Tensor) -> tuple[TapRecord, Tensor]:
            return TapRecord(), weight.new_zeros(len(given), weight.shape[1])

        forward = partial(feature, self.module, self.head)
        check_hand_over(self.module, self.taps, answer, ids, torch.zeros_like(ids), forward, self.context)

    def check_order(self, ids: Tensor) -> None:
        """Raise when the backbone was asked for other rows than those of a batch, in whose order its labels are.

        Args:
            ids: of the batch; :attr:`asked` has what was read meanwhile.

        Raises:
            RuntimeError: saying what to change.
        """
        asked, self.asked = self.asked, None
        if not asked or not len(ids):
            return
        together = torch.cat(asked)
        times, rest = divmod(len(together), len(ids))
        if rest or not torch.equal(together, ids.repeat(times)):
            raise RuntimeError(
                "the training step must give its batch to the backbone in the batch's order, got rows of other samples"
                " than the labels': what mixes, flips or shuffles inputs does so to row ids of a cache as well; put it"
                " into the stream's transforms, or leave CacheFeatures out of the callbacks"
            )

    def forget(self, split: str) -> None:
        """Release a split: its memory, and its files unless the cache has a folder to keep."""
        for task in [t for t in self._trained if split == f"train-{t}"]:
            del self._trained[task]
        for name in [n for n, k in self._keys.items() if k.split == split]:
            key = self._keys.pop(name)
            number = self._numbers.pop(key, None)
            if number is not None:
                self._entries[number] = CacheEntry({}, {}, torch.zeros(0, dtype=torch.int64), True)
            self.cache.release(key)

    # filling

    def _entry(self, images: DataLoader[Any], split: str, view: int) -> int:
        key = CacheKey(
            split=split,
            view=view,
            weights=self._weights(),
            transform=fingerprint(images, view),
            dtype=self._dtype_name(),
            arrays=self._arrays(),
        )
        if key not in self._numbers:
            self._outgrow(key)
            entry = self._open_or_fill(key, images, view)
            self._numbers[key] = len(self._entries)
            self._keys[key.name] = key
            self._entries.append(entry)
            if not self._asks_for_rows and len(entry):
                rows = torch.tensor([len(entry) - 1, 0])  # not what clipping to [0, 1] leaves as it is
                ids = row_ids(self._numbers[key], rows)
                labels = entry.labels[rows]
                check_hand_over(self.module, self.taps, self.read, ids, labels, self.module, self.context)
                self._asks_for_rows = True
        return self._numbers[key]

    def _outgrow(self, key: CacheKey) -> None:
        """Drop this run's own entry of the same data when more is read now, such as deeper blocks' class tokens."""
        held = self._keys.get(key.name)
        if held is None or held.arrays == key.arrays or replace(held, arrays=key.arrays) != key:
            return
        self._entries[self._numbers.pop(held)] = CacheEntry({}, {}, torch.zeros(0, dtype=torch.int64), True)
        first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        (self.cache.drop if first or self.cache.folder is None else self.cache.release)(held)

    def _open_or_fill(self, key: CacheKey, images: DataLoader[Any], view: int) -> CacheEntry:
        """The entry of a key. A folder is filled by the first process while the others wait."""
        if self.cache.folder is None or not (dist.is_available() and dist.is_initialized()):
            return self._fill_here(key, images, view)
        entry, failure = None, None
        if dist.get_rank() == 0:
            try:
                entry = self._fill_here(key, images, view)
            except Exception as error:  # raised below, once the others know
                failure = error
        device = module_device(self.module) if dist.get_backend() == "nccl" else torch.device("cpu")
        filled = torch.tensor(int(failure is None), device=device)
        dist.broadcast(filled, 0)
        if failure is not None:
            raise failure
        entry = self.cache.open(key) if int(filled) and entry is None else entry
        if entry is None:
            raise RuntimeError(
                f"the first process must leave the features of {key.split!r} in `folder`, got none in"
                f" {self.cache.folder}; its own error says why, or the processes do not share that folder"
            )
        return entry

    def _fill_here(self, key: CacheKey, images: DataLoader[Any], view: int) -> CacheEntry:
        entry = self.cache.open(key)
        if entry is None:
            batches = self._compute(in_order(images, view))
            return self.cache.fill(key, batches, count_samples(images))
        if self.cache.folder is not None and not self._compared:
            positions = probed(images)
            ((computed, _),) = self._compute(in_order(images, view, positions))
            exact = key.dtype in ("as computed", "float32", "float64")
            where = f"{key.split!r} in {self.cache.folder}"
            check_same(computed, entry.read(torch.tensor(positions)), 5e-3 if exact else 5e-2, where)
            self._compared = True
        return entry

    def _dtype_name(self) -> str:
        """Of stored values, with the autocast under which they are computed."""
        kind = module_device(self.module).type
        with self.context():
            cast = f" under {torch.get_autocast_dtype(kind)}" if torch.is_autocast_enabled(kind) else ""
        return self.cache.dtype_name + cast

    def _arrays(self) -> tuple[str, ...]:
        image = ("image",) if self.taps.wants_image else ()
        deep = {f"{name}.{i}" for name, depth in self._depths() for i in range(len(depth.blocks))}
        return ("feature", *(f"tap.{i}" for i in sorted(self.taps.wanted)), *sorted(deep), *image)

    def _depths(self) -> list[tuple[str, DepthTap]]:
        """What keeps class tokens of earlier blocks for computed classifiers, named by the number of blocks."""
        found = (m for m in plugin_modules(self.module).modules() if isinstance(m, DepthTap))
        return [(f"depth{len(depth.blocks)}", depth) for depth in found]

    def _compute(self, batches: DataLoader[Any]) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        device = module_device(self.module)
        with plain(self.module), evaluating(self.module), self.context():
            for batch in batches:
                inputs, labels = split_batch(hand_over(batch, self.module, device))
                if not self._checked:
                    check_frozen(self.module, self.head, self.backbone, self.taps, inputs)
                    self._checked = True
                base = feature(self.module, self.head, inputs)
                record = self.taps.take()
                arrays = {"feature": base, **{f"tap.{i}": record.taps[i] for i in sorted(self.taps.wanted)}}
                for name, depth in self._depths():
                    arrays |= {f"{name}.{i}": tokens for i, tokens in enumerate(depth.kept())}
                if record.image is not None:
                    arrays["image"] = record.image
                yield arrays, labels

    def _weights(self) -> str:
        """Digest of what the feature depends on; computed again only after one of these tensors changed."""
        head = {id(p) for p in self.head.parameters()}
        named = dict(self.backbone.model.state_dict(keep_vars=True))
        named |= {
            n: p for n, p in self.module.named_parameters() if not p.requires_grad and not n.startswith("plugins.")
        }
        for name, plugin in plugin_modules(self.module).items():
            if not isinstance(plugin, _BEHIND):
                named |= {f"plugins.{name}.{k}": v for k, v in plugin.state_dict(keep_vars=True).items()}
        tensors = [(n, t) for n, t in sorted(named.items()) if id(t) not in head and isinstance(t, Tensor)]
        versions = tuple((n, t.data_ptr(), t._version) for n, t in tensors)
        if self._digest is None or self._digest[0] != versions:
            self._digest = (versions, tensor_digest(each_once(tensors)))
            self._checked = self._compared = False
        return self._digest[1]
