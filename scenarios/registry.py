"""Data sets and streams by name; what a name stands for is imported when it is built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from cl_plugins._text import did_you_mean

if TYPE_CHECKING:
    from .stream import TaskStream
    from .stream_data import StreamData


@dataclass(frozen=True)
class DataInfo:
    """A data set that :func:`load_data` knows.

    Attributes:
        name: what it is called.
        description: one line.
        loader: ``"module:function"`` in this package.
        options: arguments of the function.
        needs: what must be there; empty for data that come along.
    """

    name: str
    description: str
    loader: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""


@dataclass(frozen=True)
class ScenarioInfo:
    """A stream that :func:`build_scenario` knows.

    Attributes:
        name: what it is called.
        description: one line.
        builder: ``"module:callable"`` in this package.
        options: arguments of the callable, which the caller's override.
        sizes: tasks, classes and samples, in words.
        needs: what must be there; empty for data that come along.
        data: name of the data set, for streams over one.
        modality: what its samples are, see :attr:`cl_plugins.scenarios.TaskStream.modality`.
    """

    name: str
    description: str
    builder: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: str = ""
    needs: str = ""
    data: str = ""
    modality: str = "image"


_DATA: dict[str, DataInfo] = {}
_SCENARIOS: dict[str, ScenarioInfo] = {}


def register_data(info: DataInfo) -> None:
    """Add a data set, or replace the one of the same name."""
    _DATA[info.name] = info


def register_scenario(info: ScenarioInfo) -> None:
    """Add a stream, or replace the one of the same name."""
    _SCENARIOS[info.name] = info


def data_names() -> list[str]:
    """Names that :func:`load_data` and :class:`ClassIncremental` take, sorted."""
    return sorted(_DATA)


def scenario_names() -> list[str]:
    """Names that :func:`build_scenario` takes, sorted."""
    return sorted(_SCENARIOS)


def scenario_info(name: str) -> ScenarioInfo:
    """What is known about a stream without building it.

    Raises:
        ValueError: for an unknown name, with the nearest known one.

    Example:
        >>> scenario_info("split-digits").sizes
        '5 tasks x 2 classes; 1,433 training and 364 test images'
    """
    if name not in _SCENARIOS:
        raise ValueError(f"`name` must be a known scenario, got {name!r}{did_you_mean(str(name), _SCENARIOS)}")
    return _SCENARIOS[name]


def _resolve(target: str) -> Any:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(f"cl_plugins.scenarios.{module}"), function)


def load_data(name: str, *, root: str | None = None, download: bool = False, **options: Any) -> StreamData:
    """A data set by name; a stream's name stands for its data.

    Args:
        name: see :func:`data_names`.
        root: folder of data that is not bundled.
        download: allow to download it.
        options: of the data set's own function, such as ``size`` of the images.

    Raises:
        ValueError: for an unknown name or option, with the nearest known one.
        FileNotFoundError: for data that is not there.
    """
    known = _DATA.get(name) or _DATA.get(_SCENARIOS[name].data if name in _SCENARIOS else "")
    if known is None:
        raise ValueError(f"`data` must be a known data set, got {name!r}{did_you_mean(name, [*_DATA, *_SCENARIOS])}")
    where = {"root": root, "download": download} if known.needs else {}
    loader = _resolve(known.loader)
    parameters = inspect.signature(loader).parameters
    taken = [key for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    unknown = next((key for key in options if key not in taken), None) if len(taken) == len(parameters) else None
    if unknown is not None:
        raise ValueError(
            f"`{unknown}` must be an option of {known.name!r}, which takes"
            f" {', '.join(taken) or 'none'}{did_you_mean(unknown, taken)}"
        )
    return cast("StreamData", loader(**{**where, **known.options, **options}))


def build_scenario(name: str, **options: Any) -> TaskStream:
    """A stream by name.

    Args:
        name: see :func:`scenario_names`.
        options: of the scenario's class, such as ``n_tasks``, ``order_seed``, ``data_seed``, ``batch_size``, ``root``.
            ``size`` of the images goes to the data set that the stream is over.

    Raises:
        ValueError: for an unknown name, with the nearest known one.

    Example:
        >>> print(build_scenario("split-digits"))
        split-digits: 5 tasks, 10 classes, 1433 training, 0 validation and 364 test samples
    """
    info = scenario_info(name)
    given = {"name": name, **info.options}
    if "classes" in options:
        given.pop("n_tasks", None)
    if info.data and "size" in options:
        size = options.pop("size")
        options["data_options"] = {"size": size, **(options.get("data_options") or {})}
    return cast("TaskStream", _resolve(info.builder)(**{**given, **options}))
