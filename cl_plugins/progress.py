"""One progress bar over a whole stream: tasks, epochs, time left, and how the numbers stand."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO

from tqdm import tqdm

from cl_plugins.plugin import ContinualCallback, Row
from cl_plugins.result import StreamResult
from cl_plugins.stream_state import finished_rows
from cl_plugins.task import Stream, Task

if TYPE_CHECKING:
    import pytorch_lightning as pl


class StreamProgress(ContinualCallback):
    """Shows a bar over tasks and epochs with the running accuracy and forgetting; one line a task where no terminal is.

    WHEN: moves with each batch, writes numbers after each task's evaluation; on the first process only.

    Args:
        label: what stands in front, such as the method's name.
        enabled: False shows nothing.
        file: where to write; standard error when None.
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "neutral"

    def __init__(self, label: str = "stream", enabled: bool = True, file: TextIO | None = None) -> None:
        super().__init__()
        self.label = label
        self.enabled = enabled
        self._file = file or sys.stderr
        self._bar: Any = None
        self._result: StreamResult | None = None
        self._n_tasks = 0

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Open the bar."""
        self._result = StreamResult.for_stream(stream)
        for row in finished_rows(trainer):
            if row.after >= 0:
                self._result.add(row)
        self._n_tasks = len(stream.tasks)
        if not self.enabled or trainer.global_rank != 0:
            return
        self._bar = tqdm(
            total=float(self._n_tasks),
            desc=self.label,
            bar_format="{desc}: {percentage:3.0f}%|{bar:10}| {elapsed} < {remaining}{postfix}",
            file=self._file,
            disable=not self._file.isatty(),
            mininterval=0.2,
        )

    def _move_to(self, position: float, text: str | None = None) -> None:
        if self._bar is None:
            return
        if text is not None:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(position - self._bar.n)

    def _numbers(self) -> str:
        if self._result is None or not self._result.rows:
            return ""
        accuracy, lost = self._result.average_accuracy, self._result.forgetting
        precision = self._result.label_scores.get("map")
        of, best = ("", "") if precision is None else (" of label accuracy", f", mAP {precision:.3f}")
        kind = "accuracy" if precision is None else "label accuracy"
        return f"{best}, {kind} {accuracy:.3f}" + ("" if lost != lost else f", forgetting{of} {lost:.3f}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar by one batch."""
        if self._bar is None or self._bar.disable or self._task is None:
            return
        batches, epochs = max(int(trainer.num_training_batches), 1), max(trainer.max_epochs or 1, 1)
        done = (trainer.current_epoch + (batch_idx + 1) / batches) / epochs
        text = f"task {self._task.index + 1}, epoch {trainer.current_epoch + 1}/{epochs}"
        self._move_to(self._task.index + 0.98 * min(done, 1.0), text + self._numbers() if batch_idx % 20 == 0 else None)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Say that the evaluation has begun."""
        self._move_to(task.index + 0.98, f"task {task.index + 1}, evaluating{self._numbers()}")

    def on_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: Row) -> None:
        """Show the numbers after the task."""
        if row.after < 0 or self._result is None:
            return
        self._result.add(row)
        count = self._n_tasks
        self._move_to(row.after + 1.0, f"task {row.after + 1}/{count} done{self._numbers()}")
        if self._bar is not None and self._bar.disable:
            print(f"{self.label}: task {row.after + 1}/{count} done{self._numbers()}", file=self._file, flush=True)

    def on_stream_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: StreamResult) -> None:
        """Close the bar."""
        self.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that an error starts on a line of its own."""
        self.close()

    def close(self) -> None:
        """Close the bar; a repeated call changes nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
