"""What a browser draws: fronts, bands, bars and lists with the right numbers, keys and signs on all, within bounds."""

import itertools
import json

import numpy as np
import pytest

from cl_plugins import functional
from cl_plugins.report import write_report
from cl_plugins.report._numbers import number
from cl_plugins.runs import Run
from tests._reports import HOSTILE, everything, record

pytestmark = pytest.mark.browser


def drawn(page, plot, part):
    """The columns that a part of a chart holds."""
    told = page.evaluate(
        f"JSON.stringify(part(plots.{plot}, '{part}').data_source.data, (k, v) => ArrayBuffer.isView(v) ? [...v] : v)"
    )
    return json.loads(told)


def several(root):
    return [
        record(root, f"{m}{s}", method=m, seed=10 * k + s, decay=d)
        for k, (m, d) in enumerate((("a", 0.05), ("b", 0.2), ("c", 0.5)))
        for s in range(3)
    ]


def front_of(points):
    """Points that no other dominates, by every pair."""
    return [p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]


def test_fronts_hold_the_runs_that_no_other_dominates(page, tmp_path):
    runs = several(tmp_path)
    for k, run in enumerate(runs):  # costs of their own, so that the cheapest is not always the best
        for cost in run.cost.values():
            cost["train_seconds"] = 1.0 + ((7 * k) % 9)
    page.open(write_report(runs, tmp_path / "report.html"))
    matrices = [run.accuracy_matrix for run in runs]
    plane = [(float(functional.learning_accuracy(m)), float(functional.stability(m))) for m in matrices]
    shown = drawn(page, "plane", "front")
    found = sorted(zip(shown["x"], shown["y"], strict=True))
    assert np.allclose(found, sorted(front_of(plane)))
    assert len(found) > 1
    spent = [sum(c["train_seconds"] for c in run.cost.values()) for run in runs]
    cheap = [(-s, float(functional.average_accuracy(m))) for s, m in zip(spent, matrices, strict=True)]
    shown = drawn(page, "cost", "front")
    found = sorted((-x, y) for x, y in zip(shown["x"], shown["y"], strict=True))
    assert np.allclose(found, sorted(front_of(cheap)))
    assert len(found) > 1


def test_lines_become_quantile_bands_above_sixty_tasks(page, tmp_path):
    page.open(write_report([record(tmp_path, "few", n_tasks=60, plug=False)], tmp_path / "few.html"))
    assert len(drawn(page, "retention", "lines")["xs"]) == 60
    assert drawn(page, "retention", "band")["x"] == []
    run = record(tmp_path, "many", n_tasks=61, plug=False)
    page.open(write_report([run], tmp_path / "many.html"))
    page.choose("#axis", "row")
    assert drawn(page, "retention", "lines")["xs"] == []
    bands, matrix = drawn(page, "retention", "band"), run.accuracy_matrix.numpy()
    assert bands["x"] == list(range(61))
    for name, share in (("low", 0.1), ("q1", 0.25), ("median", 0.5), ("q3", 0.75), ("high", 0.9)):
        assert np.allclose(bands[name], [np.quantile(matrix[i, : i + 1], share) for i in range(61)])
    page.choose("#task", "30")
    page.wait("part(plots.retention, 'mark').data_source.data.x.length === 31")
    assert np.allclose(drawn(page, "retention", "mark")["y"], matrix[30:, 30])


@pytest.mark.parametrize("n_tasks", [6, 90])
def test_the_bars_of_the_waterfall_join_from_learned_to_now(page, tmp_path, n_tasks):
    run = record(tmp_path, "a", n_tasks=n_tasks, plug=False)
    page.open(write_report([run], tmp_path / "report.html"))
    bars, matrix = drawn(page, "waterfall", "bars"), run.accuracy_matrix
    first, *steps, last = zip(bars["bottom"], bars["top"], bars["color"], strict=True)
    level = first[1]
    assert level == pytest.approx(float(functional.learning_accuracy(matrix)), abs=1e-12)
    loss = page.evaluate("css('--loss')")
    striped = drawn(page, "waterfall", "stripes")["x"]
    for k, (bottom, top, color) in enumerate(steps):
        assert level == pytest.approx(top if color == loss else bottom, abs=1e-12)  # each begins where the last ended
        level = bottom if color == loss else top
        assert (k + 1 in striped) is (color == loss)  # and a loss is told by stripes too
    assert level == pytest.approx(last[1], abs=1e-12)
    assert level == pytest.approx(float(functional.average_accuracy(matrix)), abs=1e-12)


def test_lists_and_bars_hold_the_numbers_of_the_run(page, tmp_path):
    run = record(tmp_path, "a", n_tasks=14, decay=0.2)
    page.open(write_report([run], tmp_path / "report.html"))
    matrix = run.accuracy_matrix
    lost = functional.forgetting(matrix, reduction="none").tolist()
    worst = sorted((j for j in range(14) if lost[j] == lost[j]), key=lambda j: -lost[j])[:10]
    cells = "[...document.querySelectorAll('#forgotten tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    rows = page.evaluate(cells)
    for row, j in zip(rows, worst, strict=True):
        learned, now = float(matrix[j, j]), float(matrix[-1, j])
        assert row[:4] == [f"{j}: digits {j}", number(learned), number(now), number(lost[j])]
    seconds = drawn(page, "seconds", "bars")
    tops = dict(zip(seconds["x"], seconds["top"], strict=True))  # the later of two is the one on top
    assert tops == pytest.approx({j: c["train_seconds"] + c["eval_seconds"] for j, c in run.cost.items()})
    assert drawn(page, "parameters", "bars")["top"] == [7680] * 14
    assert drawn(page, "memory", "bars")["top"] == [256] * 14


def test_every_chart_takes_keys_and_can_be_reached(page, tmp_path):
    page.open(write_report(several(tmp_path), tmp_path / "report.html"))
    ids = page.evaluate("[...document.querySelectorAll('.plot[tabindex]')].filter(p => p.offsetParent).map(p => p.id)")
    assert {"plot-matrix", "plot-retention", "plot-waterfall", "plot-plane", "plot-cost", "plot-stream"} <= set(ids)
    for place in ids:
        page.evaluate("pin(-1, -1)")
        page.evaluate(f"document.getElementById('{place}').focus()")
        page.press("ArrowRight")
        page.press("ArrowRight")
        page.wait("state.task === 1", seconds=5)
    unnamed = """[...document.querySelectorAll('select, input, button, textarea, .plot[role=group]')]
        .filter(n => !n.closest('label') && !n.getAttribute('aria-label') && !n.textContent.trim()).length"""
    assert page.evaluate(unnamed) == 0


def test_no_two_methods_and_no_two_neighbors_differ_by_color_alone(page, tmp_path):
    runs = [record(tmp_path, f"m{k}", method=f"m{k:02}", seed=k, n_tasks=5, plug=False) for k in range(16)]
    page.open(write_report(runs, tmp_path / "report.html"))
    ends = drawn(page, "stream", "runs")
    looks = list(zip(ends["color"], ends["marker"], strict=True))
    assert len(set(looks)) == 16
    for color in set(ends["color"]):
        alike = [marker for c, marker in looks if c == color]
        assert len(set(alike)) == len(alike)
    first = [page.evaluate(f"slotMarker({k})") for k in range(8)]
    assert len(set(first)) == 8  # up to eight methods differ by their marks alone
    lines, starts = drawn(page, "retention", "lines"), drawn(page, "retention", "starts")
    for own in (lines["dash"], starts["marker"]):
        assert all(a != b for a, b in itertools.pairwise(own))
    signs = page.evaluate("[...document.querySelectorAll('#stream-key b')].map(b => b.textContent)")
    assert len(set(signs[:8])) == 8
    assert all(signs)


def test_a_thousand_tasks_of_everything_stay_within_the_bounds(page, tmp_path):
    run = everything(tmp_path, "a", 1000)
    file = write_report([run], tmp_path / "report.html")
    assert file.stat().st_size <= 5e6
    ready = [page.open(file) for _ in range(3)]
    assert min(ready) < 10_000, ready  # 2 s on a machine with nothing else to do; benchmarks/report_bounds.py tells
    assert page.heap() < 100e6
    for _ in range(2):
        for name in ("mode", "axis", "task"):
            values = page.evaluate(f"[...document.querySelectorAll('#{name} option')].map(o => o.value)")
            for value in values[:: max(1, len(values) // 8)]:
                page.choose(f"#{name}", value)
    assert page.heap() < 100e6  # nothing piles up
    assert page.evaluate("matrix.values.length") == 10**6
    accuracy = number(float(functional.average_accuracy(run.accuracy_matrix)))
    assert page.evaluate("document.querySelector('[data-measure=average_accuracy]').textContent") == accuracy


def test_twenty_tasks_and_twenty_five_runs(page, tmp_path):
    runs = [record(tmp_path, f"r{k}", method=f"m{k % 5}", n_tasks=20, seed=k, names=[HOSTILE] * 20) for k in range(25)]
    file = write_report(runs, tmp_path / "report.html")
    assert file.stat().st_size <= 3e6
    page.open(file)
    for selection in page.evaluate("PAGE.selections"):
        page.choose("#selection", selection)
    assert page.heap() < 100e6
    assert page.evaluate("document.images.length") == 0


def test_a_difference_is_to_the_run_that_was_chosen(page, tmp_path):
    runs = several(tmp_path)
    page.open(write_report(runs, tmp_path / "report.html"))
    page.choose("#selection", "r0")
    page.choose("#mode", "difference")
    page.choose("#reference", "r4")
    order = page.evaluate("PAGE.runs.map(r => PAGE.groups[r.group].method + r.label)")
    assert order[0] == "aseed 0, order seed 0"
    own, other = runs[0].accuracy_matrix.numpy(), runs[4].accuracy_matrix.numpy()
    values = page.evaluate("[...matrix.values].map(v => Number.isFinite(v) ? v : null)")
    wanted = (own - other).ravel()
    assert [v is None for v in values] == np.isnan(wanted).tolist()
    assert np.allclose([v for v in values if v is not None], wanted[~np.isnan(wanted)])
    page.choose("#selection", "g0")
    page.choose("#mode", "sd")
    spread = np.std([r.accuracy_matrix.numpy() for r in runs[:3]], axis=0, ddof=1)
    values = np.array(page.evaluate("[...matrix.values].map(v => Number.isFinite(v) ? v : -1)")).reshape(5, 5)
    assert np.allclose(values[np.tril_indices(5)], spread[np.tril_indices(5)])


def test_words_stand_where_nothing_was_measured(page, tmp_path):
    page.open(write_report([Run("nothing")], tmp_path / "report.html"))
    visible = "[...document.querySelectorAll('.plot')].filter(p => p.offsetParent)"
    told = page.evaluate(f"{visible}.map(p => p.dataset.empty)")
    assert all(told), told
