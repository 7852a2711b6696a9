"""Modules that methods put beside or into a frozen backbone, one method a file."""

from cl_plugins.adapters.alpha_side import AlphaSide
from cl_plugins.adapters.hierarchical_side import HierarchicalFeatures, HierarchicalSide
from cl_plugins.adapters.ladder import LadderSide
from cl_plugins.adapters.lora import LowRank
from cl_plugins.adapters.prefix_prompt import PrefixPrompt
from cl_plugins.adapters.rank_experts import ExpertOptions, RankExperts
from cl_plugins.adapters.sherl import SherlSide

__all__ = [
    "AlphaSide",
    "ExpertOptions",
    "HierarchicalFeatures",
    "HierarchicalSide",
    "LadderSide",
    "LowRank",
    "PrefixPrompt",
    "RankExperts",
    "SherlSide",
]
