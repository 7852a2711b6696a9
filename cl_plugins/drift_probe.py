"""One pass over a probe set: the classifier's input, confidence and correctness, in the order of the data set.

With several processes each reads its share of the stream's test loaders, and all end up with all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl_plugins._processes import gather_rows
from cl_plugins.backbones import find_backbone
from cl_plugins.evaluation import Predict, evaluating, evaluation_tasks, forward_setting, split_batch
from cl_plugins.heads import find_head

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.task import Stream

_MOST_TASKS = 20


def probe_batches(
    stream: Stream, probe: int | Sequence[Any], rank: int, world: int
) -> Iterator[tuple[int, int, Iterable[Any]]]:
    """Task, most samples of this process, and batches of each part of a probe set.

    Args:
        stream: whose test samples are read.
        probe: number of samples over all its tasks (over 20 of them where there are more), the first ones of each; or
            batches of the user, as task -1.
        rank: number of this process.
        world: processes that share the loaders; 1 for batches of the user.
    """
    if not isinstance(probe, int):
        yield -1, 1 << 62, probe
        return
    tasks = list(evaluation_tasks(stream))
    if len(tasks) > _MOST_TASKS:
        places = torch.linspace(0, len(tasks) - 1, _MOST_TASKS).round().long().tolist()
        tasks = [tasks[k] for k in places]
    for task in tasks:
        wanted = range(rank, -(-probe // len(tasks)), world)  # as the loaders split the samples
        yield task.index, len(wanted), stream.test_loader(task.index)


def probe_head(module: nn.Module, name: str | None) -> tuple[nn.Module | None, str]:
    """The classifier whose input is the feature, or None and the reason; by its dotted path where it is given.

    Raises:
        ValueError: for a path that leads to none.
    """
    if name is not None:
        return find_head(module, None, name)[1], ""
    try:
        return find_head(module, find_backbone(module))[1], ""
    except ValueError as error:
        return None, f"no feature to read: {error}"


def read_probe(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    stream: Stream,
    probe: int | Sequence[Any],
    predict: Predict,
    seen: Tensor,
    head: str | None,
) -> tuple[Tensor | None, dict[int, Tensor], str]:
    """Run the module over a probe set, in its evaluation mode and precision.

    Args:
        trainer: of the run.
        module: its module.
        stream: of :func:`probe_batches`.
        probe: likewise.
        predict: gives logits of a batch.
        seen: which classes may be named ``(classes,)`` bool.
        head: of :func:`probe_head`.

    Returns:
        Features ``(samples, dim)`` float32 on the CPU, or None; confidence and correctness ``(samples, 2)`` of each
        task, empty where labels are no classes; and why there are no features.
    """
    device, precision, move = forward_setting(module, trainer)
    shared = trainer.world_size > 1 and torch.distributed.is_initialized()
    world = trainer.world_size if shared and isinstance(probe, int) else 1
    taken: list[Tensor] = []
    layer, reason = probe_head(module, head)
    handle = layer.register_forward_pre_hook(_keep(taken)) if layer is not None else None
    features: list[Tensor] = []
    judged: dict[int, Tensor] = {}
    try:
        with evaluating(module), precision:
            for task, most, batches in probe_batches(stream, probe, trainer.global_rank if world > 1 else 0, world):
                table, found, why = _read(module, batches, most, move, predict, seen.to(device), taken)
                reason = reason or why
                if world > 1:
                    table, found = (gather_rows(part.to(device), dealt=True).cpu() for part in (table, found))
                judged[task] = table
                features.append(found)
    finally:
        if handle is not None:
            handle.remove()
    if not reason and sum(map(len, features)) < 2:
        reason = "fewer than 2 samples in the probe set"
    return (None if reason else torch.cat(features)), judged, reason


def _keep(taken: list[Tensor]) -> Callable[..., None]:
    """A hook that keeps the classifier's input."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        taken.append(args[0].detach())

    return hook


def _read(
    module: nn.Module,
    batches: Iterable[Any],
    most: int,
    move: Callable[[Any], Any],
    predict: Predict,
    seen: Tensor,
    taken: list[Tensor],
) -> tuple[Tensor, Tensor, str]:
    """Confidence and correctness ``(samples, 2)`` and features of the first ``most`` samples, on the CPU."""
    judged, features, reason, count = [torch.zeros(0, 2)], [], "", 0
    for raw in batches:
        if count >= most:
            break
        batch = move(raw)
        taken.clear()
        logits = predict(module, batch)[:, : len(seen)].float()
        labels = split_batch(batch)[1]
        if len(taken) == 1 and taken[0].ndim == 2 and len(taken[0]) == len(labels):
            features.append(taken[0][: most - count].float().cpu())
        else:
            reason = reason or f"the classifier must run once per batch on one vector per sample, it ran {len(taken)} x"
        if labels.ndim == 1:
            share, named = logits.masked_fill(~seen[: logits.shape[1]], -torch.inf).softmax(1).max(1)
            judged.append(torch.stack([share, (named == labels).float()], 1)[: most - count].cpu())
        count += len(labels)
    return torch.cat(judged), torch.cat(features) if features else torch.zeros(0, 0), reason
