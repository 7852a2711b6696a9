"""How much of the new weights enters an average at a step: pure functions of a few sums, and named constants.

Paper: "Large Continual Instruction Assistant", Jingyang Qiao, Zhizhong Zhang, Xin Tan, Yanyun Qu, Shouhong Ding, Yuan
Xie, ICML 2025, arXiv 2410.10868. Implemented: the released rule, the paper's Eq. 45 in both readings of ``g + 1``,
Eq. 60 with the secant of Eq. 13, the constants of the authors' later toolbox, a fixed decay, and two extensions:
one whose speed does not depend on the number of elements, one that depends on neither elements nor steps. Not
implemented: Eq. 14, which the paper itself replaces by Eq. 45.

    a = |theta_t - E_{t-1}|_1    b = |g_t|_1    c = |g_t - g_{t-1}|_1    r = |theta_{t-1} - E_{t-1}|_1
    released:        alpha = kappa (mu + b) / (a c)                      kappa = 2, mu = 1
    dimension_free:  the same with kappa = rho * learning rate * elements
    eq45:            alpha = r (mu + b) / (a c)
    eq60:            alpha = 1 - (g_t + mu)'d / (d' H d),   d = theta_t - E_{t-1}
                     H = (g_t - g_{t-1}) / (theta_t - theta_{t-1}), element by element
    horizon:         alpha = 1 - keep^(1 / steps of the task), so the old weights' share is `keep` when the task ends
    every rule:      alpha outside (0, 1), NaN included, becomes `fallback`;  E_t = (1 - alpha) E_{t-1} + alpha theta_t
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cl_plugins._text import did_you_mean

Overflow = Literal["fallback", "follow"]


@dataclass(frozen=True)
class Rule:
    """One way to weigh the new weights; :func:`make_rule` gives the named ones.

    Args:
        name: a key of :data:`RULES`.
        kappa: L1 distance scale of the released rule, > 0; 2 belongs to tensors of about a million elements.
        fallback: weight of the new value wherever the formula gives none, in (0, 1]; 0.01 in the released code.
        mu: price of stability in the units of a gradient, >= 0; 1 in the paper, 0 makes the rule blind to loss scale.
        decay: weight of the old value for ``fixed``, in [0, 1).
        rho: speed of the average as a fraction of one Adam step for ``dimension_free``, > 0.
        keep: share of the weights before the task in the average at its end, for ``horizon``, in (0, 1).
        on_overflow: what a finite alpha of 1 or more means: ``"fallback"`` as released, or ``"follow"`` for alpha = 1.
        on_nonfinite: what NaN or infinity in weights or gradient means: ``"fallback"`` as released, or ``"skip"`` the
            tensor.

    Raises:
        ValueError: for a value out of range.
    """

    name: str
    kappa: float = 2.0
    fallback: float = 0.01
    mu: float = 1.0
    decay: float = 0.99
    rho: float = 0.02
    keep: float = 0.5
    on_overflow: Overflow = "fallback"
    on_nonfinite: Literal["fallback", "skip"] = "fallback"

    def __post_init__(self) -> None:
        for field, low_open, high, high_open in (
            ("kappa", True, float("inf"), True),
            ("rho", True, float("inf"), True),
            ("mu", False, float("inf"), True),
            ("fallback", True, 1.0, False),
            ("decay", False, 1.0, True),
            ("keep", True, 1.0, True),
        ):
            value = getattr(self, field)
            low_ok = value > 0 if low_open else value >= 0
            high_ok = value < high if high_open else value <= high
            if not (low_ok and high_ok):
                interval = f"{'(' if low_open else '['}0, {high}{')' if high_open else ']'}"
                raise ValueError(f"`{field}` must be in {interval}, got {value!r}")
        if self.on_overflow not in ("fallback", "follow"):
            raise ValueError(f"`on_overflow` must be 'fallback' or 'follow', got {self.on_overflow!r}")
        if self.on_nonfinite not in ("fallback", "skip"):
            raise ValueError(f"`on_nonfinite` must be 'fallback' or 'skip', got {self.on_nonfinite!r}")

    @property
    def needs_gradients(self) -> bool:
        """Whether the weight depends on gradients at all."""
        return self.name not in ("fixed", "horizon")

    def constant(self, steps: int | None) -> float:
        """The weight of rules that need no gradients.

        Raises:
            ValueError: for ``horizon`` without the number of steps.
        """
        if self.name == "fixed":
            return 1.0 - self.decay
        if steps is None or steps < 1:
            raise ValueError(
                f"`steps` must be the number of steps of the task for rule 'horizon', got {steps!r};"
                " set the Trainer's `max_epochs`, give `steps` to `watch`, or choose rule 'fixed' or 'released'"
            )
        return float(1.0 - self.keep ** (1.0 / steps))


RULES: dict[str, Rule] = {
    "released": Rule("released"),
    "toolbox": Rule("toolbox", kappa=0.01, fallback=0.001),
    "eq45": Rule("eq45"),
    "eq45_elementwise": Rule("eq45_elementwise"),
    "eq60": Rule("eq60"),
    "fixed": Rule("fixed"),
    "horizon": Rule("horizon"),
    "dimension_free": Rule("dimension_free", on_overflow="follow"),
}


_GUARDED = ("mu", "fallback", "on_overflow", "on_nonfinite")
_READS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(RULES, _GUARDED),
    "released": ("kappa", *_GUARDED),
    "toolbox": ("kappa", *_GUARDED),
    "dimension_free": ("rho", *_GUARDED),
    "fixed": ("decay",),
    "horizon": ("keep",),
}
"""The constants that each rule reads."""


def make_rule(name: str = "released", **changes: Any) -> Rule:
    """A named rule with some constants changed; a change that is None keeps the rule's own constant.

    Raises:
        ValueError: for an unknown name, a value out of range, or a constant that the rule does not read.

    Example:
        >>> make_rule("toolbox").fallback
        0.001
        >>> make_rule("released", kappa=0.5, fallback=None).kappa
        0.5
    """
    if name not in RULES:
        raise ValueError(f"`rule` must be one of {', '.join(RULES)}, got {name!r}{did_you_mean(str(name), RULES)}")
    given = {k: v for k, v in changes.items() if v is not None}
    for constant in given:
        if constant not in _READS[name]:
            raise ValueError(f"`{constant}` must be left out for rule {name!r}, which reads {', '.join(_READS[name])}")
    return replace(RULES[name], **given)


def balanced_weight(
    distance: Tensor, gradient: Tensor, change: Tensor, kappa: float | Tensor, mu: float = 1.0
) -> Tensor:
    """The released formula, before the guard.

    Args:
        distance: a ``(tensors,)``, L1 norm of weights minus average.
        gradient: b ``(tensors,)``, L1 norm of the gradient.
        change: c ``(tensors,)``, L1 norm of the gradient's change since the previous step.
        kappa: one number, or one per tensor.
        mu: the price of stability.

    Returns:
        alpha ``(tensors,)``; may be NaN, infinite or above 1.

    Example:
        >>> balanced_weight(torch.tensor([8.0]), torch.tensor([1.0]), torch.tensor([5.0]), kappa=2.0)
        tensor([0.1000])
    """
    return kappa * (mu + gradient) / (distance * change)


def eq45_weight(residual: Tensor, distance: Tensor, gradient: Tensor, change: Tensor) -> Tensor:
    """Eq. 45 before the guard; ``gradient`` is already ``mu + |g|`` or the elementwise ``|g + mu|``.

    ``residual`` is the distance that the last step left, |theta_{t-1} - E_{t-1}|, so it needs no copy of theta_{t-1}.
    """
    return residual * gradient / (distance * change)


def eq60_sums(
    weight: Tensor, average: Tensor, last_weight: Tensor, grad: Tensor, last_grad: Tensor, mu: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of Eq. 60 with the secant Hessian, 0-dim; alpha = 1 - numerator / denominator.

    An element that did not move tells nothing about its curvature, which counts as 0 there.
    """
    offset, moved = weight - average, weight - last_weight
    hessian = torch.where(moved == 0, 0.0, (grad - last_grad) / moved)
    return ((grad + mu) * offset).sum(), (offset * hessian * offset).sum()


def guard(alpha: Tensor, fallback: float, on_overflow: Overflow = "fallback") -> tuple[Tensor, Tensor]:
    """Replace every alpha outside (0, 1), NaN included.

    It is a replacement and no clamp: 1.7 becomes ``fallback``, not 1, unless ``on_overflow`` is ``"follow"``.

    Returns:
        The weights ``(tensors,)`` and which of them were replaced, bool ``(tensors,)``.

    Example:
        >>> guard(torch.tensor([0.5, 1.0, 1.7, float("nan")]), 0.01)
        (tensor([0.5000, 0.0100, 0.0100, 0.0100]), tensor([False,  True,  True,  True]))
        >>> guard(torch.tensor([1.7]), 0.01, "follow")[0]
        tensor([1.])
    """
    inside = (alpha > 0) & (alpha < 1)
    guarded = torch.where(inside, alpha, fallback)
    if on_overflow == "follow":
        over = (alpha >= 1) & torch.isfinite(alpha)
        return torch.where(over, 1.0, guarded), ~(inside | over)
    return guarded, ~inside


def group_ids(names: Sequence[str], granularity: str) -> list[int]:
    """Which tensors share one weight.

    Args:
        names: dotted parameter names.
        granularity: ``"tensor"`` (one weight per tensor, as released), ``"module"`` (the tensors of one layer
            together, both LoRA factors included) or ``"global"``.

    Returns:
        A group number per name, from 0.

    Raises:
        ValueError: for another granularity.

    Example:
        >>> group_ids(["a.weight", "a.bias", "b.lora_A.weight", "b.lora_B.weight"], "module")
        [0, 0, 1, 1]
    """
    if granularity == "tensor":
        return list(range(len(names)))
    if granularity == "global":
        return [0] * len(names)
    if granularity != "module":
        raise ValueError(f"`granularity` must be 'tensor', 'module' or 'global', got {granularity!r}")
    known: dict[str, int] = {}
    owners = [n.split(".lora_")[0] if ".lora_" in n else n.rpartition(".")[0] for n in names]
    return [known.setdefault(owner, len(known)) for owner in owners]
