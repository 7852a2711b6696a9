"""Writes a few images in the exact layouts of published image sets."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    """One image of one colour, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size[::-1], 3), value, np.uint8)).save(path)


def write_mnist(root: Path, n_train: int = 40, n_test: int = 20) -> Path:
    """``MNIST/raw`` as unpacked by torchvision; sample i has label i % 10 and random pixels."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, n in (("train", n_train), ("t10k", n_test)):
        scans = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, n, 28, 28) + scans.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + labels.tobytes())
    return root
