"""The plain baselines: a masked head, a masked head on a frozen backbone, and no training at all.

loss = CE(logits[task's classes], y)        MaskedHead: everything trains; FrozenBackbone: the head alone
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from cl_plugins.attach import EvalGuard, OwnFeature, freeze, plugin_modules
from cl_plugins.backbones import find_backbone
from cl_plugins.heads import find_head, head_mask, protect_rows
from cl_plugins.plugin import ContinualCallback
from cl_plugins.task import Task

if TYPE_CHECKING:
    import pytorch_lightning as pl


class MaskedHead(ContinualCallback):
    """Trains each task on its own classes' logits, so that new classes do not push old ones down.

    WHEN: the mask is set before each task; rows of other classes stay bitwise as they are, also under weight decay.

    Args:
        head: dotted name of the classifier, for modules where it cannot be told.

    Raises:
        ValueError: at ``setup`` when no classifier is found.

    Example:
        >>> from cl_plugins import Task
        >>> net, method = nn.Sequential(nn.Linear(4, 3)), MaskedHead(head="0")
        >>> method.install(net)
        >>> method.start_task(net, Task(0, (0, 1)))
        >>> net.plugins["head_mask"].seen()
        [0, 1]
    """

    modalities: ClassVar[tuple[str, ...]] = ("image", "multi-label")

    def __init__(self, head: str | None = None) -> None:
        super().__init__()
        self.head = head
        self._protections: list[RemovableHandle] = []

    def find(self, module: nn.Module) -> nn.Linear:
        """The classifier of ``module``."""
        return find_head(module, name=self.head)[1] if self.head else find_head(module, _backbone_or_none(module))[1]

    def install(self, module: nn.Module) -> None:
        """Hook the mask to the classifier."""
        head_mask(module, self.find(module))

    def start_task(self, module: nn.Module, task: Task) -> None:
        """Show the task's classes in training and all classes so far in evaluation."""
        head_mask(module, self.find(module)).start(task.classes)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Protect the rows of other classes from weight decay."""
        super().on_fit_start(trainer, pl_module)
        assert self._task is not None
        head = self.find(pl_module)
        others = sorted(set(range(head.out_features)) - set(self._task.classes))
        for optimizer in trainer.optimizers:
            protection = protect_rows(head, others, optimizer)
            if protection is not None:
                self._protections.append(protection)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the protection with the fit."""
        super().teardown(trainer, pl_module, stage)
        while self._protections:
            self._protections.pop().remove()


class ZeroShot(ContinualCallback):
    """Trains nothing: the model as it came, evaluated after every task, for models that classify by text.

    WHEN: freezes the whole module at ``setup``; no ``fit`` takes place.

    Example:
        >>> net = nn.Linear(4, 3)
        >>> ZeroShot().install(net)
        >>> net.weight.requires_grad
        False
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "none"
    modalities: ClassVar[tuple[str, ...]] = ("image-text", "text")

    def install(self, module: nn.Module) -> None:
        """Freeze everything."""
        freeze(module)

    def conflict(self, other: ContinualCallback, module: nn.Module) -> str | None:
        """What trains has nothing to train here."""
        if other.training == "required":
            return f"ZeroShot freezes the whole module, and {type(other).__name__} would train nothing"
        return None


class FrozenBackbone(MaskedHead):
    """Trains the masked classifier alone, on a backbone that stays as it was pretrained.

    WHEN: freezes at ``setup`` and keeps the backbone in eval mode from then on.

    Args:
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.
    """

    feature: ClassVar[Literal["untouched", "frozen", "adapted", "side"]] = "frozen"

    def __init__(self, backbone: str | None = None, head: str | None = None) -> None:
        super().__init__(head)
        self.backbone = backbone

    def find(self, module: nn.Module) -> nn.Linear:
        """The classifier of ``module``."""
        return find_head(module, find_backbone(module, self.backbone, text=True), self.head)[1]

    def install(self, module: nn.Module) -> None:
        """Freeze all but the classifier, hook the mask to it and give it features in memory of their own."""
        super().install(module)
        head, plugins = self.find(module), plugin_modules(module)
        if "own_feature" not in plugins:
            plugins["own_feature"] = OwnFeature(head)
        freeze_backbone(module, head, self.backbone)

    def own_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The classifier's weight and bias."""
        return {f"head.{k}": p for k, p in self.find(module).named_parameters()}


def freeze_backbone(module: nn.Module, head: nn.Module, backbone: str | None = None) -> None:
    """Freeze everything in ``module`` but its classifier and keep the backbone in eval mode; idempotent."""
    found = find_backbone(module, backbone, text=True)
    plugins = plugin_modules(module)
    freeze(module, except_=[head, *plugins.values()])
    if "eval_guard" not in plugins:
        plugins["eval_guard"] = EvalGuard(found.model)


def _backbone_or_none(module: nn.Module) -> Any:
    try:
        return find_backbone(module)
    except ValueError:
        return None  # any module with one linear classifier can have its head masked
