"""Methods against each other: pairing, tests, ranks, what is said about doubtful comparisons, and the page."""

import csv
import html.parser
import io
import itertools
import json
import math
import statistics

import pytest

from cl_plugins.cli import main
from cl_plugins.compare import collect_results, comparison_text
from cl_plugins.comparison import compare_methods
from cl_plugins.report.comparison import render_comparison
from tests._reports import HOSTILE


def result(method, seed, value, scenario="s", order=(0, 1), joint=False, **more):
    accuracy = {"average_accuracy": value, "average_incremental_accuracy": value, "forgetting": 1 - value}
    identity = {"method": method, "scenario": scenario, "seed": seed, "order_seed": seed, "class_order": list(order)}
    recipe = {"recipe": {"joint": joint}, "train_seconds": 1.0, "accuracy_matrix": [[value]]}
    return {**identity, **accuracy, **recipe, **more}


def runs(method, values, **more):
    return [result(method, seed, value, **more) for seed, value in enumerate(values)]


GOOD, FAIR, POOR = (
    [0.90, 0.91, 0.93, 0.92, 0.90, 0.94],
    [0.85, 0.87, 0.86, 0.88, 0.84, 0.90],
    [0.2, 0.3, 0.5, 0.1, 0.2, 0.3],
)


def entry(comparison, method, scenario=0):
    return next(e for e in comparison.scenarios[scenario].entries if e.method == method)


def test_differences_are_paired_and_tested_by_all_signs():
    comparison = compare_methods(runs("good", GOOD) + runs("fair", FAIR[::1]) + runs("poor", POOR))
    assert comparison.scenarios[0].baseline == "good"
    assert [e.method for e in comparison.scenarios[0].entries] == ["good", "fair", "poor"]
    gaps = [a - b for a, b in zip(FAIR, GOOD, strict=True)]
    fair = entry(comparison, "fair")
    assert fair.difference.mean == pytest.approx(statistics.fmean(gaps))
    assert fair.difference.half_width == pytest.approx(2.570581835636314 * statistics.stdev(gaps) / math.sqrt(6))
    flips = [
        abs(sum(s * g for s, g in zip(signs, gaps, strict=True))) for signs in itertools.product((1, -1), repeat=6)
    ]
    exact = sum(f >= abs(sum(gaps)) - 1e-12 for f in flips) / 64
    assert fair.p_value == exact == 2 / 64
    assert fair.adjusted_p == 2 * exact  # the smaller of two equal p values counts twice
    assert entry(comparison, "good").difference is None


def test_streams_with_the_task_known_are_compared_by_that_number():
    def known(method, values, own, **more):
        made = runs(method, values, stream={"task_known": True}, **more)
        return [{**r, "average_accuracy_task_known": v} for r, v in zip(made, own, strict=True)]

    results = known("a", GOOD, POOR) + known("b", FAIR, GOOD)
    comparison = compare_methods(results)
    assert comparison.scenarios[0].baseline == "b"
    assert comparison.measure_names == ("average accuracy, task known (last row)",)
    assert compare_methods(results, "average_accuracy").scenarios[0].baseline == "a"
    assert compare_methods(runs("a", GOOD) + runs("b", FAIR)).measures == ("average_accuracy",)


def test_pairs_are_found_by_seed_not_by_position():
    shuffled = [runs("fair", FAIR)[k] for k in (3, 0, 5, 1, 4, 2)]
    straight = compare_methods(runs("good", GOOD) + runs("fair", FAIR))
    assert (
        entry(compare_methods(runs("good", GOOD) + shuffled), "fair").difference == entry(straight, "fair").difference
    )


def test_holm_is_over_all_scenarios():
    results = [r for s in "abc" for m, v in (("good", GOOD), ("fair", FAIR)) for r in runs(m, v, scenario=s)]
    comparison = compare_methods(results)
    assert [entry(comparison, "fair", k).adjusted_p for k in range(3)] == [3 * 2 / 64] * 3


def test_missing_seeds_use_the_common_ones_and_are_said():
    comparison = compare_methods(runs("good", GOOD) + runs("fair", FAIR[:3]))
    assert entry(comparison, "fair").difference.n == 3
    assert entry(comparison, "good").summary.n == 6
    told = " ".join(comparison.notes)
    assert "s: the methods ran with different seeds (fair: 0, 1, 2; good: 0, 1, 2, 3, 4, 5)" in told
    assert "With 3 pairs the sign-flip test cannot go below p = 0.25" in told
    assert comparison.cells == 3


def test_other_class_orders_are_not_paired():
    comparison = compare_methods(runs("good", GOOD) + runs("fair", FAIR, order=(1, 0)))
    assert entry(comparison, "fair").difference is None
    assert any("different class orders" in note for note in comparison.notes)
    assert comparison.borda is None
    assert any("no seed is common" in note for note in comparison.notes)


def test_runs_that_never_differ_are_no_replicates():
    comparison = compare_methods(runs("same", [0.5] * 5) + runs("fair", FAIR[:5]))
    assert any("every run gives the same value for same:" in note for note in comparison.notes)
    assert not any("for fair" in note and "same value" in note for note in comparison.notes)


def test_one_seed_twice_is_neither_tested_nor_ranked():
    comparison = compare_methods(runs("good", GOOD) + runs("fair", FAIR) + [result("fair", 0, 0.1)])
    assert entry(comparison, "fair").difference is None
    assert comparison.borda is None
    assert any("fair has 1 more run(s)" in note for note in comparison.notes)


def test_upper_bounds_are_shown_but_neither_tested_nor_ranked():
    comparison = compare_methods(runs("joint", [0.99] * 6, joint=True) + runs("good", GOOD) + runs("fair", FAIR))
    assert comparison.scenarios[0].baseline == "good"
    assert comparison.ranked == ("fair", "good")
    assert entry(comparison, "joint").p_value is None
    assert comparison.scenarios[0].entries[-1].method == "joint"


def test_a_chosen_baseline_and_its_absence():
    results = runs("good", GOOD) + runs("fair", FAIR) + runs("good", GOOD, scenario="t")
    comparison = compare_methods(results, baseline="fair")
    assert entry(comparison, "good").difference.mean > 0
    assert comparison.scenarios[1].baseline is None
    assert any("t: the baseline fair has no value there" in note for note in comparison.notes)
    assert any(note.startswith("Not ranked") and "fair" in note for note in comparison.notes)
    with pytest.raises(ValueError, match="`baseline` must be a method among the results"):
        compare_methods(results, baseline="fiar")


def test_lower_forgetting_is_better():
    comparison = compare_methods(runs("good", GOOD) + runs("poor", POOR), "forgetting")
    assert comparison.scenarios[0].baseline == "good"
    assert comparison.mean_rank("good") == 1
    assert entry(comparison, "poor").difference.mean > 0
    with pytest.raises(ValueError, match=r"`measure` must be one of .*did you mean 'forgetting'"):
        compare_methods(runs("good", GOOD), "forgeting")


def test_all_optimal_orders_of_a_cycle():
    cycle = {"a": [0.9, 0.5, 0.7], "b": [0.7, 0.9, 0.5], "c": [0.5, 0.7, 0.9]}
    comparison = compare_methods([r for m, v in cycle.items() for r in runs(m, v)])
    orders = {"".join(comparison.ranked[k] for k in order) for order in comparison.kemeny.orders}
    assert orders == {"abc", "bca", "cab"}
    assert [comparison.mean_rank(m) for m in "abc"] == [2, 2, 2]
    assert "3 optimal orders, the data does not decide" in comparison_text(
        [r for m, v in cycle.items() for r in runs(m, v)], comparison
    )


def test_level_two_gives_every_scenario_the_same_weight():
    much = runs("a", [0.9] * 5, scenario="much") + runs("b", [0.8] * 5, scenario="much")
    few = [r for s in ("x", "y") for r in runs("a", [0.1], scenario=s) + runs("b", [0.2], scenario=s)]
    one, two = (compare_methods(much + few, level=level) for level in (1, 2))
    assert one.mean_rank("a") == pytest.approx(1 + 2 / 7)
    assert two.mean_rank("a") == pytest.approx(1 + 2 / 3)


def test_undefined_values_are_left_out_and_counted():
    comparison = compare_methods(runs("good", GOOD) + runs("none", [0.1] * 3, average_accuracy=None))
    assert entry(comparison, "none").summary is None
    assert any("undefined in 3 of 3 none runs" in note for note in comparison.notes)
    assert "undefined" in comparison_text(
        runs("good", GOOD) + runs("none", [0.1] * 3, average_accuracy=None), comparison
    )


def test_one_method_alone_has_nothing_to_compare_with():
    comparison = compare_methods(runs("good", GOOD))
    assert (comparison.scenarios[0].baseline, comparison.borda) == (None, None)
    assert "good" in render_comparison(runs("good", GOOD), comparison)


@pytest.fixture
def folder(tmp_path):
    for k, r in enumerate(runs("good", GOOD) + runs("fair", FAIR) + runs(HOSTILE, POOR)):
        place = tmp_path / "runs" / str(k)
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(r))
    return tmp_path


def test_every_format_reaches_its_file(folder, capsys):
    for style in ("text", "markdown", "csv", "latex", "json", "html"):
        out = folder / "out" / f"c.{style}"
        assert main(["compare", str(folder / "runs"), "--format", style, "-o", str(out)]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        assert "fair" in out.read_text()
    table = list(csv.DictReader(io.StringIO((folder / "out" / "c.csv").read_text())))
    fair = next(row for row in table if row["method"] == "fair")
    assert float(fair["mean"]) == pytest.approx(statistics.fmean(FAIR))
    assert (fair["baseline"], fair["n"], fair["pairs"]) == ("good", "6", "6")
    assert float(fair["p_holm"]) == 4 / 64
    content = json.loads((folder / "out" / "c.json").read_text())
    assert content["ranking"]["kemeny_orders"] == [["good", "fair", HOSTILE]]
    assert content["scenarios"][0]["methods"][1]["p_value"] == 2 / 64


class Seen(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not any(key.startswith("on") or key in ("src", "href") for key, _ in attributes)

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_runs_nothing_fetches_nothing_and_names_stay_text(folder):
    results = collect_results([folder / "runs"])
    page = render_comparison(results, compare_methods(results), title=HOSTILE)
    seen = Seen(page)
    assert not {"script", "img", "link", "iframe"} & set(seen.tags)
    assert HOSTILE in seen.words
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    assert f"{statistics.fmean(FAIR):.3f} ± " in page
    assert page.count("<svg") == 4  # three methods and the axis
    assert page.count('class="tick"') == 18


def test_a_difference_is_colored_only_where_its_interval_excludes_zero():
    results = runs("best", [0.9, 0.91, 0.92]) + runs("near", [0.91, 0.89, 0.90]) + runs("poor", [0.2, 0.21, 0.23])
    page = render_comparison(results, compare_methods(results))
    marked = {}
    for line in page.split("<tr>")[1:]:
        if "strip-cell" in line and "pairs" in line:
            marked[line.split("<bdi>")[1].split("<")[0]] = 'class="n worse"' in line
    assert marked == {"near": False, "poor": True}
