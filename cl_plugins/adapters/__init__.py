"""Modules that methods put beside or into a frozen backbone, one method a file."""

from cl_plugins.adapters.prefix_prompt import PrefixPrompt

__all__ = ["PrefixPrompt"]
