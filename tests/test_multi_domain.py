"""Multi-domain streams: label numbers, texts, shots, what counts as a prediction, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from cl_plugins.evaluation import evaluate_tasks
from cl_plugins.scenarios import MTIL, XTAIL, Joint, StreamData, TensorSource


def domain(name, names, per_class=4, value=0.0, template="", test_classes=None, **more):
    """A data set whose inputs are (value, label)."""
    labels = torch.arange(len(names)).repeat(per_class)
    tests = torch.arange(len(names) if test_classes is None else test_classes).repeat(2)

    def source(y):
        return TensorSource(torch.stack([torch.full((len(y),), value), y.float()], 1), y)

    return StreamData(source(labels), source(tests), class_names=names, name=name, template=template, **more)


PETS = domain("pets", ("cat", "dog"), value=1.0)
FOOD = domain("food", ("soup", "pie", "rice"), value=2.0, template="{}, a kind of food")
CARS = domain("cars", ("van",), value=3.0)


def test_labels_are_numbered_by_domain_whatever_the_order():
    plain = XTAIL([PETS, FOOD, CARS])
    turned = XTAIL([PETS, FOOD, CARS], domain_order=[2, 0, 1])
    assert [t.classes for t in plain.tasks] == [(0, 1), (2, 3, 4), (5,)]
    assert [(t.name, t.classes) for t in turned.tasks] == [("cars", (5,)), ("pets", (0, 1)), ("food", (2, 3, 4))]
    assert plain.class_texts == turned.class_texts
    assert plain.class_names == ("cat", "dog", "soup", "pie", "rice", "van")
    assert plain.tasks[1].class_names == ("soup", "pie", "rice")
    assert (plain.modality, plain.open_vocabulary, plain.n_classes) == ("image-text", True, 6)


def test_every_sample_comes_with_its_own_domains_label():
    stream = XTAIL([PETS, FOOD, CARS], domain_order=[1, 2, 0], batch_size=100)
    for task, (value, start) in enumerate([(2.0, 2), (3.0, 5), (1.0, 0)]):
        stream.task = task
        for x, y in (next(iter(stream.train_dataloader())), next(iter(stream.test_loader(task)))):
            assert (x[:, 0] == value).all()
            assert (y == x[:, 1].long() + start).all()


def test_templates_are_the_streams_or_the_domains_or_the_default():
    assert XTAIL([PETS, FOOD]).class_texts[1:3] == ("a photo of a dog.", "soup, a kind of food")
    assert XTAIL([PETS, FOOD], templates="a {}").class_texts == ("a cat", "a dog", "a soup", "a pie", "a rice")
    assert XTAIL([PETS, FOOD], templates=["{}!", "{}?"], domain_order=[1, 0]).class_texts[0] == "cat!"


def test_shots_are_drawn_per_class_and_by_seed():
    many = domain("many", ("a", "b"), per_class=50)
    draws = [XTAIL([many, PETS], shots=5, split_seed=s) for s in (0, 0, 1)]
    for stream in draws:
        used = stream.train.labels[stream.train.indices]
        assert np.bincount(used).tolist() == [5, 5, 4, 4]  # pets have four images a class
    assert np.array_equal(draws[0].train.indices, draws[1].train.indices)
    assert not np.array_equal(draws[0].train.indices, draws[2].train.indices)
    held = XTAIL([many, PETS], shots=10, validation_fraction=0.5)
    assert (held.train.sizes(), held.validation.sizes()) == ([10, 4], [10, 4])
    assert not set(held.train.indices) & set(held.validation.indices)


def test_validation_data_of_the_domains_are_used():
    with_own = [
        StreamData(d.train, d.test, d.test, class_names=d.class_names, name=d.name, template=d.template)
        for d in (PETS, FOOD)
    ]
    stream = XTAIL(with_own, domain_order=[1, 0])
    stream.task = 0
    x, y = next(iter(stream.val_dataloader()))
    assert (x[:, 0] == 2.0).all()
    assert sorted(set(y.tolist())) == [2, 3, 4]


class Fixed(nn.Module):
    """Prefers one label for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_predictions_may_name_classes_of_later_domains():
    stream = XTAIL([PETS, FOOD])
    net = Fixed([1.0, 0.0, 0.0, 2.0, 0.0])  # food's second class wins over all, cat within pets
    row = evaluate_tasks(net, stream, 0, future=True)
    assert row.correct == (0, 2)
    assert row.total == (4, 6)
    assert row.correct_in_task == (2, 2)
    assert row.confusion == ((0, 4), (0, 6))
    assert evaluate_tasks(net, stream, 0).correct == (0, None)


def test_mtil_differs_in_its_number_alone():
    a, b = XTAIL([PETS, FOOD]), MTIL([PETS, FOOD])
    assert (a.task_known, b.task_known, b.name) == (False, True, "mtil")
    assert (a.tasks, a.class_texts) == (b.tasks, b.class_texts)
    assert b.provenance()["open_vocabulary"]


def test_joint_reference_keeps_the_texts():
    joint = Joint(XTAIL([PETS, FOOD]))
    assert (joint.modality, joint.open_vocabulary) == ("image-text", True)
    assert joint.class_texts == XTAIL([PETS, FOOD]).class_texts
    assert joint.n_classes == 5


def test_equal_texts_are_reported():
    other = domain("zoo", ("lion", "cat"))
    with pytest.warns(UserWarning, match=r"1 labels have the text of another, such as 0 and 3, 'a photo of a cat.'"):
        XTAIL([PETS, other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        XTAIL([PETS, other], templates=["a photo of a {}.", "a photo of a {}, a wild animal."])


@pytest.mark.parametrize(
    ("domains", "options", "text"),
    [
        ([], {}, "`domains` must hold one data set per domain"),
        ([PETS], {"names": ["a", "b"]}, "`names` must hold 1 texts"),
        ([PETS, FOOD], {"templates": ["{}"]}, "`templates` must hold 2 texts"),
        ([PETS], {"templates": "a photo"}, "`templates` must hold {} for the name"),
        ([PETS], {"shots": 0}, "`shots` must be an integer of 1 or more"),
        ([PETS], {"validation_fraction": 1.0}, "`validation_fraction`"),
        ([PETS, FOOD], {"domain_order": [0, 0]}, "`domain_order` must name each position"),
        ([domain("bare", ("a", "b")).train] * 1, {}, "`test` must be given"),
        ([(PETS.train, PETS.test)], {}, "every domain must have class names, got 0 names for 2 labels"),
        ([StreamData(CARS.train, PETS.test, class_names=("a", "b"), name="odd")], {}, "got class 1 as well"),
        ([PETS, domain("x", ("a",), eval_transform=abs)], {}, "`eval_transform` must be given"),
    ],
)
def test_refusals(domains, options, text):
    with pytest.raises(ValueError, match=text.replace("{", r"\{").replace("}", r"\}")):
        XTAIL(domains, **options)
