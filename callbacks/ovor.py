"""OVOR: OnePrompt, then head epochs that push the classifier away from virtual outliers.

"OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning", Wei-Cheng Huang,
Chun-Fu (Richard) Chen and Hsiang Hsu, ICLR 2024, arXiv 2402.04129. Implemented: the whole method, with outliers as in
the published code or as in the paper. Not implemented: warm-up epochs, which no published setting uses.

Formulas (:mod:`cl_plugins.outliers` has the outliers and VOR)::

    epochs 0 ... E - H - 1      loss = CE(logits[task's classes], label)          prompts and classifier
    the last H = head_epochs    f = feature(x), o = outliers(f), loss = CE(head(f), y) + VOR(head(f), head(o))
                                                                                   classifier alone, same optimizer
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_plugins._processes import gather_rows, of_all_processes
from cl_plugins.attach import plugin_modules
from cl_plugins.evaluation import split_batch
from cl_plugins.features import collect_features
from cl_plugins.head_phase import FeatureTap, HeadPhase, tune_head
from cl_plugins.outliers import Mode, VirtualOutliers

from .one_prompt import OnePrompt

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.task import Task


class OVOR(OnePrompt):
    """Learns one prompt for all tasks, then tunes each task's classifier rows against virtual outliers.

    WHEN: in the last ``head_epochs`` epochs of a task Lightning's own batches give the features: the prompt enters
    detached, so no graph goes through the backbone, and the optimizer's step moves nothing. After the last batch of
    such an epoch, before its validation, one pass over these features trains the classifier with the Trainer's
    optimizer at the learning rate of that epoch. Gradient clipping and accumulation do not touch these steps.

    Args:
        outliers: settings of the outliers and their loss, or the ones that differ from the published defaults.
        synthesis: "reference" makes outliers as the published code does (noise around the origin), "boundary" as the
            paper does (noise around samples at the edge of the data); None takes the mode of ``outliers``.
        head_epochs: head epochs per task. None for a fifth of ``max_epochs``, at least 1, as the published 10 of 50 and
            4 of 20.
        refresh_features: collect the features anew in each head epoch, with new augmentation, as published; beside
            :class:`CacheFeatures` the backbone computes them in the first one alone. Otherwise once: the first head
            epoch makes all passes, at its learning rate, and ends the task's training.
        lengths: as in :class:`OnePrompt`.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.
        seed: for the initial prompt, and with task and epoch for the outliers and the order of the features.

    Raises:
        ValueError: for settings out of range; at the start of training when no epoch is left for the prompt.

    Example:
        >>> method = OVOR({"noise_scale": 1.0}, synthesis="boundary", head_epochs=4)
        >>> method.outliers.noise_scale, method.outliers.neighbors
        (1.0, 50)
    """

    modalities: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(
        self,
        outliers: VirtualOutliers | Mapping[str, Any] | None = None,
        *,
        synthesis: Mode | None = None,
        head_epochs: int | None = None,
        refresh_features: bool = True,
        lengths: Mapping[int, int] | None = None,
        backbone: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, backbone=backbone, head=head, seed=seed)
        if head_epochs is not None and head_epochs < 1:
            raise ValueError(f"`head_epochs` must be 1 or more, got {head_epochs!r}; for none use OnePrompt")
        chosen = outliers if isinstance(outliers, VirtualOutliers) else VirtualOutliers(**(outliers or {}))
        self.outliers = chosen if synthesis is None else replace(chosen, mode=synthesis)
        self.head_epochs = head_epochs
        self.refresh_features = refresh_features
        self._first_head_epoch = 0
        self.in_head_phase: bool = False
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._saved: list[list[Tensor]] = []
        self._rates: list[Any] = []
        self._history: dict[int, list[tuple[int, HeadPhase]]] = {}

    def targets(self, batch: Any) -> Tensor:
        """Labels ``(samples,)`` of a training batch; override it for batches that are no ``(x, y)`` or dict."""
        return split_batch(batch)[1]

    def install(self, module: nn.Module) -> None:
        """Attach the prefixes, freeze all but them and the classifier, and listen to the classifier's input."""
        super().install(module)
        plugins = plugin_modules(module)
        if "feature_tap" not in plugins:
            plugins["feature_tap"] = FeatureTap(self.find(module))

    def start_task(self, module: nn.Module, task: Task) -> None:
        """Show the task's classes and forget the features of the task before."""
        super().start_task(module, task)
        self._history.pop(task.index, None)  # of an earlier run
        self._set_mode(module, False)
        self._forget(module)

    def end_task(self, module: nn.Module, task: Task) -> None:
        """Say when training ended before any head epoch."""
        self._set_mode(module, False)
        if task.index not in self._history:
            warnings.warn(f"task {task.index} ended without a head epoch: it was trained as by OnePrompt", stacklevel=2)

    def extra_loss(self, module: nn.Module) -> Tensor | None:
        """In head epochs 0 times the prompts: DistributedDataParallel waits for a gradient of each."""
        if not self.in_head_phase:
            return None
        sums = [p.sum() for p in self.prompt(module).parameters() if p.requires_grad]
        return torch.stack(sums).sum() * 0 if sums else None

    def head_phase(
        self, module: nn.Module, loader: Iterable[Any], optimizer: Optimizer, task: Task, epoch: int = 0
    ) -> HeadPhase | None:
        """One head epoch of a hand-written loop: collect the features, make the outliers, train the classifier.

        Args:
            module: the module that :meth:`install` and :meth:`start_task` were called with.
            loader: the task's training data, ``(x, y)`` or dicts.
            optimizer: the one that trained the prompts and the classifier.
            task: the current task.
            epoch: its number within the task; another epoch, other noise.

        Returns:
            Means over the steps, as device scalars; None without samples.
        """
        features, labels = collect_features(module, self.find(module), loader)
        features, labels = gather_rows(features, dealt=True), gather_rows(labels, dealt=True)
        return self._tune(module, features, labels, optimizer, task, epoch)

    def _tune(
        self, module: nn.Module, features: Tensor, labels: Tensor, optimizer: Optimizer, task: Task, epoch: int
    ) -> HeadPhase | None:
        head, generator = self.find(module), torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + task.index * 8_191 + epoch) % (1 << 63))
        means = tune_head(head, features, labels, task.classes, optimizer, self.outliers, generator)
        if means is not None:
            self._history.setdefault(task.index, []).append((epoch, means))
        return means

    def report_events(self, module: nn.Module) -> list[dict[str, Any]]:
        """One series per quantity of the head phase and task: loss, energies, shares of active hinges."""
        return [
            {
                "name": f"ovor/{quantity}",
                "task": task,
                "x": [epoch for epoch, _ in phases],
                "value": torch.stack([getattr(means, quantity) for _, means in phases]).tolist(),
            }
            for task, phases in self._history.items()
            for quantity in HeadPhase._fields
        ]

    # Lightning's hooks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay out the task's epochs."""
        super().on_fit_start(trainer, pl_module)
        epochs = trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError(f"`max_epochs` must be a number of epochs per task, got {epochs!r}")
        wanted = max(1, round(0.2 * epochs)) if self.head_epochs is None else self.head_epochs
        if wanted >= epochs and self.head_epochs is not None and not getattr(trainer, "fast_dev_run", False):
            raise ValueError(
                f"`head_epochs` must leave an epoch for the prompt, got {wanted} of {epochs} epochs; raise `max_epochs`"
            )
        self._first_head_epoch = epochs - min(wanted, epochs - 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with a head epoch that a checkpoint interrupted."""
        super().on_train_start(trainer, pl_module)
        self._set_mode(pl_module, trainer.current_epoch >= self._first_head_epoch)
        if not self.refresh_features and self._task is not None and self._task.index in self._history:
            trainer.should_stop = True  # saved behind the one head epoch, before training ended
        if self._saved:  # inside an epoch the loader refuses another number of processes
            self._features, self._labels = ([part] for part in self._saved[trainer.global_rank])
            self._saved = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turn to the head phase when its first epoch begins."""
        self._forget(pl_module)
        self._set_mode(pl_module, trainer.current_epoch >= self._first_head_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the learning rates: Lightning steps schedulers of the epoch before the head phase runs."""
        if self.in_head_phase:
            self._rates = [copy(group["lr"]) for o in trainer.optimizers for group in o.param_groups]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Leave nothing for the optimizer to move in a head epoch's own batches."""
        if self.in_head_phase:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch's features; after the epoch's last batch, train the classifier on all of them."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self.in_head_phase:
            return
        features, labels = self._tap(pl_module).take(), self.targets(batch)
        if len(features) != len(labels):
            raise RuntimeError(
                f"a training step must give the classifier one feature per label, got {len(features)} features for"
                f" {len(labels)} labels; override `targets(batch)`"
            )
        self._features.append(features)
        self._labels.append(labels.detach())
        if trainer.is_last_batch:
            self._run(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for an epoch that ended early."""
        if self.in_head_phase and self._features:
            self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self._task is not None
        device = module.device
        features = gather_rows(torch.cat([f.to(device) for f in self._features]), dealt=True)
        labels = gather_rows(torch.cat([y.to(device) for y in self._labels]), dealt=True)
        self._forget(module)
        head, epoch = self.find(module), trainer.current_epoch
        optimizer = next(
            o for o in trainer.optimizers if any(p is head.weight for g in o.param_groups for p in g["params"])
        )
        rounds = 1 if self.refresh_features else (trainer.max_epochs or 1) - self._first_head_epoch
        with _learning_rates(trainer.optimizers, self._rates):
            for index in range(rounds):
                self._tune(module, features, labels, optimizer, self._task, epoch + index)
        if trainer.world_size > 1:
            for parameter in head.parameters():  # the same everywhere already, unless devices round differently
                dist.broadcast(parameter.data, 0)
        if not self.refresh_features:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """The reported means and the features of a head epoch under way, those of every process, which all call it."""
        state: dict[str, Any] = {
            "epochs": {task: [epoch for epoch, _ in phases] for task, phases in self._history.items()},
            "means": {task: torch.stack([torch.stack(m) for _, m in phases]) for task, phases in self._history.items()},
        }
        if self._features:
            state["head_epoch"] = of_all_processes([torch.cat(self._features).cpu(), torch.cat(self._labels).cpu()])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on collecting where the checkpoint stopped."""
        self._history = {
            task: [(epoch, HeadPhase(*row)) for epoch, row in zip(epochs, state_dict["means"][task], strict=True)]
            for task, epochs in state_dict["epochs"].items()
        }
        self._saved = state_dict.get("head_epoch", [])

    def _tap(self, module: nn.Module) -> FeatureTap:
        tap = plugin_modules(module)["feature_tap"]
        assert isinstance(tap, FeatureTap)
        return tap

    def _set_mode(self, module: nn.Module, head_epoch: bool) -> None:
        self.in_head_phase = self._tap(module).on = self.prompt(module).frozen = head_epoch
        if head_epoch and self._check is not None:  # cached features pass no prompt
            self._check.close()
            self._check = None

    def _forget(self, module: nn.Module) -> None:
        self._features, self._labels = [], []
        self._tap(module).clear()


@contextmanager
def _learning_rates(optimizers: list[Optimizer], rates: list[Any]) -> Iterator[None]:
    """The optimizers with other learning rates inside."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    current = [group["lr"] for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    try:
        yield
    finally:
        for group, rate in zip(groups, current, strict=True):
            group["lr"] = rate
