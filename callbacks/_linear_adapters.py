"""What methods with adapters on linear layers share: finding the layers, freezing the rest, files of adapters alone."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from cl_plugins.adapters.adapter_set import AdapterSet, load_adapters, read_adapters, save_adapters
from cl_plugins.adapters.delta import LinearDelta
from cl_plugins.attach import EvalGuard, freeze, plugin_modules
from cl_plugins.backbones import find_backbone
from cl_plugins.heads import find_head
from cl_plugins.plugin import ContinualCallback
from cl_plugins.targets import QkvMode, Site, find_sites
from cl_plugins.vision_language import TextClassifier

from .baselines import MaskedHead

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.task import Task

_TUNABLE = ("threshold", "evaluation", "dropout")
"""Settings that may differ from those of a file without a word: they change neither weights nor what was trained."""


class LinearAdapters(MaskedHead):
    """Base of methods that train adapters, and a classifier where there is one, on a frozen model.

    Args:
        targets: layers to adapt, see :func:`cl_plugins.targets.find_sites`.
        qkv_mode: "split" or "fused", likewise.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier; None finds it, and takes models that classify by text or generate text to
            have none; False for none.
        seed: for new adapters; None for one that follows from torch's seed, which ``fit_stream(seed=...)`` sets.
    """

    key: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]] = ("image", "multi-label", "text", "image-text")
    feature: ClassVar[Literal["untouched", "frozen", "adapted", "side"]] = "adapted"

    def __init__(
        self,
        targets: str | Sequence[str] | None,
        qkv_mode: QkvMode,
        backbone: str | None,
        head: str | Literal[False] | None,
        seed: int | None,
    ) -> None:
        super().__init__(head or None)
        if qkv_mode not in ("split", "fused"):
            raise ValueError(f"`qkv_mode` must be 'split' or 'fused', got {qkv_mode!r}")
        self.targets = targets
        self.qkv_mode: QkvMode = qkv_mode
        self.backbone = backbone
        self.headless = head is False
        self.seed = seed

    # what a subclass gives

    @abstractmethod
    def make(self, site: Site) -> LinearDelta:
        """An adapter for a site."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain values that the adapters' files keep."""

    # what the runner and hand-written loops call

    def generator(self, task: int) -> torch.Generator:
        """For what is drawn at the start of a task; the same on every device and process."""
        seed = torch.initial_seed() if self.seed is None else self.seed * 1_000_003
        return torch.Generator().manual_seed((seed + task * 8_191) % (1 << 63))

    def has_head(self, module: nn.Module) -> bool:
        """Whether a classifier is trained and masked."""
        if self.head is not None or self.headless:
            return self.head is not None
        return not any(
            isinstance(m, TextClassifier)
            or hasattr(m, "encode_text")
            or (callable(can := getattr(m, "can_generate", None)) and can())
            for m in module.modules()
        )

    def find(self, module: nn.Module) -> nn.Linear:
        """The classifier of ``module``."""
        if self.head is not None:
            return find_head(module, name=self.head)[1]
        try:
            return find_head(module, find_backbone(module, self.backbone))[1]
        except ValueError as error:
            try:
                return find_head(module)[1]
            except ValueError:
                raise ValueError(f"{error}; `head=False` trains adapters alone") from None

    def adapters(self, module: nn.Module) -> AdapterSet:
        """The adapters in ``module``.

        Raises:
            RuntimeError: before :meth:`install`.
        """
        adapters = dict(plugin_modules(module).items()).get(self.key)
        if not isinstance(adapters, AdapterSet):
            raise RuntimeError(f"`{type(self).__name__}` is not installed in this module; call `install(module)` first")
        return adapters

    def conflict(self, other: ContinualCallback, module: nn.Module) -> str | None:
        """Other adapters on the same layers: each would be trained as if it were alone there."""
        if not isinstance(other, LinearAdapters):
            return None
        mine, theirs = ([s.name for s in find_sites(module, c.targets, qkv_mode=c.qkv_mode)] for c in (self, other))
        shared = [name for name in mine if name in theirs]
        if not shared:
            return None
        return f"both adapt {len(shared)} layers, {shared[0]!r} first; give them `targets` of their own"

    def install(self, module: nn.Module) -> None:
        """Attach adapters to the target layers and freeze everything else but the classifier."""
        head = self.find(module) if self.has_head(module) else None
        plugins = plugin_modules(module)
        if self.key not in plugins:
            sites = find_sites(module, self.targets, qkv_mode=self.qkv_mode)
            adapters = AdapterSet(sites, self.make)  # everything that can be refused is refused by now
            plugins[self.key] = adapters
            adapters.attach(sites)
            module.register_load_state_dict_pre_hook(adapters.check_root)
            for name, tower in self._towers(module).items():
                if name not in plugins:
                    plugins[name] = EvalGuard(tower)
        if head is not None:
            super().install(module)
        freeze(module, except_=[*plugins.values(), *([] if head is None else [head])])

    def _towers(self, module: nn.Module) -> dict[str, nn.Module]:
        """Frozen networks that are kept in eval mode, by the name of their guard."""
        for m in module.modules():
            visual = getattr(m, "visual", None)
            if hasattr(m, "encode_text") and isinstance(visual, nn.Module):
                text = getattr(m, "text", None) or getattr(m, "transformer", None)
                return {"eval_guard": visual, **({"eval_guard_text": text} if isinstance(text, nn.Module) else {})}
        try:
            return {"eval_guard": find_backbone(module, self.backbone).model}
        except ValueError:
            if self.backbone is not None:
                raise
            return {}  # an unknown model keeps the modes that its owner gives it

    def start_task(self, module: nn.Module, task: Task) -> None:
        """Show the task's classes to the classifier, or their names to a classifier by text."""
        if self.has_head(module):
            super().start_task(module, task)
        for m in module.modules():
            if isinstance(m, TextClassifier):
                m.start_task(task)

    def adapter_modules(self, module: nn.Module) -> dict[str, nn.Module]:
        """Every adapter by the name of its layer."""
        return {name: adapter for name, adapter in self.adapters(module).by_site().items() if adapter.active}

    def own_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The adapters' parameters and the classifier's."""
        own = ContinualCallback.own_parameters(self, module)
        if self.has_head(module):
            own.update({f"head.{k}": p for k, p in self.find(module).named_parameters()})
        return own

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Protect the classifier's rows of other classes from weight decay."""
        if self.has_head(pl_module):
            super().on_fit_start(trainer, pl_module)
        else:
            ContinualCallback.on_fit_start(self, trainer, pl_module)

    # files of adapters alone

    def export_adapters(self, module: nn.Module, path: str | Path) -> None:
        """Write the adapters, without model and classifier, as a safetensors file with their settings."""
        save_adapters(self.adapters(module), path, self.key, self.settings())

    def load_adapters(self, module: nn.Module, path: str | Path) -> None:
        """Install in ``module`` and load adapters that :meth:`export_adapters` wrote, of any number of tasks.

        Raises:
            ValueError: for a file of another method.
            RuntimeError: for another rank or other layers; no weight is changed.
        """
        header, states = read_adapters(path, self.key)
        own = self.settings()
        other = {k: v for k, v in header["settings"].items() if k not in _TUNABLE and k in own and own[k] != v}
        self.install(module)
        load_adapters(self.adapters(module), states)
        if other:
            words = ", ".join(f"`{k}` {v!r} (here {own[k]!r})" for k, v in other.items())
            warnings.warn(f"the adapters were trained with other settings: {words}", stacklevel=2)
