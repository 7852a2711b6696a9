"""What the dashboard promises: numbers of the metric classes, color never alone, damage named, a bar that counts."""

import io
import json
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_plugins import fit_stream, metrics
from cl_plugins.benchmark import run_benchmark
from cl_plugins.commands.report import execute
from cl_plugins.comparison import compare_methods
from cl_plugins.progress import StreamProgress
from cl_plugins.report._figures import CHANGE, build_figures
from cl_plugins.report._numbers import measures_of, number
from cl_plugins.report.page import report_content
from cl_plugins.runs import Run, RunTask, RunWriter, read_run
from tests._helpers import PlainModule, tiny_stream
from tests._reports import record

CLASSES = {
    "average_accuracy": metrics.AverageAccuracy,
    "average_incremental_accuracy": metrics.AverageIncrementalAccuracy,
    "forgetting": metrics.Forgetting,
    "backward_transfer": metrics.BackwardTransfer,
    "learning_accuracy": metrics.LearningAccuracy,
    "stability": metrics.Stability,
    "worst_task_accuracy": metrics.WorstTaskAccuracy,
    "forward_transfer": metrics.ForwardTransfer,
    "transfer": metrics.TransferAccuracy,
}


def run_of(correct, total, initial=None):
    tasks = correct.shape[1]
    counts = None if initial is None else np.stack([initial, np.full(tasks, 50)])
    named = [RunTask(j, f"t{j}") for j in range(tasks)]
    return Run("a", tasks=named, learned_at=list(range(tasks)), correct=correct, total=total, initial=counts)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tasks=st.integers(1, 6),
    rows=st.integers(1, 6),
    whole=st.booleans(),
    holes=st.booleans(),
)
def test_every_number_of_the_page_is_that_of_the_metric_class(seed, tasks, rows, whole, holes):
    draw, rows = np.random.default_rng(seed), min(rows, tasks)
    total = draw.integers(1, 60, (rows, tasks))
    correct = draw.integers(0, total + 1)
    unseen = np.triu(np.ones((rows, tasks), bool), 1) & (not whole) | (draw.random((rows, tasks)) < 0.1) & holes
    correct[unseen] = total[unseen] = -1
    initial = draw.integers(0, 51, tasks) if whole else None
    run = run_of(correct, total, initial)
    shown = measures_of(run)
    for name, kind in CLASSES.items():
        metric = kind(tasks)
        if initial is not None:
            metric.update_row(-1, torch.from_numpy(initial), torch.full((tasks,), 50))
        for i in range(rows):
            metric.update_row(i, torch.from_numpy(correct[i].clip(0)), torch.from_numpy(total[i].clip(0)))
        assert number(shown[name]) == number(float(metric.compute())), name


def test_losses_are_orange_gains_blue_and_both_as_far_from_the_middle():
    def channels(color):
        return [int(color[k : k + 2], 16) for k in (1, 3, 5)]

    half = len(CHANGE) // 2
    for k in range(half - 16):
        red, green, blue = channels(CHANGE[k])
        assert red > green > blue
        red, green, blue = channels(CHANGE[-1 - k])
        assert blue > green > red
    grey = channels(CHANGE[half])
    assert max(grey) - min(grey) < 16
    plots = {plot.name: plot for plot in build_figures(1, True)}
    for name in ("matrix", "confusion", "panel0"):
        (mapper,) = [r.glyph.color_mapper for r in plots[name].renderers if r.name == "cells"]
        levels = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(channels, mapper.palette)]
        assert levels == sorted(levels)  # cividis: more is lighter, also without color
        assert mapper.palette[0].lower().startswith("#00")
        assert channels(mapper.palette[-1])[2] < channels(mapper.palette[-1])[0]
        assert mapper.nan_color == "rgba(0, 0, 0, 0)"  # what was not measured lets the hatching through
        (blank,) = [r for r in plots[name].renderers if r.name == "blank"]
        assert blank.glyph.hatch_pattern == "/"


def test_a_loss_is_striped_and_a_line_dashed_so_that_color_is_never_the_only_sign():
    plots = {plot.name: plot for plot in build_figures(1, True)}
    stripes = [r for r in plots["waterfall"].renderers if r.name == "stripes"]
    assert stripes[0].glyph.hatch_pattern == "/"
    (lines,) = [r for r in plots["retention"].renderers if r.name == "lines"]
    assert lines.glyph.line_dash == "dash"
    for name in ("plane", "cost", "stream", "orders"):
        (runs,) = [r for r in plots[name].renderers if r.name == "runs"]
        assert runs.glyph.marker == "marker"


# What json.loads takes and no writer of ours writes.
ODD = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "{}", "[NaN]", '"x"', "null", "true", "-1"]
LINES = [
    '{"schema":1,"kind":"run","method":"m","scenario":"s","seed":@,"order_seed":@}',
    '{"schema":1,"kind":"task","index":1,"learned_at":@,"classes":[@]}',
    '{"schema":1,"kind":"row","after":1,"correct":[@,1],"total":[4,@]}',
    '{"schema":1,"kind":"row","after":1,"correct":[1,1],"total":[4,4],"labels":{"classes":[0],"average_precision":[@],'
    '"true_positives":[@],"predicted":[1],"present":[1]}}',
    '{"schema":1,"kind":"cost","task":0,"train_seconds":@,"trainable":@,"peak_bytes":@,"parameters":{"a":@}}',
    '{"schema":1,"kind":"conf","after":1,"counts":[[@,1],[0,4]]}',
    '{"schema":1,"kind":"plug","name":"p","task":0,"x":[@],"value":[@]}',
    '{"schema":1,"kind":"plug","name":"drift/effective rank","task":0,"value":@}',
    '{"schema":1,"kind":"mid","step":@,"task":0,"old":0,"seen":1,"tasks":[0],"correct":[@],"total":[@],'
    '"correct_in_task":[0],"every":1,"sampled":false,"end":false,"seconds":@}',
    '{"schema":1,"kind":"alert","task":@,"text":@}',
    '{"schema":1,"kind":"end","time":@,"status":@}',
]


@pytest.mark.parametrize("odd", ODD)
def test_a_store_with_numbers_that_are_none_is_shown_as_far_as_it_goes(tmp_path, odd):
    folder = tmp_path / "a"
    with RunWriter(tmp_path, "a") as writer:
        writer.write("row", after=0, correct=[3], total=[4])
    good = writer.path.read_text()
    for line in LINES:
        (folder / "events.0.0.jsonl").write_text(good + line.replace("@", odd) + "\n")
        run = read_run(folder)
        content = report_content([run])
        json.dumps(content["data"], allow_nan=False)
        assert run.accuracy_matrix[0, 0] == 0.75, line
        assert all(v is None or np.isfinite(v) for v in content["data"]["runs"][0]["measures"].values())


def test_runs_with_odd_seeds_are_compared_all_the_same():
    odd = [{}, [1], float("nan"), None, "0", 0]
    results = [{"method": m, "scenario": "s", "seed": s, "average_accuracy": 0.5} for m in "ab" for s in odd]
    (scenario,) = compare_methods(results).scenarios
    assert scenario.entries[1].difference.n == len(odd)


class Arguments:
    def __init__(self, folder, out):
        self.folder, self.out = str(folder), str(out)


def test_one_unreadable_run_does_not_hide_the_others(tmp_path, capsys):
    record(tmp_path, "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "events.0.0.jsonl").write_bytes(b"\xff\xfe\x00 nothing\n" * 3)
    (tmp_path / "none").mkdir()
    assert execute(Arguments(tmp_path, tmp_path / "all.html")) == 0
    page = (tmp_path / "all.html").read_text()
    assert "3 damaged lines left out" in page
    assert "ovor on split-digits" in page
    with pytest.raises(ValueError, match="`folder` must hold runs, found none in"):
        execute(Arguments(tmp_path / "none", tmp_path / "none.html"))
    assert not (tmp_path / "none.html").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Positions(pl.Callback):
    """Where the bar stands after each batch."""

    def __init__(self, bar):
        self.bar, self.seen, self.texts = bar, [], []

    def on_train_batch_end(self, *_):
        self.seen.append(self.bar._bar.n)
        self.texts.append(self.bar._bar.postfix)


def test_the_bar_moves_over_tasks_and_epochs_with_the_running_numbers():
    stream, file = tiny_stream(3), Terminal()
    bar = StreamProgress("method", file=file)
    positions = Positions(bar)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[bar, positions], enable_model_summary=False, **options
    )
    result = fit_stream(trainer, PlainModule(), stream)
    steps = len(positions.seen) // 3
    assert positions.seen == pytest.approx([j + 0.98 * k / steps for j in range(3) for k in range(1, steps + 1)])
    told = file.getvalue()
    assert positions.texts[0] == "task 1, epoch 1/2"
    assert positions.texts[steps].startswith("task 2, epoch 1/2, accuracy ")
    accuracy, lost = result.average_accuracy, result.forgetting
    assert f"task 3/3 done, accuracy {accuracy:.3f}, forgetting {lost:.3f}" in told
    assert re.search(r"method: +\d+%\|.{10}\| \d\d:\d\d < \d\d:\d\d", told)  # elapsed < left


def test_without_a_terminal_a_line_a_task_names_what_it_measures(tmp_path, capsys):
    tiny = {"n_classes": 4, "n_tasks": 2, "train_images": 32, "test_images": 24}
    run_benchmark("frozen-linear", "multilabel-glyphs", data=tiny, epochs=1, device="cpu", out=tmp_path)
    first, last = (line for line in capsys.readouterr().err.splitlines() if " done" in line)
    assert "task 1/2 done, mAP 0." in first
    assert "forgetting" not in first
    assert ", label accuracy 0." in last
    assert ", forgetting of label accuracy" in last
