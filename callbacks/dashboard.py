"""Records a run and keeps an HTML report about it up to date."""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from tqdm import tqdm

from cl_plugins.plugin import ContinualCallback, Row, plugins_of
from cl_plugins.result import MOST_CONFUSED, StreamResult
from cl_plugins.run_writer import RunWriter, check_run_id, encode_event
from cl_plugins.stream_state import finished_rows

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.inside_tasks import InsideRow
    from cl_plugins.task import Stream, Task

_WORTH_AN_ALERT = 0.2


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """Number of parameters of the model and of what plugins put beside it."""
    plugins = getattr(module, "plugins", None)
    own = {id(p) for p in plugins.parameters()} if isinstance(plugins, nn.Module) else set()
    everything = list(module.parameters())
    return {
        "model": sum(p.numel() for p in everything if id(p) not in own),
        "plugins": sum(p.numel() for p in everything if id(p) in own),
    }


def peak_bytes(device: torch.device) -> int | None:
    """Most memory used so far: of the GPU, or of the whole process on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ForgettingDashboard(ContinualCallback):
    """Records every evaluation of a stream as it happens and renders an HTML report that works offline.

    WHEN: events are written when the stream starts, after each task's evaluation, when the stream ends and when
    training fails; then the report is rendered anew. Of batches it knows only the evaluations that a
    :class:`ContinualEvaluation` beside it makes. Only the first process writes.

    Note:
        A full disk does not stop training: the recording ends with a warning. Where rendering would take more than a
        tenth of the run's time, as with hundreds of tasks of a second each, it waits for a later task.

    Args:
        path: folder of the runs; this one gets the folder ``<path>/<run_id>`` with ``events.*.jsonl`` and the report.
        run_id: the run's name; time and random letters when None. Give the same name to go on with a resumed run.
        meta: what the report should know of the run: method, scenario, seed, order_seed, or other plain values. The
            method defaults to the names of the Trainer's continual-learning methods.
        report: file name of the report in the run's folder; None records without a report.

    Raises:
        ValueError: for a ``run_id`` that is no safe folder name, or a ``report`` that is no file name.
        RuntimeError: at the start of the stream, when another process is writing the same run.

    Example:
        >>> dashboard = ForgettingDashboard("runs", run_id="ovor-seed0", meta={"method": "ovor", "seed": 0})
        >>> dashboard.report.as_posix()
        'runs/ovor-seed0/report.html'
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "neutral"
    records: ClassVar[bool] = True

    def __init__(
        self,
        path: str | Path = "runs",
        run_id: str | None = None,
        meta: Mapping[str, Any] | None = None,
        report: str | None = "report.html",
    ) -> None:
        super().__init__()
        if meta is not None and not isinstance(meta, Mapping):
            raise TypeError(f"`meta` must be a mapping of plain values, got {meta!r}")
        self.path = Path(path)
        self.run_id = run_id if run_id is None else check_run_id(run_id)
        self.meta = dict(meta or {})
        if report is not None and (not report or Path(report).name != report):
            raise ValueError(
                f"`report` must be a file name in the run's folder, got {report!r}; choose the folder with `path`"
            )
        self._report = report
        self._writer: RunWriter | None = None
        self._before: Row | None = None
        self._begun = self._rendering = 0.0
        self._task_started: float | None = None
        self._cost: dict[str, Any] = {}
        self._told: dict[tuple[Any, Any], bytes] = {}

    @property
    def report(self) -> Path | None:
        """Where the report lies; None without one, or before the run has a name."""
        if self._report is None or self.run_id is None:
            return None
        return self.path / self.run_id / self._report

    def _write(self, kind: str, **fields: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(kind, **fields)
        except OSError as error:
            warnings.warn(f"the run is recorded no further, training goes on: {error}", stacklevel=2)
            self._close()

    def _flush(self, always: bool = False) -> None:
        """Put what was written on the disk and render the report, unless that takes too much of the time."""
        if self._writer is None:
            return
        try:
            self._writer.sync()
            elapsed = time.perf_counter() - self._begun
            if self.report is None or not (always or self._rendering <= max(0.1 * elapsed, 5.0)):
                return
            from cl_plugins.report import write_report
            from cl_plugins.runs import read_run

            started = time.perf_counter()
            write_report([read_run(self._writer.folder)], self.report)
            self._rendering += time.perf_counter() - started
        except OSError as error:
            warnings.warn(f"the report could not be written, training goes on: {error}", stacklevel=2)

    # the runner's hooks

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Open the run's file and say what the run is; after a resume, also what its checkpoint knew."""
        if trainer.global_rank != 0:
            return
        self._close()
        if self._report is not None:  # seconds, best before there is a run that an interruption would leave half open
            importlib.import_module("cl_plugins.report")
        self._writer = RunWriter(self.path, self.run_id)
        self.run_id = self._writer.run_id
        self._begun, self._rendering, self._before = time.perf_counter(), 0.0, None
        self._told.clear()
        rows = finished_rows(trainer)
        methods = [type(p).__name__ for p in plugins_of(trainer) if p.training != "neutral"]
        known = {
            "method": " + ".join(methods) or "finetune",
            "scenario": stream.name,
            **self.meta,
            "stream": stream.provenance(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pytorch_lightning": version("pytorch_lightning"),
            },
        }
        digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode("utf-8")).hexdigest()
        self._write("run", **{**known, "config_hash": digest[:16], "from_task": len(rows)})
        columns = StreamResult.for_stream(stream)  # a stream may be evaluated on other tasks than it trains on
        for index, task in enumerate(columns.tasks):
            learned = columns.learned_at[index] if columns.learned_at else index
            names = {"name": task.name, "classes": task.classes, "class_names": task.class_names}
            self._write("task", index=index, learned_at=learned, **names)
        for row in rows:
            self._record(row)
        self._flush()

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Start the clock."""
        super().on_task_start(trainer, pl_module, task)
        self._task_started = time.perf_counter()
        self._cost = {"trainable": 0}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count what is trained."""
        super().on_train_start(trainer, pl_module)
        self._cost["trainable"] = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Stop the clock."""
        super().on_task_end(trainer, pl_module, task)
        if self._task_started is not None:
            self._cost["train_seconds"] = time.perf_counter() - self._task_started

    def on_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: Row) -> None:
        """Record the evaluation, the costs and what the other plugins report; render."""
        if self._writer is None:
            return
        self._record(row)
        if row.after >= 0:
            cost = {**self._cost, "eval_seconds": row.seconds, "parameters": parameter_counts(pl_module)}
            self._write("cost", task=row.after, **cost, peak_bytes=peak_bytes(trainer.strategy.root_device))
            for plugin in plugins_of(trainer):
                for event in plugin.report_events(pl_module):
                    self._report_event({k: v for k, v in event.items() if k not in ("kind", "schema", "time")})
        self._flush()

    def on_inside_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: InsideRow) -> None:
        """Record an evaluation inside a task; the report waits for the task's end."""
        self._write("mid", **row.to_dict())

    def on_stream_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: StreamResult) -> None:
        """Close the run and say where its report is."""
        if self._writer is None:
            return
        self._write("end", status="finished")
        self._flush(always=True)
        self._close()
        if self.report is not None:
            tqdm.write(f"report: {self.report}")  # in front of a bar that is still open

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Record why training stopped; what was recorded before stays."""
        if self._writer is None:
            return
        self._write("end", status="failed", error=f"{type(exception).__name__}: {exception}"[:2000])
        self._flush(always=True)
        self._close()

    def _report_event(self, event: dict[str, Any]) -> None:
        """Write a plugin's event unless the same was written before; methods tell their whole history each time."""
        key, content = (event.get("name"), event.get("task")), hashlib.sha256(encode_event(event)).digest()
        if self._told.get(key) != content:
            self._told[key] = content
            self._write("plug", **event)

    def _record(self, row: Row) -> None:
        """The row's events; trailing tasks that were not evaluated are left out."""
        count = max((j + 1 for j, total in enumerate(row.total) if total is not None), default=0)
        self._write(
            "row",
            after=row.after,
            correct=row.correct[:count],
            total=row.total[:count],
            correct_in_task=row.correct_in_task[:count],
            seconds=row.seconds,
            **({} if row.labels is None else {"labels": asdict(row.labels)}),
        )
        if 1 < len(row.confusion) <= MOST_CONFUSED and row.after >= 0:
            self._write("conf", after=row.after, counts=row.confusion)
        before, self._before = self._before, row
        if before is None or before.after < 0:
            return
        for j, (was, is_now) in enumerate(zip(_accuracies(before), _accuracies(row), strict=True)):
            if was is not None and is_now is not None and was - is_now >= _WORTH_AN_ALERT:
                kind = "accuracy" if row.labels is None else "label accuracy"
                text = f"{kind} fell from {was:.3f} to {is_now:.3f} while task {row.after} was learned"
                self._write("alert", task=j, after=row.after, text=text)

    def _close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
            except OSError as error:
                warnings.warn(f"the end of the run may be missing on the disk: {error}", stacklevel=2)


def _accuracies(row: Row) -> list[float | None]:
    """Accuracy per task; None where it was not measured."""
    return [c / t if c is not None and t else None for c, t in zip(row.correct, row.total, strict=True)]
