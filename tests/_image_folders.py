"""Writes a few images in the exact layouts of published image sets."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100


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


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A text file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_tiny_imagenet(root: Path, n_classes: int = 20, per_class: int = 2) -> Path:
    """``tiny-imagenet-200`` as unpacked; training images of label c have brightness c, validation ones 100 + c."""
    folder = root / "tiny-imagenet-200"
    ids = [f"n{7 * c:08d}" for c in range(n_classes)]
    write_lines(folder / "wnids.txt", reversed(ids))
    write_lines(folder / "words.txt", [f"{own}\tthing {c}, stuff {c}" for c, own in enumerate(ids)] + ["n9\telse"])
    notes = []
    for c, own in enumerate(ids):
        for i in range(per_class):
            write_image(folder / "train" / own / "images" / f"{own}_{i}.JPEG", c, (64, 64))
        write_lines(folder / "train" / own / f"{own}_boxes.txt", [f"{own}_0.JPEG\t0\t10\t63\t58"])
        name = f"val_{n_classes - c}.JPEG"
        write_image(folder / "val" / "images" / name, 100 + c, (64, 64))
        notes.append(f"{name}\t{own}\t0\t32\t44\t62")
    write_lines(folder / "val" / "val_annotations.txt", notes)
    return root


def write_core50(root: Path) -> Path:
    """``core50_128x128`` with one frame an object and session, of brightness 4 * object + session."""
    for session in range(1, 12):
        for k in range(1, 51):
            name = f"C_{session:02d}_{k:02d}_000.png"
            write_image(root / "core50_128x128" / f"s{session}" / f"o{k}" / name, 4 * k + session, (8, 8))
    return root


def write_domain_net(root: Path, classes: Sequence[str] = ("aircraft_carrier", "zebra", "zigzag")) -> Path:
    """Six domains with two training images and a test image a class, of brightness 20 * domain + label."""
    for k, domain in enumerate(("clipart", "infograph", "painting", "quickdraw", "real", "sketch")):
        lists: dict[str, list[str]] = {"train": [], "test": []}
        for label, own in enumerate(classes):
            for i, part in enumerate(("train", "test", "train")):
                path = f"{domain}/{own}/{domain}_{label + 1:03d}_{i + 1:06d}.jpg"
                write_image(root / path, 20 * k + label)
                lists[part].append(f"{path} {label}")
        for part, lines in lists.items():
            write_lines(root / f"{domain}_{part}.txt", lines)
    return root


def write_mini_imagenet(root: Path, n_classes: int = 100, per_class: int = 6) -> Path:
    """``miniimagenet`` in the layout of CEC; the ids are in descending order, images have the label's brightness."""
    folder = root / "miniimagenet"
    for part, n in (("train", per_class), ("test", 1)):
        rows = ["filename,label"]
        for c in range(n_classes):
            own = f"n{1000 - c:08d}"
            for i in range(n):
                name = f"{own}{i + (500 if part == 'test' else 0):08d}.jpg"
                write_image(folder / "images" / name, c, (8, 8))
                rows.append(f"{name},{own}")
        write_lines(folder / "split" / f"{part}.csv", rows)
    return root


def write_cub(root: Path, n_classes: int = 3, per_class: int = 3) -> Path:
    """``CUB_200_2011``; the second image of each bird is for testing, images have brightness 1 + label."""
    folder = root / "CUB_200_2011"
    lines: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": [], "classes": []}
    number = 0
    for label in range(1, n_classes + 1):
        bird = f"{label:03d}.Bird_{label}"
        lines["classes"].append(f"{label} {bird}")
        for i in range(per_class):
            number += 1
            name = f"{bird}/Bird_{label}_{i:04d}_{number}.jpg"
            write_image(folder / "images" / name, label, (8, 8))
            lines["images"].append(f"{number} {name}")
            lines["image_class_labels"].append(f"{number} {label}")
            lines["train_test_split"].append(f"{number} {int(i != 1)}")
    for name, text in lines.items():
        write_lines(folder / f"{name}.txt", text)
    return root


def without_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision read what :func:`write_cifar100` wrote."""
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})


def write_cifar100(root: Path, per_class: int = 6, by_label: bool = False) -> Path:
    """``cifar-100-python``; training sample i has label i % 100 and brightness i // 100, or its label."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for part, n in (("train", 100 * per_class), ("test", 100)):
        values = np.arange(n) % 100 if by_label or part == "test" else np.arange(n) // 100
        entry = {
            "data": np.repeat(values.astype(np.uint8)[:, None], 3072, 1),
            "fine_labels": [i % 100 for i in range(n)],
            "coarse_labels": [0] * n,
            "filenames": [f"{i}.png" for i in range(n)],
            "batch_label": "",
        }
        (folder / part).write_bytes(pickle.dumps(entry))
    names = {"fine_label_names": [f"thing {i}" for i in range(100)], "coarse_label_names": ["all"]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    return root
