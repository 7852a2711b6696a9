"""Scores of a multi-label evaluation: mAP, CF1 and OF1 over the classes seen so far, each test image counted once.

As the multi-label class-incremental literature evaluates ("Knowledge Restore and Transfer for Multi-Label
Class-Incremental Learning", Dong et al., 2023, arXiv 2302.13334; "Less is more: Summarizing Patch Tokens for efficient
Multi-Label Class-Incremental Learning", De Min et al., 2024, arXiv 2405.15633): after a task, on the test images with
at least one seen class.

    mAP  mean over seen classes of the average precision
    CF1  2 CP CR / (CP + CR), CP and CR the means over seen classes of precision and recall
    OF1  the same of the precision OP and recall OR of the counts pooled over seen classes

A class is predicted where the sigmoid of its logit is at least 0.5; some papers take 0.8, and their CF1 and OF1 do not
compare with these. A class without a positive in the test data has no
average precision and enters neither mAP nor CF1. The formulas are in :mod:`cl_plugins.functional`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cl_plugins import functional

THRESHOLD = 0.5
LABEL_SCORES = {
    "map": "mean over seen classes of the average precision after the last task, each test image once",
    "average_map": "mean over rows of the mAP of the classes seen so far",
    "cf1": f"harmonic mean of mean precision and mean recall over seen classes after the last task, at {THRESHOLD}",
    "of1": f"F1 of the counts pooled over seen classes after the last task, at {THRESHOLD}",
}
"""What each number of :meth:`cl_plugins.StreamResult.metrics` on a multi-label stream is."""


LABEL_ACCURACY = (
    "the share of labels of seen classes that are among the k highest scores of their image, k the number of its labels"
)
"""What a count of :attr:`cl_plugins.plugin.Row.correct` over its total is on a multi-label stream."""


def of_label_accuracy(name: str) -> str:
    """The name of a measure of the accuracy matrix on a multi-label stream, where a count is of labels.

    Example:
        >>> of_label_accuracy("average accuracy (last row)")
        'average label accuracy (last row)'
        >>> of_label_accuracy("forgetting (peak since learned)")
        'forgetting of label accuracy (peak since learned)'
    """
    title, bracket, variant = name.partition(" (")
    known = "accuracy" in title
    return (title.replace("accuracy", "label accuracy") if known else f"{title} of label accuracy") + bracket + variant


@dataclass(frozen=True)
class LabelScores:
    """What one evaluation of a multi-label stream measured, per seen class.

    Attributes:
        classes: the seen classes.
        average_precision: one per class in [0, 1]; None where it is undefined.
        true_positives: images per class that have it and are predicted to have it.
        predicted: images per class predicted to have it.
        present: images per class that have it.
        undefined: why numbers are missing; empty when none is.

    Example:
        >>> scores = LabelScores((0, 1), (1.0, 0.5), (1, 1), (2, 1), (1, 2))
        >>> scores.map, scores.cf1, round(scores.of1, 4)
        (0.75, 0.75, 0.6667)
    """

    classes: tuple[int, ...]
    average_precision: tuple[float | None, ...]
    true_positives: tuple[int, ...]
    predicted: tuple[int, ...]
    present: tuple[int, ...]
    undefined: str = ""

    @property
    def map(self) -> float:
        """Mean average precision over the seen classes that occur, in [0, 1]; NaN when there is none."""
        known = [p for p in self.average_precision if p is not None]
        return sum(known) / len(known) if known else math.nan

    @property
    def _counts(self) -> Tensor:
        return torch.tensor([self.true_positives, self.predicted, self.present], dtype=torch.int64).reshape(3, -1)

    @property
    def cf1(self) -> float:
        """CF1 in [0, 1]; NaN when no seen class occurs or the scores are not numbers."""
        return math.nan if math.isnan(self.map) else float(functional.multilabel_cf1(self._counts))

    @property
    def of1(self) -> float:
        """OF1 in [0, 1]; NaN likewise."""
        return math.nan if math.isnan(self.map) else float(functional.multilabel_of1(self._counts))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LabelScores:
        """From plain lists, as a checkpoint holds them."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in state.items()}
        return cls(**values)


def scores_from_event(value: Any) -> LabelScores | None:
    """What a run's store holds of an evaluation; None for anything else, as a damaged or foreign line.

    Example:
        >>> scores_from_event({"classes": [3], "average_precision": [None], "true_positives": [0], "predicted": [2],
        ...                    "present": [0]}).average_precision
        (None,)
        >>> scores_from_event({"classes": [3]}) is None
        True
    """
    if not isinstance(value, dict):
        return None
    whole = ("classes", "true_positives", "predicted", "present")
    lists = [value.get(k) for k in (*whole, "average_precision")]
    if not all(isinstance(v, list) and len(v) == len(lists[0] or []) for v in lists):
        return None
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**53 for k in whole for n in value[k]):
        return None
    if not all(p is None or (isinstance(p, int | float) and 0 <= p <= 1) for p in value["average_precision"]):
        return None
    known = {k: tuple(value[k]) for k in (*whole, "average_precision")}
    return LabelScores(**known, undefined=str(value.get("undefined") or ""))


class SeenLabelScores(Metric):
    """Collects the logits and labels of an evaluation; over processes counts are added and logits gathered.

    WHEN: ``update`` per batch of every evaluated task, in the order of the tasks, then :meth:`scores` once.

    An image is in the test data of every task that has one of its classes. It is counted where it comes first: a batch
    of task i leaves out the images with a class of an earlier task.

    Args:
        seen: the classes learned so far.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = SeenLabelScores([0, 1])
        >>> labels = torch.tensor([[1, 1, 0], [0, 1, 1]])
        >>> metric.update(torch.tensor([[2.0, -1.0, 9.0], [0.5, 1.0, 9.0]]), labels)
        >>> metric.scores().average_precision
        (1.0, 1.0)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = True
    full_state_update: bool | None = False

    counts: Tensor
    logits: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor

    def __init__(self, seen: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not len(seen):
            raise ValueError("`seen` must hold at least one class, got none")
        self.seen = sorted(int(c) for c in seen)
        self.add_state("counts", torch.zeros((3, len(self.seen)), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, earlier: Sequence[int] = ()) -> None:
        """Add logits and 0/1 labels, both ``(batch, classes)``.

        Args:
            logits: of any floating-point dtype.
            labels: 1 where a class is present, nothing hidden.
            earlier: classes of the evaluated tasks before this one, whose images are counted already.

        Raises:
            ValueError: for other shapes, or hidden labels.
        """
        if logits.shape != labels.shape or logits.ndim != 2 or logits.shape[1] <= self.seen[-1]:
            raise ValueError(
                f"`logits` and `labels` must both have the shape (batch, {self.seen[-1] + 1} or more classes),"
                f" got {tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        first = ~(labels[:, list(earlier)] == 1).any(1)
        shown = labels[first][:, self.seen]
        if bool((shown < 0).any()):
            raise ValueError("`labels` must be whole in the evaluation, got hidden ones (-1) among the seen classes")
        scores = logits[first][:, self.seen].detach().float()
        assert isinstance(self.logits, list)
        assert isinstance(self.labels, list)
        self.logits.append(scores)
        self.labels.append(shown.bool())
        # sigmoid(x) >= 0.5 where x >= 0, without its rounding
        counts = functional.multilabel_counts(scores, shown, threshold=math.log(THRESHOLD / (1 - THRESHOLD)))
        self.counts = self.counts + counts.to(self.counts.device)

    def _prepare(self) -> None:
        """A process without a test image joins the gathering with no rows instead of no tensor."""
        width, device = len(self.seen), self.counts.device
        if isinstance(self.logits, list) and not self.logits:
            self.logits.append(torch.zeros(0, width, device=device))
        if isinstance(self.labels, list) and not self.labels:
            self.labels.append(torch.zeros(0, width, dtype=torch.bool, device=device))

    def scores(self, *, gather: bool = False) -> LabelScores:
        """The scores of what was added: by this process, or by all with ``gather``."""
        self._prepare()
        with self.sync_context(should_sync=gather):
            return self._scores()

    def compute(self) -> Tensor:
        """The mAP, float64; :meth:`scores` has the rest."""
        self._prepare()
        return torch.tensor(self._scores().map, dtype=torch.float64)

    def _scores(self) -> LabelScores:
        logits, labels = dim_zero_cat(self.logits), dim_zero_cat(self.labels)
        finite = bool(logits.isfinite().all())
        present = self.counts[2].tolist()
        undefined = ""
        precision: list[float | None] = [None] * len(self.seen)
        if not finite:
            undefined = "the logits of seen classes hold NaN or infinity"
        elif not any(present):
            undefined = "no seen class occurs in the test data"
        else:
            values = functional.average_precision(logits, labels).tolist()
            precision = [float(v) if n else None for v, n in zip(values, present, strict=True)]
            lost = [c for c, n in zip(self.seen, present, strict=True) if not n]
            if lost:
                undefined = f"{len(lost)} seen classes do not occur in the test data, such as class {lost[0]}"
        right, predicted = self.counts[0].tolist(), self.counts[1].tolist()
        return LabelScores(
            tuple(self.seen), tuple(precision), tuple(right), tuple(predicted), tuple(present), undefined
        )
