"""The side networks of a stream of tasks, and which of them answers.

    shared          one side network, trained on through the stream
    first_session   trained on the first task, then frozen
    per_task        one for each task, earlier ones frozen: nothing is forgotten once the task is known
    per_task_dense  the newest also reads the backbone's feature f_b and the earlier ones, detached:
                    f_t = w_0 f_b + w_1 s_1 + ... + w_t s_t,   w = softmax(mix_t), mix_t = 0 at first

In training the newest side network's feature enters the classifier. In the evaluation of the per-task regimes every
task's rows of the classifier are applied to its own side network's feature, and ``routing`` puts them together:

    prototype   the task with the largest p(t | f_b) answers alone (cl_plugins.side_routing)
    logits      all side networks answer; a task's logits are divided by its temperature
    posterior   p(t | f_b) softmax(logits within t), the chain rule: only logits of one task are compared
    both        mean of two posteriors: softmax(logits), and that of "posterior"

A side network that adapts the backbone, with registers and norms, has a pass of its own through it. Where the
backbone's own feature or several side networks are read, that is one pass for each of them beside the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_plugins._text import did_you_mean
from cl_plugins.heads import HIDDEN_LOGIT
from cl_plugins.side_network import SideNetwork, TapRecord
from cl_plugins.side_routing import TaskRouter
from cl_plugins.taps import BackboneTaps
from cl_plugins.tokens import project

Regime = Literal["shared", "first_session", "per_task", "per_task_dense"]
Routing = Literal["prototype", "logits", "posterior", "both"]


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")


class SideBank(nn.Module):
    """Holds side networks and puts their feature in front of the classifier.

    WHEN: a forward pre-hook on the classifier replaces its input; in per-task evaluation a forward hook replaces its
        logits.
    Loading a state dict restores the number of side networks.

    Args:
        head: the classifier.
        taps: of the backbone.
        build: makes a side network; called again for each task in the per-task regimes.
        regime: see the module's docstring.
        routing: see the module's docstring.
        router: says the task of a sample.

    Raises:
        ValueError: for an unknown regime or routing.
    """

    def __init__(
        self,
        head: nn.Linear,
        taps: BackboneTaps,
        build: Callable[[], SideNetwork],
        regime: Regime = "shared",
        routing: Routing = "both",
        router: TaskRouter | None = None,
    ) -> None:
        super().__init__()
        check_choice("regime", regime, get_args(Regime))
        check_choice("routing", routing, get_args(Routing))
        self.regime, self.routing = regime, routing
        self.bypass = False
        self.base: Tensor | None = None
        self.keeps_base = False
        self.known_task: int | None = None
        self.known_classes: Tensor | None = None
        self.sides = nn.ModuleList()
        self.mix = nn.ParameterList()
        self.router = (router or TaskRouter(head.out_features, head.in_features)) if self.per_task else None
        self.owner: Tensor
        self.temperature: Tensor
        self.started: Tensor
        self.register_buffer("owner", torch.full((head.out_features,), -1, dtype=torch.int64))
        self.register_buffer("temperature", torch.ones(head.out_features))
        self.register_buffer("started", torch.zeros((), dtype=torch.int64))
        self.to(head.weight.device)
        self._links = (taps, head)  # in a tuple, so that their weights are not saved twice
        self._build = build
        self._logits: Tensor | None = None
        head.register_forward_pre_hook(self._enter, prepend=True)
        head.register_forward_hook(self._leave, prepend=True)  # masks come after it
        self.register_load_state_dict_pre_hook(_match_number)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.register_load_state_dict_post_hook(_freeze_earlier)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @property
    def per_task(self) -> bool:
        """Whether each task has a side network of its own."""
        return self.regime in ("per_task", "per_task_dense")

    @property
    def taps(self) -> BackboneTaps:
        """The taps that the side networks read."""
        return self._links[0]

    @property
    def active(self) -> SideNetwork:
        """The newest side network.

        Raises:
            RuntimeError: before :meth:`start`.
        """
        if not len(self.sides):
            raise RuntimeError("there is no side network yet; call `start_task` first, or train with fit_stream")
        return self.side(len(self.sides) - 1)

    def side(self, index: int) -> SideNetwork:
        """A side network by the number of its task."""
        side = self.sides[index]
        assert isinstance(side, SideNetwork)
        return side

    def add(self) -> SideNetwork:
        """Append a side network, and say what it reads."""
        weight = self._links[1].weight
        side = self._build().to(weight.device, weight.dtype)
        self.taps.want(side.tap_indices, image=side.needs_image)
        self.taps.needs_final = self.per_task or side.needs_base or self.keeps_base
        self.sides.append(side)
        if side.adaptation() is not None:
            self.taps.choose = self._own_pass
        if self.regime == "per_task_dense":
            self.mix.append(nn.Parameter(torch.zeros(len(self.sides) + 1, device=weight.device, dtype=weight.dtype)))
        return side

    @property
    def _adapts(self) -> bool:
        """Whether each side network needs a pass of its own through the backbone."""
        return self.taps.choose is not None

    def _own_pass(self) -> SideNetwork | None:
        """The side network that adapts the pass which the user's module asks for.

        None where that pass must give the backbone's own feature.
        """
        if not len(self.sides):
            return None
        if not self.per_task:
            return self.active
        if self.bypass or self.regime == "per_task_dense":
            return None
        if self.training:
            return self.active
        if self.known_task is not None:
            return self.side(self.known_task)
        return None if len(self.sides) > 1 else self.active

    def _read(self, record: TapRecord, index: int) -> TapRecord:
        """What side network ``index`` reads: the given pass, or one of its own."""
        if not self._adapts or self._own_pass() is self.side(index):
            return record
        assert record.image is not None
        return self.taps.again(record.image, self.side(index))

    def keep_base(self) -> None:
        """Keep the backbone's own feature of each pass, for heads that read it beside the side network's."""
        self.keeps_base = self.taps.needs_final = True

    def start(self, index: int, classes: Sequence[int]) -> bool:
        """Begin task ``index`` with ``classes``; a repeated call changes nothing.

        Returns:
            Whether a side network was added.

        Raises:
            ValueError: when a per-task regime is given a class of an earlier task.
        """
        if index < int(self.started):
            self.freeze_earlier()
            return False
        columns = torch.as_tensor(list(classes), device=self.owner.device)
        taken = columns[self.owner[columns] >= 0].tolist()
        if taken and self.per_task:
            raise ValueError(
                f"`regime='{self.regime}'` must have tasks with classes of their own, got classes {taken[:8]!r} twice;"
                " use regime='shared'"
            )
        self.started.fill_(index + 1)
        grows = self.per_task or not len(self.sides)
        if grows:
            self.add()
        self.owner[columns] = len(self.sides) - 1
        self.freeze_earlier()
        return grows

    def freeze_earlier(self) -> None:
        """Let the newest side network train, and nothing else here; which one follows from the structure."""
        done = self.regime == "first_session" and int(self.started) > 1
        for part in (self.sides, self.mix):
            for index, item in enumerate(part):
                trains = index == len(part) - 1 and not done
                for parameter in item.parameters() if isinstance(item, nn.Module) else [item]:
                    parameter.requires_grad_(trains)
                    if not trains:
                        parameter.grad = None  # a stale gradient would still be applied by an optimizer
        self.train(self.training)

    def train(self, mode: bool = True) -> SideBank:
        """Frozen side networks stay in eval mode; batch statistics of a shared one stay those of its first task."""
        super().train(mode)
        for side in self.sides:
            if not any(p.requires_grad for p in side.parameters()):
                side.eval()
            elif self.regime == "shared" and int(self.started) > 1:
                for module in side.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()
        return self

    def features(self, record: TapRecord, base: Tensor, upto: int) -> list[Tensor]:
        """Features of the side networks 0 to ``upto`` ``(batch, features)``, mixed in the dense regime."""
        width = self._links[1].in_features
        own: list[Tensor] = []
        for index in range(upto + 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index == len(self.sides) - 1):
                feature = self.side(index)(self._read(record, index), base)
            own.append(project(self.taps.backbone, feature, width, tokens=self.side(index).in_token_space))
        if self.regime != "per_task_dense":
            return own
        mixed = []
        for index in range(upto + 1):
            parts = torch.stack([base, *(f.detach() for f in own[:index]), own[index]])
            mixed.append(torch.einsum("s,sbf->bf", self.mix[index].softmax(0), parts))
        return mixed

    def _feature(self, record: TapRecord, base: Tensor, index: int) -> Tensor:
        if self.regime == "per_task_dense":
            return self.features(record, base, index)[-1]
        side = self.side(index)
        feature = side(self._read(record, index), base)
        return project(self.taps.backbone, feature, self._links[1].in_features, tokens=side.in_token_space)

    def _enter(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._logits = None
        if self.bypass or not len(self.sides):
            return None
        base, record = self.taps.base_feature(args[0]), self.taps.take()
        self.base = base.detach() if self.keeps_base else None
        newest = len(self.sides) - 1
        if not self.training and self.per_task:
            if self.known_task is None and newest:
                feature, self._logits = self._answer(record, base)
                return (feature, *args[1:])
            newest = newest if self.known_task is None else self.known_task
        return (self._feature(record, base, newest), *args[1:])

    def _leave(self, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        answer, self._logits = self._logits, None
        return None if answer is None else answer.to(logits.dtype)

    def _rows(self, feature: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """Columns of a task, and its calibrated logits ``(batch, columns)``."""
        head = self._links[1]
        columns = (self.owner == task).nonzero()[:, 0]
        bias = None if head.bias is None else head.bias[columns]
        return columns, F.linear(feature.to(head.weight.dtype), head.weight[columns], bias) / self.temperature[columns]

    def _answer(self, record: TapRecord, base: Tensor) -> tuple[Tensor, Tensor]:
        """The newest side network's feature, and logits of all tasks."""
        n = len(self.sides)
        assert self.router is not None
        log_p = None if self.routing == "logits" else self.router.log_probabilities(base, self.owner, n)
        if self.routing == "prototype":
            assert log_p is not None
            return self._answer_by_one(record, base, log_p.argmax(1))
        features = self.features(record, base, n - 1)
        logits = base.new_full((len(base), len(self.owner)), HIDDEN_LOGIT)
        for task in range(n):
            columns, rows = self._rows(features[task], task)
            logits[:, columns] = rows.to(logits.dtype)
        if log_p is None:
            return features[-1], logits
        routed = torch.full_like(logits, HIDDEN_LOGIT)
        for task in range(n):
            columns = (self.owner == task).nonzero()[:, 0]
            routed[:, columns] = log_p[:, task, None].to(logits.dtype) + logits[:, columns].log_softmax(1)
        if self.routing == "both":
            routed = torch.logaddexp(logits.log_softmax(1), routed)
        return features[-1], routed.clamp_min(HIDDEN_LOGIT)

    def _answer_by_one(self, record: TapRecord, base: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Each sample runs through its own task's side network alone."""
        feature = base.new_zeros(len(base), self._links[1].in_features)
        logits = base.new_full((len(base), len(self.owner)), HIDDEN_LOGIT)
        for task in range(len(self.sides)):
            rows = (chosen == task).nonzero()[:, 0]
            if len(rows):
                own = self._feature(record.rows(rows), base[rows], task)
                columns, values = self._rows(own, task)
                feature[rows] = own.to(feature.dtype)
                logits[rows[:, None], columns] = values.to(logits.dtype)
        known = self.known_classes
        if known is not None and len(known) in (1, len(base)):
            self._fill_known(record, base, chosen, logits, known)
        return feature, logits

    def _fill_known(self, record: TapRecord, base: Tensor, chosen: Tensor, logits: Tensor, known: Tensor) -> None:
        """Put the order of a sample's known classes below the logits of the task that answers, as whole numbers."""
        least = logits.masked_fill(logits == HIDDEN_LOGIT, torch.inf).amin(1, keepdim=True).floor()
        for task in range(len(self.sides)):
            columns = (self.owner == task).nonzero()[:, 0]
            rows = (known[:, columns].any(1) & (chosen != task)).nonzero()[:, 0]
            if len(rows):
                _, values = self._rows(self._feature(record.rows(rows), base[rows], task), task)
                rank = values.argsort(dim=1, descending=True, stable=True).argsort(1)
                logits[rows[:, None], columns] = least[rows] - 1 - rank.to(logits.dtype)

    @torch.no_grad()
    def calibrate(self, logits: Tensor, labels: Tensor) -> None:
        """Fit the newest task's temperature, from 1 to 10: the one with the least cross-entropy on samples of it.

        Below 1 it would sharpen: training samples are fitted already, so they always ask for that, and the task that
        fits its own best would then answer for all the others.

        Args:
            logits: of the classifier with the newest side network ``(samples, classes)``, not calibrated.
            labels: ``(samples,)``.
        """
        columns = (self.owner == len(self.sides) - 1).nonzero()[:, 0]
        targets = (labels[:, None] == columns).int().argmax(1)
        grid = torch.logspace(0, 1, 41, device=logits.device)
        losses = torch.stack([F.cross_entropy(logits[:, columns].float() / t, targets) for t in grid])
        self.temperature[columns] = grid[losses.argmin()].to(self.temperature.dtype)


def _match_number(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Bring the side networks to the number that a state dict holds."""
    assert isinstance(module, SideBank)
    numbers = {int(k[len(prefix) :].split(".")[1]) for k in state if k.startswith(f"{prefix}sides.")}
    while len(module.sides) > len(numbers):
        del module.sides[-1]
        if len(module.mix):
            module.mix = nn.ParameterList(list(module.mix)[:-1])
    with torch.random.fork_rng():  # what is drawn here is overwritten
        while len(module.sides) < len(numbers):
            module.add()


def _freeze_earlier(module: nn.Module, _: Any) -> None:
    assert isinstance(module, SideBank)
    module.freeze_earlier()
