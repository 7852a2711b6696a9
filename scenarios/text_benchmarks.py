"""Published streams of text tasks, read from their own files: CoIN and TRACE.

CoIN (Chen et al., 2024, arXiv 2403.08350): eight kinds of questions about images, in the order of arXiv 2410.10868.
TRACE (Wang et al., 2023, arXiv 2310.06762): eight text tasks, in the order of the benchmark.

Both are scored by exact match here; TRACE's own measures for each task (ROUGE-L, edit similarity, SARI) are not
implemented, so figures are comparable within this library alone. Images of CoIN are not read: their paths are in the
batches under "images", for a module of the user's own that looks at them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .instructions import InstructionStream

COIN_TASKS = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA")
TRACE_TASKS = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")


def _stream(kind: str, order: tuple[str, ...], root: str | Path | None, options: dict[str, Any]) -> InstructionStream:
    if root is None:
        raise ValueError(
            f"`root` must be the folder of {kind} with one folder per task ({', '.join(order)}), got None;"
            " give --data root=DIR to cl-bench, or root= to build_scenario"
        )
    options["tasks"] = list(order) if options.get("tasks") is None else options["tasks"]
    return InstructionStream(root=root, format=kind, **options)


def coin(root: str | Path | None = None, **options: Any) -> InstructionStream:
    """CoIN: ``<root>/<task>/train.json`` and ``test.json``, in the published order.

    Args:
        root: folder with one folder per task, named as in :data:`COIN_TASKS`.
        options: of :class:`~cl_plugins.scenarios.InstructionStream`; ``tasks`` picks other folders or another order.

    Raises:
        ValueError: without a root, or for a folder that is not there, or a faulty file.
        FileNotFoundError: for a missing file.
    """
    options.setdefault("name", "coin")
    return _stream("coin", COIN_TASKS, root, options)


def trace(root: str | Path | None = None, **options: Any) -> InstructionStream:
    """TRACE: ``<root>/<task>/train.json``, ``eval.json`` and ``test.json``, in the published order.

    Args:
        root: folder with one folder per task, named as in :data:`TRACE_TASKS`.
        options: of :class:`~cl_plugins.scenarios.InstructionStream`; ``tasks`` picks other folders or another order.

    Raises:
        ValueError: without a root, or for a folder that is not there, or a faulty file.
        FileNotFoundError: for a missing file.
    """
    options.setdefault("name", "trace")
    return _stream("trace", TRACE_TASKS, root, options)
