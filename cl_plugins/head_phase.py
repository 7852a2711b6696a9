"""Tuning a classifier alone, on stored features and virtual outliers: the second phase of a task in OVOR.

Any method whose model splits into ``feature(x)`` and ``head(f)`` can use it: :class:`FeatureTap` (or
:func:`cl_plugins.features.collect_features`) gives the features, :func:`tune_head` makes one pass over them.

Formula of a step on features ``f`` with labels ``y`` and outliers ``o``, over the task's columns alone::

    loss = CE(head(f), y) + VOR(head(f), head(o))              see cl_plugins.outliers
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.optim import Optimizer

from cl_plugins.neighbors import full_precision
from cl_plugins.outliers import OutlierSet, VirtualOutliers


class HeadPhase(NamedTuple):
    """Means over the steps of one pass, all device scalars.

    Args:
        loss: cross-entropy plus regularizer.
        id_energy: energy of the samples.
        ood_energy: energy of the outliers.
        id_active: share of samples whose hinge acts.
        ood_active: share of outliers whose hinge acts.
    """

    loss: Tensor
    id_energy: Tensor
    ood_energy: Tensor
    id_active: Tensor
    ood_active: Tensor


class FeatureTap(nn.Module):
    """Keeps what enters a classifier in training mode while ``on`` is set.

    Args:
        head: the classifier; the tap is a forward pre-hook on it.

    Example:
        >>> head = nn.Linear(2, 3)
        >>> tap = FeatureTap(head)
        >>> tap.on = True
        >>> _ = head(torch.ones(4, 2))
        >>> tap.take().shape
        torch.Size([4, 2])
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.on = False
        self._kept: list[Tensor] = []
        self._handle = head.register_forward_pre_hook(self._keep)

    def _keep(self, head: nn.Module, args: tuple[Any, ...]) -> None:
        if self.on and self.training:
            self._kept.append(args[0].detach())

    def take(self) -> Tensor:
        """Features ``(samples, dim)`` since the last call.

        Raises:
            RuntimeError: when the classifier was not called.
        """
        if not self._kept:
            raise RuntimeError("the training step must call the module's classifier, got no call in this batch")
        kept, self._kept = self._kept, []
        return torch.cat(kept)

    def clear(self) -> None:
        """Forget what was kept."""
        self._kept = []

    def remove(self) -> None:
        """Take the hook off the classifier."""
        self._handle.remove()


def outlier_batches(outliers: OutlierSet, n_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and counts of ``n_batches`` equal batches of the repeated outliers, in order; the remainder is left out.

    With fewer outliers than batches each batch gets one, from the first again after the last.
    """
    total = int(outliers.counts.sum()) if len(outliers.counts) else 0
    if total == 0:
        for _ in range(n_batches):
            yield outliers.rows, outliers.counts
        return
    owner = torch.repeat_interleave(outliers.counts.cpu())  # row of each repeated outlier
    size = max(1, total // n_batches)
    for start in range(0, n_batches * size, size):
        batch = owner[torch.arange(start, start + size) % total]
        index, counts = torch.unique_consecutive(batch, return_counts=True)
        yield outliers.rows[index.to(outliers.rows.device)], counts.to(outliers.rows.device)


def _task_logits(head: nn.Module, features: Tensor, columns: Tensor) -> Tensor:
    if isinstance(head, nn.Linear):  # the task's rows alone, in float32 at least
        bias = None if head.bias is None else full_precision(head.bias[columns])
        weight = full_precision(head.weight[columns])
        return linear(features.to(weight.dtype), weight, bias)
    logits: Tensor = head(features)
    return full_precision(logits[:, columns])


def head_step(
    head: nn.Module,
    features: Tensor,
    targets: Tensor,
    columns: Tensor,
    outliers: Tensor,
    counts: Tensor | None,
    optimizer: Optimizer,
    settings: VirtualOutliers,
) -> HeadPhase:
    """One optimizer step on the classifier alone; everything else in the optimizer has no gradient and stays.

    Args:
        head: the classifier.
        features: ``(samples, dim)``.
        targets: position of each sample's label in ``columns`` ``(samples,)``.
        columns: labels of the task ``(classes,)``.
        outliers: ``(outliers, dim)``.
        counts: multiplicity of each outlier; once each when None.
        optimizer: holds the classifier's parameters.
        settings: thresholds and weights.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        id_logits, ood_logits = (_task_logits(head, rows, columns) for rows in (features, outliers))
        terms = settings.loss(id_logits, ood_logits, counts)
        loss = cross_entropy(id_logits, targets) + terms.loss
        # not backward(): hooks of DistributedDataParallel on the parameters must not see this
        gradients = torch.autograd.grad(loss, parameters)
    optimizer.zero_grad(set_to_none=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return HeadPhase(loss.detach(), *terms[1:])


def local_targets(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Position of each label in ``classes`` ``(samples,)``.

    Raises:
        TypeError: for labels that are not a vector of integers.
        ValueError: for a label outside ``classes``.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise TypeError(
            f"labels must be a vector of class indices, got {labels.dtype} of shape {tuple(labels.shape)};"
            " override `targets(batch)` to give them"
        )
    same = labels[:, None] == torch.as_tensor(list(classes), device=labels.device)  # (samples, classes)
    foreign = labels[~same.any(1)]
    if len(foreign):
        raise ValueError(
            f"labels must be classes of the task, {tuple(classes)}, got {sorted(set(foreign.tolist()))[:8]};"
            " the training data hold samples of other tasks"
        )
    return same.int().argmax(1)


def tune_head(
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    classes: Sequence[int],
    optimizer: Optimizer,
    settings: VirtualOutliers,
    generator: torch.Generator,
    *,
    noise: Tensor | None = None,
) -> HeadPhase | None:
    """One pass over the features: fresh outliers, shuffled batches, one step of the classifier per batch.

    Rows of other classes stay bitwise as they are. With several processes, give each the same features (see
    :func:`gather_rows`) and equally seeded generators: they then make the same steps.

    Args:
        head: the classifier.
        features: ``(samples, dim)``.
        labels: class of each sample ``(samples,)``.
        classes: labels of the task.
        optimizer: holds the classifier's parameters; its moments carry on.
        settings: outliers, batch size and loss.
        generator: on the CPU; draws the noise and the order.
        noise: standard normal draws ``(draws, dim)`` in place of the generator's.

    Returns:
        Means over the steps; None when there are no samples.
    """
    if not len(features):
        warnings.warn("no features were collected: the head phase is skipped", stacklevel=2)
        return None
    targets = local_targets(labels, classes)
    columns = torch.as_tensor(list(classes), device=features.device)
    outliers = settings.synthesize(features, len(classes), generator if noise is None else noise)
    order = torch.randperm(len(features), generator=generator).to(features.device)
    batches = torch.split(order, settings.batch_size)
    rows = list(head.parameters()) if isinstance(head, nn.Linear) else []
    before = [p.detach().clone() for p in rows]
    steps = [
        head_step(head, features[index], targets[index], columns, *batch, optimizer, settings)
        for index, batch in zip(batches, outlier_batches(outliers, len(batches)), strict=True)
    ]
    with torch.no_grad():
        for parameter, old in zip(rows, before, strict=True):
            old[columns] = parameter[columns]  # weight decay and old moments move the other rows
            parameter.copy_(old)
    return HeadPhase(*(torch.stack(values).mean() for values in zip(*steps, strict=True)))
