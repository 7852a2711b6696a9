"""Routing over rank-1 experts and the closed-form backward of the routed sum.

Symbols, per token, as in arXiv 2506.21035 (MoRA, in later versions MoRAM)::

    z_i = A_i . x,   s_i = z_i / max(|z|, eps),   S = the k largest s_i                    A = `keys`, B = `values`
    w_i = softmax_S(s_i / temperature) * [s_i >= threshold],   delta = scaling * sum_{i in S} w_i z_i B_i
    h_i = B_i . g,   q_i = scaling z_i h_i [w_i > 0],   e_i = p_i / temperature (q_i - sum_S p_j q_j)
                                                                                            p: w before the mask
    dL/dz_j = scaling w_j h_j + (e_j - s_j sum_S s_i e_i) / |z|   for every j, selected or not
    dL/dA_j = dL/dz_j x,   dL/dB_j = scaling w_j z_j g,   dL/dx = sum_j dL/dz_j A_j

Saved for backward: x, z, the selected indices and their weights; the rest is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ScoreNorm = Literal["bank_l2", "cosine", "none"]
EPS = 1e-12
"""Smallest norm that is divided by; routing is float32 or wider, where it does not underflow."""


@dataclass(frozen=True)
class Routing:
    """How tokens choose experts.

    Args:
        top_k: experts per token, already within the size of the bank.
        temperature: of the softmax over the chosen scores.
        threshold: scores below it get weight 0; 0 for none.
        scaling: factor of the sum.
        score_norm: "bank_l2" divides responses by their norm over the bank, "cosine" by the norms of key and token,
            "none" leaves them.
    """

    top_k: int
    temperature: float
    threshold: float = 0.0
    scaling: float = 1.0
    score_norm: ScoreNorm = "bank_l2"


def _norm(t: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=dtype)
    return norm.clamp_min(EPS)


def responses(x: Tensor, keys: Tensor) -> Tensor:
    """``z``: dot products ``(tokens, groups, experts)`` of ``(tokens, dim)`` and ``(groups, experts, dim)``."""
    groups, experts, dim = keys.shape
    return (x @ keys.reshape(groups * experts, dim).T).view(len(x), groups, experts)


def _divisor(z: Tensor, x: Tensor, keys: Tensor, norm: ScoreNorm, dtype: torch.dtype) -> Tensor | None:
    """What responses are divided by: ``(tokens, groups, 1 or experts)``; None for nothing."""
    if norm == "bank_l2":
        return _norm(z, dtype)
    if norm == "cosine":
        return _norm(x, dtype).unsqueeze(1) * _norm(keys, dtype).squeeze(-1)
    return None


def route(
    z: Tensor, x: Tensor, keys: Tensor, routing: Routing, *, ordered: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts, in float32 or wider whatever the dtype of ``z``.

    Args:
        z: responses ``(tokens, groups, experts)``.
        x: tokens ``(tokens, dim)``; used by the "cosine" norm alone.
        keys: ``(groups, experts, dim)``; likewise.
        routing: the rule.
        ordered: sort the chosen by falling score, which the sum does not need.

    Returns:
        Indices ``(tokens, groups, k)`` int64, their scores, their weights before the threshold.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    score = z.to(dtype)
    divisor = _divisor(z, x, keys, routing.score_norm, dtype)
    if routing.top_k == z.shape[-1] and not ordered:  # the first task: everything is chosen
        index = torch.arange(routing.top_k, device=z.device).expand_as(z)
        value = score if divisor is None else score / divisor
    elif routing.score_norm == "bank_l2":  # dividing by one positive number keeps the order: select first, divide less
        value, index = score.topk(routing.top_k, dim=-1, sorted=ordered)
        assert divisor is not None
        value = value / divisor
    else:
        value, index = (score if divisor is None else score / divisor).topk(routing.top_k, dim=-1, sorted=ordered)
    return index, value, (value / routing.temperature).softmax(-1)


def masked(weight: Tensor, score: Tensor, threshold: float) -> Tensor:
    """Weights with those of scores below ``threshold`` at 0, not normalized again."""
    return weight * (score >= threshold) if threshold > 0 else weight


def _spread(index: Tensor, source: Tensor, experts: int) -> Tensor:
    """``(tokens, groups, k)`` values at their experts' places in ``(tokens, groups, experts)`` zeros."""
    return source.new_zeros(*source.shape[:-1], experts).scatter_(-1, index, source)


def combine(index: Tensor, coefficient: Tensor, values: Tensor, *, bag: bool) -> Tensor:
    """Sum of the chosen values.

    Args:
        index: ``(tokens, groups, k)``.
        coefficient: factors of the same shape.
        values: ``(groups, experts, out)``.
        bag: gather and add rows of the chosen experts; else one dense product over all of them.

    Returns:
        ``(tokens, groups * out)``.
    """
    groups, experts, out = values.shape
    tokens, _, k = index.shape
    if bag:
        rows = index if groups == 1 else index + torch.arange(groups, device=index.device).view(1, groups, 1) * experts
        total = F.embedding_bag(
            rows.reshape(-1, k), values.reshape(-1, out), per_sample_weights=coefficient.reshape(-1, k), mode="sum"
        )
        return total.view(tokens, groups * out)
    dense = _spread(index, coefficient, experts)
    return torch.cat([dense[:, g] @ values[g] for g in range(groups)], -1) if groups > 1 else dense[:, 0] @ values[0]


class _RankExperts(torch.autograd.Function):
    """The routed sum with the closed-form backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, old_keys: Tensor, new_keys: Tensor, old_values: Tensor, new_values: Tensor,
        routing: Routing, bag: bool,
    ) -> Tensor:  # fmt: skip
        keys = torch.cat([old_keys, new_keys], 1) if old_keys.shape[1] else new_keys
        values = torch.cat([old_values, new_values], 1) if old_values.shape[1] else new_values
        z = responses(x, keys)
        index, score, weight = route(z, x, keys, routing, ordered=False)
        chosen = z.gather(-1, index)
        coefficient = (masked(weight, score, routing.threshold) * routing.scaling).to(z.dtype) * chosen
        # 16 bits name up to 32767 experts; the weights are read as probabilities only
        short = index.to(torch.int16) if keys.shape[1] < 2**15 else index
        ctx.save_for_backward(x, z, short, weight, old_keys, new_keys, old_values, new_values)
        ctx.routing = routing
        return combine(index, coefficient, values, bag=bag)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, index, weight, old_keys, new_keys, old_values, new_values = ctx.saved_tensors
        rule: Routing = ctx.routing
        keys = torch.cat([old_keys, new_keys], 1) if old_keys.shape[1] else new_keys
        values = torch.cat([old_values, new_values], 1) if old_values.shape[1] else new_values
        groups, experts, out = values.shape
        n_old = old_keys.shape[1]
        index = index.long()
        g = grad.view(len(x), groups, out)
        h = torch.empty_like(z) if groups > 1 else (grad @ values[0].T)[:, None]  # (tokens, groups, experts)
        for i in range(groups if groups > 1 else 0):
            h[:, i] = g[:, i] @ values[i].T

        dtype = weight.dtype
        divisor = _divisor(z, x, keys, rule.score_norm, dtype)
        z_chosen, h_chosen = z.gather(-1, index).to(dtype), h.gather(-1, index).to(dtype)
        n_chosen = divisor if divisor is None or divisor.shape[-1] == 1 else divisor.gather(-1, index)
        score = z_chosen if n_chosen is None else z_chosen / n_chosen
        active = masked(weight, score, rule.threshold) * rule.scaling
        per_value = active * h_chosen
        q = z_chosen * (h_chosen if rule.threshold <= 0 else h_chosen * (score >= rule.threshold)) * rule.scaling
        e = weight * (q - (weight * q).sum(-1, keepdim=True)) / rule.temperature
        through_score = e if n_chosen is None else e / n_chosen
        at_chosen = (per_value + through_score).to(z.dtype)
        pull = (score * e).sum(-1, keepdim=True)
        if rule.score_norm == "bank_l2":
            assert divisor is not None
            # a token whose norm was clamped has a constant divisor; its z is 0, so the term vanishes by itself
            dz = (z * (pull / divisor.square()).neg().to(z.dtype)).scatter_add_(-1, index, at_chosen)
        else:
            dz = _spread(index, at_chosen, experts)

        dx = d_new_keys = d_new_values = None
        if ctx.needs_input_grad[0]:
            dx = dz.view(len(x), -1) @ keys.reshape(-1, keys.shape[-1])
            if rule.score_norm == "cosine":
                dx = dx - x * (pull.sum(1) / _norm(x, dtype).square()).to(x.dtype)
        if ctx.needs_input_grad[2]:
            # no product of the frozen experts' share is ever formed
            d_new_keys = (dz[..., n_old:].reshape(len(x), -1).T @ x).view_as(new_keys)
            if rule.score_norm == "cosine":
                per_key = _spread(index, score * e, experts)[..., n_old:].sum(0)
                per_key = per_key.unsqueeze(-1) / _norm(new_keys, dtype).square()
                d_new_keys = d_new_keys - new_keys * per_key.to(x.dtype)
        if ctx.needs_input_grad[4]:
            # a first column takes what belongs to frozen experts and is dropped
            place = index if n_old == 0 else (index - (n_old - 1)).clamp_min_(0)
            u = _spread(place, (active * z_chosen).to(z.dtype), experts - n_old + min(n_old, 1))[..., min(n_old, 1) :]
            d_new_values = torch.stack([u[:, i].T @ g[:, i] for i in range(groups)])
        return dx, None, d_new_keys, None, d_new_values, None, None


def rank_experts(
    x: Tensor,
    old_keys: Tensor,
    new_keys: Tensor,
    old_values: Tensor,
    new_values: Tensor,
    routing: Routing,
    *,
    bag: bool = False,
) -> Tensor:
    """What the experts add to a layer's output, differentiable in ``x`` and in the new experts.

    Args:
        x: tokens ``(tokens, dim)``.
        old_keys: ``(groups, old experts, dim)``; gets no gradient.
        new_keys: ``(groups, new experts, dim)``.
        old_values: ``(groups, old experts, out)``; gets no gradient.
        new_values: ``(groups, new experts, out)``.
        routing: the rule.
        bag: see :func:`combine`.

    Returns:
        ``(tokens, groups * out)``, in the dtype of ``x``, which all arguments share.
    """
    total: Tensor = _RankExperts.apply(x, old_keys, new_keys, old_values, new_values, routing, bag)
    return total
