"""Tasks with similar instructions share weights: each group of tasks has its own copy of what trains.

Paper: "Large Continual Instruction Assistant", Jingyang Qiao, Zhizhong Zhang, Xin Tan, Yanyun Qu, Shouhong Ding, Yuan
Xie, ICML 2025, arXiv 2410.10868, section 4.5. Implemented: reuse or expand at a task's start, and the choice of a
group per sample at test time. With :class:`~cl_plugins.callbacks.BalancedEMA` it is the paper's whole method; each
works without the other.

    task like group j:  train from the group's weights, average them        `BalancedEMA(active="reused")`
    task like none:     train a new group from the last weights (`start`), without an average
    test sample:        weights of the group whose instructions resemble its own
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_plugins.feature_groups import FeatureGroups
from cl_plugins.group_match import Match
from cl_plugins.grouped_prediction import predict_by_group
from cl_plugins.instruction_groups import InstructionGroups, task_texts
from cl_plugins.module_average import ParameterFilter
from cl_plugins.plugin import ContinualCallback, plugins_of
from cl_plugins.task import Stream, Task

if TYPE_CHECKING:
    import pytorch_lightning as pl

Weights = dict[str, Tensor]


class TaskGroups(ContinualCallback):
    """Gives every group of similar tasks its own weights.

    WHEN: before a task its texts choose a group, whose weights are loaded; after it they are stored. Each test sample
    is answered with its own group's weights: by ``fit_stream`` on streams of instructions, else through :meth:`routed`.

    Args:
        groups: the codebook; TF-IDF with the three options below when None. :class:`FeatureGroups` for tasks without
            text, with ``texts`` giving features.
        texts: texts of a task, or its features ``(samples, dim)``; by default the stream's ``instructions(index)``,
            else description or class names.
        start: weights of a new group: ``"last"``, as the task before left them, or ``"fresh"``, as before the first
            task.
        include: regular expression; only parameters whose name it finds belong to a group.
        exclude: regular expression; parameters whose name it finds are shared by all groups.
        plugins: only what these plugins own, by their names under ``module.plugins``.
        threshold: similarity from which a group is reused, as of :class:`InstructionGroups`;
            ``"loose"`` when None.
        reduce: similarity of a task to a group from its pairs of texts, ``"mean"`` when None.
        unmatched: group of a test text below the threshold, ``"best"`` when None.

    Raises:
        ValueError: for an unknown ``start``, options of a codebook beside ``groups``, or features without ``texts``.

    Example:
        >>> net, groups = nn.Linear(1, 1, bias=False), TaskGroups()
        >>> for index, text in enumerate(["Sort the letters", "Add both numbers"]):
        ...     task = Task(index, (0, 1), description=text)
        ...     groups.start_task(net, task)
        ...     _ = nn.init.constant_(net.weight, index)
        ...     groups.end_task(net, task)
        >>> with groups.weights_of(net, 0):
        ...     net.weight.item()
        0.0
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "neutral"
    needs_steps: ClassVar[bool] = True

    def __init__(
        self,
        groups: InstructionGroups | FeatureGroups | None = None,
        texts: Callable[[Task], Any] | None = None,
        start: Literal["last", "fresh"] = "last",
        include: str | None = None,
        exclude: str | None = None,
        plugins: Sequence[str] | None = None,
        threshold: float | str | None = None,
        reduce: Literal["mean", "max"] | None = None,
        unmatched: Literal["best", "last", "error"] | None = None,
    ) -> None:
        super().__init__()
        told: dict[str, Any] = {"threshold": threshold, "reduce": reduce, "unmatched": unmatched}
        told = {k: v for k, v in told.items() if v is not None}
        if groups is not None and told:
            raise ValueError(f"`groups` is a codebook and holds its options, got {', '.join(told)} beside it")
        if start not in ("last", "fresh"):
            raise ValueError(f"`start` must be 'last' or 'fresh', got {start!r}")
        if isinstance(groups, FeatureGroups) and texts is None:
            raise ValueError("`texts` must give the features of a task beside FeatureGroups, got None")
        self.groups: Any = InstructionGroups(**told) if groups is None else groups
        self.texts = texts
        self.start = start
        self.weights: list[Weights] = []
        self._chosen = ParameterFilter(include, exclude, plugins)
        self._filtered = any(f is not None for f in (include, exclude, plugins))
        self._fresh: Weights | None = None
        self._match: Match | None = None
        self._stream: Stream | None = None

    def conflict(self, other: ContinualCallback, module: nn.Module) -> str | None:
        """Methods that grow, unless the user says which parameters belong to a group, and evaluations inside tasks."""
        if type(other).__name__ == "ContinualEvaluation":
            return "inside a task the weights of its group are not stored, so no sample could be answered with them"
        if self._filtered or not other.grows():
            return None
        return (
            f"{type(other).__name__} adds parameters with each task, which the weights of an earlier group do not have;"
            " say with `exclude` or `plugins` what belongs to a group"
        )

    def start_task(self, module: nn.Module, task: Task) -> None:
        """Choose the task's group and load its weights.

        Raises:
            ValueError: for a task name that a group holds already, or texts that cannot be compared.
        """
        self._task = task
        if self._fresh is None:
            self._fresh = self._copy(module)
        if any(h["task"] == task.name for h in self.groups.history):
            raise ValueError(f"`task` must have a name of its own, got {task.name!r} a second time")
        match = self.groups.match(self._texts_of(task))
        if not match.expanded:
            self._load(module, self.weights[match.group])
        elif self.start == "fresh":
            self._load(module, self._fresh)
        self._match = match

    def end_task(self, module: nn.Module, task: Task) -> None:
        """Store the weights in the task's group.

        Raises:
            RuntimeError: without a preceding :meth:`start_task`.
        """
        if self._match is None:
            raise RuntimeError(f"`end_task` must follow `start_task`, got the end of {task.name!r} alone")
        group = self.groups.commit(self._match, task.name)
        self.weights[group : group + 1] = [self._copy(module)]
        self._match = None

    def reused(self, task: Task) -> bool:
        """Whether the present task trains a group that was there before; for ``BalancedEMA(active=...)``."""
        return self._match is not None and not self._match.expanded

    @contextmanager
    def weights_of(self, module: nn.Module, group: int) -> Iterator[None]:
        """The group's weights inside the block; the present ones return, whatever happens.

        Raises:
            IndexError: for a group that does not exist.
        """
        if not 0 <= group < len(self.weights):
            raise IndexError(f"`group` must be one of {len(self.weights)} groups, got {group!r}")
        parameters = dict(module.named_parameters())
        saved = {n: parameters[n].detach().clone() for n in self.weights[group] if n in parameters}
        self._load(module, self.weights[group])
        try:
            yield
        finally:
            self._load(module, saved)

    def routed(
        self,
        predict: Callable[[nn.Module, Any], Tensor],
        allocate: Callable[[Any], Sequence[int]] | None = None,
    ) -> Callable[[nn.Module, Any], Tensor]:
        """``predict`` with each sample's own group, for streams that :meth:`predictor` does not know.

        Args:
            predict: gives logits ``(batch, classes)`` of a batch, such as ``stream.predict``.
            allocate: the group of each sample of a batch; by default from the texts in ``batch["instructions"]``.
        """

        def chosen(module: nn.Module, batch: Any) -> Tensor:
            if not self.weights:
                return predict(module, batch)  # an evaluation before any training
            groups = list(self.groups.allocate_samples(batch["instructions"]) if allocate is None else allocate(batch))
            return predict_by_group(predict, module, batch, groups, self.weights_of)

        return chosen

    def predictor(self, predict: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
        """:meth:`routed` on a stream whose samples carry their instructions; else ``predict``."""
        return self.routed(predict) if callable(getattr(self._stream, "instructions", None)) else predict

    def report_events(self, module: nn.Module) -> list[dict[str, Any]]:
        """Per task its group, the similarity to each group and the reason; and where its test prompts go at present.

        The latter is the share of (at most 500) test prompts that find their task's group by their instruction, on
        streams that tell ``test_instructions(index)``.
        """
        events = [
            {"name": "TaskGroups/group", "task": i, "group": h["group"], "scores": h["scores"], "reason": h["reason"]}
            for i, h in enumerate(self.groups.history)
        ]
        told = getattr(self._stream, "test_instructions", None)
        if not callable(told) or isinstance(self.groups, FeatureGroups) or self.groups.unmatched == "error":
            return events
        for i, h in enumerate(self.groups.history):
            texts = told(i)
            texts = texts[:: max(1, math.ceil(len(texts) / 500))]
            share = self.groups.share_allocated(texts, h["group"])
            events.append({"name": "TaskGroups/allocated", "task": i, "share": share})
        return events

    def _texts_of(self, task: Task) -> Any:
        if self.texts is not None:
            return self.texts(task)
        told = getattr(self._stream, "instructions", None)
        return told(task.index) if callable(told) else task_texts(task)

    def _copy(self, module: nn.Module) -> Weights:
        return {n: p.detach().to("cpu", copy=True) for n, p in self._chosen.of(module).items()}

    @torch.no_grad()
    def _load(self, module: nn.Module, weights: Weights) -> None:
        parameters = dict(module.named_parameters())
        for name, value in weights.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise RuntimeError(
                    f"`{name}` must keep its shape {tuple(value.shape)} once a group has it;"
                    " leave what other plugins grow out with `exclude`"
                )
            parameters[name].copy_(value)

    # Lightning's and the runner's hooks

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Remember whose instructions to read, and refuse those that cannot be compared before any training.

        Raises:
            ValueError: for two tasks of one name, or texts that cannot be compared, naming the task.
        """
        self._stream = stream
        names = [task.name for task in stream.tasks]
        twice = [n for n in names if names.count(n) > 1]
        if twice:
            raise ValueError(f"`stream` must have tasks with names of their own, got {twice[0]!r} twice; rename one")
        for task in stream.tasks if not isinstance(self.groups, FeatureGroups) else ():
            try:
                self.groups.checked(self._texts_of(task))
            except (TypeError, ValueError) as error:
                raise type(error)(f"task {task.name!r}: {error}") from None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse grown parameters among those of a group, before the first step.

        Raises:
            RuntimeError: for a method that grows, whose new parameters ``exclude`` and the like do not leave out.
        """
        super().on_train_start(trainer, pl_module)
        chosen = {id(p): name for name, p in self._chosen.of(pl_module).items()}
        for other in plugins_of(trainer):
            modules = other.adapter_modules(pl_module).values() if other.grows() else ()
            grown = next((chosen[id(p)] for m in modules for p in m.parameters() if id(p) in chosen), None)
            if grown is not None:
                raise RuntimeError(
                    f"`exclude` must leave out what {type(other).__name__} adds with each task, got {grown!r} among the"
                    " weights of a group; an earlier group does not have what is added later"
                )

    def state_dict(self) -> dict[str, Any]:
        """Codebook, weights of the groups and the present decision."""
        return {
            "groups": self.groups.state_dict(),
            "weights": [dict(w) for w in self.weights],
            "fresh": self._fresh,
            "match": None if self._match is None else self._match.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.groups.load_state_dict(state_dict["groups"])
        self.weights = [dict(w) for w in state_dict["weights"]]
        self._fresh = state_dict["fresh"]
        saved = state_dict["match"]
        self._match = None if saved is None else Match.from_state_dict(saved)
