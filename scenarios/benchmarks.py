"""Image benchmarks that must be downloaded: CIFAR-10/100, ImageNet-R, ImageNet-A, CUB-200.

Transforms and splits follow CODA-Prompt (Smith et al., 2023, arXiv 2211.13218), which OVOR and others compare with:

    training    RandomResizedCrop(size), horizontal flip, pixels in [0, 1]
    evaluation  CIFAR: Resize(size); the others: Resize(size * 256 / 224), CenterCrop(size); pixels in [0, 1]

Pixels are not normalized by mean and standard deviation there; add it to ``eval_transform`` and ``train_transform`` for
weights that expect it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from .data import Transform
from .fetch import fetch
from .image_files import ImageFiles, class_folders, listed_images, need, seeded_halves
from .stream_data import StreamData


def crop_transforms(size: int, *, squash: bool = False) -> tuple[Transform, Transform]:
    """Transforms for training and evaluation, from a PIL image to ``(3, size, size)`` in [0, 1].

    Args:
        size: side in pixels.
        squash: resize straight to ``size`` in the evaluation, as for CIFAR, instead of a center crop.
    """
    from torchvision import transforms

    if size < 1:
        raise ValueError(f"`size` must be 1 or more, got {size!r}")
    train = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    if squash:
        return train, transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])
    evaluate = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), transforms.ToTensor()]
    return train, transforms.Compose(evaluate)


def data_folder(root: str | None, name: str, how: str) -> Path:
    """The folder of data that do not come along.

    Raises:
        ValueError: without one, saying ``how`` to get them.
    """
    if root is None:
        raise ValueError(f"`root` must be the folder with {name}, got None; {how}")
    return Path(root).expanduser()


def load_cifar(
    root: str | None = None, download: bool = False, kind: Literal["cifar10", "cifar100"] = "cifar100", size: int = 224
) -> StreamData:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009): 50,000 training and 10,000 test images, through torchvision.

    Args:
        root: folder that holds or gets ``cifar-100-python`` (or ``cifar-10-batches-py``).
        download: get it, about 170 MB, checksummed; goes on after an interruption.
        kind: which of the two; 10 tasks of 10 classes, or 5 of 2.
        size: of the images given out.

    Raises:
        ValueError: without a folder.
        FileNotFoundError: when the files are not there or damaged.
        ConnectionError: when the download breaks; the next one goes on.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    how = "pass `download=True` to get it"
    folder = data_folder(root, kind, how)
    factory = {"cifar10": CIFAR10, "cifar100": CIFAR100}[kind]
    try:
        train, test = (factory(str(folder), train=part) for part in (True, False))
    except RuntimeError as error:
        if download:
            fetch(factory.url, folder / factory.filename, factory.tgz_md5)
            factory(str(folder), download=True)  # unpacks it
            return load_cifar(root, False, kind, size)
        raise FileNotFoundError(
            f"`root` must hold {factory.base_folder}, whole and undamaged, got {str(folder)!r}; {how}"
        ) from error
    transforms = crop_transforms(size, squash=True)
    return StreamData(
        train,
        test,
        class_names=tuple(train.classes),
        train_transform=transforms[0],
        eval_transform=transforms[1],
        n_tasks=10 if kind == "cifar100" else 5,
        name=kind,
    )


def load_class_folders(
    root: str | None = None,
    download: bool = False,
    name: str = "imagenet-r",
    title: str = "ImageNet-R",
    source: str = "https://github.com/hendrycks/imagenet-r",
    n_classes: int = 200,
    n_tasks: int = 10,
    size: int = 224,
    train_list: str | None = None,
    test_list: str | None = None,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> StreamData:
    """A benchmark of one folder per class without an official split: ImageNet-R, ImageNet-A.

    ImageNet-R (Hendrycks et al., 2021, arXiv 2006.16241) has 30,000 images; CODA-Prompt divided them into 24,000 and
    6,000 by lists of its own. The split is, in this order: the lists, when given; the folders ``train`` and ``test``,
    when there are such; else a seeded split of every class in the same proportion. The last is not CODA's, so numbers
    may differ slightly from published ones.

    Args:
        root: holds one folder per class, or ``train`` and ``test`` with one folder per class.
        download: refused, since there is no checksummed source.
        name: of the data set here.
        title: of the data set in messages.
        source: where to get it.
        n_classes: class folders that must be there.
        n_tasks: number of tasks when nobody says otherwise.
        size: of the images given out.
        train_list: text file of training images, one path relative to ``root`` a line.
        test_list: the same for test images.
        test_fraction: share of each class that a seeded split keeps for testing.
        split_seed: of that split.

    Raises:
        ValueError: without a folder, or with one list only.
        FileNotFoundError: when parts are not there.
    """
    how = f"get it from {source} and unpack it there"
    folder = data_folder(root, title, how)
    need(title, folder, (), how)
    if download and not any(folder.iterdir()):
        raise FileNotFoundError(f"`download` must be False for {title}, which has no checksummed source; {how}")
    if (train_list is None) != (test_list is None):
        raise ValueError(f"`train_list` and `test_list` must be given together, got {train_list!r} and {test_list!r}")
    prepared = (folder / "train").is_dir() and (folder / "test").is_dir()
    first = folder / "train" if prepared else folder
    names = sorted(p.name for p in first.iterdir() if p.is_dir())
    if len(names) != n_classes:
        raise FileNotFoundError(
            f"`root` must hold {n_classes} class folders of {title}, got {len(names)} in {str(first)!r}; {how}"
        )
    if train_list is not None and test_list is not None:
        train, test = (listed_images(folder, Path(p).expanduser(), names) for p in (train_list, test_list))
    elif prepared:
        train, test = class_folders(folder / "train", names), class_folders(folder / "test", names)
    else:
        train, test = seeded_halves(class_folders(folder, names), test_fraction, split_seed)
    transforms = crop_transforms(size)
    return StreamData(
        train,
        test,
        class_names=tuple(names),
        train_transform=transforms[0],
        eval_transform=transforms[1],
        n_tasks=n_tasks,
        name=name,
    )


def load_cub(root: str | None = None, download: bool = False, size: int = 224, n_tasks: int = 10) -> StreamData:
    """CUB-200-2011 (Wah et al., 2011): 200 birds, 5,994 training and 5,788 test images in the official split.

    Args:
        root: ``CUB_200_2011``, or the folder that holds it.
        download: refused, since its source asks for a browser.
        size: of the images given out.
        n_tasks: number of tasks when nobody says otherwise.

    Raises:
        ValueError: without a folder.
        FileNotFoundError: when parts are not there, naming them.
    """
    how = "get CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 and unpack it there"
    folder = data_folder(root, "CUB-200-2011", how)
    if (folder / "CUB_200_2011").is_dir():
        folder = folder / "CUB_200_2011"
    parts = ("images", "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    need("CUB-200-2011", folder, parts, how)
    if download and not any((folder / "images").iterdir()):
        raise FileNotFoundError(f"`download` must be False for CUB-200-2011; {how}")

    def table(name: str) -> dict[int, str]:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        return {int(number): value for number, value in (line.split(maxsplit=1) for line in lines if line.strip())}

    files, classes, testing = table("images.txt"), table("image_class_labels.txt"), table("train_test_split.txt")
    names = [text.partition(".")[2].replace("_", " ") for _, text in sorted(table("classes.txt").items())]
    if not set(files) == set(classes) == set(testing):
        raise FileNotFoundError(
            f"images.txt, image_class_labels.txt and train_test_split.txt must list the same images, got {len(files)},"
            f" {len(classes)} and {len(testing)} in {str(folder)!r}; {how}"
        )
    lost = next((f for f in files.values() if not (folder / "images" / f).is_file()), None)
    if lost is not None:
        raise FileNotFoundError(f"`root` must hold every listed image, got no images/{lost} in {str(folder)!r}; {how}")
    numbers = sorted(files)
    every = ImageFiles([folder / "images" / files[i] for i in numbers], [int(classes[i]) - 1 for i in numbers], names)
    training = np.array([testing[i].strip() == "1" for i in numbers])
    transforms = crop_transforms(size)
    return StreamData(
        every.only(training),
        every.only(~training),
        class_names=tuple(names),
        train_transform=transforms[0],
        eval_transform=transforms[1],
        n_tasks=n_tasks,
        name="cub200",
    )
