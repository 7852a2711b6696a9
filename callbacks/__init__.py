"""Lightning callbacks: one continual-learning method or observer a file."""

from .one_prompt import OnePrompt
from .ovor import OVOR

__all__ = [
    "OVOR",
    "OnePrompt",
]
