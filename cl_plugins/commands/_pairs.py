"""``KEY=VALUE`` options."""

from __future__ import annotations

from typing import Any

import yaml


def pair(text: str) -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE``; the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"`--set` must be KEY=VALUE, got {text!r}")
    parsed = yaml.safe_load(value)
    if isinstance(parsed, str):
        try:
            parsed = float(parsed)  # YAML reads 1e-3 as text
        except ValueError:
            return key, parsed
    return key, parsed
