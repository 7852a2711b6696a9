"""Labels are found without reading a sample."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from cl_plugins.scenarios import find_labels
from cl_plugins.scenarios.labels import FoundLabels, align_labels


class Unreadable:
    """A data set whose samples must not be touched."""

    def __init__(self, n=3, **attributes):
        self.n = n
        vars(self).update(attributes)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        raise AssertionError("a sample was read")


class Table(Unreadable):
    """Columns as Hugging Face's ``Dataset`` has them."""

    column_names = ("image", "fine_label")

    def __getitem__(self, key):
        return {"fine_label": [2, 0, 1]}[key]


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (Unreadable(targets=[2, 0, 1]), None),
        (Unreadable(targets=torch.tensor([2, 0, 1])), None),
        (Unreadable(_labels=(2, 0, 1)), None),
        (Unreadable(samples=[("a", 2), ("b", 0), ("c", 1)]), None),
        (Unreadable(kinds=np.array([2.0, 0.0, 1.0])), "kinds"),
        (Unreadable(), [2, 0, 1]),
        (Unreadable(), np.array([[2], [0], [1]])),
        (Unreadable(), lambda i: (2, 0, 1)[i]),
        (Table(), None),
        (Table(), "fine_label"),
        (TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1])), None),
        (Subset(Unreadable(5, targets=[9, 1, 9, 0, 2]), [4, 3, 1]), None),
        (ConcatDataset([Unreadable(1, targets=[2]), Unreadable(2, targets=[0, 1])]), None),
    ],
)
def test_labels_are_found(data, labels):
    found = find_labels(data, labels)
    assert found.values.dtype == np.int64
    assert found.values.tolist() == [2, 0, 1]


def test_text_is_numbered_in_alphabetical_order_and_said():
    found = find_labels(Unreadable(), ["dog", "ant", "dog"])
    assert found.values.tolist() == [1, 0, 1]
    assert found.mapping == {"ant": 0, "dog": 1}
    assert found.names == ("ant", "dog")


def test_class_names_of_the_data_set_are_taken():
    assert find_labels(Unreadable(targets=[1, 0, 1], classes=["ant", "dog"])).names == ("ant", "dog")
    assert find_labels(Unreadable(targets=[1, 0, 1], classes=["x", "y"]), names=["ant", "dog"]).names == ("ant", "dog")


@pytest.mark.parametrize(
    ("data", "labels", "text"),
    [
        (Unreadable(), None, r"labels of `Unreadable` must be found without reading.*pass `labels=` as a column's"),
        (Unreadable(kind=1), "knd", r"must name a column or attribute of the data set, got 'knd'; it has kind, n"),
        (Unreadable(), [0, 1], r"one value for each of the 3 samples, got shape \(2,\)"),
        (Unreadable(), np.zeros((3, 4)), r"got shape \(3, 4\); for several labels a sample use a multi-label scenario"),
        (Unreadable(), [0, -1, 2], r"`labels` must be 0 or more, got -1 at sample 1; remove unlabeled samples"),
        (Unreadable(), [0.5, 1, 2], r"must be integers or text, got float64 with fractions, infinity or NaN"),
        (Unreadable(), [0, float("nan"), 2], r"must be integers or text, got float64 with fractions, infinity or NaN"),
        (Unreadable(), [0, float("inf"), 2], r"must be integers or text, got float64 with fractions, infinity or NaN"),
        (Unreadable(), [0, 10**6, 2], r"must be below 1,000,000, .*got 1000000 at sample 1"),
        (Unreadable(), [0, 10**9, 2], r"must be below 1,000,000, .*got 1000000000 at sample 1; pass np.unique"),
        (Unreadable(), np.array([0, 2**63 + 1, 2], np.uint64), r"must be below 1,000,000, .*got 9223372036854775809"),
        (Unreadable(), ["ant", None, "dog"], r"must be given for every sample, got None"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(data, labels, text):
    with pytest.raises(ValueError, match=text):
        find_labels(data, labels)


def test_folders_with_other_classes_are_aligned_by_name():
    train = FoundLabels(np.array([0, 1, 2]), ("ant", "bee", "cat"))
    test = FoundLabels(np.array([0, 1, 1]), ("ant", "cat"))
    assert align_labels(train, test).values.tolist() == [0, 2, 2]
    with pytest.raises(ValueError, match="`test` must hold classes of the training data only, got dog as well"):
        align_labels(train, FoundLabels(np.array([0, 1]), ("ant", "dog")))


def test_numbers_and_text_are_not_taken_for_each_other():
    numbers, text = find_labels(range(3), [0, 1, 2]), find_labels(range(3), ["cat", "ant", "bee"])
    with pytest.raises(ValueError, match=r"`labels` must be text in training and test data.*got integers and text;"):
        align_labels(numbers, text)
    with pytest.raises(ValueError, match="got text and integers; number the text"):
        align_labels(text, numbers)
    assert align_labels(FoundLabels(numbers.values, ("bee", "cat", "ant")), text).values.tolist() == [1, 2, 0]
