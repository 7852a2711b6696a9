"""X-TAIL and MTIL over the published image sets; the protocols are in :mod:`cl_plugins.scenarios.multi_domain`.

    MTIL    eleven sets, alphabetical (order I): Aircraft, Caltech101, CIFAR-100, DTD, EuroSAT, Flowers, Food, MNIST,
            Oxford Pets, Stanford Cars, SUN397; 1,201 classes; all training images
    X-TAIL  the same without CIFAR-100 and without Caltech101's "Faces easy"; 1,100 classes; 16 training images a class

Which images are drawn as the 16, and the seeded splits of the sets without an official one, are this library's, so
numbers may differ slightly from published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .benchmarks import crop_transforms
from .multi_domain import MTIL, XTAIL
from .stream_data import StreamData
from .transfer_sets import SETS, load_transfer_set, missing_parts

MTIL_SETS = tuple(SETS)
"""In order I."""
XTAIL_SETS = tuple(name for name in SETS if name != "cifar100")


def _domains(
    title: str, root: str | None, download: bool, sets: Sequence[str], faces_easy: bool, size: int | None
) -> list[StreamData]:
    unknown = [s for s in sets if s not in SETS]
    if isinstance(sets, str) or not len(sets) or unknown or len(set(sets)) < len(sets):
        raise ValueError(f"`sets` must name some of {', '.join(SETS)}, each once, got {sets!r}")
    if root is None:
        raise ValueError(
            f"`root` must be the folder with the {len(sets)} sets of {title}, got None; each lies in the folder that"
            " torchvision unpacks, and `download=True` gets all but Stanford Cars"
        )
    folder = Path(root).expanduser()
    by_hand = [s for s in sets if missing_parts(s, folder) and not (download and not SETS[s].source)]
    if by_hand:
        wanted = "\n".join(f"  {SETS[s].title}: {SETS[s].how}" for s in by_hand)
        raise FileNotFoundError(
            f"`root` must hold the sets of {title}, got {str(folder)!r} without {len(by_hand)} of {len(sets)}:\n"
            + wanted
        )
    left_out = {} if faces_easy else {"caltech101": ("Faces easy",)}
    found = [load_transfer_set(root, download, s, leave_out=left_out.get(s, ())) for s in sets]
    train, evaluate = (None, None) if size is None else crop_transforms(size)
    return [replace(d, train_transform=train, eval_transform=evaluate) for d in found]


def x_tail(
    root: str | None = None,
    download: bool = False,
    sets: Sequence[str] = XTAIL_SETS,
    shots: int | None = 16,
    size: int | None = None,
    **options: Any,
) -> XTAIL:
    """Ten sets, an image is classified among the classes of all of them.

    Args:
        root: folder with the sets.
        download: get what is not there, where torchvision can.
        sets: which ones, see :data:`cl_plugins.scenarios.transfer_sets.SETS`; ``domain_order`` is by position in it.
        shots: training images per class, drawn by ``split_seed``; None takes all.
        size: of the images given out; None leaves them to ``train_transform`` and ``eval_transform``, for which
            ``cl-bench`` takes those of the model.
        options: of :class:`XTAIL`.

    Raises:
        ValueError: without a folder, or for an unknown set.
        FileNotFoundError: before anything is read, naming each missing set and what to put where.
    """
    return XTAIL(_domains("X-TAIL", root, download, sets, False, size), shots=shots, **options)


def mtil(
    root: str | None = None,
    download: bool = False,
    sets: Sequence[str] = MTIL_SETS,
    shots: int | None = None,
    size: int | None = None,
    **options: Any,
) -> MTIL:
    """Eleven sets, an image is classified among the classes of its own.

    Args:
        root: folder with the sets.
        download: get what is not there, where torchvision can.
        sets: which ones, see :data:`cl_plugins.scenarios.transfer_sets.SETS`.
        shots: training images per class, drawn by ``split_seed``; None takes all.
        size: of the images given out; None leaves them to the transforms, as in :func:`x_tail`.
        options: of :class:`MTIL`.

    Raises:
        ValueError: without a folder, or for an unknown set.
        FileNotFoundError: before anything is read, naming each missing set and what to put where.
    """
    return MTIL(_domains("MTIL", root, download, sets, True, size), shots=shots, **options)
