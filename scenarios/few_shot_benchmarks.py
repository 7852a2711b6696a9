"""Few-shot class-incremental benchmarks: CIFAR-100, mini-ImageNet, CUB-200.

Protocol of Tao et al. (2020, arXiv 2004.10956), which CEC (Zhang et al., 2021, arXiv 2104.03047) and others follow:

    CIFAR-100, mini-ImageNet   60 base classes with all images, then 8 tasks of 5 classes with 5 images each
    CUB-200                    100 base classes with all images, then 10 tasks of 10 classes with 5 images each

Classes are learned in ascending order; the test images are whole. Which five images a later class has is published as
lists ``session_2.txt``, ``session_3.txt``, ... (``index_list`` of both repositories): numbers of training samples for
CIFAR-100, paths of images for the others, of which the file name counts. Give their folder as ``lists`` to compare
with published numbers; without it ``shot_seed`` draws the shots. :meth:`PublishedFewShot.provenance` says which.

Transforms follow CEC without the normalization (see :mod:`~cl_plugins.scenarios.benchmarks`): CIFAR-100 random crops
of the image padded by 4 pixels, at 32 pixels; mini-ImageNet random resized crops at 84 pixels, in the evaluation
resized to 92 and cropped; CUB-200 the same at 224 and 256. All are flipped at random in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .benchmarks import data_folder, load_cifar, load_cub
from .boundaries import FewShot, check_counts
from .data import Split
from .image_files import ImageFiles, image_names, need, no_download
from .stream_data import StreamData


class PublishedFewShot(FewShot):
    """:class:`FewShot` whose shots may be listed instead of drawn.

    WHEN: drawn when it is constructed.

    Args:
        data: as of :class:`FewShot`.
        listed: for each task behind the first, the indices of its training samples; None draws them by ``shot_seed``.
        options: of :class:`FewShot`.

    Raises:
        ValueError: for lists that do not fit the tasks, or as :class:`FewShot` does.

    Example:
        >>> from cl_plugins.scenarios import TensorSource
        >>> import torch
        >>> some = TensorSource(torch.zeros(6, 3), torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> stream = PublishedFewShot((some, some), listed=[[4]], base_classes=1, ways=1, shots=1)
        >>> stream.train.of(1).tolist()
        [4]
    """

    def __init__(self, data: Any, listed: Sequence[Sequence[int]] | None = None, **options: Any) -> None:
        self.listed = None if listed is None else [np.asarray(own, np.int64) for own in listed]
        super().__init__(data, **options)

    def arrange(self, train: Split, lists: list[list[int]]) -> tuple[Split, list[list[int]]]:
        """Keep the listed samples of every class behind the first task."""
        if self.listed is None:
            return super().arrange(train, lists)
        if len(self.listed) != len(lists) - 1:
            raise ValueError(
                f"`listed` must hold one list for each of the {len(lists) - 1} tasks behind the first,"
                f" got {len(self.listed)}"
            )
        for task, (indices, own) in enumerate(zip(self.listed, lists[1:], strict=True), 1):
            labels = train.labels[indices]
            if len(set(indices.tolist())) != len(own) * self.shots or any(
                (labels == c).sum() != self.shots for c in own
            ):
                raise ValueError(
                    f"the list of task {task} must name {self.shots} training samples of each of its classes"
                    f" {tuple(own)}, got {len(indices)} of classes {tuple(np.unique(labels).tolist())}; published lists"
                    " need the classes in ascending order and the published number of classes"
                )
        named = np.concatenate(self.listed)
        keep = np.isin(train.indices, named)
        if keep.sum() != len(named):
            raise ValueError(
                f"`validation_fraction` must be 0 with listed shots, which it would take away, got {len(named)} listed"
                f" samples of which {int(keep.sum())} are left"
            )
        keep |= np.arange(len(keep)) < train.offsets[1]
        return train.only(keep), lists

    def provenance(self) -> dict[str, Any]:
        """As of the stream, and where the shots come from: "listed" or "seeded"."""
        return {**super().provenance(), "shots": "seeded" if self.listed is None else "listed"}


def read_sessions(lists: str, n_sessions: int, find: Callable[[str], int | None]) -> list[list[int]]:
    """Sample indices from ``session_2.txt`` to ``session_<n_sessions>.txt``; the first session is all base images.

    Args:
        lists: folder of the files.
        n_sessions: number of sessions with the base session.
        find: index of the sample that a line names; None for an unknown one.

    Raises:
        FileNotFoundError: naming the missing files.
        ValueError: naming a line without a training sample.
    """
    folder = Path(lists).expanduser()
    names = [f"session_{k}.txt" for k in range(2, n_sessions + 1)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"`lists` must be the folder with session_2.txt to session_{n_sessions}.txt, got {str(folder)!r} without"
            f" {', '.join(missing)}; get the index_list of the data set from https://github.com/icoz69/CEC-CVPR2021"
        )
    sessions = []
    for name in names:
        found = []
        for line in (folder / name).read_text(encoding="utf-8").split():
            index = find(line)
            if index is None:
                raise ValueError(f"{name} must name training samples, got {line!r}, which is none")
            found.append(index)
        sessions.append(found)
    return sessions


def _by_number(n: int) -> Callable[[str], int | None]:
    return lambda line: int(line) if line.isdecimal() and int(line) < n else None


def _by_file_name(images: ImageFiles) -> Callable[[str], int | None]:
    number = {Path(path).name: i for i, (path, _) in enumerate(images.samples)}
    return lambda line: number.get(line.rpartition("/")[2])


def _stream(
    data: StreamData, lists: str | None, find: Callable[[str], int | None], options: dict[str, Any]
) -> PublishedFewShot:
    options.setdefault("name", f"fewshot-{data.name}")
    check_counts(**{name: options[name] for name in ("base_classes", "ways", "shots")})
    listed = None
    if lists is not None:
        later = len(data.class_names or ()) - options["base_classes"]
        listed = read_sessions(lists, 1 - (-later // options["ways"]), find)
    return PublishedFewShot(data, listed, **options)


def fewshot_cifar100(
    root: str | None = None,
    download: bool = False,
    lists: str | None = None,
    size: int = 32,
    base_classes: int = 60,
    ways: int = 5,
    shots: int = 5,
    **options: Any,
) -> PublishedFewShot:
    """CIFAR-100: 60 base classes, then 8 times 5 classes with 5 images each.

    Args:
        root: folder that holds or gets ``cifar-100-python``.
        download: get it, 169 MB, checksummed.
        lists: folder of the published lists; None draws the shots by ``shot_seed``.
        size: of the images given out.
        base_classes: classes of the first task.
        ways: classes of each later task.
        shots: training images of each later class.
        options: of :class:`FewShot`.

    Raises:
        ValueError: without a folder, or for faulty arguments or lists.
        FileNotFoundError: when files are not there or damaged.
    """
    from torchvision import transforms

    data = load_cifar(root, download, "cifar100", size)
    crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    options.setdefault("train_transform", transforms.Compose([*crop, transforms.Resize(size), transforms.ToTensor()]))
    options.update(base_classes=base_classes, ways=ways, shots=shots)
    return _stream(data, lists, _by_number(len(data.train)), options)


def load_mini_imagenet(
    root: str | None = None, download: bool = False, size: int = 84, n_classes: int = 100
) -> StreamData:
    """mini-ImageNet as few-shot incremental learning uses it: 100 classes, 500 training and 100 test images each.

    Layout of CEC: ``images`` with all files, ``split/train.csv`` and ``split/test.csv`` with lines ``file,WordNet id``
    under a heading. Labels number the ids as they first occur in ``train.csv``. The older split of the same images into
    64, 16 and 20 classes has files of the same names; it is refused.

    Args:
        root: ``miniimagenet``, or the folder that holds it.
        download: refused, since there is no checksummed source.
        size: of the images given out.
        n_classes: classes that ``train.csv`` must name.

    Raises:
        ValueError: without a folder, or for faulty tables.
        FileNotFoundError: when parts are not there, naming them.
    """
    from torchvision import transforms

    how = "get miniimagenet.tar by the links of https://github.com/icoz69/CEC-CVPR2021 and unpack it there"
    no_download("mini-ImageNet", download, how)
    folder = data_folder(root, "mini-ImageNet", how)
    if (folder / "miniimagenet").is_dir():
        folder = folder / "miniimagenet"
    need("mini-ImageNet", folder, ("images", "split/train.csv", "split/test.csv"), how)
    there = set(image_names(folder / "images"))
    number: dict[str, int] = {}
    parts = []
    for part in ("train", "test"):
        rows = (folder / "split" / f"{part}.csv").read_text(encoding="utf-8").split()[1:]
        files, ids = [row.partition(",")[0] for row in rows], [row.partition(",")[2] for row in rows]
        if part == "train":
            number = {own: i for i, own in enumerate(dict.fromkeys(ids))}
            if len(number) != n_classes:
                raise ValueError(
                    f"split/train.csv must name {n_classes} classes, got {len(number)}; the split of few-shot"
                    " incremental learning is needed, which has training and test images of all classes"
                )
        unknown = next((own for own in ids if own not in number), None)
        if unknown is not None:
            raise ValueError(f"split/{part}.csv must name classes of split/train.csv, got {unknown!r}")
        lost = next((name for name in files if name not in there), None)
        if lost is not None:
            raise FileNotFoundError(
                f"`root` must hold every listed image, got no images/{lost} in {str(folder)!r}; {how}"
            )
        parts.append(ImageFiles([folder / "images" / f for f in files], [number[own] for own in ids], list(number)))
    train = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    larger = round(size * 92 / 84)
    evaluate = [transforms.Resize((larger, larger)), transforms.CenterCrop(size), transforms.ToTensor()]
    return StreamData(
        parts[0],
        parts[1],
        class_names=tuple(number),
        train_transform=transforms.Compose(train),
        eval_transform=transforms.Compose(evaluate),
        n_tasks=10,
        name="mini-imagenet",
    )


def fewshot_mini_imagenet(
    root: str | None = None,
    download: bool = False,
    lists: str | None = None,
    size: int = 84,
    base_classes: int = 60,
    ways: int = 5,
    shots: int = 5,
    n_classes: int = 100,
    **options: Any,
) -> PublishedFewShot:
    """mini-ImageNet: 60 base classes, then 8 times 5 classes with 5 images each.

    Args:
        root: ``miniimagenet``, or the folder that holds it.
        download: refused, since there is no checksummed source.
        lists: folder of the published lists; None draws the shots by ``shot_seed``.
        size: of the images given out.
        base_classes: classes of the first task.
        ways: classes of each later task.
        shots: training images of each later class.
        n_classes: classes that the tables must name.
        options: of :class:`FewShot`.

    Raises:
        ValueError: without a folder, or for faulty arguments, tables or lists.
        FileNotFoundError: when parts are not there, naming them.
    """
    data = load_mini_imagenet(root, download, size, n_classes)
    options.update(base_classes=base_classes, ways=ways, shots=shots)
    return _stream(data, lists, _by_file_name(data.train), options)


def fewshot_cub200(
    root: str | None = None,
    download: bool = False,
    lists: str | None = None,
    size: int = 224,
    base_classes: int = 100,
    ways: int = 10,
    shots: int = 5,
    **options: Any,
) -> PublishedFewShot:
    """CUB-200: 100 base classes, then 10 times 10 classes with 5 images each.

    Args:
        root: ``CUB_200_2011``, or the folder that holds it.
        download: refused, since its source asks for a browser.
        lists: folder of the published lists; None draws the shots by ``shot_seed``.
        size: of the images given out.
        base_classes: classes of the first task.
        ways: classes of each later task.
        shots: training images of each later class.
        options: of :class:`FewShot`.

    Raises:
        ValueError: without a folder, or for faulty arguments or lists.
        FileNotFoundError: when parts are not there, naming them.
    """
    data = load_cub(root, download, size)
    options.update(base_classes=base_classes, ways=ways, shots=shots)
    return _stream(data, lists, _by_file_name(data.train), options)
