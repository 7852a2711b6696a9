"""Modules that methods put beside or into a frozen backbone, one method a file."""

from cl_plugins.adapters.alpha_side import AlphaSide
from cl_plugins.adapters.hierarchical_side import HierarchicalFeatures, HierarchicalSide
from cl_plugins.adapters.ladder import LadderSide
from cl_plugins.adapters.prefix_prompt import PrefixPrompt
from cl_plugins.adapters.sherl import SherlSide

__all__ = [
    "AlphaSide",
    "HierarchicalFeatures",
    "HierarchicalSide",
    "LadderSide",
    "PrefixPrompt",
    "SherlSide",
]
