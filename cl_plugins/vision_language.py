"""Classification by text: an image goes to the class whose name it fits best, as in CLIP.

The loss is the two-part one of arXiv 2506.21035 (Lu, Zhao, Xue, Yao, Moore and Gong, 2025) for its vision-language
streams. Implemented: the loss, class texts of the current task in training, cached texts of all classes in evaluation.
Not implemented: several templates per class.

Formulas, with unit vectors f (images) and t (texts), sigma = `logit_scale`, C = classes of the current task, B =
images, N = |C| + `n_seen`::

    L_i2t = -1/B sum_b log softmax over c in C of (sigma f_b . t_c)[y_b]
    L_t2i = -1/N sum_b log softmax over images b' of (sigma t_{y_b} . f_b')[b]
    L = L_i2t + L_t2i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_plugins.task import Task


class ContrastiveLoss(NamedTuple):
    """The parts of the loss and their sum."""

    image_to_text: Tensor
    text_to_image: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of both parts."""
        return self.image_to_text + self.text_to_image


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, labels: Tensor, logit_scale: Tensor | float, n_seen: int = 0
) -> ContrastiveLoss:
    """The loss of a batch against the texts of the current task's classes.

    Classes of earlier tasks enter through their number alone: they would get no gradient, so they are not needed.

    Args:
        image_features: ``(batch, dim)``, of any length.
        text_features: ``(classes, dim)``, of any length; one per class of the current task.
        labels: ``(batch,)`` rows of ``text_features``.
        logit_scale: factor of the cosines, 100 for OpenAI's models.
        n_seen: classes of earlier tasks.

    Example:
        >>> f = torch.eye(2)
        >>> round(contrastive_loss(f, f, torch.tensor([0, 1]), 10.0).total.item(), 6)
        9.1e-05
    """
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    logits = logit_scale * images @ texts.T  # (batch, classes)
    to_text = F.cross_entropy(logits, labels)
    # the batch may hold several images of a class: each is a target of the class's row
    picked = logits.T.log_softmax(1)[labels, torch.arange(len(labels), device=labels.device)]
    return ContrastiveLoss(to_text, -picked.sum() / (n_seen + len(texts)))


class TextClassifier(nn.Module):
    """Makes a classifier of a model with ``encode_image`` and ``encode_text``, such as those of open_clip.

    In training, texts of the current task's classes alone are encoded, with gradient, once per batch. In evaluation the
    texts of all classes are encoded once and kept until the next training step, :meth:`start_task` or :meth:`forget`.

    Args:
        model: with ``encode_image(x)``, ``encode_text(tokens)`` and ``logit_scale``, whose exponential scales cosines.
        tokenize: texts to token tensors ``(texts, positions)``, as ``open_clip.get_tokenizer(name)`` gives it.
        class_names: one per label.
        template: text of a class, with ``{}`` for its name.
        chunk: texts encoded at once in evaluation.

    Raises:
        ValueError: for a template without ``{}`` or no class.
        TypeError: for a model that does not encode both.
    """

    tokens: Tensor
    current: Tensor
    row: Tensor

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[list[str]], Tensor],
        class_names: Sequence[str],
        template: str = "a photo of a {}.",
        chunk: int = 256,
    ) -> None:
        super().__init__()
        missing = [n for n in ("encode_image", "encode_text", "logit_scale") if not hasattr(model, n)]
        if missing:
            raise TypeError(f"`model` must have {', '.join(missing)}, got {type(model).__name__}")
        if "{}" not in template:
            raise ValueError(f"`template` must hold {{}} for the name of the class, got {template!r}")
        if not class_names:
            raise ValueError("`class_names` must hold at least one name, got none")
        self.model, self.chunk = model, chunk
        self.register_buffer("tokens", tokenize([template.format(n) for n in class_names]), persistent=False)
        # buffers of the current task follow the module to its device, so that no step copies from the host
        self.register_buffer("current", self.tokens[:0], persistent=False)
        self.register_buffer("row", torch.full((len(self.tokens),), -1), persistent=False)
        self.classes: tuple[int, ...] = ()
        self.seen: tuple[int, ...] = ()
        self._texts: Tensor | None = None

    def start_task(self, task: Task) -> None:
        """Train on the classes of ``task`` from now on; MoRA and LoRA call it."""
        outside = [c for c in task.classes if c >= len(self.tokens)]
        if outside:
            raise ValueError(f"`class_names` must cover class {outside[0]}, got {len(self.tokens)} names")
        if task.classes != self.classes:
            self.seen = tuple(dict.fromkeys(self.seen + self.classes))
            self._set_classes(task.classes)
        self.forget()

    def _set_classes(self, classes: tuple[int, ...]) -> None:
        self.classes = classes
        self.current = self.tokens[list(classes)]
        self.row = torch.full_like(self.row, -1)
        self.row[list(classes)] = torch.arange(len(classes), device=self.row.device)

    def get_extra_state(self) -> dict[str, list[int]]:
        """Classes of the current task and of those before: the loss depends on their number after a resume, too."""
        return {"classes": list(self.classes), "seen": list(self.seen)}

    def set_extra_state(self, state: dict[str, list[int]]) -> None:
        """Go on where the state was taken."""
        self.seen = tuple(state["seen"])
        self._set_classes(tuple(state["classes"]))
        self.forget()

    def forget(self) -> None:
        """Encode the texts anew at the next evaluation; call it after changing weights by hand."""
        self._texts = None

    def train(self, mode: bool = True) -> TextClassifier:
        """Set the mode; training makes the kept texts stale."""
        if mode:
            self._texts = None
        return super().train(mode)

    @property
    def scale(self) -> Tensor:
        """Factor of the cosines."""
        scale: Any = self.model.logit_scale
        return torch.as_tensor(scale).exp()

    def encode_texts(self, labels: Sequence[int] | None = None) -> Tensor:
        """Text features ``(labels, dim)``, of all classes when None."""
        encode: Any = self.model.encode_text
        tokens = self.tokens if labels is None else self.tokens[list(labels)]
        return torch.cat([encode(part) for part in torch.split(tokens, self.chunk)])

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of all class names."""
        encode: Any = self.model.encode_image
        features = F.normalize(encode(images), dim=-1)
        if self.training or torch.is_grad_enabled():
            texts = F.normalize(self.encode_texts(), dim=-1)
        else:
            if self._texts is None:
                self._texts = F.normalize(self.encode_texts(), dim=-1)
            texts = self._texts
        return self.scale * features @ texts.to(features.dtype).T

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The two-part loss of a batch of the current task.

        Args:
            images: ``(batch, ...)`` as the model takes them.
            labels: ``(batch,)`` labels of the current task's classes.

        Raises:
            RuntimeError: before :meth:`start_task`.
        """
        if not self.classes:
            raise RuntimeError("`start_task(task)` must be called before `loss`; the MoRA and LoRA callbacks do it")
        self._texts = None
        encode: Any = self.model.encode_image
        encode_text: Any = self.model.encode_text
        n_seen = len(set(self.seen) - set(self.classes))
        parts = contrastive_loss(encode(images), encode_text(self.current), self.row[labels], self.scale, n_seen)
        return parts.total
