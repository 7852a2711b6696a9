"""Bytes as tokens: no vocabulary to download, every text and its exact inverse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Tokenizer(Protocol):
    """What prompts and generation need of a tokenizer; those of transformers fit when wrapped in these names."""

    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then the special tokens.

    Attributes:
        pad_id: fills a batch.
        bos_id: begins a prompt.
        eos_id: ends an answer.
        vocab_size: number of ids.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("né")
        [110, 195, 169]
        >>> tokenizer.decode([110, 195, 169, tokenizer.eos_id])
        'né'
    """

    pad_id = 256
    bos_id = 257
    eos_id = 258
    vocab_size = 259

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of bytes; special tokens are left out, incomplete characters become U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")
