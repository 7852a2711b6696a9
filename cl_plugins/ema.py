"""Averages of a list of tensors whose weight is found at every step: list operations and the averager around them.

Paper, formulas and constants: see :mod:`cl_plugins.ema_rules`. The averager knows neither Lightning nor modules; it
takes names, weights and gradients as lists. Per step and element it does three L1 sums, two differences, one
interpolation and one copy, in a few multi-tensor calls; nothing is read back to the host on an accelerator. It holds
two float32 copies of what it averages (the average and the previous gradient), and nothing else of that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cl_plugins.ema_log import WeightLog
from cl_plugins.ema_rules import Rule, balanced_weight, eq45_weight, eq60_sums, group_ids, guard, make_rule
from cl_plugins.tensor_lists import cast_like, chunks, interpolate_, l1_change_, l1_distances, l1_norms

Start = Literal["before_first_step", "after_first_step"]


@dataclass(frozen=True)
class _Plan:
    """What an update of a fixed selection of tensors can prepare once."""

    parts: list[slice]
    groups: Tensor | None
    n_groups: int
    sizes: list[int]


class BalancedAverager:
    """Averages named tensors; the weight of the new value follows from gradients and weights.

    WHEN: :meth:`join` before the first step, :meth:`update` after every real optimizer step and before gradients are
    zeroed.

    Args:
        rule: a :class:`~cl_plugins.ema_rules.Rule` or the name of one.
        granularity: what shares one weight: ``"tensor"`` (as released), ``"module"`` or ``"global"``.
        start: ``"before_first_step"`` (the paper) or ``"after_first_step"`` (the released code, which loses the old
            weights unless the first learning rate is 0).
        dtype: of averages, previous gradients and sums; None for the parameter's own, in which a bfloat16 average
            stands still.
        max_points: see :class:`~cl_plugins.ema_log.WeightLog`.

    Raises:
        ValueError: for an unknown rule, granularity or start.

    Example:
        >>> weight = torch.zeros(2)
        >>> averager = BalancedAverager("fixed")
        >>> averager.join(["w"], [weight])
        >>> _ = averager.update([weight + 1], [None])
        >>> averager.averages[0]
        tensor([0.0100, 0.0100])
    """

    def __init__(
        self,
        rule: Rule | str = "released",
        granularity: str = "tensor",
        start: Start = "before_first_step",
        dtype: torch.dtype | None = torch.float32,
        max_points: int = 256,
    ) -> None:
        if start not in ("before_first_step", "after_first_step"):
            raise ValueError(f"`start` must be 'before_first_step' or 'after_first_step', got {start!r}")
        group_ids([], granularity)
        self.rule = rule if isinstance(rule, Rule) else make_rule(rule)
        self.granularity = granularity
        self.start = start
        self.dtype = dtype
        self.log = WeightLog(max_points)
        self.total_steps: int | None = None  # of the task, for "horizon" alone
        self.clear()

    def clear(self) -> None:
        """Forget all tensors; the next :meth:`join` begins anew."""
        self.names: list[str] = []
        self.averages: list[Tensor] = []
        self.previous: list[Tensor] = []  # gradients of the step before
        self.last_weights: list[Tensor] = []  # for "eq60" alone
        self.steps: list[int] = []
        self._has_previous: list[bool] = []
        self._residual: list[Tensor] = []  # 0-dim, |theta - E| after the last update
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._kappa: tuple[Any, Tensor] | None = None
        self.log.clear()

    @torch.no_grad()
    def join(self, names: Sequence[str], weights: Sequence[Tensor]) -> None:
        """Begin averages of further tensors at their current values."""
        repeated = set(names) & set(self.names)
        if repeated or len(set(names)) != len(names):
            raise ValueError(f"`names` must be new and distinct, got {sorted(repeated)[:4] or list(names)[:4]!r}")
        for name, weight in zip(names, weights, strict=True):
            value = weight.detach()
            self.names.append(name)
            self.averages.append(value.to(self.dtype or value.dtype, copy=True))
            if self.rule.needs_gradients:
                self.previous.append(torch.zeros_like(self.averages[-1]))
            if self.rule.name == "eq60":
                self.last_weights.append(self.averages[-1].clone())
            self.steps.append(0)
            self._has_previous.append(False)
            self._residual.append(torch.zeros((), device=value.device))
        self._plans.clear()

    def _plan(self, chosen: tuple[int, ...]) -> _Plan:
        plan = self._plans.get(chosen)
        if plan is None:
            sizes = [self.averages[i].numel() for i in chosen]
            ids = group_ids([self.names[i] for i in chosen], self.granularity)
            groups = None
            if self.granularity != "tensor":
                groups = torch.tensor(ids, device=self.averages[chosen[0]].device)
            plan = _Plan(list(chunks([self.averages[i] for i in chosen])), groups, max(ids) + 1, sizes)
            self._plans[chosen] = plan
        return plan

    @torch.no_grad()
    def update(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        chosen: Sequence[int] | None = None,
        lrs: Sequence[float] | None = None,
    ) -> Tensor:
        """Move the averages toward the weights after a step.

        Args:
            weights: after the step, in the order of ``names`` (or of ``chosen``).
            grads: that the step used; None for a tensor without one, which falls back now and at its next update.
            chosen: indices of the tensors that this optimizer stepped; all by default.
            lrs: learning rate of each tensor, for ``dimension_free``.

        Returns:
            alpha ``(tensors,)``, the weight of the new value.
        """
        index = tuple(range(len(self.names))) if chosen is None else tuple(chosen)
        if not index:
            return torch.empty(0)
        if not len(weights) == len(grads) == len(index):
            raise ValueError(
                f"`weights` and `grads` must hold {len(index)} tensors, got {len(weights)} and {len(grads)}"
            )
        averages = [self.averages[i] for i in index]
        if self.start == "after_first_step":
            fresh = [k for k, i in enumerate(index) if self.steps[i] == 0]
            if fresh:
                torch._foreach_copy_([averages[k] for k in fresh], [weights[k] for k in fresh])
        if self.rule.needs_gradients:
            alpha = self._weigh(index, averages, weights, grads, lrs)
            self._move(index, averages, weights, alpha)
        else:
            constant = self.rule.constant(self.total_steps)
            alpha = torch.full((len(index),), constant, device=averages[0].device)
            self._move(index, averages, weights, constant)
            self.log.add(alpha, torch.zeros_like(alpha, dtype=torch.bool))
        for i in index:
            self.steps[i] += 1
        return alpha

    def _move(
        self, index: tuple[int, ...], averages: list[Tensor], weights: Sequence[Tensor], alpha: Tensor | float
    ) -> None:
        for part in self._plan(index).parts:
            sources, share = cast_like(weights[part], averages[part]), alpha
            if isinstance(alpha, Tensor):
                share = alpha[part]
                if self.rule.on_nonfinite == "skip":  # 0 * NaN would still reach the average
                    sources = [
                        torch.where(a > 0, s, e)
                        for a, s, e in zip(share.to(sources[0].device), sources, averages[part], strict=True)
                    ]
            interpolate_(averages[part], sources, share)

    def _weigh(
        self,
        index: tuple[int, ...],
        averages: list[Tensor],
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        lrs: Sequence[float] | None,
    ) -> Tensor:
        rule, plan, home, kind = self.rule, self._plan(index), averages[0].device, self.dtype or averages[0].dtype
        usable = [g is not None and self._has_previous[i] for i, g in zip(index, grads, strict=True)]
        a = torch.cat([self._distance(weights[part], averages[part], home, kind) for part in plan.parts])
        b, c, plus_one = (torch.zeros(len(index), device=home, dtype=kind) for _ in range(3))
        quotient = None
        if rule.name == "eq60":
            quotient = self._eq60(index, averages, weights, grads, usable, home)
        for part in plan.parts:
            ks = [k for k in range(part.start, part.stop) if grads[k] is not None]
            if not ks:
                continue
            new = [g.to_dense() if g.is_sparse else g for g in (grads[k] for k in ks) if g is not None]
            old = [self.previous[index[k]] for k in ks]
            at = slice(ks[0], ks[-1] + 1) if len(ks) == ks[-1] + 1 - ks[0] else torch.tensor(ks, device=home)
            new = cast_like(new, old)
            b[at] = l1_norms(new, home, kind)
            if rule.name == "eq45_elementwise":
                plus_one[at] = l1_norms(torch._foreach_add(new, rule.mu), home, kind)
            c[at] = l1_change_(old, new, home, kind)
        for k, i in enumerate(index):
            self._has_previous[i] = grads[k] is not None
        r = torch.stack([self._residual[i].to(home, kind) for i in index]) if rule.name.startswith("eq45") else a
        columns = torch.stack([a, b, c, plus_one, r])
        if plan.groups is not None:
            columns = columns.new_zeros(5, plan.n_groups).index_add_(1, plan.groups, columns)
        raw = self._formula(columns, quotient, plan, lrs, home)
        raw = raw if plan.groups is None else raw[plan.groups]
        if not all(usable):
            raw = torch.where(torch.tensor(usable, device=home), raw, torch.nan)
        alpha, replaced = guard(raw.float(), rule.fallback, rule.on_overflow)
        if rule.on_nonfinite == "skip":
            alpha = torch.where(torch.isfinite(a) & torch.isfinite(b), alpha, 0.0)
        self.log.add(alpha, replaced)
        if rule.name.startswith("eq45"):
            for i, left in zip(index, ((1 - alpha) * a).unbind(), strict=True):
                self._residual[i] = left
        return alpha

    @staticmethod
    def _distance(
        weights: Sequence[Tensor], averages: Sequence[Tensor], home: torch.device, dtype: torch.dtype
    ) -> Tensor:
        return l1_distances(cast_like(weights, averages), averages, home, dtype)

    def _formula(
        self, columns: Tensor, quotient: Tensor | None, plan: _Plan, lrs: Sequence[float] | None, home: torch.device
    ) -> Tensor:
        a, b, c, plus_one, r = columns.unbind()
        if quotient is not None:
            if plan.groups is not None:
                quotient = quotient.new_zeros(2, plan.n_groups).index_add_(1, plan.groups, quotient)
            return 1 - quotient[0] / quotient[1]
        if self.rule.name == "eq45":
            return eq45_weight(r, a, self.rule.mu + b, c)
        if self.rule.name == "eq45_elementwise":
            return eq45_weight(r, a, plus_one, c)
        kappa: float | Tensor = self.rule.kappa
        if self.rule.name == "dimension_free":
            if lrs is None:
                raise ValueError("`lrs` must hold a learning rate per tensor for rule 'dimension_free', got None")
            key = (tuple(lrs), id(plan))
            if self._kappa is None or self._kappa[0] != key:
                speeds = [self.rule.rho * lr * n for lr, n in zip(lrs, plan.sizes, strict=True)]
                vector = torch.tensor(speeds, device=home)
                if plan.groups is not None:
                    vector = vector.new_zeros(plan.n_groups).index_add_(0, plan.groups, vector)
                self._kappa = (key, vector)
            kappa = self._kappa[1]
        return balanced_weight(a, b, c, kappa, self.rule.mu)

    def _eq60(
        self,
        index: tuple[int, ...],
        averages: list[Tensor],
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        usable: list[bool],
        home: torch.device,
    ) -> Tensor:
        sums = []
        for k, i in enumerate(index):
            weight, grad = weights[k].to(averages[k].dtype), grads[k]
            pair = (torch.zeros((), device=home), torch.zeros((), device=home))
            if usable[k] and grad is not None:
                last = self.last_weights[i]
                pair = eq60_sums(weight, averages[k], last, grad.to(weight.dtype), self.previous[i], self.rule.mu)
            self.last_weights[i].copy_(weight)
            sums.append(torch.stack(pair).to(home))
        return torch.stack(sums, dim=1)

    @torch.no_grad()
    def copy_to(self, weights: Sequence[Tensor]) -> None:
        """Write the averages into ``weights``, in the order of ``names``, in the weights' own dtype."""
        if len(weights) != len(self.averages):
            raise ValueError(f"`weights` must hold {len(self.averages)} tensors, got {len(weights)}")
        if weights:
            torch._foreach_copy_(list(weights), self.averages)

    def state_bytes(self) -> int:
        """Bytes of all tensors that are as large as the weights."""
        return sum(t.numel() * t.element_size() for t in [*self.averages, *self.previous, *self.last_weights])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; the tensors are those of the averager, not copies."""
        return {
            "names": list(self.names),
            "averages": list(self.averages),
            "previous": list(self.previous),
            "last_weights": list(self.last_weights),
            "steps": list(self.steps),
            "has_previous": list(self._has_previous),
            "residual": torch.stack([r.cpu() for r in self._residual]) if self.names else torch.empty(0),
            "log": self.log.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], weights: Sequence[Tensor]) -> None:
        """Continue from a saved state; ``weights`` (those of the saved names, in order) give devices and shapes.

        Raises:
            ValueError: when a shape differs or the state lacks what this rule needs.
        """
        for name, saved, weight in zip(state["names"], state["averages"], weights, strict=True):
            if saved.shape != weight.shape:
                raise ValueError(
                    f"the saved average of {name!r} must have the weight's shape {tuple(weight.shape)},"
                    f" got {tuple(saved.shape)}"
                )
        self.clear()
        self.join(state["names"], weights)
        if len(state["previous"]) != len(self.previous) or len(state["last_weights"]) != len(self.last_weights):
            raise ValueError(f"the saved state must be one of rule {self.rule.name!r}; build the averager as before")
        for mine, saved in (
            (self.averages, state["averages"]),
            (self.previous, state["previous"]),
            (self.last_weights, state["last_weights"]),
        ):
            if mine:
                torch._foreach_copy_(mine, list(saved))
        self.steps, self._has_previous = list(state["steps"]), list(state["has_previous"])
        self._residual = [r.to(w.device) for r, w in zip(state["residual"], weights, strict=True)]
        self.log.load_state_dict(state["log"])
