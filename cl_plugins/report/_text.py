"""Text that stays text, in HTML and in scripts."""

from __future__ import annotations

import html
import json
import unicodedata
from typing import Any

_LONGEST_NAME = 200


def text(value: Any) -> str:
    """``value`` as HTML text: markup, control characters and half surrogates lose their power."""
    shown = str(value)
    clean = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in shown)
    return html.escape(clean, quote=True)


def name(value: Any) -> str:
    """A name as isolated HTML text, so that its writing direction stays its own."""
    return f"<bdi>{text(str(value)[:_LONGEST_NAME])}</bdi>"


def embedded_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    plain = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
