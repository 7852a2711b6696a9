"""What all side-tuning callbacks share: freezing, tapping, one side network or several, routing between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cl_plugins._processes import gather_rows
from cl_plugins.adapters.side_bank import Regime, Routing, SideBank, check_choice
from cl_plugins.attach import plugin_modules
from cl_plugins.backbones import Backbone, find_backbone
from cl_plugins.decay import exempt_from_decay
from cl_plugins.features import collect_features
from cl_plugins.side_network import SideNetwork
from cl_plugins.side_routing import TaskRouter
from cl_plugins.taps import backbone_taps

from .baselines import FrozenBackbone

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.plugin import ContinualCallback
    from cl_plugins.task import Stream, Task


class SideCallback(FrozenBackbone):
    """Base of the side-tuning methods; a subclass says how a side network is built.

    WHEN: freezes and attaches at ``setup``; adds or freezes side networks before each task. Class means of the frozen
        feature, which tell tasks apart, are taken before a task (of the first one behind it), temperatures behind it.

    Args:
        regime: "shared", "first_session", "per_task" or "per_task_dense", see :mod:`cl_plugins.adapters.side_bank`.
        routing: "prototype", "logits", "posterior" or "both": who answers in the evaluation of the per-task regimes.
        warm_start: begin a new task's side network with the weights of the one before.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.
        seed: of the initial weights.

    Raises:
        ValueError: for an unknown regime or routing; at ``setup`` for a backbone that the side network does not fit.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    plugin: ClassVar[str] = "side"
    feature: ClassVar[Literal["untouched", "frozen", "adapted", "side"]] = "side"
    regimes: ClassVar[tuple[str, ...]] = get_args(Regime)

    def __init__(
        self,
        regime: Regime = "shared",
        routing: Routing = "both",
        *,
        warm_start: bool = False,
        backbone: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, head)
        check_choice("regime", regime, self.regimes)
        check_choice("routing", routing, get_args(Routing))
        self.regime, self.routing, self.warm_start, self.seed = regime, routing, warm_start, seed
        self._stream: Stream | None = None
        self._grew = False
        self._decay: list[RemovableHandle] = []

    # what a method overrides

    def factory(self, backbone: Backbone, head: nn.Linear) -> Callable[[], SideNetwork]:
        """What makes a side network; ``functools.partial`` of a module class, so that it can be copied."""
        raise RuntimeError(f"`{type(self).__name__}` builds no side network; use one of its subclasses")

    def initialize_side(self, module: nn.Module, side: SideNetwork) -> None:
        """Give a new side network its first weights, without data."""

    def initialize(self, module: nn.Module, loader: Iterable[Any]) -> None:
        """Give a new side network its first weights from the task's data; :func:`~cl_plugins.fit_stream` calls it."""

    def reads_data(self) -> bool:
        """Whether :meth:`initialize` takes something from the task's data."""
        return False

    def grows(self) -> bool:
        """Whether each task gets a side network of its own."""
        return self.regime in ("per_task", "per_task_dense")

    def conflict(self, other: ContinualCallback, module: nn.Module) -> str | None:
        """A computed classifier, when its sums would mix the features of several side networks."""
        if other.training != "none" or not self.grows():
            return None
        return (
            f"regime={self.regime!r} gives each task a feature of its own, and the sums of one computed classifier"
            " cannot hold several; use regime='first_session' or 'shared'"
        )

    # the life of a task

    def bank(self, module: nn.Module) -> SideBank:
        """The side networks of ``module``.

        Raises:
            RuntimeError: before :meth:`install`.
        """
        bank = dict(plugin_modules(module).items()).get(self.plugin)
        if not isinstance(bank, SideBank):
            raise RuntimeError("`install` must come first; train with fit_stream, or call it once by hand")
        return bank

    def install(self, module: nn.Module) -> None:
        """Tap the backbone, hook the side networks to the classifier and freeze the rest."""
        found, head, plugins = (
            find_backbone(module, self.backbone, text=True),
            self.find(module),
            plugin_modules(module),
        )
        if self.plugin not in plugins:
            build = self.factory(found, head)
            with torch.random.fork_rng():
                build()  # a faulty option is told here rather than at the first task
            taps = backbone_taps(module, found, head)
            taps.frozen = True
            router = TaskRouter(head.out_features, head.in_features)
            bank = SideBank(head, taps, build, self.regime, self.routing, router).to(head.weight.device)
            plugins[self.plugin] = bank.train(module.training)
        super().install(module)

    def start_task(self, module: nn.Module, task: Task) -> None:
        """Set the masks; add a side network where the regime asks for one, and freeze the earlier ones."""
        super().start_task(module, task)
        bank = self.bank(module)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 1_000_003 + task.index)
            self._grew = bank.start(task.index, task.classes)
            if self._grew and self.warm_start and len(bank.sides) > 1:
                bank.active.load_state_dict(bank.side(len(bank.sides) - 2).state_dict())
            elif self._grew:
                self.initialize_side(module, bank.active)

    @torch.no_grad()
    def prepare_router(self, module: nn.Module, loader: Iterable[Any]) -> None:
        """Add the newest task to what tells tasks apart, so that it is chosen while it trains; for hand-written loops.

        Its temperature is 1 until :meth:`fit_router`. A repeated call changes nothing.

        Args:
            module: where :meth:`start_task` was called.
            loader: the task's training data, in a fixed order and without augmentation; read once.
        """
        bank = self.bank(module)
        if bank.router is None or bank.router.knows(bank.owner == len(bank.sides) - 1):
            return
        bank.bypass = True
        try:
            features, labels = collect_features(module, self.find(module), loader)
        finally:
            bank.bypass = False
        bank.router.accumulate(gather_rows(features), gather_rows(labels))

    @torch.no_grad()
    def fit_router(self, module: nn.Module, loader: Iterable[Any]) -> None:
        """Do what is left of :meth:`prepare_router`, and calibrate the task's logits; for hand-written loops.

        Args:
            module: where :meth:`install` was called.
            loader: the task's training data, in a fixed order and without augmentation; read twice, and once behind
                :meth:`prepare_router`.
        """
        self.prepare_router(module, loader)
        bank, head = self.bank(module), self.find(module)
        if bank.router is None or self.routing == "prototype":
            return
        known, bank.known_task = bank.known_task, len(bank.sides) - 1
        try:
            features, labels = collect_features(module, head, loader)
        finally:
            bank.known_task = known
        features, labels = gather_rows(features), gather_rows(labels)
        weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
        bank.calibrate(nn.functional.linear(features, weight, bias), labels)

    def adapter_modules(self, module: nn.Module) -> dict[str, nn.Module]:
        """The side network that trains."""
        bank = self.bank(module)
        trains = len(bank.sides) and any(p.requires_grad for p in bank.active.parameters())
        return {f"{self.plugin}.{len(bank.sides) - 1}": bank.active} if trains else {}

    def own_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The side networks' parameters and the classifier's."""
        bank = {f"{self.plugin}.{n}": p for n, p in self.bank(module).named_parameters() if p.requires_grad}
        return {**bank, **super().own_parameters(module)}

    # the runner's and Lightning's hooks

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Keep the stream, which has the data for starting weights and for the router.

        Raises:
            ValueError: for a per-task regime on tasks that share classes, before the first of them is trained.
        """
        if self.regime in ("per_task", "per_task_dense"):
            classes = [c for task in stream.tasks for c in task.classes]
            twice = sorted({c for c in classes if classes.count(c) > 1}) if len(set(classes)) < len(classes) else []
            if twice:
                raise ValueError(
                    f"`regime='{self.regime}'` must have tasks with classes of their own, got classes"
                    f" {twice[:8]!r} in several; use regime='shared'"
                )
        self._stream = stream

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Prepare the task, and take starting weights from its data where the method asks for them."""
        super().on_task_start(trainer, pl_module, task)
        if not self._grew:
            return
        fresh = not (self.warm_start and task.index)
        if self._stream is None:
            if fresh and self.reads_data():
                warnings.warn(
                    f"`{type(self).__name__}` takes the first weights of its side network from the task's data, which a"
                    " Trainer alone does not hand out before training, so they stay random here; train with"
                    " fit_stream(trainer, module, stream), or call `start_task` and `initialize` in a loop of your own",
                    stacklevel=2,
                )
            return
        pl_module.to(trainer.strategy.root_device)
        if fresh:
            self.initialize(pl_module, self._stream.train_loader_for_features(task.index))
        if len(self.bank(pl_module).sides) > 1:  # one alone answers for all samples
            with torch.random.fork_rng():  # iterating draws, and what other plugins draw stays the same
                self.prepare_router(pl_module, self._stream.train_loader_for_features(task.index))

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Finish the task, and fit what is left of the router."""
        super().on_task_end(trainer, pl_module, task)
        if self.bank(pl_module).per_task and self._stream is not None:
            pl_module.to(trainer.strategy.root_device)
            self.fit_router(pl_module, self._stream.train_loader_for_features(task.index))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep weight decay away from gates, blends and mixing weights."""
        super().on_fit_start(trainer, pl_module)
        bank = self.bank(pl_module)
        spared = [*bank.mix, *(bank.active.undecayed() if len(bank.sides) else [])]
        for optimizer in trainer.optimizers:
            self._decay += exempt_from_decay(spared, optimizer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End what holds for one fit."""
        super().teardown(trainer, pl_module, stage)
        for handle in self._decay:
            handle.remove()
        self._decay.clear()
