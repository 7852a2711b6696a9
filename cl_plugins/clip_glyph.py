"""The bundled vision-language model: a small open_clip model that knows characters and their Unicode names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_plugins.backbones import WEIGHTS

CONTEXT_LENGTH = 14
"""Positions of a text: its words, a start and an end."""
HELD_OUT = 300
"""The first so many of the streams' characters are new to the model, images and names."""


@lru_cache(maxsize=1)
def _bundled_words() -> tuple[str, ...]:
    return tuple(json.loads((WEIGHTS / "clip_glyph_words.json").read_text(encoding="utf-8")))


class NameTokenizer:
    """One token a word, for names such as "LATIN SMALL LETTER A WITH ACUTE"; other words count as unknown.

    Args:
        words: the vocabulary in order of its tokens; None for that of ``clip_glyph``.

    Example:
        >>> NameTokenizer(["LATIN", "LETTER"])("Latin letter A").tolist()[0][:6]
        [1, 3, 4, 2, 5, 0]
    """

    def __init__(self, words: Sequence[str] | None = None) -> None:
        self.words = _bundled_words() if words is None else tuple(words)
        self._ids = {word: 3 + i for i, word in enumerate(self.words)}  # 0 pads, 1 starts, 2 is unknown

    @property
    def end(self) -> int:
        """The last token, of all the largest: open_clip finds the end of a text by this."""
        return 3 + len(self.words)

    @staticmethod
    def split(text: str) -> list[str]:
        """Words of a text, in upper case."""
        return re.findall(r"[^\s\-]+", text.upper())

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens ``(texts, 14)``; longer texts lose their end."""
        tokens = torch.zeros(1 if isinstance(texts, str) else len(texts), CONTEXT_LENGTH, dtype=torch.long)
        for row, text in zip(tokens, [texts] if isinstance(texts, str) else texts, strict=True):
            ids = [1, *(self._ids.get(word, 2) for word in self.split(text))][: CONTEXT_LENGTH - 1]
            ids.append(self.end)
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def create_clip_glyph(pretrained: bool | str | Path = True, **options: Any) -> tuple[nn.Module, NameTokenizer]:
    """The model and its tokenizer, by open_clip's own way; nothing is downloaded.

    Images are ``(batch, 3, 32, 32)`` in [0, 1], texts names in the manner of Unicode.

    Args:
        pretrained: True for the weights in the package, a file that ``examples/pretrain_clip_glyph.py`` made, or
            False for random ones.
        **options: further arguments of ``open_clip.create_model``.

    Raises:
        FileNotFoundError: when the weights are not there.

    Example:
        >>> model, tokenize = create_clip_glyph()
        >>> model.encode_text(tokenize(["GREEK SMALL LETTER ALPHA", "BLACK SQUARE"])).shape
        torch.Size([2, 128])
    """
    import open_clip

    open_clip.add_model_config(WEIGHTS / "clip_glyph.json")
    weights = WEIGHTS / "clip_glyph.safetensors" if pretrained is True else Path(pretrained) if pretrained else None
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(
            f"`pretrained` must be a file of weights, got {str(weights)!r}, which is not there;"
            " make it with examples/pretrain_clip_glyph.py"
        )
    path = None if weights is None else str(weights)
    model: nn.Module = open_clip.create_model("clip_glyph", pretrained=path, **options)
    return model, NameTokenizer()
