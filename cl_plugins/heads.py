"""The classifier: finding it, showing it only the classes that count, and keeping old rows as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cl_plugins._text import did_you_mean
from cl_plugins.attach import plugin_modules
from cl_plugins.backbones import Backbone

HIDDEN_LOGIT = -1e4
"""Stands for minus infinity: its softmax is exactly 0 in every dtype, and label smoothing stays finite."""


def find_head(module: nn.Module, backbone: Backbone | None = None, name: str | None = None) -> tuple[str, nn.Linear]:
    """The linear classifier whose input is the feature.

    Looks at timm's ``get_classifier()``, then for the one ``nn.Linear`` outside the backbone.

    Args:
        module: the user's module.
        backbone: its transformer, as :func:`cl_plugins.backbones.find_backbone` returns it, when there is one.
        name: dotted path of the classifier, for modules where it cannot be told.

    Returns:
        Its dotted path and the layer.

    Raises:
        ValueError: when there is none, or several and ``name`` does not choose.
    """
    layers = {path: m for path, m in module.named_modules() if not path.startswith("plugins.")}
    if name is not None:
        if name not in layers:
            raise ValueError(f"`head` must be a submodule's name, got {name!r}{did_you_mean(name, layers)}")
        chosen = layers[name]
        if not isinstance(chosen, nn.Linear):
            raise ValueError(f"`head` must be an nn.Linear, got {name!r}, a {type(chosen).__name__}")
        return name, chosen
    get_classifier: Any = None if backbone is None else getattr(backbone.model, "get_classifier", None)
    if callable(get_classifier):
        classifier = get_classifier()
        if isinstance(classifier, nn.Linear):
            return next(path for path, m in layers.items() if m is classifier), classifier
    inside = set() if backbone is None else {id(m) for m in backbone.model.modules()}
    linear = {p: m for p, m in layers.items() if isinstance(m, nn.Linear) and id(m) not in inside}
    if len(linear) == 1:
        return next(iter(linear.items()))
    where = "outside the backbone" if backbone is not None else "in it"
    found = f"{len(linear)} linear layers {where}: {', '.join(linear)}" if linear else f"no linear layer {where}"
    raise ValueError(
        f"`{type(module).__name__}` must have one classifier, found {found}; pass `head=` with the classifier's name"
    )


class HeadMask(nn.Module):
    """Hides logits: in training those outside the current task, in evaluation those of classes not seen yet.

    Cross-entropy on the masked logits equals cross-entropy on the task's columns alone, in value and gradient, so rows
    of other classes get gradient zero. Before the first :meth:`start` nothing is hidden.

    Args:
        head: the classifier; the mask is a forward hook on it.

    Example:
        >>> head = nn.Linear(2, 3)
        >>> mask = HeadMask(head)
        >>> mask.start([0, 2])
        >>> (head(torch.zeros(1, 2)) == HIDDEN_LOGIT).tolist()
        [[False, True, False]]
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        n = head.out_features
        self.hidden_in_training: Tensor
        self.hidden_in_evaluation: Tensor
        self.register_buffer("hidden_in_training", torch.zeros(n, dtype=torch.bool, device=head.weight.device))
        self.register_buffer("hidden_in_evaluation", torch.zeros(n, dtype=torch.bool, device=head.weight.device))
        self.started: Tensor  # once all classes are seen, the masks alone could not tell
        self.register_buffer("started", torch.zeros((), dtype=torch.bool, device=head.weight.device))
        self._handle = head.register_forward_hook(self._mask)

    def start(self, classes: Sequence[int]) -> None:
        """Make ``classes`` the current task and add them to the seen ones; a repeated call changes nothing.

        Raises:
            ValueError: for a label that the head has no row for.
        """
        n = len(self.hidden_in_training)
        outside = [c for c in classes if not 0 <= c < n]
        if outside:
            raise ValueError(
                f"`classes` must be rows of the head, 0 to {n - 1}, got {outside[:8]!r};"
                f" build the model with at least {max(classes) + 1} outputs"
            )
        index = torch.as_tensor(list(classes), device=self.hidden_in_training.device)
        if not self.started:
            self.hidden_in_evaluation.fill_(True)
            self.started.fill_(True)
        self.hidden_in_training.fill_(True)
        self.hidden_in_training[index] = False
        self.hidden_in_evaluation[index] = False

    def seen(self) -> list[int]:
        """Labels of all tasks that were started, ascending."""
        return (~self.hidden_in_evaluation).nonzero()[:, 0].tolist() if self.started else []

    def _mask(self, head: nn.Module, args: Any, logits: Tensor) -> Tensor:
        hidden = self.hidden_in_training if self.training else self.hidden_in_evaluation
        return logits.masked_fill(hidden, HIDDEN_LOGIT)

    def remove(self) -> None:
        """Take the hook off the head."""
        self._handle.remove()


def head_mask(module: nn.Module, head: nn.Linear) -> HeadMask:
    """The one mask of ``head`` under ``module.plugins``; several callbacks of a Trainer share it."""
    plugins = plugin_modules(module)
    if "head_mask" not in plugins:
        plugins["head_mask"] = HeadMask(head)
    mask = plugins["head_mask"]
    assert isinstance(mask, HeadMask)
    return mask


def protect_rows(head: nn.Linear, rows: Sequence[int], optimizer: torch.optim.Optimizer) -> RemovableHandle | None:
    """Keep ``rows`` of the head bitwise as they are, whatever weight decay or momentum does to them.

    Args:
        head: the classifier.
        rows: labels to protect.
        optimizer: the one that steps the head; the rows are written back after each of its steps.

    Returns:
        A handle whose ``remove()`` ends the protection; None when no row is given or the optimizer has nothing that
        could move a row without gradient (no weight decay).
    """
    parameters = [p for p in (head.weight, head.bias) if p is not None]
    decayed = any(
        group.get("weight_decay", 0.0) != 0.0 and any(p is q for p in group["params"] for q in parameters)
        for group in optimizer.param_groups
    )
    if not rows or not decayed:
        return None
    index = torch.as_tensor(list(rows), device=head.weight.device)
    saved = [p.detach()[index].clone() for p in parameters]

    def restore(*_: Any) -> None:
        with torch.no_grad():
            for parameter, values in zip(parameters, saved, strict=True):
                parameter.index_copy_(0, index, values)

    return optimizer.register_step_post_hook(restore)
