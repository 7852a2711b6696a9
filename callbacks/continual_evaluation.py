"""Evaluation inside tasks: what happens to old tasks while a new one is learned.

Matthias De Lange, Gido van de Ven and Tinne Tuytelaars, "Continual evaluation for lifelong learning: Identifying the
stability gap", ICLR 2023, arXiv 2205.13452. Implemented: evaluation every so many optimizer steps, in one pass over
all chosen tasks; the metrics are in :mod:`cl_plugins.inside_tasks`. Drawing some of the old tasks, for long streams, is
an addition of this library, see :mod:`cl_plugins.task_sampling`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cl_plugins._lightning import datamodule_of
from cl_plugins.evaluation import evaluation_tasks, taught_columns
from cl_plugins.inside_tasks import InsideRow, InsideTasks, sorted_rows
from cl_plugins.plugin import ContinualCallback, Row, plugins_of
from cl_plugins.pooled_evaluation import Counts, PooledLoader, evaluate_pooled
from cl_plugins.stream_state import same_randomness, stream_predict
from cl_plugins.task_sampling import draw_tasks

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.result import StreamResult
    from cl_plugins.task import Stream, Task


class ContinualEvaluation(ContinualCallback):
    """Evaluates tasks every few optimizer steps, inside the tasks, and changes nothing else.

    WHEN: behind the training batch with which ``trainer.global_step`` reaches a multiple of ``every_n_steps``, and once
    behind each task's end, when methods have finished it. The model is in eval mode for it and then in its own modes
    again, the random numbers go on as if nothing had been evaluated, and an average of the weights stands in where
    validation would see it too; so a run with this callback ends with the same weights, bit for bit, as one without.

    Tasks are evaluated when they are learned or under way; on a stream with an open vocabulary those to come as well,
    where ``tasks`` lists them. All are read through one loader, in batches that mix tasks. With several processes
    each counts its share. The rows are in the result (``result.inside``), in ``result.json`` under ``inside_tasks``, in
    the dashboard's run store, and as ``cl/inside/average_accuracy`` (``old_accuracy``, ``current_accuracy``,
    ``half_width``) in the Trainer's loggers. They are in this callback's state, so a resumed run has each row once.

    Args:
        every_n_steps: optimizer steps between evaluations, counted over the whole stream. More evaluations find lower
            minima, so compare runs of the same period.
        tasks: "seen" for all so far, a list of task indices, or how many old tasks to draw at random, 2 or more, anew
            for each evaluation; the task under way is then always evaluated as well.
        max_samples_per_task: evaluate at most so many samples of a task, the same ones every time; None for all.
        seed: for what is drawn.
        split: "test", or "validation" for the stream's validation data.
        prefix: what the loggers' keys start with.

    Raises:
        ValueError: for arguments out of range; at the start of a stream for tasks or data that it does not have.

    Note:
        A method that fits no batches ("none") has no steps, so it is evaluated at the tasks' ends alone. Weights that
        Lightning's own averaging callbacks keep are not put in.

    Example:
        >>> every = ContinualEvaluation(every_n_steps=50, tasks=20, max_samples_per_task=100)
        >>> every.rows
        []
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "neutral"

    def __init__(
        self,
        every_n_steps: int,
        tasks: Literal["seen"] | Sequence[int] | int = "seen",
        max_samples_per_task: int | None = None,
        seed: int = 0,
        split: Literal["test", "validation"] = "test",
        prefix: str = "cl/",
    ) -> None:
        super().__init__()
        _check_count("every_n_steps", every_n_steps, 1)
        if max_samples_per_task is not None:
            _check_count("max_samples_per_task", max_samples_per_task, 1)
        _check_count("seed", seed, 0)
        if isinstance(tasks, int):
            _check_count("tasks", tasks, 2)
        elif isinstance(tasks, str):
            if tasks != "seen":
                raise ValueError(f"`tasks` must be 'seen', a list of task indices or a number, got {tasks!r}")
        else:
            tasks = list(tasks)
            if not tasks or any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in tasks):
                raise ValueError(f"`tasks` must be 'seen', a list of task indices or a number, got {tasks!r}")
            if len(set(tasks)) < len(tasks):
                raise ValueError(f"`tasks` must be distinct, got {tasks!r}")
        if split not in ("test", "validation"):
            raise ValueError(f"`split` must be 'test' or 'validation', got {split!r}")
        self.every_n_steps, self.tasks = every_n_steps, tasks
        self.max_samples_per_task, self.seed = max_samples_per_task, seed
        self.split: Literal["test", "validation"] = split
        self.prefix = prefix
        self.rows: list[InsideRow] = []
        """The evaluations so far."""
        self._stream: Stream | None = None
        self._loader: PooledLoader | None = None
        self._step = 0
        self._untold = False

    @property
    def state_key(self) -> str:
        """The same in every version of the library; a Trainer takes one of them."""
        return "ContinualEvaluation"

    @property
    def inside(self) -> InsideTasks:
        """The evaluations so far, with the numbers that follow from them."""
        return InsideTasks(list(self.rows))

    # what is evaluated

    def _known(self, task: int) -> tuple[int, int]:
        """Columns learned before ``task``, and with it."""
        assert self._stream is not None
        taught = taught_columns(self._stream, task)
        return taught.start, taught.stop

    def choose(self, task: int, step: int) -> list[int]:
        """The columns that an evaluation at ``step`` inside ``task`` covers."""
        old, seen = self._known(task)
        if isinstance(self.tasks, int):
            return [*draw_tasks(old, self.tasks, self.seed, step), *range(old, seen)]
        if isinstance(self.tasks, str):
            return list(range(seen))
        assert self._stream is not None
        reach = len(evaluation_tasks(self._stream)) if getattr(self._stream, "open_vocabulary", False) else seen
        return sorted(t for t in self.tasks if t < reach)

    def _open(self, trainer: pl.Trainer, tasks: Sequence[int]) -> PooledLoader:
        """A loader with the data of ``tasks``; made anew when one is missing."""
        stream: Any = self._stream
        if self._loader is None or not set(tasks) <= set(self._loader.tasks):
            have = [] if self._loader is None else self._loader.tasks
            give = stream.test_loader if self.split == "test" else stream.validation_loader
            self._loader = PooledLoader(
                {t: give(t) for t in sorted({*have, *tasks})},
                max_samples=self.max_samples_per_task,
                seed=self.seed,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
        return self._loader

    def _evaluate(self, trainer: pl.Trainer, module: pl.LightningModule, task: int, tasks: Sequence[int]) -> Counts:
        assert self._stream is not None
        with same_randomness(), ExitStack() as weights:
            for plugin in plugins_of(trainer):
                weights.enter_context(plugin.evaluation_weights(module))
            loader, predict = self._open(trainer, tasks), stream_predict(trainer, self._stream)
            return evaluate_pooled(module, self._stream, loader, tasks, task, trainer=trainer, predict=predict)

    def _add(
        self, trainer: pl.Trainer, module: pl.LightningModule, counts: Counts, task: int, end: bool, seconds: float
    ) -> None:
        tasks = tuple(sorted(counts.total))
        old, seen = self._known(task)
        row = InsideRow(
            step=trainer.global_step,
            task=task,
            old=old,
            seen=seen,
            tasks=tasks,
            correct=tuple(counts.correct[t] for t in tasks),
            total=tuple(counts.total[t] for t in tasks),
            correct_in_task=tuple(counts.correct_in_task[t] for t in tasks),
            every=self.every_n_steps,
            sampled=isinstance(self.tasks, int) and sum(t < old for t in tasks) < old,
            end=end,
            seconds=seconds,
        )
        self.rows = sorted_rows([*self.rows, row]) if self._repeats(row) else [*self.rows, row]
        self._tell(trainer, module)
        for plugin in plugins_of(trainer):
            plugin.on_inside_row(trainer, module, row)
        values = {f"{self.prefix}inside/{k}": v for k, v in _logged(row).items() if v == v}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _repeats(self, row: InsideRow) -> bool:
        return bool(self.rows) and (self.rows[-1].task, self.rows[-1].step, self.rows[-1].end) >= (
            row.task, row.step, row.end,
        )  # fmt: skip

    def _tell(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """After a resume, tell the others the rows that were saved."""
        if self._untold:
            self._untold = False
            for row in self.rows:
                for plugin in plugins_of(trainer):
                    plugin.on_inside_row(trainer, module, row)

    # the runner's hooks

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Begin without rows; a resume brings its own."""
        self.rows, self._untold, self._loader = [], False, None
        self._take(stream)

    def _take(self, stream: Any) -> None:
        columns = len(evaluation_tasks(stream))
        if isinstance(self.tasks, list) and max(self.tasks) >= columns:
            raise ValueError(
                f"`tasks` must be below the number of tasks of {stream.name!r} ({columns}), got {max(self.tasks)}"
            )
        if self.split == "validation" and (
            getattr(stream, "validation", None) is None or evaluation_tasks(stream) != stream.tasks
        ):
            raise ValueError(
                f"`split` must be 'test' for {stream.name!r}, which has no validation data for each task; build the"
                " stream with `validation_fraction`"
            )
        self._stream = stream

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Forget the loader, since data sets may be others now."""
        super().on_task_start(trainer, pl_module, task)
        self._loader = None

    def on_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: Row) -> None:
        """Add the evaluation behind a task's end: the stream's own counts where they cover the same samples."""
        if row.after < 0:
            return
        if self._stream is None:
            self._take(datamodule_of(trainer))
        started = time.perf_counter()
        seen = self._known(row.after)[1]
        tasks = list(range(seen)) if isinstance(self.tasks, int) else self.choose(row.after, trainer.global_step)
        own = self.split == "test" and all(row.total[t] is not None for t in tasks)
        if own and self.max_samples_per_task is not None:
            own = all((row.total[t] or 0) <= self.max_samples_per_task for t in tasks)
        if own:
            lines = (row.correct, row.total, row.correct_in_task)
            counts = Counts(*({t: line[t] or 0 for t in tasks if row.total[t]} for line in lines))
            self._add(trainer, pl_module, counts, row.after, True, 0.0)
        else:
            tasks = self.choose(row.after, trainer.global_step)
            counts = self._evaluate(trainer, pl_module, row.after, tasks)
            self._add(trainer, pl_module, counts, row.after, True, time.perf_counter() - started)

    def on_stream_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: StreamResult) -> None:
        """Put the rows into the result."""
        result.inside_tasks = list(self.rows)
        self._loader = None

    # Lightning's hooks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on from the step of a resume."""
        super().on_train_start(trainer, pl_module)
        if self._stream is None:
            self._take(datamodule_of(trainer))
        self._step = trainer.global_step
        self._tell(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate when a multiple of the period was reached, behind the optimizer step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        before, self._step = self._step, trainer.global_step
        if self._step // self.every_n_steps == before // self.every_n_steps:
            return
        started = time.perf_counter()
        task = 0 if self._task is None else self._task.index
        counts = self._evaluate(trainer, pl_module, task, self.choose(task, self._step))
        self._add(trainer, pl_module, counts, task, False, time.perf_counter() - started)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the loader's workers."""
        self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """The rows, as plain values."""
        return {"rows": [row.to_dict() for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the saved rows."""
        self.rows = [InsideRow.from_dict(row) for row in state_dict["rows"]]
        self._untold = bool(self.rows)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        more = ", or 'seen'" if name == "tasks" else ""
        raise ValueError(f"`{name}` must be a whole number of {least} or more{more}, got {value!r}")


def _logged(row: InsideRow) -> dict[str, float]:
    """The numbers for the loggers; NaN where undefined."""
    old = [a for t, a in row.accuracy.items() if t < row.old]
    average = row.average
    return {
        "average_accuracy": average.value,
        "old_accuracy": sum(old) / len(old) if old else float("nan"),
        "current_accuracy": row.current,
        **({"half_width": average.half_width} if row.sampled else {}),
    }
