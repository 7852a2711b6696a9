"""MNIST streams: split (class-incremental), permuted and rotated (domain-incremental), through torchvision.

    split-mnist     5 tasks x 2 classes in ascending order (Zenke, Poole and Ganguli, 2017, arXiv 1703.04200)
    permuted-mnist  10 tasks x the same 10 classes, the 784 pixels in another fixed order in each task, the first
                    as they are (Goodfellow et al., 2013, arXiv 1312.6211; Kirkpatrick et al., 2017, arXiv 1612.00796;
                    ten tasks as van de Ven and Tolias, 2019, arXiv 1904.07734)
    rotated-mnist   10 tasks x the same 10 classes, turned by a fixed angle in each task (Lopez-Paz and Ranzato, 2017,
                    arXiv 1706.08840, who draw 20 angles between 0 and 180 degrees; here ten at equal distances)

Permutation and rotation act on the 28 x 28 scans. Then images are enlarged (bilinear) to ``size`` and the grey value is
repeated in three channels, so that any image backbone takes them; ``size=28`` leaves the pixels as they are. Pixels are
in [0, 1], not normalized.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ._seeds import MIXING, check_seed, generator
from .benchmarks import data_folder
from .domains import DomainIncremental
from .fetch import fetch
from .image_files import need
from .stream_data import StreamData

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANGLES = tuple(18.0 * k for k in range(10))
"""Ten angles at equal distances in [0, 180), the range of Lopez-Paz and Ranzato."""
_PARTS = tuple(
    f"MNIST/raw/{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
)
_PIXELS = 784


class GreyDigits:
    """Scans that lie in memory as bytes; a batch is permuted or turned, enlarged and given three channels when read.

    Args:
        scans: ``(samples, 28, 28)`` uint8.
        labels: ``(samples,)`` integers.
        size: side of the images given out, in pixels.
        permutation: ``(784,)``, which pixel stands at each place; None leaves them.
        angle: in degrees, counter-clockwise; what comes in from outside is black.

    Example:
        >>> GreyDigits(torch.zeros(4, 28, 28, dtype=torch.uint8), torch.arange(4)).read_batch(np.array([1, 2])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        scans: Tensor,
        labels: Tensor,
        size: int = 32,
        permutation: NDArray[np.int64] | None = None,
        angle: float = 0.0,
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"`size` must be an integer of 1 or more, got {size!r}")
        self.scans = scans
        self.labels = np.asarray(labels, np.int64)
        self.size = size
        self.permutation = None if permutation is None else torch.from_numpy(permutation)
        self.angle = angle

    def __len__(self) -> int:
        return len(self.scans)

    def read_batch(self, indices: NDArray[np.int64]) -> Tensor:
        """Images ``(batch, 3, size, size)`` float32 in [0, 1]."""
        images = self.scans[torch.from_numpy(indices)].float()[:, None] / 255
        if self.permutation is not None:
            images = images.flatten(1)[:, self.permutation].view_as(images)
        if self.angle:
            from torchvision.transforms.functional import InterpolationMode, rotate

            images = rotate(images, self.angle, InterpolationMode.BILINEAR)
        if images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return images.expand(-1, 3, -1, -1).contiguous()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read_batch(np.array([index]))[0], int(self.labels[index])


def _read(root: str | None, download: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scans and labels for training and testing."""
    from torchvision.datasets import MNIST

    how = "pass `download=True` to get it"
    folder = data_folder(root, "MNIST", how)
    if download and not all((folder / part).is_file() for part in _PARTS):
        for name, md5 in MNIST.resources:
            _fetch(MNIST.mirrors, folder / "MNIST" / "raw" / name, md5)
        MNIST(str(folder), download=True)  # unpacks them
    need("MNIST", folder, _PARTS, how)
    try:
        train, test = (MNIST(str(folder), train=part) for part in (True, False))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise FileNotFoundError(
            f"`root` must hold MNIST/raw, whole and undamaged, got {str(folder)!r}: {error}; remove it and {how}"
        ) from error
    return (train.data, train.targets), (test.data, test.targets)


def _fetch(mirrors: Sequence[str], path: Path, md5: str) -> None:
    for mirror in mirrors[:-1]:
        try:
            fetch(f"{mirror}{path.name}", path, md5)
        except (ConnectionError, ValueError) as error:
            print(f"{error}; trying the next mirror", file=sys.stderr)
        else:
            return
    fetch(f"{mirrors[-1]}{path.name}", path, md5)


def _stream_data(parts: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], **change: Any) -> StreamData:
    train, test = (GreyDigits(*part, **change) for part in parts)
    return StreamData(train, test, class_names=NAMES, n_tasks=5, name="mnist")


def load_mnist(root: str | None = None, download: bool = False, size: int = 32) -> StreamData:
    """MNIST (LeCun, Bottou, Bengio and Haffner, 1998): 60,000 training and 10,000 test scans of digits.

    Args:
        root: folder that holds or gets ``MNIST/raw``.
        download: get it, about 12 MB, checksummed; goes on after an interruption.
        size: side of the images given out, in pixels.

    Raises:
        ValueError: without a folder.
        FileNotFoundError: when files are not there, naming them, or damaged.
    """
    return _stream_data(_read(root, download), size=size)


def permuted_mnist(
    root: str | None = None,
    download: bool = False,
    size: int = 32,
    n_tasks: int = 10,
    permutation_seed: int | None = None,
    **options: Any,
) -> DomainIncremental:
    """The pixels of all scans in another order in each task; the first task leaves them as they are.

    Args:
        root: folder that holds or gets ``MNIST/raw``.
        download: get it.
        size: side of the images given out, in pixels; pixels are permuted before they are enlarged.
        n_tasks: number of tasks.
        permutation_seed: draws the orders; None takes the stream's ``data_seed`` (or ``seed``), so that runs with
            different seeds differ in it, as is usual.
        options: of :class:`DomainIncremental`.

    Raises:
        ValueError: without a folder, or for faulty numbers.
        FileNotFoundError: when files are not there, naming them.
    """
    if isinstance(n_tasks, bool) or not isinstance(n_tasks, int) or n_tasks < 1:
        raise ValueError(f"`n_tasks` must be an integer of 1 or more, got {n_tasks!r}")
    if permutation_seed is None:
        given = options.get("data_seed")
        given = options.get("seed") if given is None else given
        permutation_seed = 0 if given is None else given
    seed = check_seed("permutation_seed", permutation_seed)
    parts = _read(root, download)
    domains = [_stream_data(parts, size=size, permutation=pixel_order(k, seed)) for k in range(n_tasks)]
    options.setdefault("names", [f"permutation {k}" if k else "as they are" for k in range(n_tasks)])
    options.setdefault("name", "permuted-mnist")
    stream = DomainIncremental(domains, **options)
    stream.seeds["permutation"] = seed
    return stream


def pixel_order(task: int, seed: int) -> NDArray[np.int64] | None:
    """Which pixel stands at each of the 784 places in a task; None for the first, which leaves them.

    Example:
        >>> pixel_order(0, 7) is None, sorted(pixel_order(1, 7)) == list(range(784))
        (True, True)
    """
    return generator(MIXING, seed, task).permutation(_PIXELS) if task else None


def rotated_mnist(
    root: str | None = None,
    download: bool = False,
    size: int = 32,
    angles: Sequence[float] = ANGLES,
    **options: Any,
) -> DomainIncremental:
    """All scans turned by another angle in each task.

    Args:
        root: folder that holds or gets ``MNIST/raw``.
        download: get it.
        size: side of the images given out, in pixels.
        angles: one per task, in degrees, counter-clockwise.
        options: of :class:`DomainIncremental`.

    Raises:
        ValueError: without a folder, or for angles that are no numbers, or none at all.
        FileNotFoundError: when files are not there, naming them.
    """
    if isinstance(angles, str) or not len(angles):
        raise ValueError(f"`angles` must hold one angle in degrees per task, got {angles!r}")
    for angle in angles:
        if isinstance(angle, bool) or not isinstance(angle, int | float) or not np.isfinite(angle):
            raise ValueError(f"`angles` must hold numbers of degrees, got {angle!r}")
    parts = _read(root, download)
    options.setdefault("names", [f"{angle:g} degrees" for angle in angles])
    options.setdefault("name", "rotated-mnist")
    return DomainIncremental([_stream_data(parts, size=size, angle=float(angle)) for angle in angles], **options)
