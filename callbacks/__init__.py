"""Lightning callbacks: one continual-learning method or observer a file."""

from .balanced_ema import BalancedEMA
from .one_prompt import OnePrompt
from .ovor import OVOR

__all__ = [
    "BalancedEMA",
    "OVOR",
    "OnePrompt",
]
