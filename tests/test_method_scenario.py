"""Methods of cl-bench on the streams that come along: each works, or is refused before anything is trained."""

from __future__ import annotations

import pytest

from benchmarks.method_scenario import outcome, streams

REFUSED = {
    ("ovor", "online-glyphs"): "`head_epochs` must leave an epoch for the prompt",
    ("ovor", "multilabel-glyphs"): "OVOR works on image data alone, because it needs one label per sample",
    ("hst", "blurry-glyphs"): "`regime='per_task'` must have tasks with classes of their own",
    ("lst", "instructions"): "LadderSideTuning works on image data alone",
    ("zero-shot", "split-digits"): "because it needs the texts of the classes",
    ("oneprompt", "mtil-glyphs"): "because it acts on a linear classifier behind an image backbone",
}
CELLS = [("frozen-linear", "blurry-glyphs"), ("nearest-mean", "fewshot-glyphs"), ("lora", "domain-glyphs")]


@pytest.mark.parametrize(("method", "scenario"), [*REFUSED, *CELLS])
def test_a_sample_of_the_table(method, scenario):
    refused = outcome(method, scenario)
    if (method, scenario) in REFUSED:
        assert REFUSED[method, scenario] in refused
    else:
        assert refused is None


@pytest.mark.slow
@pytest.mark.parametrize("scenario", streams())
def test_every_stream_serves_plain_training_and_adapters(scenario):
    """The whole table comes from ``benchmarks/method_scenario.py``."""
    assert outcome("finetune", scenario) is None
    assert outcome("lora", scenario) is None
