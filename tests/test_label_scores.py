"""The mAP, CF1 and OF1 of a multi-label evaluation equal those of scikit-learn and torchmetrics, on any batches."""

from __future__ import annotations

import io
import json
import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_score, recall_score
from torch import nn
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

from cl_plugins.benchmark import run_benchmark
from cl_plugins.compare import table_rows
from cl_plugins.comparison import MEASURES
from cl_plugins.evaluation import evaluate_tasks
from cl_plugins.label_scores import SeenLabelScores
from cl_plugins.plugin import Row
from cl_plugins.report._measures import headline
from cl_plugins.report._numbers import measures_of
from cl_plugins.result import StreamResult
from cl_plugins.runs import RunWriter, read_run
from cl_plugins.scenarios import MultiLabel
from cl_plugins.stream_state import rows_from_state, rows_to_state
from cl_plugins.summary import summary_table
from cl_plugins.task import Task
from tests._helpers import leave_processes


class Numbered:
    """Samples that are their own number, so that a table of logits is a model of them."""

    def __init__(self, targets):
        self.targets = np.asarray(targets)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.tensor(index), 0


class Table(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits[x]


def case(seed, classes=6, images=40):
    draw = np.random.default_rng(seed)
    targets = draw.random((images, classes)) < 0.3
    targets[np.arange(classes), np.arange(classes)] = True
    logits = torch.from_numpy(np.round(draw.normal(size=(images, classes)), 1)).float()  # rounded: with ties
    return targets, logits


def by_sklearn(logits, targets, seen):
    """Of the images with a seen class; columns of seen classes that occur."""
    rows = targets[:, seen].any(1)
    y, s = targets[rows][:, seen], logits.numpy()[rows][:, seen]
    occurs = y.any(0)
    named = s >= 0
    columns = np.flatnonzero(occurs)
    precision, recall = (
        np.mean([score(y[:, c], named[:, c], zero_division=0) for c in columns])
        for score in (precision_score, recall_score)
    )
    pooled = (y & named).sum() / max(named.sum(), 1), (y & named).sum() / y.sum()
    f1 = [2 * p * r / (p + r) if p + r else 0.0 for p, r in ((precision, recall), pooled)]
    return [average_precision_score(y[:, occurs], s[:, occurs], average="macro"), *f1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), n_tasks=st.integers(1, 6), batch=st.integers(1, 40))
def test_equal_to_sklearn_after_every_task(seed, n_tasks, batch):
    targets, logits = case(seed)
    stream = MultiLabel(Numbered(targets), Numbered(targets), n_tasks, order_seed=seed % 5, eval_batch_size=batch)
    for task in stream.tasks:
        labels = evaluate_tasks(Table(logits), stream, task.index, future=bool(seed % 2)).labels
        seen = sorted(c for t in stream.tasks[: task.index + 1] for c in t.classes)
        assert list(labels.classes) == seen
        assert labels.present == tuple(targets[:, seen].sum(0))  # each image once, though in several tasks
        assert [labels.map, labels.cf1, labels.of1] == pytest.approx(by_sklearn(logits, targets, seen), abs=1e-12)


def test_equal_to_torchmetrics_where_it_has_the_measure():
    targets, logits = case(3)
    logits += 0.05  # none at the threshold: torchmetrics leaves it out
    metric = SeenLabelScores(range(6))
    metric.update(logits, torch.from_numpy(targets))
    scores, y = metric.scores(), torch.from_numpy(targets).long()
    assert float(metric.compute()) == scores.map
    theirs = multilabel_average_precision(logits.sigmoid(), y, 6, average=None)
    torch.testing.assert_close(torch.tensor(scores.average_precision), theirs, rtol=0, atol=1e-6)
    assert scores.of1 == pytest.approx(float(multilabel_f1_score(logits.sigmoid(), y, 6, average="micro")), abs=1e-6)
    macro = float(multilabel_f1_score(logits.sigmoid(), y, 6, average="macro"))
    assert abs(scores.cf1 - macro) > 1e-3  # another measure: the mean of the classes' F1


def test_a_threshold_of_one_half_on_the_sigmoid_is_zero_on_the_logit():
    metric = SeenLabelScores([0])
    metric.update(torch.tensor([[0.0], [-1e-6], [40.0], [50.0]]), torch.tensor([[1], [1], [0], [1]]))
    scores = metric.scores()
    assert (scores.predicted, scores.true_positives) == ((3,), (2,))
    assert scores.average_precision == (pytest.approx(np.mean([1 / 1, 2 / 3, 3 / 4])),)  # float32's sigmoid: 40 = 50


def test_undefined_numbers_have_a_reason():
    targets = np.eye(4, dtype=int)
    test = Numbered(np.delete(targets, 1, 0))
    stream = MultiLabel(Numbered(targets), test, classes=[[1], [0, 2], [3]])
    row = evaluate_tasks(Table(torch.zeros(3, 4)), stream, 0)
    assert np.isnan([row.labels.map, row.labels.cf1, row.labels.of1]).all()
    assert row.labels.undefined == "no seen class occurs in the test data"
    after = evaluate_tasks(Table(torch.eye(4)[[0, 2, 3]]), stream, 1)
    assert after.labels.average_precision == (1.0, None, 1.0)
    assert after.labels.undefined == "1 seen classes do not occur in the test data, such as class 1"
    broken = evaluate_tasks(Table(torch.full((3, 4), torch.nan)), stream, 2)
    assert np.isnan(broken.labels.map)
    assert np.isnan(broken.labels.of1)
    assert broken.labels.undefined == "the logits of seen classes hold NaN or infinity"
    result = StreamResult(list(stream.tasks), [row, after, broken])
    assert [result.metrics()[k] for k in ("map", "average_map", "cf1", "of1")] == [None] * 4
    assert result.to_dict()["multilabel"]["rows"][0]["undefined"] == "no seen class occurs in the test data"
    assert "undefined  (no seen class occurs in the test data)" in summary_table(result)


def test_faulty_batches_are_refused():
    metric = SeenLabelScores([0, 2])
    with pytest.raises(ValueError, match=r"shape \(batch, 3 or more classes\), got \(2, 2\) and \(2, 2\)"):
        metric.update(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"must be whole in the evaluation, got hidden ones"):
        metric.update(torch.zeros(1, 3), torch.tensor([[0, 0, -1]]))
    with pytest.raises(ValueError, match="`seen` must hold at least one class"):
        SeenLabelScores([])


def test_other_streams_have_none_and_rows_survive_a_checkpoint():
    plain = Row(0, (9,), (10,), (9,), ((10,),), 0.1)
    result = StreamResult([Task(0, (0, 1))], [plain])
    assert "map" not in result.metrics()
    assert "multilabel" not in result.to_dict()
    targets, logits = case(1)
    row = evaluate_tasks(Table(logits), MultiLabel(Numbered(targets), Numbered(targets), 2), 1)
    for kept in ([row], [plain], []):
        file = io.BytesIO()
        torch.save(rows_to_state(kept), file)
        file.seek(0)
        assert rows_from_state(torch.load(file, weights_only=True)) == kept


def test_bench_records_and_prints_them(tmp_path):
    data = {"n_classes": 4, "n_tasks": 2, "train_images": 32, "test_images": 24}
    options = {"epochs": 1, "device": "cpu", "progress": False}
    result = run_benchmark("frozen-linear", "multilabel-glyphs", data=data, out=tmp_path, **options)
    saved = json.loads((tmp_path / "result.json").read_text())
    rows = saved["multilabel"]["rows"]
    assert saved["multilabel"]["threshold"] == 0.5
    assert [r["after"] for r in rows] == [0, 1]
    assert [len(r["classes"]) for r in rows] == [2, 4]
    assert saved["map"] == rows[1]["map"] == result.label_scores["map"]
    assert saved["average_map"] == pytest.approx((rows[0]["map"] + rows[1]["map"]) / 2)
    for row in rows:
        assert row["map"] == pytest.approx(np.mean(row["average_precision"]))
        right, named, there = (sum(row[k]) for k in ("true_positives", "predicted", "present"))
        assert row["of1"] == pytest.approx(2 * right / (named + there))
    assert {"map", "average_map", "cf1", "of1"} <= set(saved["definitions"])
    run = read_run(tmp_path)  # the store and its page have the same numbers
    assert run.labels == {row.after: row.labels for row in result.rows}
    shown = measures_of(run)
    assert {k: shown[k] for k in ("map", "average_map", "cf1", "of1")} == pytest.approx(result.label_scores)
    page = (tmp_path / "report.html").read_text()
    assert "mAP of seen classes (last row)" in page
    assert "count labels, not images" in page
    assert headline([run], True)[0] == "map"
    text = summary_table(result)
    for line in (f"after T1    {rows[1]['map']:9.4f}{rows[1]['cf1']:9.4f}", f"{saved['map']:.4f}", "CF1 (last row)"):
        assert line in text


def test_the_comparison_has_columns_for_them(tmp_path):
    base = {"method": "m", "scenario": "s", "average_accuracy": 0.5}
    table = table_rows([{**base, "seed": k, "map": 0.25 + 0.5 * k, "cf1": None} for k in (0, 1)])
    assert "mAP" in str(table)
    assert "0.5" in str(table)
    assert "OF1" not in str(table)
    assert {"map", "average_map", "cf1", "of1"} <= set(MEASURES)


def _worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=3)
    targets, logits = case(7)
    mine = slice(*((0, 9), (9, 40), (40, 40))[rank])  # unequal shares, one of them empty
    metric = SeenLabelScores(range(4))
    if rank < 2:
        metric.update(logits[mine], torch.from_numpy(targets[mine]), earlier=[5])
    alone = metric.scores(gather=False)
    torch.save([repr(metric.scores(gather=True)), sum(alone.present)], f"{folder}/{rank}.pt")
    leave_processes()


@pytest.mark.ddp
@pytest.mark.slow
def test_processes_with_unequal_shares_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=3)
    targets, logits = case(7)
    metric = SeenLabelScores(range(4))
    metric.update(logits, torch.from_numpy(targets), earlier=[5])
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert [text for text, _ in found] == [repr(metric.scores())] * 3
    assert found[2][1] == 0
    assert found[0][1] + found[1][1] == sum(metric.scores().present)


def test_malformed_scores_in_a_store_are_left_out_and_named(tmp_path):
    good = {"classes": [0], "average_precision": [0.5], "true_positives": [1], "predicted": [2], "present": [1]}
    bad = [{**good, "present": [-1]}, {**good, "present": [1, 2]}, {**good, "average_precision": [2.0]}, [1], None]
    with RunWriter(tmp_path, "run") as writer:
        for after, labels in enumerate([good, *bad]):
            writer.write("row", after=after, correct=[1], total=[2], labels=labels)
    run = read_run(tmp_path / "run")
    assert list(run.labels) == [0]
    assert run.labels[0].map == 0.5
    assert sum("label scores after task" in p for p in run.problems) == len(bad)
    assert all(np.isnan(measures_of(run)[k]) for k in ("map", "cf1"))  # not of the one row that could be read
