"""Metrics of continual learning as torchmetrics classes; log their values, never the objects."""

from __future__ import annotations

from .accuracy import (
    AccuracyOverTime,
    AverageAccuracy,
    AverageIncrementalAccuracy,
    HarmonicAccuracy,
    LearningAccuracy,
    PerformanceDrop,
    Plasticity,
    Stability,
    StabilityPlasticity,
    WorstTaskAccuracy,
)
from .cost import (
    ComputeEfficiency,
    ModelSizeEfficiency,
    ParameterGrowth,
    SampleStorageEfficiency,
)
from .factories import (
    cil_metrics,
    online_metrics,
    standard_metrics,
    vlm_metrics,
)
from .forgetting import (
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    MTILScores,
    PositiveBackwardTransfer,
    Remembering,
    TransferAccuracy,
)
from .matrix import (
    AccuracyMatrix,
)
from .multilabel import (
    MultilabelCF1,
    MultilabelOF1,
    SeenLabelMAP,
)
from .predictions import (
    NegativeFlipRate,
    SeenClassAccuracy,
    TaskConfusionMatrix,
    TaskRecencyBias,
    TaskRecencyPull,
)
from .reference import (
    ForgettingRatio,
    Intransigence,
    NormalizedAccuracy,
    PlasticityGain,
)
from .representation import (
    CalibrationDrift,
    EffectiveRank,
    LinearCKA,
    RepresentationDrift,
)
from .traces import (
    AnytimeAccuracy,
    LearningCurveArea,
    MinAccuracy,
    StabilityGap,
    WindowedForgetting,
    WindowedPlasticity,
    WorstCaseAccuracy,
)

__all__ = [
    "AccuracyMatrix",
    "AccuracyOverTime",
    "AnytimeAccuracy",
    "AverageAccuracy",
    "AverageIncrementalAccuracy",
    "BackwardTransfer",
    "CalibrationDrift",
    "ComputeEfficiency",
    "EffectiveRank",
    "Forgetting",
    "ForgettingRatio",
    "ForwardTransfer",
    "HarmonicAccuracy",
    "Intransigence",
    "LearningAccuracy",
    "LearningCurveArea",
    "LinearCKA",
    "MTILScores",
    "MinAccuracy",
    "ModelSizeEfficiency",
    "MultilabelCF1",
    "MultilabelOF1",
    "NegativeFlipRate",
    "NormalizedAccuracy",
    "ParameterGrowth",
    "PerformanceDrop",
    "Plasticity",
    "PlasticityGain",
    "PositiveBackwardTransfer",
    "Remembering",
    "RepresentationDrift",
    "SampleStorageEfficiency",
    "SeenClassAccuracy",
    "SeenLabelMAP",
    "Stability",
    "StabilityGap",
    "StabilityPlasticity",
    "TaskConfusionMatrix",
    "TaskRecencyBias",
    "TaskRecencyPull",
    "TransferAccuracy",
    "WindowedForgetting",
    "WindowedPlasticity",
    "WorstCaseAccuracy",
    "WorstTaskAccuracy",
    "cil_metrics",
    "online_metrics",
    "standard_metrics",
    "vlm_metrics",
]
