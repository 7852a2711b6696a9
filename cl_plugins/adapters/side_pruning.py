"""Starting values for a narrow side network: rows of the backbone's weights that matter most.

"LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", Yi-Lin Sung, Jaemin Cho, Mohit Bansal,
NeurIPS 2022, arXiv 2206.06522, its structural pruning. Implemented: each group of weights chooses its own rows (the
variant that the paper's experiments use), in one step or several; importance by Fisher information or by weight
magnitude. Not implemented: quotas for the strongest heads, one selection for the whole residual stream. Kept rows stay
in ascending order.

Formula along the chain of layers, for a group ``G`` of weights that share their rows (queries, keys, values)::

    W   <- W[:, K_prev]                                   columns follow the rows that the layer before kept
    P    = product over G of I(W)                         I = W (magnitude) or sum over samples of (dLoss/dW)^2 (Fisher)
    K    = the n / reduction rows (at least one) with the largest sums of |P|;   W <- W[K],  bias <- bias[K]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_plugins.adapters.ladder import LadderSide, kept_rows
from cl_plugins.backbones import Backbone

Chain = Sequence[tuple[str, ...]]
"""Names of layers in the order in which they feed each other; layers of one group share their rows."""


def _select(importance: Sequence[Tensor], keep: float) -> Tensor:
    """Rows to keep of a group, ascending."""
    scores = (
        torch.stack([i.double().flatten(1) for i in importance]).prod(0).abs().sum(1)
    )  # three squares underflow float32
    return scores.topk(kept_rows(len(scores), keep)).indices.sort().values


def _prune_once(
    weights: dict[str, Tensor], importance: dict[str, Tensor], chain: Chain, keep: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    pruned, imp, kept = dict(weights), dict(importance), list[Tensor]()
    previous: Tensor | None = None
    for group in chain:
        keys = [f"{name}.weight" for name in group]
        if weights[keys[0]].ndim == 1:  # a norm follows the stream it stands on
            rows = previous
        else:
            if previous is not None:
                for key in keys:
                    pruned[key], imp[key] = pruned[key][:, previous], imp[key][:, previous]
            rows = previous = _select([imp[key] for key in keys], keep)
            kept.append(rows)
        assert rows is not None
        for name in group:
            for part in ("weight", "bias"):
                key = f"{name}.{part}"
                if key in pruned:
                    pruned[key] = pruned[key][rows]
                if key in imp:
                    imp[key] = imp[key][rows]
    return pruned, imp, kept


def prune_chain(
    weights: Mapping[str, Tensor],
    chain: Chain,
    reduction: float,
    importance: Mapping[str, Tensor] | None = None,
    steps: int = 1,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Prune the rows of a chain of layers to ``1 / reduction`` of their number.

    Args:
        weights: ``name.weight`` ``(rows, columns)`` or ``(rows,)`` for a norm, ``name.bias`` where there is one.
        chain: groups of names; the first one's columns are kept.
        reduction: 1 or more.
        importance: by the names of ``weights``, shaped like them; the weights themselves when None.
        steps: points of the keep ratio from 1 to ``1 / reduction``; 1 prunes at once.

    Returns:
        The pruned weights, and the kept rows of each group, ascending, relative to what the step before left.

    Raises:
        ValueError: for a reduction below 1, fewer than one step, or a norm at the start of the chain.

    Example:
        >>> w = {"a.weight": torch.tensor([[1.0], [5.0], [2.0], [4.0]])}
        >>> pruned, kept = prune_chain(w, [("a",)], reduction=2)
        >>> pruned["a.weight"].tolist(), kept[0].tolist()
        ([[5.0], [4.0]], [1, 3])
    """
    if reduction < 1:
        raise ValueError(f"`reduction` must be 1 or more, got {reduction!r}")
    if steps < 1:
        raise ValueError(f"`steps` must be 1 or more, got {steps!r}")
    if weights[f"{chain[0][0]}.weight"].ndim == 1:
        raise ValueError(f"`chain` must begin with a matrix, got the norm {chain[0][0]!r}")
    ratios = (
        [1.0 / reduction] if steps == 1 else torch.linspace(1.0, 1.0 / reduction, steps, dtype=torch.float64).tolist()
    )
    pruned = {k: v.detach() for k, v in weights.items()}
    imp = {k: v.detach() for k, v in (weights if importance is None else importance).items()}
    kept: list[Tensor] = []
    before = 1.0
    for ratio in ratios:
        pruned, imp, rows = _prune_once(pruned, imp, chain, ratio / before)
        kept += rows
        before = ratio
    return pruned, kept


_OPEN_CLIP_NAMES = (
    (r"^conv1\.weight$", "patch_embed.proj.weight"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"^(ln_post|ln_final)\.", "norm."),
    (r"\.ln_1\.", ".norm1."),
    (r"\.ln_2\.", ".norm2."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def canonical_weights(backbone: Backbone, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors of a backbone under timm's names, queries, keys and values apart and the patch kernel flattened.

    A text tower's token embedding, transposed, stands where a patch kernel does.

    Args:
        backbone: a timm ViT or an open_clip tower.
        values: by the backbone's own parameter names, such as squared gradients; its weights when None.

    Raises:
        ValueError: for blocks without ``norm1``, ``attn.qkv``, ``attn.proj``, ``norm2``, ``mlp.fc1``, ``mlp.fc2``.
    """
    found: dict[str, Tensor] = {}
    for name, value in (dict(backbone.model.named_parameters()) if values is None else values).items():
        if backbone.kind != "timm":
            for pattern, replacement in _OPEN_CLIP_NAMES:
                name = re.sub(pattern, replacement, name)
        value = value.detach()
        if name == "patch_embed.proj.weight":
            found["patch_embed.weight"] = value.flatten(1)
        elif name == "token_embedding.weight" and backbone.kind == "text":
            found["patch_embed.weight"] = value.T  # (dim, vocabulary): rows are what the first block's columns read
        elif ".attn.qkv." in name:
            found.update({name.replace("qkv", part): rows for part, rows in zip("qkv", value.chunk(3), strict=True)})
        elif name.startswith(("blocks.", "norm.")):
            found[name] = value
        elif name.startswith("fc_norm.") and not isinstance(backbone.model.fc_norm, nn.Identity):
            found[name.removeprefix("fc_")] = value  # the norm behind average pooling
    chain = vit_chain(len(backbone.blocks), "norm.weight" in found)
    missing = [n for group in chain for n in group if f"{n}.weight" not in found]
    if missing and values is None:
        raise ValueError(
            f"the backbone must have plain pre-norm blocks to be pruned, got {type(backbone.model).__name__} without"
            f" {', '.join(missing[:4])}; use init='random'"
        )
    if values is None:
        _check_chain(found, chain, type(backbone.model).__name__)
    return {k: v for k, v in found.items() if k.rpartition(".")[0] in {n for group in chain for n in group}}


def _check_chain(weights: Mapping[str, Tensor], chain: Chain, model: str) -> None:
    """Raise a ValueError where a layer's columns are not the rows of the one before, as in gated layers."""
    rows: int | None = None
    for group in chain:
        weight = weights[f"{group[0]}.weight"]
        if rows is not None and (weight.shape[1] if weight.ndim > 1 else len(weight)) != rows:
            raise ValueError(
                f"the backbone must have plain feed-forward layers to be pruned, got {model}, where"
                f" {group[0]!r} does not take the {rows} values of the layer before; use init='random'"
            )
        rows = len(weight)


def vit_chain(depth: int, final_norm: bool = True) -> list[tuple[str, ...]]:
    """Layers of a ViT in the order in which they feed each other."""
    chain: list[tuple[str, ...]] = [("patch_embed",)]
    for i in range(depth):
        chain += [(f"blocks.{i}.norm1",), tuple(f"blocks.{i}.attn.{p}" for p in "qkv"), (f"blocks.{i}.attn.proj",)]
        chain += [(f"blocks.{i}.norm2",), (f"blocks.{i}.mlp.fc1",), (f"blocks.{i}.mlp.fc2",)]
    return [*chain, ("norm",)] if final_norm else chain


@torch.no_grad()
def initialize_ladder(
    side: LadderSide, backbone: Backbone, reduction: int, importance: Mapping[str, Tensor] | None = None, steps: int = 1
) -> None:
    """Copy the backbone's most important rows into the blocks and the norm of a ladder.

    ``first``, ``down`` and ``up`` keep their random values and the gates stay at 0, as published.

    Args:
        side: the ladder.
        backbone: what it stands beside.
        reduction: the ladder's.
        importance: from :func:`fisher_importance`; the weights' magnitude when None.
        steps: of the pruning.
    """
    weights = canonical_weights(backbone)
    chain = vit_chain(len(backbone.blocks), "norm.weight" in weights)
    scores = None if importance is None else canonical_weights(backbone, importance)
    pruned, _ = prune_chain(weights, chain, reduction, scores, steps)
    for i in side.layers:
        for part in ("weight", "bias"):
            rows = [pruned[f"blocks.{i}.attn.{p}.{part}"] for p in "qkv" if f"blocks.{i}.attn.{p}.{part}" in pruned]
            if rows:
                pruned[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(rows)
    for name, parameter in [*side.blocks.named_parameters(prefix="blocks"), *side.norm.named_parameters(prefix="norm")]:
        if name in pruned:
            parameter.copy_(pruned[name])


def fisher_importance(
    parameters: Mapping[str, nn.Parameter], loss: Callable[[Any], Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Sum over batches of the squared gradient; with batches of one sample the empirical Fisher information.

    Args:
        parameters: by name; their ``requires_grad`` is restored.
        loss: of a batch, with the true label.
        batches: the paper takes 1024 of one sample each.

    Returns:
        By name, float64, since products of three underflow float32.

    Raises:
        ValueError: when there is no batch.
    """
    names, tensors = list(parameters), list(parameters.values())
    flags = [p.requires_grad for p in tensors]
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in tensors]
    count = 0
    try:
        for parameter in tensors:
            parameter.requires_grad_(True)
        for batch in batches:
            count += 1
            gradients = torch.autograd.grad(loss(batch), tensors, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.double().square()
    finally:
        for parameter, flag in zip(tensors, flags, strict=True):
            parameter.requires_grad_(flag)
    if count == 0:
        raise ValueError("`batches` must give at least one batch, got none")
    return dict(zip(names, sums, strict=True))
