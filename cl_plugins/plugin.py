"""The base of every method: a Lightning callback that also knows where tasks begin and end.

A method overrides :meth:`~ContinualCallback.install`, :meth:`~ContinualCallback.start_task`,
:meth:`~ContinualCallback.end_task` and perhaps :meth:`~ContinualCallback.extra_loss`. They take any ``nn.Module``, so a
hand-written loop calls the same four; the hooks below call them at the right moment of a Trainer's life.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_plugins._lightning import Callback, callbacks_of, datamodule_of
from cl_plugins.attach import CallCheck
from cl_plugins.composition import check_composition
from cl_plugins.label_scores import LabelScores
from cl_plugins.task import Stream, Task

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.evaluation import Predict
    from cl_plugins.inside_tasks import InsideRow
    from cl_plugins.result import StreamResult


@dataclass(frozen=True)
class Row:
    """Evaluation of a model on the tasks of a stream, as counts.

    Attributes:
        after: index of the task that was learned last; -1 before any training.
        correct: correct predictions per task; None for a task that was not evaluated.
        total: test samples per task; None likewise.
        correct_in_task: correct predictions when the choice is among the task's own classes (task known).
        confusion: ``(tasks, tasks)`` counts, samples of a task (row) predicted as a class of a task (column); empty
            when tasks share classes, so that a prediction names no task.
        seconds: duration of the evaluation.
        labels: average precision and counts per class on a multi-label stream; None on others.
    """

    after: int
    correct: tuple[int | None, ...]
    total: tuple[int | None, ...]
    correct_in_task: tuple[int | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    seconds: float
    labels: LabelScores | None = None

    @cached_property
    def cells(self) -> Tensor:
        """``correct``, ``total`` and ``correct_in_task`` as ``(3, tasks)`` int64, -1 for None.

        Kept, since every later task asks for all rows: reading the tuples anew each time is quadratic in Python.
        """
        counts = [[-1 if c is None else c for c in line] for line in (self.correct, self.total, self.correct_in_task)]
        return torch.tensor(counts, dtype=torch.int64)

    @cached_property
    def confusion_cells(self) -> Tensor:
        """``confusion`` as int64, kept likewise."""
        return torch.tensor(self.confusion, dtype=torch.int64)


class ContinualCallback(Callback):
    """Base class of continual-learning methods and observers.

    WHEN: ``install`` and ``start_task`` run before each task's ``Trainer.fit``, so before optimizers exist;
    ``end_task`` after it and before the evaluation.
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "required"
    """Whether the method needs gradient steps ("required"), replaces them ("none") or only watches ("neutral")."""
    modalities: ClassVar[tuple[str, ...]] = ("image", "multi-label", "text", "image-text")
    """What a stream's samples may be, see :attr:`cl_plugins.scenarios.TaskStream.modality`."""

    feature: ClassVar[Literal["untouched", "frozen", "adapted", "side"]] = "untouched"
    """What the method does to the feature in front of the classifier: leaves it to others, keeps it as pretrained and
    trains the classifier alone, trains weights inside the backbone, or replaces it by that of a side network."""

    records: ClassVar[bool] = False
    """Whether :meth:`on_row` collects what other callbacks made of the row; it is then called after theirs."""

    needs_steps: ClassVar[bool] = False
    """Whether a stream without any training step leaves this callback nothing to do."""

    in_head_phase: bool | None = None
    """Whether the classifier alone trains until the task ends, so that features can be cached; None for methods without
    such a phase."""

    def __init__(self) -> None:
        self._task: Task | None = None
        self._check: CallCheck | None = None
        self._reached: set[str] = set()

    # what a method overrides; usable without a Trainer

    def install(self, module: nn.Module) -> None:
        """Put the method's modules beside the model and freeze what it freezes; a repeated call changes nothing."""

    def start_task(self, module: nn.Module, task: Task) -> None:
        """Prepare for a task: grow, set masks. Before the optimizer is built."""

    def end_task(self, module: nn.Module, task: Task) -> None:
        """Finish a task: freeze, average, fold in. Before it is evaluated."""

    def extra_loss(self, module: nn.Module) -> Tensor | None:
        """A term to add to the loss of this step, or None."""
        return None

    def adapter_modules(self, module: nn.Module) -> dict[str, nn.Module]:
        """Modules that the first training batch must reach, by name."""
        return {}

    def own_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters that this method means to train; each must be in an optimizer."""
        return {f"{n}.{k}": p for n, m in self.adapter_modules(module).items() for k, p in m.named_parameters()}

    def grows(self) -> bool:
        """Whether new tasks add parameters, or give those there another shape."""
        return False

    def conflict(self, other: ContinualCallback, module: nn.Module) -> str | None:
        """Why ``other`` cannot stand beside this callback on ``module``; None when nothing is known against it.

        Both callbacks of a pair are asked. What follows from :attr:`feature` and :attr:`training` need not be repeated.
        """
        return None

    def evaluation_weights(self, module: nn.Module) -> AbstractContextManager[None]:
        """A block in which the module has the weights that an evaluation in the middle of a task should see."""
        return nullcontext()

    def predictor(self, predict: Predict) -> Predict:
        """What the evaluation of a stream calls in place of ``predict``; the same where a method does not route."""
        return predict

    def report_events(self, module: nn.Module) -> list[dict[str, Any]]:
        """Series and matrices of this method for the run store, asked for after each task."""
        return []

    # the runner's hooks

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Called once, before the first task or after a resume."""

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Called before a task's ``fit``, with the random state forked and seeded by the task."""
        self.install(pl_module)
        self.start_task(pl_module, task)
        self._task = task

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Called after a task's ``fit``, before the evaluation."""
        self.end_task(pl_module, task)

    def on_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: Row) -> None:
        """Called after the tasks so far were evaluated."""

    def on_inside_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: InsideRow) -> None:
        """Called after an evaluation inside a task, and again for saved ones after a resume."""

    def on_stream_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: StreamResult) -> None:
        """Called once, after the last task."""

    # Lightning's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the structure in every stage, so that checkpoints load strictly; idempotent."""
        plugins = plugins_of(trainer)
        if plugins and plugins[0] is self:
            check_composition(plugins, pl_module)
        self.install(pl_module)
        stream = datamodule_of(trainer)
        if stage == "fit" and self._task is None and isinstance(getattr(stream, "task", None), int):
            self.on_task_start(trainer, pl_module, stream.tasks[stream.task])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise when a parameter of this method would silently stay untrained."""
        if self.training == "required" and self._task is None:
            raise RuntimeError(
                f"`{type(self).__name__}` must know the task before training;"
                " train with fit_stream(trainer, module, stream), or pass a TaskStream as `datamodule`"
            )
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        lost = [n for n, p in self.own_parameters(pl_module).items() if p.requires_grad and id(p) not in held]
        if lost:
            raise RuntimeError(
                f"{len(lost)} parameters of `{type(self).__name__}` are in no optimizer: {', '.join(lost[:4])};"
                " let `configure_optimizers` take self.parameters(), which holds the adapters as well"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting the calls of the adapters."""
        # each once: a compiled model does not run hooks that are added later
        modules = {n: m for n, m in self.adapter_modules(pl_module).items() if n not in self._reached}
        self._check = CallCheck(modules) if modules else None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the first batch, raise when an adapter was not reached."""
        if self._check is not None:
            check, self._check = self._check, None
            self._reached |= set(check.verify())

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add :meth:`extra_loss`, scaled as Lightning scaled the loss, so it equals a term the module adds itself."""
        term = self.extra_loss(pl_module)
        if term is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                term = scaler.scale(term)
            loss.add_(term.to(loss.dtype) / trainer.accumulate_grad_batches)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the task at the end of a fit; the next one must name its own."""
        if stage == "fit":
            self._task = None
            if self._check is not None:
                self._check.close()
                self._check = None


def plugins_of(trainer: pl.Trainer) -> list[ContinualCallback]:
    """The continual-learning callbacks of a Trainer, in its order."""
    return [c for c in callbacks_of(trainer) if isinstance(c, ContinualCallback)]


def tell_row(trainer: pl.Trainer, module: pl.LightningModule, row: Row) -> None:
    """Hand a row to the plugins of a Trainer; those that record come last, wherever they stand."""
    for plugin in sorted(plugins_of(trainer), key=lambda p: p.records):
        plugin.on_row(trainer, module, row)


def module_device(module: nn.Module) -> torch.device:
    """Device of the first parameter; CPU for a module without parameters."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))
