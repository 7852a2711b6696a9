"""Runs with several labels a sample: every view says what is measured, ranks by mAP, and mixes no two quantities."""

import csv
import html
import io
import json
import re

import pytest

from cl_plugins.compare import comparison_text, table_rows
from cl_plugins.comparison import compare_methods
from cl_plugins.report import render_report, write_report
from cl_plugins.report.comparison import render_comparison
from cl_plugins.report.page import report_content
from cl_plugins.runs import RunWriter, read_run
from tests._reports import record

N = 100


def labelled(root, method, seed, precision, right, *, scenario="multilabel", scores=True):
    """A finished run over three tasks whose average precision and label accuracy are told apart."""
    with RunWriter(root, f"{scenario}-{method}-{seed}") as writer:
        writer.write("run", method=method, scenario=scenario, seed=seed, order_seed=seed, from_task=0)
        for j in range(3):
            writer.write("task", index=j, name=f"labels {j}", classes=[j])
        for i in range(3):
            n = i + 1
            value = precision - 0.05 * i + 0.01 * seed
            own = {"classes": [*range(n)], "average_precision": [value] * n, "true_positives": [5] * n}
            own |= {"predicted": [8] * n, "present": [10] * n}
            more = {"labels": own} if scores else {}
            correct = [right - 10 * (i - j) + seed for j in range(n)]
            writer.write("row", after=i, correct=correct, total=[N] * n, **more)
            writer.write("cost", task=i, train_seconds=1.0 + seed, eval_seconds=0.1, trainable=10)
        writer.write("end", status="finished")
    return read_run(writer.folder)


def two_methods(root):
    """One is better by mAP, the other by label accuracy."""
    return [
        labelled(root, m, s, precision, right)
        for m, precision, right in (("precise", 0.9, 50), ("counting", 0.6, 80))
        for s in range(3)
    ]


def mixed(root):
    return [*two_methods(root), *(record(root, f"d{s}", method="precise", seed=s) for s in range(3))]


def data_of(page):
    return json.loads(re.search(r'id="page-data">(.*?)</script>', page, re.DOTALL)[1])


def place(runs, name):
    return html.unescape(report_content(runs)["html"][name])


def csv_tables(page):
    return [list(csv.reader(io.StringIO(part))) for part in data_of(page)["copies"]["CSV"].split("\n\n")]


def test_order_ranks_and_curves_follow_map(tmp_path):
    runs = two_methods(tmp_path)
    page = render_report(runs)
    data = data_of(page)
    assert [g["method"] for g in data["groups"]] == ["precise", "counting"]
    ((head, *lines),) = csv_tables(page)
    at = head.index("mean rank (Borda)")
    assert {line[0]: line[at] for line in lines} == {"precise": "1.00", "counting": "2.00"}
    assert head[3:5] == ["mean rank (Borda)", "mAP of seen classes (last row)"]
    accuracies = [runs[k].accuracy_matrix[-1].mean() for k in (0, 3)]
    assert accuracies[0] < accuracies[1]  # by label accuracy the ranks would be the other way round
    for run, shown in zip(runs, data["runs"], strict=True):
        assert shown["multiLabel"] is True
        assert shown["curve"] == [run.labels[k].map for k in range(3)]
        assert shown["measures"]["map"] == run.labels[2].map
    band = data["groups"][0]["band"]["mean"]
    assert band == pytest.approx([0.91, 0.86, 0.81])


def test_no_name_of_a_labelled_page_says_accuracy_alone(tmp_path):
    page = two_methods(tmp_path)
    for name in ("tiles", "table", "definitions", "notices"):
        told = re.sub(r"<[^>]+>", " ", place(page, name))
        alone = re.findall(r"\S+ \S+ (?<!label )accuracy", told)
        assert alone == [], (name, alone)
        assert "label accuracy" in told
    assert "forgetting of label accuracy (peak since learned)" in place(page, "table")
    assert "k the number of its labels" in place(page, "definitions")
    assert '<h3 class="written">mAP of seen classes' in place(page, "tiles")  # no style writes it as MAP
    plain = [record(tmp_path, "plain")]
    assert "label accuracy" not in place(plain, "definitions") + place(plain, "tiles") + place(plain, "table")
    assert "mAP" not in place(plain, "definitions")


def test_streams_of_both_kinds_share_no_column(tmp_path):
    page = render_report(mixed(tmp_path))
    plain, many = csv_tables(page)
    assert {line[1] for line in plain[1:]} == {"split-digits"}
    assert {line[1] for line in many[1:]} == {"multilabel"}
    assert "average accuracy (last row)" in plain[0]
    assert "mAP of seen classes (last row)" not in plain[0]
    assert "average label accuracy (last row)" in many[0]
    assert "average accuracy (last row)" not in many[0]
    for kind in ("Markdown", "LaTeX"):
        assert data_of(page)["copies"][kind].count("average label accuracy") == 1
    assert [r["multiLabel"] for r in data_of(page)["runs"]] == [True] * 6 + [False] * 3


def test_a_run_without_scores_stays_off_the_axes_of_map(tmp_path):
    runs = [*two_methods(tmp_path), labelled(tmp_path, "old", 0, 0.5, 60, scores=False)]
    page = render_report(runs)
    shown = data_of(page)["runs"][-1]
    assert shown["multiLabel"] is True
    assert shown["curve"] == []
    assert shown["measures"]["map"] is None
    assert "1 of 7 runs of multilabel have no mAP recorded and are not ranked." in page
    ((head, *lines),) = csv_tables(page)
    assert {line[0]: line[head.index("mean rank (Borda)")] for line in lines}["old"] == "not ranked"


def results(kind=None):
    rows = []
    for scenario, is_labelled in (("digits", False), ("glyphs", True)):
        if kind not in (None, is_labelled):
            continue
        for method, accuracy, precision in (("a", 0.9, 0.3), ("b", 0.5, 0.7)):
            for seed in range(3):
                own = {"method": method, "scenario": scenario, "seed": seed, "order_seed": seed}
                own |= {"average_accuracy": accuracy + seed / 100, "forgetting": 0.1, "train_seconds": 1.0}
                own |= {"average_incremental_accuracy": accuracy}
                rows.append({**own, "map": precision + seed / 100} if is_labelled else own)
    return rows


def test_a_comparison_measures_each_scenario_by_its_own_kind():
    comparison = compare_methods(results())
    digits, glyphs = comparison.scenarios
    assert (digits.measure, digits.entries[0].method) == ("average_accuracy", "a")
    assert (glyphs.measure, glyphs.entries[0].method) == ("map", "b")
    assert comparison.measures == ("average_accuracy", "map")
    assert comparison.mean_rank("a") == comparison.mean_rank("b") == 1.5
    assert any("compared by different measures" in note for note in comparison.notes)
    (alone,) = compare_methods(results(True), "average_accuracy").scenarios
    assert alone.measure_name == "average label accuracy (last row)"
    assert not any("different measures" in n for n in compare_methods(results(True)).notes)
    assert compare_methods(results(), "forgetting").measure_names == (
        "forgetting (peak since learned)",
        "forgetting of label accuracy (peak since learned)",
    )


def test_its_page_and_tables_name_what_each_scenario_shows():
    page = render_comparison(results(), compare_methods(results()))
    first, second = page.split('<section class="card wide12">')[1:3]
    assert '<p class="about">average accuracy (last row). A tick' in first
    assert '<p class="about">mAP of seen classes (last row). A tick' in second
    assert "label accuracy" not in first
    assert "mAP" not in first
    assert not re.search(r">(average|incremental) accuracy<", second)
    assert "Compared by average accuracy (last row) and mAP of seen classes (last row) over 12 runs." in page
    rows = {(row["scenario"], row["method"]): row for row in table_rows(results())}
    assert rows["digits", "a"]["average accuracy"].startswith("0.910")
    assert rows["digits", "a"]["label accuracy"] == rows["digits", "a"]["mAP"] == ""
    assert rows["glyphs", "a"]["average accuracy"] == rows["glyphs", "a"]["forgetting"] == ""
    assert rows["glyphs", "a"]["label accuracy"].startswith("0.910")
    lines = list(csv.DictReader(io.StringIO(comparison_text(results(), compare_methods(results()), "csv"))))
    assert {line["scenario"]: line["measure"] for line in lines} == {"digits": "average_accuracy", "glyphs": "map"}
    told = json.loads(comparison_text(results(), compare_methods(results()), "json"))
    assert [s["measure_name"] for s in told["scenarios"]] == [
        "average accuracy (last row)",
        "mAP of seen classes (last row)",
    ]
    assert "average accuracy" not in table_rows(results(True))[0]


@pytest.mark.browser
def test_axes_and_words_change_with_the_kind_that_is_shown(page, tmp_path):
    page.open(write_report(mixed(tmp_path), tmp_path / "report.html"))
    names = "['retention', 'waterfall', 'plane', 'cost', 'stream']"
    titles = f"Object.fromEntries({names}.map(n => [n, plots[n].left[0].axis_label]))"
    seen = {}
    for selection in page.evaluate("PAGE.selections"):
        page.choose("#selection", selection)
        many = page.evaluate("view().multiLabel")
        seen[many] = (page.evaluate(titles), page.evaluate("document.querySelector('h2').textContent"))
        lede = page.evaluate("document.getElementById('lede').textContent")
        assert ("mAP of seen classes (last row) is" in lede) is many
        assert ("average accuracy (last row) is" in lede) is not many
        references = page.evaluate("[...document.querySelectorAll('#reference option')].map(o => o.value)")
        assert references
        for reference in references:  # a difference of two quantities is none
            assert page.evaluate(f"view({json.dumps(reference)}).multiLabel") is many
        points = page.evaluate("stream.points.map(p => p.y)")
        assert all(0.4 < y < 0.95 for y in points) if many else points
    assert seen[False] == (
        {
            "retention": "accuracy",
            "waterfall": "accuracy, mean over tasks",
            "plane": "stability: accuracy now",
            "cost": "average accuracy (row)",
            "stream": "average accuracy (row)",
        },
        "Accuracy matrix",
    )
    assert seen[True] == (
        {
            "retention": "label accuracy",
            "waterfall": "label accuracy, mean over tasks",
            "plane": "stability: label accuracy now",
            "cost": "mAP of seen classes (row)",
            "stream": "mAP of seen classes (row)",
        },
        "Label accuracy matrix",
    )
