"""A growing bank of rank-1 experts on a linear layer, of which each token activates a few by itself.

"Little By Little: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive Learning", Haodong Lu,
Chongyang Zhao, Jason Xue, Lina Yao, Kristen Moore and Dong Gong, 2025, arXiv 2506.21035, whose later versions call the
method MoRAM. Implemented: the method of all versions and switches for what the paper leaves open. Not implemented: the
approximate merging of one fixed average weight per expert, since the weights depend on the token.

Formula, per token and bank (A: `old_keys` and `new_keys`, B: `old_values` and `new_values`)::

    z = A x,  s = z / |z|                                    responses, normalized over the bank (`score_norm`)
    S = the max(`top_k`, `min_active`) largest s             chosen experts
    w = softmax_S(s / `temperature`) [s >= `threshold`]      threshold in evaluation only
    y = W x + b + `scaling` sum_{i in S} w_i z_i B_i
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cl_plugins.adapters._rank_experts_functional import Routing, ScoreNorm, masked, rank_experts, responses, route
from cl_plugins.adapters.delta import LinearDelta

_BAG_FROM = 64
"""On a CPU, gathering the chosen rows is faster than one dense product from about this many experts on."""
_PARAMETERS = ("old_keys", "new_keys", "old_values", "new_values")


@dataclass(frozen=True)
class ExpertOptions:
    """Settings of a bank of experts; the defaults are those of the published code for CLIP.

    Args:
        rank: new experts per task.
        top_k: experts per token; None for ``rank``.
        min_active: smallest number of experts per token; with one the softmax would be constant and teach no key.
        temperature: of the softmax over the chosen scores; at 0.01 nearly one expert per token acts.
        threshold: in evaluation, experts with a lower score are left out; in [0, 1).
        scaling: factor of the sum, for old and new experts alike.
        dropout: on the input of the experts, so also on their scores.
        score_norm: "bank_l2" as in the paper; "cosine" divides by the norms of key and token; "none" leaves responses.
        delta_mode: the threshold "absolute" as published, or "sqrt_r", which multiplies it by sqrt(rank / experts), as
            normalized scores shrink with the number of experts.
        k_schedule: ``top_k`` "constant" as published, or "per_task": times the number of tasks.
        new_key_init: "kaiming" uniform as published, or "orthogonal_to_old": the same without its share in the span of
            the older keys, which disturbs what was learned less.
        evaluation: how the values are summed: one "dense" product over all experts, a "bag" of the chosen rows, or
            "auto": bags on the CPU from 64 experts on. The results agree to rounding.

    Raises:
        ValueError: for a setting out of range.
    """

    rank: int = 16
    top_k: int | None = None
    min_active: int = 2
    temperature: float = 0.01
    threshold: float = 0.2
    scaling: float = 1.0
    dropout: float = 0.0
    score_norm: ScoreNorm = "bank_l2"
    delta_mode: Literal["absolute", "sqrt_r"] = "absolute"
    k_schedule: Literal["constant", "per_task"] = "constant"
    new_key_init: Literal["kaiming", "orthogonal_to_old"] = "kaiming"
    evaluation: Literal["dense", "bag", "auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("rank", "top_k", "min_active"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be an integer of 1 or more, got {value!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"`temperature` must be above 0, got {self.temperature!r}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` must be in [0, 1), got {self.threshold!r}; scores are at most 1")
        if not math.isfinite(self.scaling):
            raise ValueError(f"`scaling` must be finite, got {self.scaling!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout!r}")
        choices: dict[str, Any] = {
            "score_norm": get_args(ScoreNorm),
            "delta_mode": ("absolute", "sqrt_r"),
            "k_schedule": ("constant", "per_task"),
            "new_key_init": ("kaiming", "orthogonal_to_old"),
            "evaluation": ("dense", "bag", "auto"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}")


class RankExperts(LinearDelta):
    """The experts of one linear layer: frozen ones of earlier tasks and trainable ones of the current task.

    WHEN: :meth:`grow` at the start of a task, before its optimizer exists. Which experts train follows from where they
    are stored, so it survives saving and loading; a loaded state brings its own number of tasks.

    Args:
        in_features: width of the layer's input.
        out_features: width of one part of its output.
        options: the settings.
        parts: parts of the output that have a bank of their own, see :class:`LinearDelta`.
        of: number of parts of the output.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        old_keys: ``(groups, old experts, in_features)``, frozen.
        new_keys: ``(groups, rank, in_features)``.
        old_values: ``(groups, old experts, out_features)``, frozen; one row per expert.
        new_values: ``(groups, rank, out_features)``, zeros at first.
        tasks: for each growth, the task and the number of its experts.

    Example:
        >>> bank = RankExperts(8, 4, ExpertOptions(rank=2))
        >>> for task in range(3):
        ...     bank.grow(task, torch.Generator().manual_seed(task))
        >>> [tuple(p.shape) for p in (bank.old_keys, bank.new_keys)], bank.experts
        ([(1, 4, 8), (1, 2, 8)], 6)
        >>> bank(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    old_keys: nn.Parameter
    new_keys: nn.Parameter
    old_values: nn.Parameter
    new_values: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        options: ExpertOptions | None = None,
        *,
        parts: tuple[int, ...] = (0,),
        of: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, parts=parts, of=of)
        self.options = options or ExpertOptions()
        self.tasks: list[tuple[int, int]] = []
        self.usage: ExpertUsage | None = None
        for name in _PARAMETERS:
            self._set(name, torch.empty(self.groups, 0, self._width(name), device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_take_structure)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _width(self, name: str) -> int:
        return self.in_features if name.endswith("keys") else self.out_features

    def _set(self, name: str, value: Tensor) -> None:
        setattr(self, name, nn.Parameter(value, requires_grad=name.startswith("new")))

    def extra_repr(self) -> str:
        """Sizes for the printed model."""
        return f"{self.in_features}, {self.out_features}, parts={self.parts}, experts={[n for _, n in self.tasks]}"

    @property
    def experts(self) -> int:
        """Old and new experts."""
        return self.old_keys.shape[1] + self.new_keys.shape[1]

    @property
    def active(self) -> bool:
        """Whether the bank has grown at least once."""
        return self.new_keys.shape[1] > 0

    @property
    def top_k(self) -> int:
        """Experts per token at the present size."""
        o = self.options
        k = (o.top_k or o.rank) * (max(1, len(self.tasks)) if o.k_schedule == "per_task" else 1)
        return min(max(k, o.min_active), self.experts)

    @property
    def threshold(self) -> float:
        """Threshold of the scores in evaluation at the present size."""
        o = self.options
        return o.threshold * (math.sqrt(o.rank / max(1, self.experts)) if o.delta_mode == "sqrt_r" else 1.0)

    def refusal(self, state: Mapping[str, Tensor]) -> str | None:
        """Why a saved state cannot be loaded into this bank; None when it can, whatever its number of tasks."""
        for name in _PARAMETERS:
            value, own = state.get(name), getattr(self, name)
            if value is None:
                return f"it lacks `{name}`"
            if value.ndim != 3 or value.shape[0] != own.shape[0] or value.shape[2] != own.shape[2]:
                return f"its `{name}` has shape {tuple(value.shape)}, here it is {tuple(own.shape)}"
            if value.shape[1] != state[_PARAMETERS[name.startswith("new")]].shape[1]:
                return "its numbers of keys and values differ"
        rank = state["new_keys"].shape[1]
        if rank not in (0, self.options.rank):
            return f"its rank is {rank}, here `rank` is {self.options.rank}"
        return None

    def check_growth(self) -> None:
        """Refuse a growth that :meth:`grow` could not finish.

        Raises:
            RuntimeError: when keys orthogonal to all older ones do not exist.
        """
        o, old = self.options, self.experts
        if o.new_key_init == "orthogonal_to_old" and old and old + o.rank > self.in_features:
            raise RuntimeError(
                f"`new_key_init='orthogonal_to_old'` needs room for {old} old and {o.rank} new keys in"
                f" {self.in_features} dimensions; use 'kaiming' or a smaller `rank`"
            )

    def grow(self, task: int, generator: torch.Generator | None = None) -> None:
        """Freeze all experts and add ``rank`` new ones, whose values are zero.

        Right after it, and before training, the layer's output differs from before: new keys compete with old ones.

        Args:
            task: index of the task that the new experts are for.
            generator: draws the keys on the CPU; a fixed seed when None.

        Raises:
            RuntimeError: as :meth:`check_growth`.
        """
        self.check_growth()
        o, like = self.options, self.new_keys
        generator = generator or torch.Generator().manual_seed(task)
        bound = 1 / math.sqrt(self.in_features)  # Kaiming uniform with a = sqrt(5)
        keys = torch.empty(self.groups, o.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        old_keys = torch.cat([self.old_keys.detach(), self.new_keys.detach()], 1)
        if o.new_key_init == "orthogonal_to_old" and old_keys.shape[1]:
            keys = _without_span(keys, old_keys.float().cpu())
        old_values = torch.cat([self.old_values.detach(), self.new_values.detach()], 1)
        self._set("old_keys", old_keys)
        self._set("old_values", old_values)
        self._set("new_keys", keys.to(like))
        self._set("new_values", like.new_zeros(self.groups, o.rank, self.out_features))
        self.tasks.append((task, o.rank))

    def routing(self) -> Routing:
        """The rule at the present size and mode."""
        o = self.options
        return Routing(self.top_k, o.temperature, 0.0 if self.training else self.threshold, o.scaling, o.score_norm)

    def _in_dtype(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        dtype = self.compute_dtype(x, self.new_keys)
        keys = self.old_keys.to(dtype), self.new_keys.to(dtype)
        return x.to(dtype), *keys, self.old_values.to(dtype), self.new_values.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The experts' sum ``(..., groups * out_features)`` for ``(..., in_features)``, in the products' dtype."""
        if not self.active:
            return x.new_zeros(*x.shape[:-1], self.groups * self.out_features)
        if self.usage is not None:
            self.usage.update(self, x)
        dropped = nn.functional.dropout(x, self.options.dropout, self.training) if self.options.dropout else x
        tensors = self._in_dtype(dropped.reshape(-1, self.in_features))
        evaluation = self.options.evaluation
        bag = evaluation == "bag" or (evaluation == "auto" and x.device.type == "cpu" and self.experts >= _BAG_FROM)
        with torch.autocast(x.device.type, enabled=False):
            delta = rank_experts(*tensors, routing=self.routing(), bag=bag)
        return delta.view(*x.shape[:-1], self.groups * self.out_features)

    @torch.no_grad()
    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which experts an input activates, by the rule of the present mode.

        Args:
            x: ``(..., in_features)``.

        Returns:
            Indices ``(..., groups, k)`` by falling score, old experts first in numbering, their scores and weights.
        """
        index, score, weight = self._route(x)
        return index, score, masked(weight, score, self.routing().threshold)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, old_keys, new_keys, _, _ = self._in_dtype(x.reshape(-1, self.in_features))
        rule = self.routing()
        keys = torch.cat([old_keys, new_keys], 1)
        with torch.autocast(x.device.type, enabled=False):
            index, score, weight = route(responses(tokens, keys), tokens, keys, rule)
        shape = (*x.shape[:-1], self.groups, rule.top_k)
        return index.view(shape), score.view(shape), weight.view(shape)

    def merge(self) -> None:
        """Refuse: no fixed weight computes what the experts do.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "rank-1 experts cannot be merged into the layer's weight: which of them act, and how strongly, depends on"
            " each token; keep the adapters, or save them alone with `MoRA.export_adapters`"
        )

    def get_extra_state(self) -> Tensor:
        """Tasks and numbers of experts, ``(growths, 2)``."""
        return torch.tensor(self.tasks, dtype=torch.int64).view(-1, 2)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the tasks of a saved bank."""
        self.tasks = [(int(task), int(n)) for task, n in state.tolist()]


class ExpertUsage:
    """Sums over tokens of how a bank uses its experts; on the device, read once at the end.

    Args:
        bank: the bank; :meth:`update` is called by it while ``bank.usage`` is this object.
    """

    def __init__(self, bank: RankExperts) -> None:
        device = bank.new_keys.device
        owner = [n for n, (_, count) in enumerate(bank.tasks) for _ in range(count)]
        self.owner = torch.tensor(owner, device=device)
        self.sums = torch.zeros(len(bank.tasks) + 3, device=device)

    @torch.no_grad()
    def update(self, bank: RankExperts, x: Tensor) -> None:
        """Add the tokens of ``x``."""
        index, score, weight = bank._route(x)
        silent = (score < bank.threshold).all(-1).sum() if bank.threshold > 0 else torch.zeros_like(weight.sum())
        effective = torch.special.entr(weight).sum(-1).exp()
        self.sums[:-3].index_add_(0, self.owner[index.flatten()], weight.flatten().float())
        count = self.sums.new_tensor(effective.numel())
        self.sums[-3:] += torch.stack([silent.float(), effective.sum().float(), count])

    def read(self) -> dict[str, Any]:
        """Share of the softmax mass on each task's experts, share of tokens without an expert, effective experts."""
        *mass, empty, effective, tokens = self.sums.tolist()
        tokens = max(tokens, 1.0)
        return {"mass": [m / tokens for m in mass], "empty": empty / tokens, "effective": effective / tokens}


def _without_span(keys: Tensor, old: Tensor) -> Tensor:
    """``keys`` ``(groups, rank, dim)`` without their share in the span of ``old``, at the length they had."""
    basis = torch.linalg.qr(old.double().transpose(1, 2)).Q  # (groups, dim, old)
    rest = keys.double()
    for _ in range(2):  # twice, for rounding
        rest = rest - (rest @ basis) @ basis.transpose(1, 2)
    norm = torch.linalg.vector_norm
    scale: Tensor = norm(keys.double(), dim=-1, keepdim=True) / norm(rest, dim=-1, keepdim=True)
    return (rest * scale).to(keys.dtype)


def _take_structure(bank: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the bank as many experts as the state to be loaded has; what does not fit is left for torch to refuse."""
    assert isinstance(bank, RankExperts)
    state = {name: state_dict[prefix + name] for name in _PARAMETERS if prefix + name in state_dict}
    if bank.refusal(state) is None:
        for name, value in state.items():
            own = getattr(bank, name)
            if own.shape != value.shape:
                bank._set(name, own.detach().new_empty(value.shape))
