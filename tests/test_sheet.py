"""cl-bench show: what a stream looks like, as a picture and as text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from cl_plugins.cli import main
from cl_plugins.scenarios import ClassIncremental, build_scenario
from cl_plugins.sheet import draw_sheet, label_counts, task_samples, text_sheet


def stream(sizes=(3, 1, 5, 2)):
    """Four classes; an image of class c is c / 10 everywhere."""
    labels = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    images = (labels.float() / 10)[:, None, None, None].expand(-1, 1, 8, 8)
    data = TensorDataset(images, labels)
    return ClassIncremental(data, test=data, n_tasks=2, class_order=[2, 1, 0, 3])


def test_counts_follow_the_order_of_the_classes():
    assert [label_counts(stream(), i) for i in (0, 1)] == [[("2", 5), ("1", 1)], [("0", 3), ("3", 2)]]


def test_samples_come_class_by_class_and_show_what_their_name_says():
    samples = task_samples(stream(), 0, 5, seed=3)
    assert [s.caption for s in samples] == ["2", "1", "2", "2", "2"]
    assert all(torch.equal(s.image, torch.full((3, 8, 8), int(s.caption) / 10)) for s in samples)
    assert len(task_samples(stream(), 0, 50)) == 6
    with pytest.raises(ValueError, match="`count` must be 1 or more, got 0"):
        task_samples(stream(), 0, 0)


def test_several_labels_and_texts():
    several = build_scenario("multilabel-glyphs", n_classes=6, n_tasks=3, train_images=24, test_images=12)
    rows = several.train.targets[several.train.of(1)]
    assert [n for _, n in label_counts(several, 1)] == [int(rows[:, c].sum()) for c in several.tasks[1].classes]
    assert f"{len(rows)} training samples" in text_sheet(several, [1])
    names = several.tasks[1].class_names
    assert all(set(s.caption.split(", ")) <= set(names) for s in task_samples(several, 1, 4))
    texts = build_scenario("instructions", n_train=8, n_test=2)
    (sample,) = task_samples(texts, 0, 1)
    known = {(f"{e.instruction} {e.input}", e.output) for e in texts.text_tasks[0].train}
    assert (sample.text, sample.caption) in known
    assert f"-> {sample.caption}" in text_sheet(texts, [0], 1)


def test_the_picture_holds_the_samples():
    pixels = np.asarray(draw_sheet(stream(), [1], columns=2))
    assert pixels.ndim == 3
    drawn = {tuple(c) for c in pixels.reshape(-1, 3).tolist()}
    assert {(0, 0, 0), (76, 76, 76)} <= drawn  # class 0, and class 3 at 0.3
    with pytest.raises(ValueError, match="`tasks` must be from 0 to 1, got 2"):
        draw_sheet(stream(), [2])


def test_the_text_scales_bars_and_colors():
    plain = text_sheet(stream(), columns=2)
    assert "task 0: 6 training samples, 2 classes |█▂| 1 to 5" in plain
    assert "\x1b" not in plain
    assert "\x1b[38;2;51;51;51;48;2;51;51;51m▀" in text_sheet(stream(), [0], 1, colors=True)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "sheets" / "digits.png"
    assert main(["show", "split-digits", "--tasks", "0,3-4", "--columns", "3", "-o", str(out)]) == 0
    assert Image.open(out).size[1] < 500
    assert main(["show", "split-digits", "--tasks", "1"]) == 0
    assert "task 1: 287 training samples, 2 classes" in capsys.readouterr().out
    for tasks, said in (("x", "`--tasks` must be numbers and ranges"), ("9", "`tasks` must be from 0 to 4, got 9")):
        assert main(["show", "split-digits", "--tasks", tasks]) != 0
        assert said in capsys.readouterr().err
    for option, said in (
        (("--tasks", "3-1"), "`--tasks` must have ranges from low to high, got '3-1'"),
        (("--columns", "0"), "`--columns` must be 1 or more, got 0"),
        (("--seed", "-1"), "`--seed` must be 0 or more, got -1"),
    ):
        assert main(["show", "split-digits", *option]) != 0
        assert said in capsys.readouterr().err
