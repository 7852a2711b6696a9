"""Lightning callbacks: one continual-learning method or observer a file."""

if __name__ == "callbacks":
    raise ImportError("import cl_plugins.callbacks instead: a second copy under this name would break isinstance")

from .balanced_ema import BalancedEMA
from .baselines import FrozenBackbone, MaskedHead
from .closed_form import NearestMean, RanPAC
from .one_prompt import OnePrompt
from .ovor import OVOR
from .tracker import ForgettingTracker

__all__ = [
    "OVOR",
    "BalancedEMA",
    "ForgettingTracker",
    "FrozenBackbone",
    "MaskedHead",
    "NearestMean",
    "OnePrompt",
    "RanPAC",
]
