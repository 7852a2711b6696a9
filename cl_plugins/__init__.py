"""Continual learning for PyTorch Lightning: add one callback to the Trainer, train over a stream of tasks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cl_plugins import _checkout

_checkout.install()

if TYPE_CHECKING:
    from cl_plugins.plugin import ContinualCallback, Row
    from cl_plugins.result import StreamResult
    from cl_plugins.runner import end_task, fit_stream, start_task
    from cl_plugins.task import Task

__version__ = "0.1.0"

__all__ = ["ContinualCallback", "Row", "StreamResult", "Task", "__version__", "end_task", "fit_stream", "start_task"]

_HOME = {
    "ContinualCallback": "plugin",
    "Row": "plugin",
    "StreamResult": "result",
    "Task": "task",
    "end_task": "runner",
    "fit_stream": "runner",
    "start_task": "runner",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: ``cl-bench --help`` need not wait for torch and Lightning."""
    if name not in _HOME:
        raise AttributeError(f"module 'cl_plugins' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"cl_plugins.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
