"""Lets an uninstalled checkout import ``cl_plugins.callbacks`` and ``cl_plugins.scenarios`` from their folders.

An installed copy has both as real sub-packages and never reaches this finder, which is last on ``sys.meta_path``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = {f"cl_plugins.{name}": _ROOT / name for name in ("callbacks", "scenarios")}


class _SiblingFolders(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = _FOLDERS.get(fullname)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install() -> None:
    """Add the finder when this file lies in a checkout; a second call changes nothing."""
    if (_ROOT / "pyproject.toml").is_file() and not any(isinstance(f, _SiblingFolders) for f in sys.meta_path):
        sys.meta_path.append(_SiblingFolders())
