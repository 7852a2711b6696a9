"""Metrics of continual learning as pure functions of tensors: no state, any device, batched over leading dimensions."""

from __future__ import annotations

from .accuracy import (
    accuracy_curve,
    accuracy_matrix,
    accuracy_over_time,
    average_accuracy,
    average_incremental_accuracy,
    learning_accuracy,
    plasticity,
    stability,
    stability_plasticity,
    worst_task_accuracy,
)
from .fewshot import harmonic_accuracy, performance_drop
from .forgetting import forgetting, forgetting_curve, retention_waterfall
from .reference import forgetting_ratio, intransigence, normalized_accuracy, plasticity_gain
from .transfer import (
    backward_transfer,
    backward_transfer_curve,
    forward_transfer,
    mtil_scores,
    positive_backward_transfer,
    remembering,
    transfer_accuracy,
)

__all__ = [
    "accuracy_curve",
    "accuracy_matrix",
    "accuracy_over_time",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "backward_transfer_curve",
    "forgetting",
    "forgetting_curve",
    "forgetting_ratio",
    "forward_transfer",
    "harmonic_accuracy",
    "intransigence",
    "learning_accuracy",
    "mtil_scores",
    "normalized_accuracy",
    "performance_drop",
    "plasticity",
    "plasticity_gain",
    "positive_backward_transfer",
    "remembering",
    "retention_waterfall",
    "stability",
    "stability_plasticity",
    "transfer_accuracy",
    "worst_task_accuracy",
]
