"""Streams of tasks and the data they need: ``from cl_plugins.scenarios import ClassIncremental``."""

if __name__ == "scenarios":
    raise ImportError("import cl_plugins.scenarios instead")

from . import catalog  # noqa: F401  registers the names
from .boundaries import Blurry, FewShot, Repetition
from .class_incremental import ClassIncremental, TaskIncremental
from .data import BatchSource, Split, TensorSource
from .domains import DomainIncremental
from .from_data import stream_from
from .instructions import InstructionStream
from .labels import find_labels
from .multi_domain import MTIL, XTAIL
from .multi_label import MultiLabel
from .references import Cumulative, Joint
from .registry import build_scenario, data_names, load_data, scenario_info, scenario_names
from .stream import TaskStream
from .stream_data import StreamData

__all__ = [
    "MTIL",
    "XTAIL",
    "BatchSource",
    "Blurry",
    "ClassIncremental",
    "Cumulative",
    "DomainIncremental",
    "FewShot",
    "InstructionStream",
    "Joint",
    "MultiLabel",
    "Repetition",
    "Split",
    "StreamData",
    "TaskIncremental",
    "TaskStream",
    "TensorSource",
    "build_scenario",
    "data_names",
    "find_labels",
    "load_data",
    "scenario_info",
    "scenario_names",
    "stream_from",
]
