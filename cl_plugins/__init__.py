"""Continual learning for PyTorch Lightning: add one callback to the Trainer, train over a stream of tasks."""

from cl_plugins import _checkout

_checkout.install()

from cl_plugins.plugin import ContinualCallback, Row  # noqa: E402  the finder must be in place first
from cl_plugins.result import StreamResult  # noqa: E402
from cl_plugins.runner import end_task, fit_stream, start_task  # noqa: E402
from cl_plugins.task import Task  # noqa: E402

__version__ = "0.1.0"

__all__ = ["ContinualCallback", "Row", "StreamResult", "Task", "__version__", "end_task", "fit_stream", "start_task"]
