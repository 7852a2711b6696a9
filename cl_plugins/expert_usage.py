"""How a model uses the experts of its tasks, measured on one batch of each task's data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from cl_plugins.adapters.rank_experts import ExpertUsage, RankExperts
from cl_plugins.batches import hand_over, own_pass
from cl_plugins.evaluation import Predict, default_predict, evaluating
from cl_plugins.plugin import module_device
from cl_plugins.vision_language import TextClassifier

Usage = dict[str, dict[str, Any]]
"""Per layer: ``mass`` (share of the softmax mass per growth), ``empty`` (share of tokens that no expert answers at the
threshold of evaluation) and ``effective`` (mean of the exponential of the weights' entropy)."""


def expert_usage(
    module: nn.Module, banks: Mapping[str, RankExperts], batches: Iterable[Any], predict: Predict = default_predict
) -> Usage:
    """Run ``batches`` through the model in eval mode and read what the banks did; one read per bank at the end.

    A text tower sees the texts of all classes, once, whatever the batches.

    Args:
        module: the model; its modes are restored.
        banks: its banks by layer.
        batches: as the test loader gives them.
        predict: runs a batch.
    """
    device = module_device(module)
    grown = {name: bank for name, bank in banks.items() if bank.active}
    try:
        for bank in grown.values():
            bank.usage = ExpertUsage(bank)
        for m in module.modules():
            if isinstance(m, TextClassifier):
                m.forget()  # kept texts would not pass through the text tower's banks
        with evaluating(module), own_pass(module):
            for batch in batches:
                predict(module, hand_over(batch, module, device))
        return {name: bank.usage.read() for name, bank in grown.items() if bank.usage is not None}
    finally:
        for bank in grown.values():
            bank.usage = None


def usage_events(
    prefix: str, usages: Mapping[int, Usage], names: Mapping[int, str], newest: int
) -> list[dict[str, Any]]:
    """Rows for the run store.

    Args:
        prefix: the method's name.
        usages: by index of the task whose data were used.
        names: of the tasks, by index.
        newest: index of the task that was learned last; ``usages`` may name other tasks, those that are evaluated.
    """
    tasks = sorted(usages)
    if not tasks or not usages[tasks[-1]]:
        return []
    layers = list(usages[tasks[-1]])
    mass = {t: torch.tensor([usages[t][layer]["mass"] for layer in layers]) for t in tasks}
    growths = [f"experts of growth {i}" for i in range(mass[tasks[-1]].shape[1])]
    data = [names.get(t, f"task {t}") for t in tasks]

    def by_layer(quantity: str) -> list[list[float]]:
        return [[usages[t][layer][quantity] for t in tasks] for layer in layers]

    rows = {
        "mass_per_layer": (mass[tasks[-1]].tolist(), layers, growths),
        "mass_per_task": ([mass[t].mean(0).tolist() for t in tasks], data, growths),
        "tokens_without_expert": (by_layer("empty"), layers, data),
        "effective_experts": (by_layer("effective"), layers, data),
    }
    return [
        {"name": f"{prefix}/{name}", "value": value, "task": newest, "rows": row, "columns": column}
        for name, (value, row, column) in rows.items()
    ]
