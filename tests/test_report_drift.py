"""The charts of drift: what they are given, how large they may grow, and that a browser draws them."""

from __future__ import annotations

import math

import pytest

from cl_plugins.drift import DriftRow, drift_events
from cl_plugins.report import write_report
from cl_plugins.report._drift import CHARTS, drift_payload
from cl_plugins.report.page import report_content
from cl_plugins.runs import RunWriter, read_run
from tests._reports import HOSTILE, record


def _row(after):
    errors = {j: 0.01 * (after - j) - 0.02 * (j == 1) for j in range(min(after, 20))}
    late = after > 0
    return DriftRow(
        after,
        samples=24,
        effective_rank=5.0 + math.sin(after),
        cka_first=1 / (after + 1),
        cka_previous=0.9 if late else None,
        calibration_error=0.1,
        calibration_drift=errors,
        task_error=0.2,
        recency_bias=0.1 if late else None,
        recency_pull=0.5 if late else None,
        bytes={"frozen": 3 << 20, "trained": 1 << 20, "method": 0},
    )


def _drifted(root, run_id, n_tasks=4, **options):
    record(root, run_id, n_tasks=n_tasks, names=[HOSTILE, *(f"digits {j}" for j in range(1, n_tasks))], **options)
    with RunWriter(root, run_id) as writer:
        for after in range(n_tasks):
            for event in drift_events(_row(after)):
                writer.write("plug", **event)
    return read_run(root / run_id)


def test_every_chart_holds_what_was_measured(tmp_path):
    run = _drifted(tmp_path, "a")
    rank, cka, confusion, error, change, memory = drift_payload(run)
    assert [line["y"][0] for line in rank["lines"]] == [
        pytest.approx(_row(i).effective_rank, rel=1e-5) for i in range(4)
    ]
    assert [(line["label"], line["task"]) for line in cka["lines"]] == [
        *(("with the first task end", i) for i in range(4)), *(("with the one before", i) for i in (1, 2, 3)),
    ]  # fmt: skip
    assert {line["label"] for line in confusion["lines"]} == {
        "old-task errors in the newest task", "predicted as another task", "recency bias",
    }  # fmt: skip
    assert [line["x"] for line in error["lines"]] == [[0], [1], [2], [3]]
    assert (change["shape"], change["rows"], change["columns"]) == ([3, 3], ["1", "2", "3"], ["0", "1", "2"])
    assert change["matrix"] == pytest.approx([0.01, None, None, 0.02, -0.01, None, 0.03, 0.0, 0.01])
    assert {line["label"]: line["y"] for line in memory["lines"]} == {
        "frozen": [3.0],
        "trained": [1.0],
    }  # no empty kind
    assert not any(p["name"].startswith("drift") for p in report_content([run])["data"]["runs"][0]["panels"])


def test_a_run_without_a_measurement_has_no_section(tmp_path):
    plain = record(tmp_path, "plain")
    assert drift_payload(plain) is None
    page = write_report([plain], tmp_path / "a.html").read_text()
    assert 'id="plot-drift0"' not in page
    assert 'id="plot-drift5"' in write_report([plain, _drifted(tmp_path, "b")], tmp_path / "b.html").read_text()


def test_odd_events_leave_their_chart_out(tmp_path):
    with RunWriter(tmp_path, "odd") as writer:
        writer.write("row", after=0, correct=[1], total=[2])
        writer.write("plug", name="drift/effective rank", task=0, value="much")
        writer.write("plug", name="drift/effective rank", task="x", value=3.0)
        writer.write("plug", name="drift/calibration drift per task", task=1, x=[0, 1], values=[0.5])
        writer.write("plug", name="drift/linear CKA", task=0, first=0.5, previous=[1])
        writer.write("plug", name="drift/unknown", task=0, value=1)
    charts = drift_payload(read_run(tmp_path / "odd"))
    assert [k for k, chart in enumerate(charts) if chart] == [1]
    assert len(charts) == CHARTS


def test_a_thousand_tasks_stay_within_the_bound(tmp_path):
    run = _drifted(tmp_path, "long", n_tasks=1000)
    assert write_report([run], tmp_path / "report.html").stat().st_size < 5e6
    rank, *_, change, _ = drift_payload(run)
    assert [line["task"] for line in rank["lines"]][:: len(rank["lines"]) - 1] == [0, 999]
    assert len(rank["lines"]) <= 400
    assert change["shape"] == [400, 20]


class TestInABrowser:
    pytestmark = pytest.mark.browser

    @pytest.mark.parametrize("width", [1400, 700])
    def test_it_is_drawn_and_follows_the_task(self, page, tmp_path, width):
        runs = [_drifted(tmp_path, "a"), record(tmp_path, "b", method="b"), _drifted(tmp_path, "c", 300, method="c")]
        page.resize(width)
        page.open(write_report(runs, tmp_path / "report.html"))
        for selection, drawn in (("r0", True), ("r1", False), ("r2", True), ("r0", True)):
            page.choose("#selection", selection)
            hidden = page.evaluate("[...document.querySelectorAll('[id^=box-drift]')].map((b) => b.hidden)")
            assert hidden == [not drawn] * CHARTS
        assert page.evaluate("part(plots.drift0, 'lines').data_source.data.ys[0].length") == 4
        assert page.evaluate("plots.drift4.left[0].major_label_overrides.get(0)") == "1"
        assert page.evaluate("part(plots.drift4, 'labels').data_source.data.text.join()") == (
            "+0.01,+0.02,-0.01,+0.03,0.00,+0.01"
        )
        page.choose("#task", "2")
        page.wait("part(plots.drift0, 'mark').data_source.data.left[0] === 1.55")
        page.choose("#selection", "r1")
        assert page.evaluate("byId('drift-about').textContent") == "This run has no measurement of drift."
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("document.images.length") == 0
