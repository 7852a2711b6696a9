"""Balanced averaging: the weights that are kept are a moving average whose speed follows from gradients and weights.

Paper: "Large Continual Instruction Assistant", Jingyang Qiao, Zhizhong Zhang, Xin Tan, Yanyun Qu, Shouhong Ding, Yuan
Xie, ICML 2025, arXiv 2410.10868. Implemented: the averaging, for any module and optimizer; the rules are in
:mod:`cl_plugins.ema_rules`, the grouping of tasks in :mod:`cl_plugins.instruction_groups`. Training itself is
unchanged: the average enters no forward pass until the task ends.

    E_0 = theta_0;   E_t = (1 - alpha_t) E_{t-1} + alpha_t theta_t          after every real optimizer step t
    alpha_t = kappa (1 + |g_t|_1) / (|theta_t - E_{t-1}|_1 |g_t - g_{t-1}|_1) per tensor, else `fallback`
    at the end of a task: theta <- E
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from cl_plugins._lightning import callbacks_of
from cl_plugins.ema import BalancedAverager
from cl_plugins.ema_rules import Rule, make_rule
from cl_plugins.evaluation import taught_columns
from cl_plugins.module_average import ModuleAverage, ParameterFilter, put_average
from cl_plugins.plugin import ContinualCallback, Row
from cl_plugins.task import Stream, Task

from .task_groups import TaskGroups

if TYPE_CHECKING:
    import pytorch_lightning as pl

_SHARDED = ("DeepSpeed", "FSDP", "ModelParallel", "XLAFSDP")


class BalancedEMA(ContinualCallback):
    """Ends every task with an average of the weights that balances what the task taught against what was there before.

    WHEN: the average starts from the weights before the first step and moves after every real optimizer step (after
    unscaling and clipping, once per accumulation window, never for a step that mixed precision skipped). It stands in
    for the weights during validation, and replaces them at the end of the task, before anything is evaluated.

    Args:
        rule: name of a rule in :data:`cl_plugins.ema_rules.RULES`, or a ``Rule``. ``"horizon"``, the default, keeps a
            share of the weights before the task. ``"released"`` is the paper's code: on related tasks it was 6 to 12
            points of accuracy below (turned digits at three sizes, glyph domains at one, five seeds, docs/ema.md).
        kappa: speed of ``"released"``; 2 in the released code, which belongs to tensors of about a million elements.
        fallback: weight where the formula gives none; 0.01 in the released code.
        decay: weight of the old value for ``"fixed"``, in [0, 1); 0.99 when left out.
        rho: speed of ``"dimension_free"`` as a fraction of one Adam step; 0.02 when left out.
        keep: for ``"horizon"``, the share of the weights before the task in the average at its end, in (0, 1); 0.5 when
            left out, as on turned digits. It needs the number of steps, so a Trainer with ``max_epochs``.
        granularity: what shares a weight: ``"tensor"`` (as released), ``"module"`` or ``"global"``.
        include: regular expression; only parameters whose name it finds are averaged.
        exclude: regular expression; parameters whose name it finds are not.
        plugins: average only what these plugins own, by their names under ``module.plugins``.
        active: tasks that are averaged: ``"after_first"``, since averaging slows a first task and it forgets nothing,
            ``"always"``, ``"reused"`` for those that train on in a group of :class:`TaskGroups` (the paper's), or a
            function of the task. Training that is no task of a stream is averaged always.
        evaluate: what validation during training sees, ``"average"`` or ``"weights"``.
        finalize: put the average into the module at the end of a task; without it :meth:`averaged` alone shows it.
        start: ``"before_first_step"``, or ``"after_first_step"`` as in the released code.
        tag: tells several averages of one Trainer apart in its checkpoints.

    Raises:
        ValueError: for an option out of range, or a constant that the rule does not read.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1, bias=False)
        >>> ema, sgd = BalancedEMA("fixed", decay=0.5), torch.optim.SGD(net.parameters(), lr=1.0)
        >>> _ = nn.init.zeros_(net.weight)
        >>> ema.watch(net, sgd)
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> _ = sgd.step()
        >>> ema.end_task(net, Task(0, (0,)))
        >>> net.weight.tolist()
        [[-0.5, -0.5]]
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "neutral"
    needs_steps: ClassVar[bool] = True

    def __init__(
        self,
        rule: str | Rule = "horizon",
        kappa: float | None = None,
        fallback: float | None = None,
        decay: float | None = None,
        rho: float | None = None,
        keep: float | None = None,
        granularity: str = "tensor",
        include: str | None = None,
        exclude: str | None = None,
        plugins: Sequence[str] | None = None,
        active: Literal["always", "after_first", "reused"] | Callable[[Task], bool] = "after_first",
        evaluate: Literal["average", "weights"] = "average",
        finalize: bool = True,
        start: Literal["before_first_step", "after_first_step"] = "before_first_step",
        tag: str = "",
    ) -> None:
        super().__init__()
        if evaluate not in ("average", "weights"):
            raise ValueError(f"`evaluate` must be 'average' or 'weights', got {evaluate!r}")
        if active not in ("always", "after_first", "reused") and not callable(active):
            raise ValueError(
                f"`active` must be 'always', 'after_first', 'reused' or a function of a task, got {active!r}"
            )
        constants = {"kappa": kappa, "fallback": fallback, "decay": decay, "rho": rho, "keep": keep}
        given = {k: v for k, v in constants.items() if v is not None}
        if isinstance(rule, Rule) and given:
            raise ValueError(f"`rule` is a Rule and holds its constants, got {', '.join(given)} beside it")
        self.rule = rule if isinstance(rule, Rule) else make_rule(rule, **given)
        self.average = ModuleAverage(
            BalancedAverager(self.rule, granularity, start), ParameterFilter(include, exclude, plugins)
        )
        self.active = active
        self.evaluate = evaluate
        self.finalize = finalize
        self.tag = tag
        self._loaded: dict[str, Any] | None = None
        self._reports: dict[int, dict[str, Any]] = {}
        self._stream: Stream | None = None
        self._plainly: tuple[int, float] | None = None  # the newest task without an average, its accuracy

    @property
    def state_key(self) -> str:
        """The class and the tag, so that two averages of one Trainer keep their own states."""
        return f"BalancedEMA[{self.tag}]" if self.tag else "BalancedEMA"

    # usable without a Trainer

    def watch(self, module: nn.Module, *optimizers: Optimizer, steps: int | None = None) -> None:
        """Begin an average at the present weights and move it after each step of the optimizers.

        Args:
            module: owns the parameters.
            *optimizers: of the module; several may share parameters.
            steps: of the task, for rule ``"horizon"``, the default.

        Raises:
            RuntimeError: when nothing trains, or no optimizer holds what should be averaged.
            ValueError: for rule ``"horizon"`` without ``steps``.
        """
        if self.rule.name == "horizon":
            self.rule.constant(steps)  # refused now and not inside the first step
        self.average.averager.total_steps = steps
        self.average.begin(module)
        self.average.attach(module, optimizers)

    def start_task(self, module: nn.Module, task: Task) -> None:
        """Remember the task, which decides with ``active`` whether it is averaged."""
        self._task = task

    def end_task(self, module: nn.Module, task: Task) -> None:
        """Put the average into the module, unless the end of training already did."""
        self._task = task  # the end of a fit forgot it
        self._finish(module)

    @contextmanager
    def averaged(self, module: nn.Module) -> Iterator[None]:
        """The average in place of the weights inside the block; the weights return bit by bit, whatever happens.

        Raises:
            RuntimeError: when there is no average, or it is in place already.
        """
        if not self.average.running:
            raise RuntimeError(
                "there is no average beside the weights; it exists from the start of training to its end"
            )
        self.average.swap_in(module)
        try:
            yield
        finally:
            self.average.swap_out()

    def evaluation_weights(self, module: nn.Module) -> AbstractContextManager[None]:
        """The average, where validation sees it too."""
        return self.averaged(module) if self.average.running and self.evaluate == "average" else nullcontext()

    def averaged_state_dict(self, module: nn.Module, only_averaged: bool = False) -> dict[str, Tensor]:
        """Copies of the module's state with the average in place of the weights, for export.

        Args:
            module: owns the parameters.
            only_averaged: leave out everything that is not averaged, such as a frozen backbone.
        """
        state = {k: v.detach().clone() for k, v in module.state_dict().items()}
        names: list[str] = list(self.average.chosen.of(module))
        if self.average.running:
            names = self.average.averager.names
            for name, average in zip(names, self.average.averager.averages, strict=True):
                state[name] = average.to(state[name].dtype, copy=True)
        return {k: v for k, v in state.items() if k in names} if only_averaged else state

    def report_events(self, module: nn.Module) -> list[dict[str, Any]]:
        """One series per task: quartiles over tensors of the weight at evenly spaced steps, share of fallbacks."""
        return [{"name": f"{self.state_key}/weight", "task": task, **report} for task, report in self._reports.items()]

    def _finish(self, module: nn.Module) -> None:
        if not self.average.running:
            return
        log = self.average.averager.log
        self._reports[0 if self._task is None else self._task.index] = {
            **log.series(),
            "fallback_share": log.share_of_fallbacks(),
        }
        self.average.swap_out()
        self.average.detach()
        if self.finalize:
            self.average.finalize(module)
            self.average.end()

    # Lightning's hooks

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Remember which task teaches what is evaluated."""
        self._stream = stream

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two averages that a checkpoint could not tell apart."""
        super().setup(trainer, pl_module, stage)
        if any(c.state_key == self.state_key for c in self._others(trainer)):
            raise ValueError(f"`tag` must differ between the averages of a Trainer, got {self.tag!r} twice")
        if self.active == "reused":
            _groups_of(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the average, or continue a saved one; the module is complete, loaded and on its device here."""
        super().on_fit_start(trainer, pl_module)
        kind = type(trainer.strategy).__name__
        launcher = type(getattr(trainer.strategy, "launcher", None)).__name__
        if kind.startswith(_SHARDED):
            raise RuntimeError(
                f"`strategy` must leave whole gradients on each process, got {kind}, which shards or hides them;"
                " use strategy='ddp' or a single device"
            )
        if launcher.startswith("_MultiProcessing"):
            raise RuntimeError(
                f"`strategy` must not spawn processes, got {kind} with a spawn or fork launcher; use 'ddp'"
            )
        mine = set(self.average.chosen.of(pl_module))
        for other in self._others(trainer):
            if other.average.running and not mine.isdisjoint(other.average.averager.names):
                shared = min(mine.intersection(other.average.averager.names))
                raise RuntimeError(
                    f"{shared!r} must belong to one average, got two; use `include`, `exclude` or `plugins`"
                )
        state, self._loaded = self._loaded, None
        self.average.end()
        if self._is_active(trainer):
            self.average.begin(pl_module, None if state is None else state["average"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the task's steps; earlier it would build the loaders before a resumed position is known."""
        super().on_train_start(trainer, pl_module)
        if self.average.running:
            self.average.averager.total_steps = self._steps(trainer)

    def _others(self, trainer: pl.Trainer) -> list[BalancedEMA]:
        return [c for c in callbacks_of(trainer) if isinstance(c, BalancedEMA) and c is not self]

    def _steps(self, trainer: pl.Trainer) -> int | None:
        if self.rule.name != "horizon":
            return None
        steps = trainer.estimated_stepping_batches
        count = int(steps) if steps != float("inf") else None
        self.rule.constant(count)
        return count

    def _is_active(self, trainer: pl.Trainer) -> bool:
        if self._task is None or self.active == "always":
            return True
        if self.active == "reused":
            return _groups_of(trainer).reused(self._task)
        return self.active(self._task) if callable(self.active) else self._task.index > 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hook the optimizers behind everyone else's hooks, and again when one of them got more parameters."""
        if self.average.running and self.average.stale(trainer.optimizers):
            self.average.attach(pl_module, trainer.optimizers)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in: during training, or when a checkpoint was loaded whose average is not in its weights."""
        if trainer.state.fn != "fit":
            self._swap_loaded(pl_module)
        elif self.average.running and self.evaluate == "average" and not trainer.sanity_checking:
            self.average.swap_in(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back, before any checkpoint is written."""
        self.average.swap_out()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average of a checkpoint in that was loaded with ``ckpt_path``."""
        self._swap_loaded(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back."""
        self.average.swap_out()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average of a checkpoint in that was loaded with ``ckpt_path``."""
        self._swap_loaded(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back."""
        self.average.swap_out()

    def _swap_loaded(self, module: nn.Module) -> None:
        if self._loaded is not None and self._loaded["average"] is not None:
            self.average.swap_in(module, self._loaded["average"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the module before any plugin finishes the task and before the last checkpoint."""
        self._finish(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same for a checkpoint of finished training, whose resumed fit has no step left."""
        self._finish(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the weights back and leave the optimizers."""
        self.average.swap_out()
        self.average.detach()
        self._loaded = None

    def on_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: Row) -> None:
        """Warn when a task was learned half as well under the average as one without: the two answers do not mix."""
        taught = taught_columns(self._stream, row.after) if self._stream is not None and row.after >= 0 else ()
        correct, total = (sum(counts[j] or 0 for j in taught) for counts in (row.correct, row.total))
        if total == 0:  # a task that adds nothing to what is evaluated
            return
        accuracy = correct / total
        if row.after not in self._reports:
            self._plainly = row.after, accuracy
        elif self._plainly is not None and accuracy < self._plainly[1] / 2:
            warnings.warn(
                f"task {row.after} was learned to {accuracy:.2f} under the average and task {self._plainly[0]} to"
                f" {self._plainly[1]:.2f} without: averages suit tasks that share answers; let TaskGroups keep others"
                " apart, or average less (`keep`, `kappa`, `decay`)",
                stacklevel=2,
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave module and optimizers as they are without this callback."""
        super().teardown(trainer, pl_module, stage)
        self.average.swap_out()
        self.average.detach()
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; ``average`` is None once it is in the weights."""
        average = self.average.averager.state_dict() if self.average.running else None
        reports, plainly = dict(self._reports), self._plainly and list(self._plainly)
        return {"average": average, "rule": self.rule.name, "reports": reports, "plainly": plainly}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the module is complete and on its device."""
        self._loaded = state_dict
        self._reports = dict(state_dict["reports"])
        known = state_dict.get("plainly")  # older checkpoints do not say
        self._plainly = None if known is None else (known[0], known[1])


def _groups_of(trainer: pl.Trainer) -> TaskGroups:
    found = next((c for c in callbacks_of(trainer) if isinstance(c, TaskGroups)), None)
    if found is None:
        raise ValueError("`active` must not be 'reused' without TaskGroups in the Trainer; add it")
    return found


def load_average(checkpoint: dict[str, Any], module: nn.Module, tag: str = "") -> None:
    """Put the average of a Lightning checkpoint into ``module``, which holds the checkpoint's weights already.

    Args:
        checkpoint: as ``torch.load(path, weights_only=True)`` gives it.
        module: built like the one that was trained.
        tag: of the callback that wrote it.

    Raises:
        ValueError: when the checkpoint has no such average.
        RuntimeError: when the module lacks a parameter.
    """
    key = f"BalancedEMA[{tag}]" if tag else "BalancedEMA"
    state = checkpoint.get("callbacks", {}).get(key)
    if state is None:
        raise ValueError(f"`checkpoint` must be one of a Trainer with {key}, got one without its state")
    if state["average"] is not None:  # else training had ended, and the weights are the average
        put_average(state["average"], module)
