"""What an average and the groups of tasks report reaches the run folder and the page."""

import json
import re

import pytest
import torch

from cl_plugins import fit_stream
from cl_plugins.callbacks import BalancedEMA, ForgettingDashboard, TaskGroups
from cl_plugins.causal_lm import CausalLM, LanguageModule
from cl_plugins.report import render_report
from cl_plugins.runs import read_runs
from cl_plugins.scenarios import InstructionStream
from tests._helpers import quiet_trainer


def _panels(page):
    found = re.search(r'<script[^>]*id="page-data"[^>]*>(.*?)</script>', page, re.DOTALL)
    return {(p["name"], p.get("kind", "matrix")): p for p in json.loads(found.group(1))["runs"][0]["panels"]}


def test_weights_fallbacks_groups_and_similarities_are_on_the_page(tmp_path):
    stream = InstructionStream(["reverse", "add", "upper-case"], n_train=16, n_test=2, batch_size=4)
    ema, groups = BalancedEMA("released", kappa=1e-4, active="always"), TaskGroups()
    trainer = quiet_trainer(callbacks=[groups, ema, ForgettingDashboard(tmp_path, run_id="one")], max_epochs=1)
    fit_stream(trainer, LanguageModule(CausalLM(dim=16, depth=1, heads=2)), stream, seed=0)
    (run,) = read_runs(tmp_path)
    panels = _panels(render_report([run]))

    lines = panels["BalancedEMA/weight", "lines"]
    assert {line["label"] for line in lines["lines"]} >= {"q25", "median", "q75", "fallback"}
    assert {line["task"] for line in lines["lines"]} == {0, 1, 2}
    medians = [line for line in lines["lines"] if line["label"] == "median" and line["task"] == 0]
    assert medians[0]["y"] == pytest.approx(
        next(e["median"] for e in ema.report_events(trainer.lightning_module) if e["task"] == 0), rel=1e-5
    )
    assert medians[0]["x"] == [1, 2, 3, 4]

    shares = panels["BalancedEMA/weight", "points"]["lines"]
    assert {line["label"] for line in shares} == {"fallback_share"}
    assert all(0 <= line["y"][0] <= 1 for line in shares)

    chosen = panels["TaskGroups/group", "points"]["lines"]
    assert [line["y"][0] for line in chosen] == [h["group"] for h in groups.groups.history]
    scores = panels["TaskGroups/group", "lines"]["lines"]
    assert torch.tensor(scores[-1]["y"]).ge(0).all()
    reasons = [e["reason"] for e in run.plug if e["name"] == "TaskGroups/group"]
    assert len(reasons) == 3
    assert all(reasons)
