"""Metrics of continual learning as pure functions of an accuracy matrix."""

from .accuracy import (
    accuracy_curve,
    accuracy_over_time,
    average_accuracy,
    average_incremental_accuracy,
    learning_accuracy,
    worst_task_accuracy,
)
from .forgetting import backward_transfer, forgetting, positive_backward_transfer, remembering
from .transfer import forward_transfer, transfer_accuracy

__all__ = [
    "accuracy_curve",
    "accuracy_over_time",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "positive_backward_transfer",
    "remembering",
    "transfer_accuracy",
    "worst_task_accuracy",
]
