"""The report: names stay text, numbers are the metrics', nothing is fetched, undefined is not 0."""

import base64
import csv
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
import torch

from cl_plugins import functional
from cl_plugins.report import render_report, write_report
from cl_plugins.report._numbers import MEASURES, number
from cl_plugins.report._text import embedded_json
from cl_plugins.runs import Run, RunWriter, read_run
from tests._reports import HOSTILE, record


class Reader(HTMLParser):
    """Tags, attributes, scripts and visible text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.stack = [], [], [], []
        self.text, self.tiles, self.cells, self.policy = "", {}, [], ""
        self._selection = self._measure = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        known = dict(attrs)
        if tag == "meta" and known.get("http-equiv") == "Content-Security-Policy":
            self.policy = known["content"]
        if tag == "script":
            self.scripts.append([known, ""])
        self._selection = known.get("data-selection", self._selection)
        self._measure = known.get("data-measure")
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        self.stack.append(tag)

    def handle_endtag(self, tag):
        self._measure = None
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1][1] += data
        elif self.stack and self.stack[-1] != "style":
            self.text += data
            if self._measure:
                self.tiles[self._selection, self._measure] = data
            if {"td", "th"} & set(self.stack):
                self.cells[-1][-1] += data

    def json(self, identity):
        return next(json.loads(content) for known, content in self.scripts if known.get("id") == identity)


def unpack(packed):
    if packed["type"] == "list":
        return np.array(packed["data"])
    values = np.frombuffer(base64.b64decode(packed["data"]), f"<{packed['type']}").astype(np.int64)
    return np.where(values == np.iinfo(packed["type"]).max, -1, values)


def cells_of(run):
    """The counts in the page, decoded by a second implementation."""
    cells, shape = run["cells"], (run["rows"], run["tasks"])
    correct, total = np.full(shape, -1), np.full(shape, -1)
    heads, totals, at = unpack(cells["correct"]), unpack(cells["total"]), 0
    for i, length in enumerate(cells["lengths"]):
        correct[i, :length] = heads[at : at + length]
        total[i, :length] = totals[:length] if cells["constant"] else totals[at : at + length]
        at += length
    total[correct < 0] = -1
    return correct, total


def test_names_are_text_wherever_they_stand(tmp_path):
    hostile = [HOSTILE, "<!--", "]]>", "$$\\frac{a}{b}$$", "\"'`", "\u202e\ud800\x00", "&lt;b&gt;"]
    folder = tmp_path / "runs"
    with RunWriter(folder, "a") as writer:
        writer.write("run", method=HOSTILE, scenario=HOSTILE, seed=HOSTILE, **{HOSTILE: HOSTILE})
        for j, name in enumerate(hostile):
            writer.write("task", index=j, name=name, classes=[j], class_names=[name])
            writer.write("row", after=j, correct=[1] * (j + 1), total=[2] * (j + 1))
            writer.write("plug", name=name, value=[[1.0]], unit=name, rows=[name], columns=[name], x_title=name)
        writer.write("alert", text=HOSTILE)
        writer.write("end", status=HOSTILE, error=HOSTILE)
    (tmp_path / "page").mkdir()
    file = write_report(folder, tmp_path / "page", title=HOSTILE)
    page = Reader(file.read_text(encoding="utf-8"))
    plain = Reader(render_report([record(tmp_path, "plain", n_tasks=7)]))
    assert "img" not in page.tags
    assert set(page.tags) == set(plain.tags) | {"ul", "li"}
    assert not [a for a, _ in page.attributes if a.startswith("on")]
    assert len(page.scripts) == len(plain.scripts) == 4
    assert page.text.count(HOSTILE) >= 5
    data = page.json("page-data")
    assert data["names"][0] == hostile
    assert data["runs"][0]["alerts"][0]["text"] == HOSTILE
    assert HOSTILE not in json.dumps(page.json("page-documents"))  # no name reaches Bokeh


def test_embedded_json_cannot_leave_its_script():
    text = embedded_json({"a": "</script><!--<script>&\u2028"})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {"a": "</script><!--<script>&\u2028"}


def test_nothing_is_fetched_and_only_the_known_scripts_run(tmp_path):
    page = Reader(render_report([record(tmp_path, "a")]))
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "data", "action", "ping")
        assert name != "href" or value.startswith("#")
    assert not {"link", "iframe", "object", "embed", "base", "form", "img"} & set(page.tags)
    policy = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert policy["default-src"] == policy["connect-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    running = [content for known, content in page.scripts if known.get("type") != "application/json"]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in running}
    assert set(policy["script-src"].split()) == hashes
    own = running[-1]
    assert not re.search(r"https?://|innerHTML|insertAdjacent|document\.write|eval\(|new Function", own)


def test_headline_numbers_are_the_metrics(tmp_path):
    run = record(tmp_path, "a", full=True)
    page = Reader(render_report([run]))
    matrix, initial = run.accuracy_matrix, run.initial_accuracy
    for (selection, measure), shown in page.tiles.items():
        assert selection == "r0"
        assert shown == f"{float(getattr(functional, measure)(matrix)):.3f}"
    assert {m for _, m in page.tiles} >= {"average_accuracy", "forgetting", "backward_transfer"}
    heading, line = next((a, b) for a, b in zip(page.cells, page.cells[1:], strict=False) if a[0] == "method")
    shown = dict(zip(heading, line, strict=True))
    assert shown["forgetting (peak since learned)"] == f"{float(functional.forgetting(matrix)):.3f}"
    forward = functional.forward_transfer(matrix, initial=initial)
    assert shown["forward transfer (before learning - initial row)"] == f"{float(forward):.3f}"
    for name in shown:
        assert name == "n" or "(" in name or name in ("method", "scenario"), "a number names its variant"


def test_means_and_intervals_over_seeds(tmp_path):
    runs = [
        record(tmp_path, f"{m}{s}", method=m, seed=s, decay=d) for m, d in (("a", 0.1), ("b", 0.3)) for s in range(4)
    ]
    page = Reader(render_report(runs))
    values = [float(functional.forgetting(r.accuracy_matrix)) for r in runs[:4]]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    line = next(c for c in page.cells if c and c[0] == "a")
    assert f"{np.mean(values):.3f} ± {(high - low) / 2:.3f}" in line
    assert page.tiles["g0", "forgetting"] == f"{np.mean(values):.3f}"
    assert f"± {(high - low) / 2:.3f} (95 % t), n = 4" in page.text
    data = page.json("page-data")
    assert data["selections"] == ["g0", "r0", "r1", "r2", "r3", "g1", "r4", "r5", "r6", "r7"]


def test_counts_and_task_numbers_in_the_page(tmp_path):
    runs = [record(tmp_path, "a"), record(tmp_path, "b", n=70_000, full=True)]
    with RunWriter(tmp_path, "c") as writer:  # holes, totals that change, a task learned late, one never
        for j, at in enumerate([0, 2, 2, None]):
            writer.write("task", index=j, learned_at=at)
        writer.write("row", after=0, correct=[3, None, 1], total=[4, None, 9])
        writer.write("row", after=2, correct=[2, 5, 0], total=[5, 6, 7])
    runs.append(read_run(tmp_path / "c"))
    data = Reader(render_report(runs)).json("page-data")
    for run, told in zip(runs, data["runs"], strict=True):
        correct, total = cells_of(told)
        assert np.array_equal(correct, run.correct)
        assert np.array_equal(total, run.total)
        matrix, learned_at = run.accuracy_matrix, told["learnedAt"]
        expected = functional.forgetting(matrix, learned_at=learned_at, reduction="none").tolist()
        assert told["forgotten"] == [None if math.isnan(v) else v for v in expected]
        for j, at in enumerate(learned_at):
            diagonal = None if at is None else float(matrix[at, j])
            assert told["learned"][j] == diagonal
        if all(v is not None for v in told["waterfall"]):
            accuracy = float(functional.average_accuracy(matrix, learned_at=learned_at))
            assert sum(told["waterfall"]) == pytest.approx(accuracy, abs=1e-12)
        for measure, value in told["measures"].items():
            options = {"learned_at": learned_at, "initial": run.initial_accuracy}
            counted = run.accuracy_matrix_task_known if measure == "average_accuracy_task_known" else matrix
            expected = float(MEASURES[measure].compute(counted, **options))
            assert value == (None if math.isnan(expected) else expected)


@pytest.mark.parametrize("own_labels", [False, True])
def test_streams_of_domains_show_transfer_average_and_last(tmp_path, own_labels):
    stream = {"open_vocabulary": True, "task_known": own_labels}
    with RunWriter(tmp_path, "one") as writer:
        writer.write("run", stream=stream)
        writer.write("row", after=-1, correct=[1, 2], total=[10, 10], correct_in_task=[3, 5])
        writer.write("row", after=0, correct=[7, 3], total=[10, 10], correct_in_task=[8, 6])
        writer.write("row", after=1, correct=[6, 8], total=[10, 10], correct_in_task=[7, 9])
    run = read_run(tmp_path / "one")
    page = Reader(render_report([run]))
    assert page.tiles["r0", "transfer"] == ("0.600" if own_labels else "0.300")
    assert page.tiles["r0", "average_all_cells"] == ("0.750" if own_labels else "0.600")
    assert "average (all cells)" in page.json("page-data")["copies"]["CSV"]
    assert page.tiles["r0", "average_accuracy"] == "0.700"
    assert ("r0", "worst_task_accuracy") not in page.tiles
    assert page.tiles.get(("r0", "average_accuracy_task_known")) == ("0.800" if own_labels else None)
    assert run.initial_accuracy_task_known.tolist() == [0.3, 0.5]
    with RunWriter(tmp_path, "plain") as writer:  # evaluated on what was learned alone
        writer.write("row", after=0, correct=[7], total=[10])
        writer.write("row", after=1, correct=[6, 8], total=[10, 10])
    page = Reader(render_report([read_run(tmp_path / "plain")]))
    assert ("r0", "average_all_cells") not in page.tiles
    assert "average (all cells)" not in page.json("page-data")["copies"]["CSV"]


def test_undefined_is_a_word_with_a_reason_never_zero(tmp_path):
    with RunWriter(tmp_path, "one") as writer:
        writer.write("row", after=0, correct=[3], total=[4])
    page = Reader(render_report([read_run(tmp_path / "one")]))
    assert page.tiles["r0", "average_accuracy"] == "0.750"
    assert page.tiles["r0", "forgetting"] == page.tiles["r0", "backward_transfer"] == "undefined"
    assert "there is no old task yet" in page.text
    with RunWriter(tmp_path, "hole") as writer:
        writer.write("row", after=0, correct=[3], total=[4])
        writer.write("row", after=1, correct=[None, 4], total=[None, 4])
    page = Reader(render_report([read_run(tmp_path / "hole")]))
    assert page.tiles["r0", "average_accuracy"] == page.tiles["r0", "forgetting"] == "undefined"
    assert page.tiles["r0", "learning_accuracy"] == "0.875"
    page = Reader(render_report([Run("nothing")]))
    assert set(page.tiles.values()) == {"undefined"}
    assert number(float("nan")) == number(None) == "undefined"


def test_a_reader_is_warned_before_comparing(tmp_path):
    runs = [record(tmp_path, f"a{s}", method="a", seed=s) for s in range(3)]
    text = Reader(render_report(runs)).text
    assert "class orders" not in text
    assert "no interval of" not in text
    runs.append(record(tmp_path, "b", method="b", order=2, rows=3))
    text = Reader(render_report(runs)).text
    assert "2 different class orders. The methods did not see the same orders" in text
    assert "Fewer than 3 runs, so no interval of split-digits: b (1)." in text
    assert "stand at different tasks: 3, 5 are done" in text


def test_problems_and_unfinished_runs_are_said(tmp_path):
    with RunWriter(tmp_path, "a") as writer:
        writer.write("row", after=0, correct=[1], total=[2])
        writer.write("row", after=1, correct=[3], total=[2])
    with writer.path.open("a") as file:
        file.write('{"schema": 9, "kind": "x"}\n')
    text = Reader(render_report([read_run(tmp_path / "a")])).text
    assert "the row after task 1 is malformed" in text
    assert "was written in event format 9" in text
    assert "not ended (running or killed)" in text


def test_the_table_copies_as_csv_markdown_and_latex(tmp_path):
    runs = [record(tmp_path, "a", method="=a|b_50% & c"), record(tmp_path, "b", method="plain")]
    page = Reader(render_report(runs))
    copies = page.json("page-data")["copies"]
    shown = [line for line in page.cells if line]
    shown = shown[next(i for i, line in enumerate(shown) if line[0] == "method") :][:3]
    parsed = list(csv.reader(io.StringIO(copies["CSV"])))
    assert [[c.removeprefix("'") for c in line] for line in parsed] == shown
    assert sum(line[0] == "'=a|b_50% & c" for line in parsed) == 1
    assert "| =a\\|b\\_50% & c |" in copies["Markdown"]
    assert len(set(map(len, (re.findall(r"(?<!\\)\|", x) for x in copies["Markdown"].strip().splitlines())))) == 1
    assert r"=a|b\_50\% \& c &" in copies["LaTeX"]
    assert copies["LaTeX"].count("\n") == 7


def test_size_of_a_thousand_tasks_and_of_many_runs(tmp_path):
    dense = np.random.default_rng(0).integers(0, 200, (1000, 1000))
    triangle = np.tril(np.ones((1000, 1000), bool))
    tasks = record(tmp_path, "x", n_tasks=1000, rows=0, plug=False)
    big = Run("big", tasks=tasks.tasks, learned_at=tasks.learned_at)
    for seen in (triangle, np.ones_like(triangle)):
        big.correct, big.total = np.where(seen, dense, -1), np.where(seen, 200, -1)
        assert write_report([big], tmp_path / "big.html").stat().st_size <= 5e6
    runs = [record(tmp_path, f"r{k}", method=f"m{k % 5}", n_tasks=20, seed=k) for k in range(25)]
    assert write_report(runs, tmp_path / "many.html").stat().st_size <= 3e6


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path):
    run = record(tmp_path / "runs", "a")
    out = tmp_path / "new" / "report.html"
    assert write_report([run], out, title="first") == out
    write_report(tmp_path / "runs", out.parent, title="second")
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    before = out.read_bytes()
    assert b"second" in before
    with pytest.raises(ValueError, match="`runs` must hold at least one run, got none"):
        write_report([], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none in"):
        write_report(tmp_path / "empty", out)
    with pytest.raises(FileNotFoundError, match="`root` must be a folder of runs"):
        write_report(tmp_path / "absent", out)
    assert out.read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_odd_plugin_events_do_not_stop_the_report(tmp_path):
    odd = [
        None,
        True,
        "text",
        [],
        [[]],
        [[1], [2, 3]],
        {"a": 1},
        [None, 1.0],
        [[None, 1.0]],
        10**400,
        float("inf"),
        [[[1]]],
    ]
    with RunWriter(tmp_path, "a") as writer:
        writer.write("row", after=0, correct=[1], total=[2])
        for k, value in enumerate(odd):
            writer.write("plug", name=f"p{k}", value=value, x=value, task="x" if k % 2 else k, rows=3, columns={"a": 1})
        writer.write("cost", task=0, train_seconds="x", trainable=None, parameters=[1], peak_bytes=float("nan"))
        writer.write("conf", after=0, counts=[[1, -1], [2]])
    panels = Reader(render_report([read_run(tmp_path / "a")])).json("page-data")["runs"][0]["panels"]
    assert {p["name"] for p in panels} == {"p7", "p8"}


def test_recency_bias_is_the_metric(tmp_path):
    run = record(tmp_path, "a")
    told = Reader(render_report([run])).json("page-data")["runs"][0]["confusions"]
    assert told[0]["bias"] is None
    for entry in told[1:]:
        counts = torch.from_numpy(run.confusion[entry["after"]])
        newest = counts[:, entry["after"]].sum() - counts[entry["after"]].sum()
        assert entry["bias"] == pytest.approx(float(newest / counts.sum()))
