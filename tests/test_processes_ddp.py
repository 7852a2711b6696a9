"""Every method on two processes ends as on one with the same effective batch."""

from __future__ import annotations

import pytest

from benchmarks.processes import BATCH_STATISTICS, compare, compare_resumed, launch, teams
from cl_plugins.recipes import load_recipe, recipe_names

QUICK = ["OVOR and NearestMean", "MoRA", "BalancedEMA", "LeanHierarchicalSideTuning", "RanPAC", "ForgettingDashboard"]


def _outcomes(folder, chosen):
    launch(folder / "one", 1, chosen)
    launch(folder / "two", 2, chosen)
    found, wrong = {}, []
    for name in chosen:
        try:
            found[name] = compare(name, folder / "one", folder / "two")
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    for name, gap in found.items():
        if isinstance(gap, str):
            assert name in BATCH_STATISTICS, f"{name}: {gap}"
        else:
            assert gap < 1e-9, f"{name}: weights differ by {gap}, in double precision"


def test_every_method_of_the_list_is_among_the_teams():
    known = [set(team) for team in teams().values()]
    for method in recipe_names():  # what `cl-bench list` shows; "finetune" and "joint" have no callback
        classes = {entry["class"] for entry in load_recipe(method, "split-digits").callbacks}
        assert classes in known or classes - {"CacheFeatures"} in known, method  # the cache stands in two teams


@pytest.mark.ddp
def test_two_processes_equal_one(tmp_path):
    _outcomes(tmp_path, QUICK)


@pytest.mark.ddp
@pytest.mark.slow
def test_every_method_on_two_processes_equals_one(tmp_path):
    _outcomes(tmp_path, [n for n in teams() if n not in QUICK])


def _resumed(folder, chosen, step):
    launch(folder / "whole", 2, chosen, 0)
    launch(folder / "resumed", 2, chosen, step)
    found = {name: compare_resumed(name, folder / "whole", folder / "resumed") for name in chosen}
    assert set(found.values()) == {0}, found


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_that_were_stopped_end_bit_for_bit_as_two_that_were_not(tmp_path):
    _resumed(tmp_path, ["no method", "OVOR"], 7)  # the last epoch's second step, for OVOR in a head epoch


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 6])  # inside an epoch; where the last epoch begins
def test_every_method_on_two_processes_goes_on_bit_for_bit(tmp_path, step):
    _resumed(tmp_path, list(teams()), step)
