"""OnePrompt: one set of attention prefixes for all tasks on a frozen backbone.

"OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning", Wei-Cheng Huang,
Chun-Fu (Richard) Chen and Hsiang Hsu, ICLR 2024, arXiv 2402.04129, its OnePrompt part. Implemented: the shared
prefixes and the masked classifier. Left to the user's module: the published optimizer (a new Adam per task, learning
rate 1e-3, no weight decay, :func:`cl_plugins.outliers.ovor_learning_rate`), 50 epochs a task, images in [0, 1].

Formulas::

    y = proj(softmax(q [P_k; k]^T / sqrt(head_dim)) [P_v; v])        P: rows of `lengths`, blocks 0 to 4
    loss = CE(logits[task's classes], label)                         prompts and classifier train, nothing else
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from cl_plugins.adapters.prefix_prompt import PrefixPrompt
from cl_plugins.attach import plugin_modules
from cl_plugins.backbones import find_backbone

from .baselines import FrozenBackbone

if TYPE_CHECKING:
    from cl_plugins.plugin import ContinualCallback
    from cl_plugins.task import Task


class OnePrompt(FrozenBackbone):
    """Learns one prompt for all tasks: key and value prefixes in the first blocks of a frozen transformer.

    There is no pool, no key and no query pass: one forward pass per image, in training and in evaluation. The prompt
    goes on from task to task; rows of the classifier that belong to other tasks stay bitwise as they are.

    WHEN: attaches and freezes at ``setup``; sets the classifier's mask before each task.

    Args:
        lengths: prompt rows per block index, even; half are keys, half values. None for the published ones: 10 in
            blocks 0 and 1, 40 in blocks 2, 3 and 4, as far as the backbone has these blocks.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.
        seed: for the initial prompt, uniform in [0, 1) as published.

    Raises:
        ValueError: for odd lengths; at ``setup`` for blocks that do not exist or an attention that takes no prefix.

    Example:
        >>> from cl_plugins import Task
        >>> from cl_plugins.backbones import vit_glyph
        >>> net, method = vit_glyph(num_classes=10), OnePrompt()
        >>> method.install(net)
        >>> method.start_task(net, Task(0, (0, 1)))
        >>> sum(p.numel() for p in net.parameters() if p.requires_grad)  # (2 * 10 + 3 * 40) * 128 + 129 * 10
        19210
    """

    feature: ClassVar[Literal["untouched", "frozen", "adapted", "side"]] = "adapted"

    def __init__(
        self,
        lengths: Mapping[int, int] | None = None,
        *,
        backbone: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, head)
        self.lengths = None if lengths is None else {int(b): n for b, n in lengths.items()}
        self.seed = seed
        PrefixPrompt(1, self.lengths)  # refuses odd lengths here rather than at setup

    def prompt(self, module: nn.Module) -> PrefixPrompt:
        """The prefixes beside ``module``.

        Raises:
            RuntimeError: before :meth:`install`.
        """
        prompt = dict(plugin_modules(module).items()).get("one_prompt")
        if not isinstance(prompt, PrefixPrompt):
            raise RuntimeError("`install` must come first; train with fit_stream, or call it once by hand")
        return prompt

    def install(self, module: nn.Module) -> None:
        """Attach the prefixes and freeze all but them and the classifier."""
        found, plugins = find_backbone(module, self.backbone), plugin_modules(module)
        if "one_prompt" not in plugins:
            weight = next(found.blocks[0].parameters())
            prompt = PrefixPrompt(found.embed_dim, self.lengths, seed=self.seed).attach(found.blocks)
            plugins["one_prompt"] = prompt.to(weight.device, weight.dtype if weight.is_floating_point() else None)
        self.prompt(module).attach(found.blocks)
        super().install(module)

    def start_task(self, module: nn.Module, task: Task) -> None:
        """Show the task's classes in training and all classes so far in evaluation."""
        super().start_task(module, task)
        self.prompt(module).frozen = False
        if len(task.classes) == 1:
            warnings.warn(
                f"task {task.index} has one class: its cross-entropy is always 0, so it cannot train the prompt",
                stacklevel=2,
            )

    def conflict(self, other: ContinualCallback, module: nn.Module) -> str | None:
        """Another callback with this prompt."""
        return "both own the one prompt; OVOR trains it as OnePrompt does" if isinstance(other, OnePrompt) else None

    def adapter_modules(self, module: nn.Module) -> dict[str, nn.Module]:
        """The prefixes that the forward pass must reach."""
        slots = self.prompt(module).slots.items()
        return {
            f"one_prompt.{block}": s for block, s in slots if any(p.numel() and p.requires_grad for p in s.parameters())
        }

    def own_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The prompts and the classifier's weight and bias."""
        prompts = {f"{n}.prompt": p for n, s in self.adapter_modules(module).items() for p in s.parameters()}
        return {**prompts, **super().own_parameters(module)}
