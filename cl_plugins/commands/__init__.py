"""Sub-commands of ``cl-bench``, one module each with ``HELP``, ``parser()`` and ``execute(arguments)``."""

from __future__ import annotations

NAMES = ("run", "sweep", "list", "show", "report", "serve", "compare", "check")
"""In the order in which ``cl-bench --help`` shows them."""
