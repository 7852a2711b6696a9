"""Handwritten digits: the 1,797 real 8 x 8 scans of scikit-learn (UCI Optical Recognition of Handwritten Digits)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import TensorSource
from .stream_data import StreamData

_TEST_FRACTION = 5  # every fifth sample of a class is a test sample


def load_digit_images(size: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of a fixed, class-balanced split: every fifth sample of each class is for testing.

    Args:
        size: side in pixels after bilinear enlargement of the 8 x 8 scans.

    Returns:
        Train images ``(1433, 3, size, size)`` float32 in [0, 1], train labels ``(1433,)`` int64, then 364 for test.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 16  # (1797, 1, 8, 8)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(raw.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        test[(labels == label).nonzero()[::_TEST_FRACTION, 0]] = True
    return images[~test].contiguous(), labels[~test], images[test].contiguous(), labels[test]


def load_digits_data() -> StreamData:
    """The digits as a data set of streams; images ``(3, 32, 32)`` in [0, 1], as they are."""
    train_images, train_labels, test_images, test_labels = load_digit_images()
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return StreamData(
        TensorSource(train_images, train_labels),
        TensorSource(test_images, test_labels),
        class_names=names,
        n_tasks=5,
        name="digits",
    )
