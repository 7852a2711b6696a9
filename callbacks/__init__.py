"""Lightning callbacks: one continual-learning method or observer a file."""

if __name__ == "callbacks":
    raise ImportError("import cl_plugins.callbacks instead: a second copy under this name would break isinstance")

from cl_plugins.stream_checkpoint import StreamCheckpoint

from .balanced_ema import BalancedEMA
from .baselines import FrozenBackbone, MaskedHead, ZeroShot
from .cache_features import CacheFeatures
from .closed_form import NearestMean, RanPAC
from .continual_evaluation import ContinualEvaluation
from .dashboard import ForgettingDashboard
from .drift import DriftTracker
from .hierarchical_side_tuning import HierarchicalSideTuning, LeanHierarchicalSideTuning
from .ladder_side_tuning import LadderSideTuning
from .lora import LoRA
from .mora import MoRA
from .one_prompt import OnePrompt
from .ovor import OVOR
from .sherl import Sherl
from .side_tuning import SideTuning
from .task_groups import TaskGroups
from .tracker import ForgettingTracker

__all__ = [
    "OVOR",
    "BalancedEMA",
    "CacheFeatures",
    "ContinualEvaluation",
    "DriftTracker",
    "ForgettingDashboard",
    "ForgettingTracker",
    "FrozenBackbone",
    "HierarchicalSideTuning",
    "LadderSideTuning",
    "LeanHierarchicalSideTuning",
    "LoRA",
    "MaskedHead",
    "MoRA",
    "NearestMean",
    "OnePrompt",
    "RanPAC",
    "Sherl",
    "SideTuning",
    "StreamCheckpoint",
    "TaskGroups",
    "ZeroShot",
]
