"""MoRA: rank-1 experts that grow task by task and activate themselves.

"Little By Little: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive Learning", Haodong Lu,
Chongyang Zhao, Jason Xue, Lina Yao, Kristen Moore and Dong Gong, 2025, arXiv 2506.21035 (MoRAM in its later versions;
not the MoRA of arXiv 2405.12130). Implemented: the method on any linear layers. Left to the user's module: the
published optimizer (AdamW, betas 0.9 and 0.9999, learning rate 5e-4 with cosine, no weight decay, 500 steps a task).

Formula, per token and layer (:mod:`cl_plugins.adapters.rank_experts` has the details)::

    z = A x,  s = z / |z|,  S = the `top_k` largest s,  w = softmax_S(s / `temperature`) [s >= `threshold`]
    y = W x + b + `scaling` sum_{i in S} w_i z_i B_i         A, B: all experts so far; those of the current task train
                                                             threshold: in evaluation only
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from cl_plugins.adapters._rank_experts_functional import ScoreNorm
from cl_plugins.adapters.delta import LinearDelta, adapter_dtype
from cl_plugins.adapters.rank_experts import ExpertOptions, RankExperts
from cl_plugins.evaluation import default_predict, evaluation_tasks, learned_after
from cl_plugins.expert_usage import expert_usage, usage_events
from cl_plugins.targets import QkvMode, Site

from ._linear_adapters import LinearAdapters

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.task import Stream, Task


_MOST_REPORTED = 50


def _spread(n: int) -> list[int]:
    """At most :data:`_MOST_REPORTED` of ``n`` numbers from 0, evenly spread, the last one among them."""
    count = min(n, _MOST_REPORTED)
    return [(k + 1) * n // count - 1 for k in range(count)]


class MoRA(LinearAdapters):
    """Grows rank-1 experts task by task on a frozen model; each token activates the few that answer it best.

    WHEN: attaches and freezes at ``setup``; adds ``rank`` experts to every layer before each task and freezes all older
    ones. Nothing happens at the end of a task. A checkpoint brings its number of tasks along.

    Args:
        rank: new experts per task and layer.
        targets: layers to adapt: a regular expression of the whole dotted name, or a list of its ends; None for
            attention and MLP of every block.
        top_k: experts per token; None for ``rank``.
        min_active: smallest number of experts per token.
        temperature: of the softmax over the chosen scores.
        threshold: in evaluation alone, experts with a lower score are left out; in [0, 1). It grows stricter with the
            number of experts, see ``delta_mode``.
        scaling: factor of the experts' sum.
        dropout: on the experts' input, in [0, 1).
        score_norm: "bank_l2", "cosine" or "none".
        delta_mode: threshold "absolute", or "sqrt_r" to shrink it as experts are added.
        k_schedule: ``top_k`` "constant", or "per_task" to multiply it by the number of tasks.
        qkv_mode: "split" for a bank each on query, key and value where one layer computes them, "fused" for one.
        new_key_init: "kaiming" or "orthogonal_to_old".
        evaluation: "dense", "bag" or "auto": how values are summed.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier; None finds it, False for none.
        seed: for new keys; None for one that follows from torch's seed.
        probe: batches per task that :meth:`report_events` looks at; 0 for no report.

    Raises:
        ValueError: for settings out of range; at ``setup`` when no layer matches or one cannot be adapted.
        RuntimeError: for growth in the middle of a task.

    Example:
        >>> from cl_plugins import Task
        >>> from cl_plugins.backbones import vit_glyph
        >>> net, method = vit_glyph(num_classes=10), MoRA(rank=4)
        >>> method.install(net)
        >>> for task in (Task(0, (0, 1)), Task(1, (2, 3))):
        ...     method.start_task(net, task)
        ...     method.end_task(net, task)
        >>> len(method.banks(net)), method.banks(net)["blocks.0.attn.qkv"].experts
        (24, 8)
    """

    key: ClassVar[str] = "mora"

    def __init__(
        self,
        rank: int = 16,
        targets: str | Sequence[str] | None = None,
        *,
        top_k: int | None = None,
        min_active: int = 2,
        temperature: float = 0.01,
        threshold: float = 0.2,
        scaling: float = 1.0,
        dropout: float = 0.0,
        score_norm: ScoreNorm = "bank_l2",
        delta_mode: Literal["absolute", "sqrt_r"] = "absolute",
        k_schedule: Literal["constant", "per_task"] = "constant",
        qkv_mode: QkvMode = "split",
        new_key_init: Literal["kaiming", "orthogonal_to_old"] = "kaiming",
        evaluation: Literal["dense", "bag", "auto"] = "auto",
        backbone: str | None = None,
        head: str | Literal[False] | None = None,
        seed: int | None = None,
        probe: int = 1,
    ) -> None:
        super().__init__(targets, qkv_mode, backbone, head, seed)
        self.options = ExpertOptions(
            rank, top_k, min_active, temperature, threshold, scaling, dropout, score_norm, delta_mode, k_schedule,
            new_key_init, evaluation,
        )  # fmt: skip
        if probe < 0:
            raise ValueError(f"`probe` must be a number of batches, got {probe!r}")
        self.probe = probe
        self._open: int | None = None
        self._fitting = False
        self._stream: Stream | None = None

    def make(self, site: Site) -> LinearDelta:
        """An empty bank."""
        weight: Any = site.layer.in_proj_weight if site.slot != "output" else site.layer.weight
        return RankExperts(
            site.in_features, site.out_features, self.options, parts=site.parts, of=site.of, device=weight.device,
            dtype=adapter_dtype(weight),
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Plain values that the adapters' files keep."""
        return {**asdict(self.options), "qkv_mode": self.qkv_mode}

    def grows(self) -> bool:
        """Yes: experts are added with each task."""
        return True

    def banks(self, module: nn.Module) -> dict[str, RankExperts]:
        """The banks by the names of their layers."""
        return {n: a for n, a in self.adapters(module).by_site().items() if isinstance(a, RankExperts)}

    def start_task(self, module: nn.Module, task: Task) -> None:
        """Add this task's experts; a repeated call for the task under way adds none.

        Raises:
            RuntimeError: while another task is being trained.
        """
        if self._fitting or (self._open is not None and self._open != task.index):
            raise RuntimeError(
                f"experts of task {task.index} cannot be added in the middle of task {self._open}: the optimizer would"
                " not know them; end the training first, and call `end_task(module, task)` in a loop of your own"
            )
        growing = [b for b in self.banks(module).values() if not b.tasks or b.tasks[-1][0] != task.index]
        for bank in growing:
            bank.check_growth()
        super().start_task(module, task)
        generator = self.generator(task.index)
        for bank in growing:
            bank.grow(task.index, generator)
        self.adapters(module).train()  # the threshold must not act in training, whatever mode the module came in
        self._open = task.index
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # each growth changes shapes; past 8 of them a compiled model would run uncompiled

    def end_task(self, module: nn.Module, task: Task) -> None:
        """Allow the next growth."""
        self._open = None

    def merge(self, module: nn.Module) -> None:
        """Refuse to fold the experts into the model's weights.

        Raises:
            RuntimeError: always, with the reason.
        """
        next(iter(self.banks(module).values())).merge()

    def report_events(self, module: nn.Module) -> list[dict[str, Any]]:
        """Use of the experts per layer and task, on the first test batches of the tasks so far.

        In a stream of more than :data:`_MOST_REPORTED` tasks it is told so many times, for so many tasks at most: for
        all tasks after each, the record would grow with the cube of their number.
        """
        banks = self.banks(module)
        learned = {task for bank in banks.values() for task, _ in bank.tasks}
        if self._stream is None or not self.probe or not learned:
            return []
        newest, n = max(learned), len(self._stream.tasks)
        if newest not in _spread(n):
            return []
        columns = evaluation_tasks(self._stream)[: learned_after(self._stream, newest)]
        tasks = [columns[i] for i in _spread(len(columns))]
        predict = getattr(self._stream, "predict", default_predict)
        usages = {
            t.index: expert_usage(module, banks, islice(iter(self._stream.test_loader(t.index)), self.probe), predict)
            for t in tasks
        }
        return usage_events(self.key, usages, {t.index: t.name for t in tasks}, newest)

    # Lightning's hooks

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Remember where test data come from."""
        self._open, self._fitting, self._stream = None, False, stream

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Allow no growth from here on."""
        super().on_train_start(trainer, pl_module)
        self._fitting = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Allow growth again."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._open, self._fitting = None, False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Allow growth again: Lightning calls no ``teardown`` after an exception."""
        self._open, self._fitting = None, False
