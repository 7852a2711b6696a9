"""Groups of tasks that have no instructions: class names by a text tower, descriptions, and features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from cl_plugins import Task, fit_stream
from cl_plugins.callbacks import BalancedEMA, MaskedHead, TaskGroups
from cl_plugins.clip_glyph import create_clip_glyph
from cl_plugins.feature_groups import FeatureGroups, suggest_threshold
from cl_plugins.instruction_groups import InstructionGroups
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit
from tests._regression import all_equal, weights_of

NAMES = [
    ("LATIN SMALL LETTER A WITH ACUTE", "LATIN SMALL LETTER A WITH GRAVE"),
    ("LEFTWARDS ARROW", "LEFTWARDS DOUBLE ARROW"),
    ("LATIN SMALL LETTER A WITH DIAERESIS", "LATIN SMALL LETTER A WITH TILDE"),
]


@pytest.fixture(scope="module")
def text_tower():
    model, tokenize = create_clip_glyph()
    return lambda texts: model.encode_text(tokenize(texts))  # with its gradient, as written by hand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_names_by_the_text_features_of_open_clip(text_tower, dtype):
    def encoder(texts):
        return text_tower(texts).to(dtype)

    threshold = suggest_threshold(InstructionGroups(encoder, threshold=0.0), [list(n) for n in NAMES], labels=[0, 1, 0])
    groups = TaskGroups(InstructionGroups(encoder, threshold=threshold, encoder_id="clip_glyph"), texts=_names)
    net = nn.Linear(1, 1)
    for index, names in enumerate(NAMES):
        task = Task(index, (2 * index, 2 * index + 1), class_names=names)
        groups.start_task(net, task)
        groups.end_task(net, task)
    assert [h["group"] for h in groups.groups.history] == [0, 1, 0]
    assert groups.groups.allocate_samples(["LEFTWARDS WAVE ARROW", "LATIN SMALL LETTER A WITH ACUTE"]) == [1, 0]
    assert groups.groups.state_dict()["encoder_id"] == "clip_glyph"


def _names(task):
    return list(task.class_names)


def test_an_encoder_like_sentence_transformers():
    """A bound method that takes a list and gives float32 rows, each text once; it may keep options of its own."""

    class Sentences:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def encode(self, sentences: list[str], normalize_embeddings: bool = True) -> np.ndarray:
            self.seen += sentences
            rows = np.array([[float("french" in s.lower()), float("vowel" in s.lower()), 0.1] for s in sentences])
            return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    model = Sentences()
    groups = InstructionGroups(model.encode, threshold=0.8, encoder_id="toy 1")
    for text in ("Say it in French", "Count vowels", "What is it in French"):
        groups.commit(groups.match([text]), text)
    assert [h["group"] for h in groups.history] == [0, 1, 0]
    assert groups.match(["What is it"]).expanded  # stop words only are texts for such an encoder
    assert len(model.seen) == len(set(model.seen)) == 4


MEANS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])


def _of_task(task):
    return (MEANS[task.index] + torch.zeros(4, 2)).requires_grad_()  # as a network gives them


def _grouped(tmp_path=None):
    groups = TaskGroups(FeatureGroups(threshold=0.8), texts=_of_task, exclude="head")
    extra = (
        [] if tmp_path is None else [ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")]
    )
    trainer = quiet_trainer(
        callbacks=[MaskedHead(), groups, BalancedEMA(active="reused"), *extra],
        max_epochs=1,
        enable_checkpointing=tmp_path is not None,
    )
    return groups, trainer


def test_features_group_an_image_stream(tmp_path):
    groups, trainer = _grouped(tmp_path)
    module, stream = PlainModule(), tiny_stream()
    result = fit_stream(trainer, module, stream)
    assert [h["group"] for h in groups.groups.history] == [0, 1, 0]
    assert [len(m) for m in groups.groups.means] == [2, 1]
    assert {e["name"] for e in groups.report_events(module)} == {"TaskGroups/group"}
    assert "reaches the threshold 0.800" in groups.report_events(module)[2]["reason"]
    step = sorted(tmp_path.glob("step=*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))[1]
    again, trainer = _grouped()
    resumed = PlainModule(tiny_vit(seed=3))
    other = fit_stream(trainer, resumed, tiny_stream(), ckpt_path=step)  # inside a task, whose features are kept
    assert all_equal(weights_of(module), weights_of(resumed))
    assert torch.equal(result.correct, other.correct)
    assert again.groups.state_dict() == groups.groups.state_dict()


def test_samples_find_their_group_by_features():
    groups, net = TaskGroups(FeatureGroups(threshold=0.8), texts=_of_task), nn.Linear(2, 2, bias=False)
    for index in range(2):
        groups.start_task(net, Task(index, (0, 1)))
        nn.init.constant_(net.weight, float(index + 1))
        groups.end_task(net, Task(index, (0, 1)))
    predict = groups.routed(lambda module, batch: module(batch), allocate=groups.groups.allocate_samples)
    assert predict(net, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))[:, 0].tolist() == [2.0, 1.0]


def test_features_need_a_function():
    with pytest.raises(ValueError, match="`texts` must give the features of a task beside FeatureGroups, got None"):
        TaskGroups(FeatureGroups(threshold=0.5))
