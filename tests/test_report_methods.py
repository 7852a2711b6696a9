"""Views over methods, seeds and class orders, and over tasks before they are learned."""

import json
import math
import re
import statistics

import numpy as np
import pytest

from cl_plugins import functional
from cl_plugins.benchmark import run_benchmark
from cl_plugins.report import render_report, write_report
from cl_plugins.report._numbers import group_runs, measures_of
from cl_plugins.report.page import report_content
from cl_plugins.runs import RunWriter, read_run
from cl_plugins.stats import variance_parts
from tests._reports import record


def data_of(page):
    return json.loads(re.search(r'id="page-data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_band_is_the_interval_over_runs(tmp_path):
    runs = [record(tmp_path, f"a{s}", seed=s) for s in range(4)] + [record(tmp_path, "b", method="b")]
    runs += [record(tmp_path, "short", seed=9, rows=3)]
    data = data_of(render_report(runs))
    group = next(g for g in data["groups"] if g["method"] == "ovor")
    assert group["band"]["rows"] == [0, 1, 2]  # rows that every run has
    curves = [functional.accuracy_curve(r.accuracy_matrix).tolist() for r in (*runs[:4], runs[5])]
    for row in range(3):
        values = [c[row] for c in curves]
        assert group["band"]["mean"][row] == pytest.approx(statistics.fmean(values))
        half = 2.7764451051977934 * statistics.stdev(values) / math.sqrt(5)
        assert group["band"]["half"][row] == pytest.approx(half)
    alone = next(g for g in data["groups"] if g["method"] == "b")
    assert alone["band"]["half"] == [None] * 5


def test_orders_are_numbered_by_order_seed_within_a_scenario(tmp_path):
    runs = [record(tmp_path, f"r{k}", seed=k, order=order) for k, order in enumerate((4, 2, 4, 8, 2))]
    data = data_of(render_report(runs))
    assert [run["order"] for run in data["runs"]] == [1, 0, 1, 2, 0]
    assert data["groups"][0]["orders"] == 3


def test_variance_is_split_only_where_it_can_be(tmp_path):
    crossed = [
        record(tmp_path, f"x{o}{s}", seed=10 * o + s, order=o, decay=0.05 * (o + 1)) for o in range(3) for s in range(2)
    ]
    page = render_report(crossed)
    values = [measures_of(run)["average_accuracy"] for run in crossed]
    parts = variance_parts([values[0:2], values[2:4], values[4:6]])
    assert f"<td class=n>{parts.order_sd:.3f}</td><td class=n>{parts.seed_sd:.3f}</td>" in page
    assert "cannot be told apart" not in page
    page = render_report([record(tmp_path, f"y{s}", seed=s, order=s) for s in range(3)])
    assert "cannot be told apart" in page
    assert "sd between orders" not in page


def test_variance_parts_are_those_that_were_drawn():
    rng = np.random.default_rng(0)
    groups = [(0.3 * rng.standard_normal() + 0.1 * rng.standard_normal(3)).tolist() for _ in range(3000)]
    parts = variance_parts(groups)
    assert parts.order_sd == pytest.approx(0.3, rel=0.05)
    assert parts.seed_sd == pytest.approx(0.1, rel=0.05)
    assert variance_parts([[0.1, 0.5], [0.5, 0.1]]).order_sd == 0
    assert variance_parts([[0.1], [0.2]]) is None
    assert variance_parts([[0.1, 0.2]]) is None
    with pytest.raises(ValueError, match="`groups` must hold finite numbers"):
        variance_parts([[0.1, math.nan], [0.2]])


def test_tasks_before_learning_and_the_transfer_score(tmp_path):
    run = record(tmp_path, "a", full=True)
    matrix = run.accuracy_matrix
    page = render_report([run])
    (content,) = data_of(page)["runs"]
    assert content["initial"] == [0.1] * 5
    assert content["before"][0] is None
    for j in range(1, 5):
        assert content["before"][j] == pytest.approx(float(matrix[:j, j].mean()))
    assert content["measures"]["transfer"] == pytest.approx(statistics.fmean(content["before"][1:]))
    assert 'id="plot-transfer"' in page
    assert "transfer (before learning, column first)" in data_of(page)["copies"]["CSV"]
    plain = render_report([record(tmp_path, "b")])
    assert data_of(plain)["runs"][0]["before"] == []
    assert '<section class="card wide12" hidden>\n    <div class="head"><h2>Transfer' in plain
    assert "transfer (before learning" not in data_of(plain)["copies"]["CSV"]


def test_ranks_stand_in_the_table(tmp_path):
    runs = [record(tmp_path, f"{m}{s}", method=m, seed=s, decay=d) for m, d in (("a", 0.5), ("b", 0.1)) for s in (0, 1)]
    page = render_report(runs)
    lines = data_of(page)["copies"]["CSV"].splitlines()
    at = lines[0].split(",").index("mean rank (Borda)")
    assert {line.split(",")[0]: line.split(",")[at] for line in lines[1:]} == {"a": "2.00", "b": "1.00"}


def test_columns_that_references_alone_have_and_orders_of_a_joint_run_in_one_task(tmp_path):
    runs = [record(tmp_path, f"a{s}", seed=s) for s in range(3)]
    joint = record(tmp_path, "joint", method="joint", full=True, n_tasks=5)
    joint.meta["recipe"] = {"joint": True}
    page = render_report([*runs, joint])
    assert "transfer (before learning" not in data_of(page)["copies"]["CSV"]
    assert (
        "transfer (before learning"
        in data_of(render_report([*runs, record(tmp_path, "b", full=True)]))["copies"]["CSV"]
    )
    with RunWriter(tmp_path, "one") as writer:
        writer.write("run", method="joint", scenario="split-digits", seed=0, recipe={"joint": True})
        writer.write("task", index=0, name="all", classes=[c for t in runs[0].tasks for c in t.classes])
        writer.write("row", after=0, correct=[9], total=[10])
    assert "class orders" not in report_content([*runs, read_run(tmp_path / "one")])["html"]["notices"]


def test_a_method_has_one_color_on_all_scenarios(tmp_path):
    runs = []
    for scenario, decay in (("s", (0.1, 0.3)), ("t", (0.3, 0.1))):
        for method, d in zip(("a", "b"), decay, strict=True):
            run = record(tmp_path, scenario + method, method=method, decay=d)
            run.meta["scenario"] = scenario
            runs.append(run)
    groups = group_runs(runs, [measures_of(run) for run in runs])
    assert [(g.scenario, g.method, g.slot) for g in groups] == [
        ("s", "a", 0),
        ("s", "b", 1),
        ("t", "b", 1),
        ("t", "a", 0),
    ]


def test_the_joint_reference_is_reported_as_its_result_says(tmp_path):
    result = run_benchmark(
        "joint", "split-digits", epochs=1, device="cpu", out=tmp_path / "j", order_seed=1, progress=False
    )
    other = run_benchmark(
        "nearest-mean", "split-digits", device="cpu", out=tmp_path / "n", order_seed=1, progress=False
    )
    joint, plain = read_run(tmp_path / "j"), read_run(tmp_path / "n")
    assert joint.learned_at == [0] * 5
    assert measures_of(joint)["average_accuracy"] == result.average_accuracy
    assert measures_of(plain)["average_accuracy"] == other.average_accuracy
    assert [t.classes for t in joint.tasks] == [t.classes for t in plain.tasks]
    page = render_report([joint, plain])
    assert data_of(page)["selections"] == ["r1", "r0"]  # an upper bound stands last
    assert "different class orders" not in page
    assert "stand at different tasks: " not in page
    assert "1 of 1 tasks" in page
    assert "not ranked" in page


def damaged(tmp_path):
    """Runs with everything that a store can hold by accident."""
    record(tmp_path, "fine", seed=1)
    with RunWriter(tmp_path, "holes") as writer:
        writer.write("run", method="<i>m</i>", scenario="split-digits", seed=math.nan, order_seed=math.inf, recipe="x")
        for j in range(4):
            writer.write("task", index=j, name=f"t{j}", classes=[j], learned_at=None if j == 3 else j)
        writer.write("row", after=0, correct=[3, None, 1], total=[4, None, 4])
        writer.write("row", after=2, correct=[None, 2, 4], total=[None, 4, 4])
        writer.write("plug", name="p/inf", task=0, value=[math.inf, math.nan, 1.0, -math.inf])
        writer.write("plug", name="p/matrix", value=[[math.nan, 1e300], [None, -1e300]])
        writer.write("cost", task=0, train_seconds=math.inf, trainable=math.nan, peak_bytes=-1)
        writer.write("conf", after=0, counts=[[1, 0], [0, -1]])
    with RunWriter(tmp_path, "newer") as writer:
        writer.write("row", after=0, correct=[1], total=[2])
    with writer.path.open("a") as file:
        file.write('{"schema": 99, "kind": "row", "after": 1, "correct": [1, 2], "total": [2, 2]}\n')
        file.write('not json\n{"schema": 1, "kind": "row", "after": 2, "corr')
    return [read_run(tmp_path / name) for name in ("fine", "holes", "newer")]


def test_damaged_stores_are_shown_as_far_as_they_go(tmp_path):
    runs = damaged(tmp_path)
    page = render_report(runs)
    data = data_of(page)
    assert [run["rows"] for run in data["runs"]] == [5, 3, 2]
    holes = data["runs"][1]
    assert holes["measures"]["average_accuracy"] is None
    assert holes["forgotten"][0] is None
    assert "event format 99" in page
    assert "1 damaged line left out" in page
    assert "Infinity" not in json.dumps(data)
    assert "NaN" not in json.dumps(data)


@pytest.mark.browser
def test_damaged_stores_log_nothing_in_any_state(page, tmp_path):
    page.open(write_report(damaged(tmp_path), tmp_path / "report.html"))
    for selection in page.evaluate("PAGE.selections"):
        page.choose("#selection", selection)
        for mode in ("change", "difference", "sd", "accuracy"):
            page.choose("#mode", mode)
        for axis in ("age", "row"):
            page.choose("#axis", axis)
        for task in page.evaluate("[...document.querySelector('#task').options].map(o => o.value)"):
            page.choose("#task", task)
    page.wait("document.body.textContent.includes('undefined')")


@pytest.mark.browser
def test_the_views_in_a_browser(page, tmp_path):
    names = ["</script><img src=x onerror=alert(1)>", "b"]
    runs = [
        record(tmp_path, f"{k}{o}{s}", method=m, seed=s, order=o, decay=0.1 * (k + 1), full=True)
        for k, m in enumerate(names) for o in range(2) for s in range(2)
    ]  # fmt: skip
    empty = RunWriter(tmp_path, "empty")
    empty.write("run", method="c", scenario="split-digits")
    empty.close()
    page.open(write_report([*runs, read_run(tmp_path / "empty")], tmp_path / "report.html"))
    for selection in page.evaluate("PAGE.selections"):
        page.choose("#selection", selection)
        assert page.evaluate("document.querySelectorAll('#stream-key > span').length") == 3
    page.choose("#selection", "g0")
    drawn = "part(plots.stream, 'lines').data_source.data.xs.length"
    assert page.evaluate(drawn) == 2
    assert page.evaluate("part(plots.stream, 'bands').data_source.data.xs.length") == 2
    assert page.evaluate("part(plots.orders, 'runs').data_source.data.x.length") == 8
    assert page.evaluate("part(plots.transfer, 'runs').data_source.data.x.length") == 5 + 4 + 5
    page.choose("#task", "3")
    page.wait("part(plots.transfer, 'mark').data_source.data.x.length === 3")
    page.wait("part(plots.stream, 'mark').data_source.data.x.length === 1")
    for name in ("stream", "orders", "transfer", "plane"):
        page.evaluate(f"document.querySelector('#plot-{name}').scrollIntoView({{block: 'center'}})")
        box = page.evaluate(
            f"(() => {{ const b = document.querySelector('#plot-{name}').getBoundingClientRect();"
            " return [b.left, b.top, b.width, b.height]; })()"
        )
        for k in range(1, 8):
            page.move(box[0] + box[2] * k / 8, box[1] + box[3] * k / 8)
    assert page.evaluate("document.images.length") == 0
