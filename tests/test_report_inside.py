"""The chart of accuracy inside tasks: what it is given, how large it may grow, and that a browser draws it."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from cl_plugins.inside_tasks import InsideRow, InsideTasks
from cl_plugins.report import write_report
from cl_plugins.report._inside import inside_payload
from cl_plugins.report._numbers import number
from cl_plugins.report.page import report_content
from cl_plugins.runs import Run, RunWriter, read_run
from tests._reports import HOSTILE, record


def _inside(root, run_id, n_tasks=4, drawn=None, evaluations=5, n=200):
    """A recorded run with evaluations inside its tasks; old tasks dip and come back in part."""
    record(root, run_id, n_tasks=n_tasks, names=[HOSTILE, *(f"digits {j}" for j in range(1, n_tasks))])
    draw = np.random.default_rng(1)
    with RunWriter(root, run_id) as writer:
        step = 0
        for task in range(n_tasks):
            for k in range(evaluations + 1):
                step += 10 if k < evaluations else 3
                chosen = range(task + 1)
                if drawn is not None and task > drawn:
                    chosen = [*sorted(draw.choice(task, drawn, replace=False).tolist()), task]
                correct = [int(n * (0.9 - 0.3 * np.exp(-k) * (j < task) - 0.02 * (task - j))) for j in chosen]
                row = InsideRow(
                    step, task, task, task + 1, tuple(chosen), tuple(correct), (n,) * len(correct), tuple(correct), 10,
                    drawn is not None and task > drawn, k == evaluations,
                )  # fmt: skip
                writer.write("mid", **row.to_dict())
    return read_run(root / run_id)


def test_the_lines_are_the_accuracies_and_the_numbers_those_of_the_metrics(tmp_path):
    run = _inside(tmp_path, "a")
    told, inside = inside_payload(run, 1), InsideTasks(run.inside)
    matrix, place = inside.matrix, {t: k for k, t in enumerate(inside.columns)}
    for line in told["lines"]:
        for k, y in zip(line["k"], line["y"], strict=True):
            assert y == pytest.approx(float(matrix[k, place[line["task"]]]), abs=1e-5)
    assert sum(len(line["k"]) for line in told["lines"]) == sum(len(r.tasks) for r in run.inside)
    assert {key: value for key, value, _ in told["numbers"]} == inside.metrics()
    assert told["ends"] == [[53 * (t + 1), t] for t in range(4)]
    # each task falls most at the first evaluation after a switch; the first column is lowest at the start of task 1
    dip = told["dip"]
    depths = [(matrix[e, j] - matrix[e + 1, j], -j) for e in (5, 11, 17) for j in range(e // 6 + 1)]
    assert dip["depth"] == pytest.approx(float(max(depths)[0]))
    assert told["steps"][dip["at"]] == told["steps"][dip["from"]] + 10
    assert inside_payload(record(tmp_path, "b"), 1) is None


def test_a_long_run_keeps_task_ends_and_the_deepest_dip_and_stays_small(tmp_path):
    rows = []
    for task in range(1000):
        chosen = (*range(max(0, task - 200), task), task)
        for k in range(2):
            counts = tuple(90 - (k == 0) * (j < task) for j in chosen)
            rows.append(InsideRow(20 * task + 10 * (k + 1), task, task, task + 1, chosen, counts,
                                  (100,) * len(chosen), counts, 10, True, k == 1))  # fmt: skip
    run = Run("big", tasks=record(tmp_path, "x", n_tasks=1000, rows=0, plug=False).tasks, inside=rows)
    run.learned_at = list(range(1000))
    told = inside_payload(run, 1)
    assert not told["whole"]
    assert sum(len(line["k"]) for line in told["lines"]) < 80_000
    assert len(json.dumps(told)) < 1.5e6
    assert told["numbers"] == inside_payload(run, 50)["numbers"]
    assert told["dip"]["depth"] == pytest.approx(0.01)


def test_pages_without_such_rows_hide_the_chart(tmp_path):
    assert not report_content([record(tmp_path, "a")])["inside"]
    assert report_content([_inside(tmp_path, "b")])["inside"]


class TestInABrowser:
    pytestmark = pytest.mark.browser

    def test_it_is_drawn_for_one_run_and_for_many_and_follows_the_task(self, page, tmp_path):
        runs = [_inside(tmp_path, "a"), record(tmp_path, "b", method="b"), _inside(tmp_path, "c", 80, 3, 2)]
        page.open(write_report(runs, tmp_path / "report.html"))
        page.choose("#selection", "r0")
        drawn = page.evaluate("part(plots.inside, 'lines').data_source.data.xs.length")
        assert drawn == 4
        values = InsideTasks(runs[0].inside).metrics()
        shown = page.evaluate(
            "[...document.querySelectorAll('#inside-numbers tr')].map(r => r.children[1].textContent)"
        )
        assert shown == [number(v) for v in values.values()]
        assert "Deepest dip (stability gap)" in page.evaluate("document.getElementById('inside-about').textContent")
        page.choose("#task", "1")
        page.wait("part(plots.inside, 'mark').data_source.data.x.length > 0")
        page.choose("#task", "-1")
        page.evaluate("document.querySelector('#plot-inside').scrollIntoView({block: 'center'})")
        spot = page.evaluate("""(() => {
            const { frame } = Bokeh.index.get_by_id(plots.inside.id);
            const box = document.querySelector('#plot-inside').getBoundingClientRect();
            const { xs, ys } = part(plots.inside, 'lines').data_source.data;
            return [box.left + frame.x_scale.compute(xs[0][2]), box.top + frame.y_scale.compute(ys[0][2])];
        })()""")
        page.move(spot[0] - 3, spot[1])
        page.move(*spot)
        page.wait("!document.getElementById('tip').hidden")
        assert page.evaluate("document.querySelector('#tip strong').textContent") == f"0: {HOSTILE}"
        page.choose("#selection", "r1")
        page.wait("document.getElementById('plot-inside').dataset.empty?.startsWith('this run was not evaluated')")
        page.choose("#selection", "r2")  # many tasks, some drawn: the mean with its band
        assert page.evaluate("part(plots.inside, 'bands').data_source.data.x.length") > 100
        assert page.evaluate("part(plots.inside, 'lines').data_source.data.xs.length") == 0
        page.choose("#task", "7")
        page.wait("part(plots.inside, 'mark').data_source.data.x.length > 0")
        time.sleep(0.1)
        assert page.evaluate("document.images.length") == 0
