"""What a checkpoint must hold beside Lightning's own state, so that a stream goes on inside any task."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_plugins._lightning import Callback, callbacks_of
from cl_plugins._processes import of_all_processes
from cl_plugins._reading import load_tensors
from cl_plugins.evaluation import Predict, default_predict
from cl_plugins.label_scores import LabelScores
from cl_plugins.plugin import Row
from cl_plugins.result import StreamResult
from cl_plugins.stream_checkpoint import StreamCheckpoint
from cl_plugins.task import Stream

if TYPE_CHECKING:
    import pytorch_lightning as pl

KEY = "cl_plugins.StreamState"


def rows_to_state(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as plain values and three tensors: a stream of 1,000 tasks saves a million counts each time."""
    told = [n for n, row in enumerate(rows) if row.confusion]
    confusions = [rows[n].confusion_cells for n in told]
    return {
        "after": [row.after for row in rows],
        "seconds": [row.seconds for row in rows],
        "counts": torch.stack([row.cells for row in rows]) if rows else torch.zeros(0, dtype=torch.int64),
        "confusion": {
            "rows": told,
            "counts": torch.stack(confusions or [torch.empty(0, dtype=torch.int64)])[: len(told)],
        },
        "labels": {n: _plain(asdict(row.labels)) for n, row in enumerate(rows) if row.labels is not None},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def rows_from_state(state: dict[str, Any]) -> list[Row]:
    """The inverse of :func:`rows_to_state`."""
    rows = []
    told = state["confusion"]
    confusions = dict(zip(told["rows"], told["counts"].tolist(), strict=True))
    for n, (after, seconds, counts) in enumerate(
        zip(state["after"], state["seconds"], state["counts"].tolist(), strict=True)
    ):
        correct, total, in_task = (tuple(None if c < 0 else c for c in column) for column in counts)
        confusion = tuple(map(tuple, confusions.get(n, ())))
        scores = state["labels"].get(n)
        labels = None if scores is None else LabelScores.from_state(scores)
        rows.append(Row(after, correct, total, in_task, confusion, seconds, labels))
    return rows


def restore_result(result: StreamResult, state: dict[str, Any]) -> None:
    """Put the rows and times of a saved state into an empty result."""
    result.rows[:] = rows_from_state(state["rows"])
    result.initial = next(iter(rows_from_state(state["initial"])), None)
    result.train_seconds[:] = state["train_seconds"]
    result.trainable_parameters = state.get("trainable_parameters", 0)


def random_states() -> dict[str, Any]:
    """States of torch's, NumPy's and Python's global generators as tensors and plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """The inverse of :func:`random_states`."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in states and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def same_randomness() -> Iterator[None]:
    """Whatever the block draws, the global generators of torch, NumPy and Python go on as if it had not run."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def finished_rows(trainer: pl.Trainer) -> list[Row]:
    """The rows that a resumed stream begins with; none in a stream that starts anew."""
    state = next((c for c in callbacks_of(trainer) if isinstance(c, StreamState)), None)
    return [] if state is None else state.rows


def stream_predict(trainer: pl.Trainer, stream: Stream) -> Predict:
    """How the stream under way is evaluated, before methods route samples; in a loop of one's own, the stream's way."""
    told = next((c.predict for c in callbacks_of(trainer) if isinstance(c, StreamState)), None)
    own: Predict = getattr(stream, "predict", default_predict)
    return own if told is None else told


class StreamState(Callback):
    """Puts the position in the stream, the finished rows and the random states into every checkpoint.

    WHEN: read by :func:`cl_plugins.fit_stream` before it resumes; the random states are set again when training starts.
    """

    def __init__(self) -> None:
        self.task = 0
        self.started: float | None = None
        """When the task under way began, by ``time.perf_counter``; None between tasks."""
        self.predict: Predict | None = None
        """How the stream under way is evaluated; None before it starts."""
        self._result: StreamResult | None = None
        self._identity: dict[str, Any] = {}
        self._pending: list[dict[str, Any]] | None = None

    @classmethod
    def for_stream(cls, stream: Stream) -> StreamState:
        """One that reads checkpoints of ``stream``."""
        state = cls()
        state.begin(stream, StreamResult.for_stream(stream))
        return state

    @property
    def state_key(self) -> str:
        """The same in every version of the library."""
        return KEY

    @property
    def rows(self) -> list[Row]:
        """The rows of the tasks that are finished."""
        return [] if self._result is None else list(self._result.rows)

    def begin(self, stream: Stream, result: StreamResult) -> None:
        """Remember whose rows to save."""
        self._result = result
        self._identity = {"name": stream.name, "tasks": [list(t.classes) for t in stream.tasks]}

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and tensors, loadable with ``weights_only=True``; all processes must call it."""
        result = self._result
        return {
            "task": self.task,
            "stream": self._identity,
            "rows": rows_to_state(self.rows),
            "initial": rows_to_state([] if result is None or result.initial is None else [result.initial]),
            "train_seconds": [] if result is None else list(result.train_seconds),
            "trainable_parameters": 0 if result is None else result.trainable_parameters,
            "spent": 0.0 if self.started is None else time.perf_counter() - self.started,
            "random": of_all_processes(random_states()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the random states until training starts, since building optimizers and loaders draws too."""
        self._pending = state_dict["random"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on where the checkpoint stopped: in the data, in the random numbers and in the right epoch."""
        loop: Any = trainer.fit_loop
        if loop._combined_loader_states_to_load:
            # something built the loaders before the checkpoint's loops were read, as `estimated_stepping_batches` in
            # `configure_optimizers` does: Lightning has left them at their beginning
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)
        self.restore_random_states(trainer)
        done = loop.epoch_progress.current
        if getattr(loop, "restarted_mid_epoch", False) and done.processed == done.started:
            # resumed behind an epoch's last step: Lightning would not count the epoch that begins now, and a second
            # resume would train it twice
            loop.reset_restart_stage()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the savers write what waited for the end of the epoch before, ahead of every other callback."""
        for callback in callbacks_of(trainer):
            if isinstance(callback, StreamCheckpoint):
                callback.save_before_epoch(trainer)

    def restore_random_states(self, trainer: pl.Trainer) -> None:
        """Go on with the loaded random numbers now, not when training starts; each process with its own.

        Where another number of processes goes on, all take those of the first.
        """
        if self._pending is not None:
            same = len(self._pending) == trainer.world_size
            set_random_states(self._pending[trainer.global_rank if same else 0])
            self._pending = None

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The saved state in a checkpoint, checked against the stream, and the whole checkpoint.

        Raises:
            ValueError: when the file is no stream checkpoint or one of another stream.
        """
        checkpoint = load_tensors(path)
        callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
        state: dict[str, Any] | None = callbacks.get(KEY) if isinstance(callbacks, dict) else None
        if state is None:
            raise ValueError(
                f"`ckpt_path` must be a checkpoint written by fit_stream, got {str(path)!r} without a stream"
            )
        _check_state(state, path)
        if state["stream"] != self._identity:
            raise ValueError(
                f"`ckpt_path` must belong to this stream, got {str(path)!r} of {state['stream'].get('name')!r} with"
                f" {len(state['stream'].get('tasks', []))} tasks; use the same scenario, class order and seeds"
            )
        return state, checkpoint

    @staticmethod
    def load_weights(module: nn.Module, path: Path) -> None:
        """Strictly load the weights alone, for methods without a training phase."""
        weights: dict[str, Tensor] = load_tensors(path)["state_dict"]
        module.load_state_dict(weights)


def _sound(row: Row) -> bool:
    """Whether a row that was read holds numbers of the right kind."""
    counts = (c for line in (row.correct, row.total, row.correct_in_task) for c in line)
    whole = all(c is None or type(c) is int for c in counts) and all(type(c) is int for r in row.confusion for c in r)
    return whole and type(row.after) is int and isinstance(row.seconds, (int, float))


def _check_state(state: Any, path: Path) -> None:
    """Raise a ValueError when a part of the saved state is missing or of another kind."""
    kinds = {"task": int, "stream": dict, "rows": dict, "initial": dict, "train_seconds": list, "random": list}
    wrong = [k for k, kind in kinds.items() if not isinstance(state, dict) or not isinstance(state.get(k), kind)]
    if not wrong:
        try:
            if not all(_sound(row) for part in ("rows", "initial") for row in rows_from_state(state[part])):
                wrong = ["rows"]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            wrong = ["rows"]
    if wrong:
        raise ValueError(
            f"{str(path)!r} must hold the whole state of a stream, got one with a damaged `{wrong[0]}`; go on from an"
            " earlier checkpoint"
        )
