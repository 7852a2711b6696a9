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
from .cost import (
    compute_efficiency,
    model_size_efficiency,
    parameter_growth,
    sample_storage_efficiency,
)
from .fewshot import (
    harmonic_accuracy,
    performance_drop,
)
from .forgetting import (
    forgetting,
    forgetting_curve,
    retention_waterfall,
)
from .multilabel import (
    average_precision,
    multilabel_cf1,
    multilabel_counts,
    multilabel_of1,
    seen_label_map,
)
from .predictions import (
    class_confusion,
    negative_flip_rate,
    seen_class_accuracy,
    task_confusion_matrix,
    task_id_accuracy,
    task_recency_bias,
    task_recency_pull,
)
from .reference import (
    forgetting_ratio,
    intransigence,
    normalized_accuracy,
    plasticity_gain,
)
from .representation import (
    effective_rank,
    expected_calibration_error,
    linear_cka,
)
from .traces import (
    Gap,
    anytime_accuracy,
    learning_curve_area,
    min_accuracy,
    stability_gap,
    stability_gaps,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)
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
    "Gap",
    "accuracy_curve",
    "accuracy_matrix",
    "accuracy_over_time",
    "anytime_accuracy",
    "average_accuracy",
    "average_incremental_accuracy",
    "average_precision",
    "backward_transfer",
    "backward_transfer_curve",
    "class_confusion",
    "compute_efficiency",
    "effective_rank",
    "expected_calibration_error",
    "forgetting",
    "forgetting_curve",
    "forgetting_ratio",
    "forward_transfer",
    "harmonic_accuracy",
    "intransigence",
    "learning_accuracy",
    "learning_curve_area",
    "linear_cka",
    "min_accuracy",
    "model_size_efficiency",
    "mtil_scores",
    "multilabel_cf1",
    "multilabel_counts",
    "multilabel_of1",
    "negative_flip_rate",
    "normalized_accuracy",
    "parameter_growth",
    "performance_drop",
    "plasticity",
    "plasticity_gain",
    "positive_backward_transfer",
    "remembering",
    "retention_waterfall",
    "sample_storage_efficiency",
    "seen_class_accuracy",
    "seen_label_map",
    "stability",
    "stability_gap",
    "stability_gaps",
    "stability_plasticity",
    "task_confusion_matrix",
    "task_id_accuracy",
    "task_recency_bias",
    "task_recency_pull",
    "transfer_accuracy",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
    "worst_task_accuracy",
]
