"""What ``cl-bench run`` and ``cl-bench sweep`` can measure beside the accuracy at the end of each task."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def add_measuring(parser: ArgumentParser) -> None:
    """The options of evaluations inside tasks, and of drift."""
    parser.add_argument(
        "--eval-every", type=int | None, default=None, help="evaluate inside tasks, too, after so many optimizer steps"
    )
    parser.add_argument(
        "--eval-tasks", type=int | None, default=None, help="with --eval-every: draw so many old tasks, instead of all"
    )
    parser.add_argument(
        "--eval-samples", type=int | None, default=None, help="with --eval-every: at most so many samples of a task"
    )
    parser.add_argument("--drift", action="store_true", help="measure features, calibration and memory at task ends")
