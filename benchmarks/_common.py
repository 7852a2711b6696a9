"""What several scripts here share: a Trainer that writes and prints nothing, and tables inside a page of the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options of a Trainer."""


def tell(text: str, page: Path | None, begin: str, end: str) -> None:
    """Put ``text`` between the two markers of ``page``, or on the terminal without one."""
    if page is None:
        print(text)
        return
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} must hold the lines {begin} and {end}")
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
