"""Which callbacks may stand beside each other: what cannot work is refused before anything is trained.

Each method says with :attr:`~cl_plugins.plugin.ContinualCallback.feature` what it does to the feature in front of the
classifier, and with :meth:`~cl_plugins.plugin.ContinualCallback.conflict` what only it can know. The order of the
callbacks is of no matter. ``docs/composition.md`` has every pair of the library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from cl_plugins.plugin import ContinualCallback

_MEANING = {
    "frozen": "trains the classifier alone on a frozen backbone",
    "adapted": "trains weights inside the backbone",
    "side": "replaces the frozen backbone's feature by that of a side network",
}
_EXCLUSIVE = {
    ("frozen", "adapted"): "the adapters freeze the backbone themselves, and the classifier trains with them",
    ("frozen", "side"): "side networks freeze the backbone themselves, and the classifier trains with them",
    ("adapted", "side"): "what is trained inside the backbone would get no gradient past the side network",
    ("side", "side"): "the classifier has one input",
}


def _reason(a: ContinualCallback, b: ContinualCallback, module: nn.Module) -> str | None:
    """Why two callbacks cannot stand beside each other; None when they can."""
    if type(a) is type(b) and a.training != "neutral":
        return "two of one kind would own the same modules"
    if a.training == b.training == "none":
        return "both compute the classifier"
    for first, second in ((a, b), (b, a)):
        why = _EXCLUSIVE.get((first.feature, second.feature))
        if why is not None:
            return (
                f"{type(first).__name__} {_MEANING[first.feature]}, {type(second).__name__} {_MEANING[second.feature]};"
                f" {why}"
            )
        why = first.conflict(second, module)
        if why is not None:
            return why
    return None


def check_composition(plugins: Sequence[ContinualCallback], module: nn.Module) -> None:
    """Refuse callbacks that cannot work beside each other, in whatever order they are given.

    Args:
        plugins: the continual-learning callbacks of a Trainer.
        module: the user's module, before or after anything was attached to it; it is not changed.

    Raises:
        ValueError: naming the pair and the reason.

    Example:
        >>> from cl_plugins.backbones import vit_glyph
        >>> from cl_plugins.callbacks import LadderSideTuning, LoRA
        >>> check_composition([LoRA(), LadderSideTuning()], vit_glyph(num_classes=2))
        Traceback (most recent call last):
        ...
        ValueError: `callbacks` must not hold LadderSideTuning beside LoRA: LoRA trains weights inside the backbone, \
LadderSideTuning replaces the frozen backbone's feature by that of a side network; what is trained inside the backbone \
would get no gradient past the side network; leave one of the two out
    """
    for a, b in combinations(sorted(plugins, key=lambda p: type(p).__name__), 2):
        why = _reason(a, b, module)
        if why is not None:
            raise ValueError(
                f"`callbacks` must not hold {type(a).__name__} beside {type(b).__name__}: {why}; leave one of the two"
                " out"
            )
    idle = [type(p).__name__ for p in plugins if p.needs_steps]
    computed = [type(p).__name__ for p in plugins if p.training == "none"]
    if idle and computed and all(p.training != "required" for p in plugins):
        raise ValueError(
            f"`callbacks` must hold a method that trains beside {idle[0]}, got {computed[0]}, which computes its"
            f" classifier without a training step; leave {idle[0]} out, or add a method such as LoRA"
        )
