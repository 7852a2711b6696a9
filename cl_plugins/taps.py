"""Taps: the tokens between the blocks of a frozen backbone, taken without building a graph through it.

This is the one place where side networks meet the backbone. The pass through it runs under ``no_grad`` and in eval mode
whatever the parent module does, so autograd keeps no tensor of it, dropout never makes two passes differ, and what was
taken once can be stored and replayed (see :mod:`cl_plugins.feature_cache`).

    tap 0      tokens that enter block 0, after embedding, position and pre-norm
    tap i + 1  output of block i, before any final norm                          (batch, tokens, dim)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_plugins.attach import own_memory, plugin_modules
from cl_plugins.backbones import Backbone
from cl_plugins.side_network import SideNetwork, TapRecord
from cl_plugins.tokens import is_causal, output_width, text_position, token_layout


def is_row_ids(value: Any) -> bool:
    """Whether ``value`` stands for rows of a feature cache instead of images: an int64 vector."""
    return isinstance(value, Tensor) and value.ndim == 1 and value.dtype == torch.int64


class _Enough(Exception):
    """Ends the pass through the backbone behind the last block that anything reads."""


class BackboneTaps(nn.Module):
    """Takes taps whenever the backbone runs; nothing of the user's module changes but what it keeps for backward.

    WHEN: :meth:`attach` puts a bound method in front of the backbone's ``forward_features`` (timm), ``forward``
    (open_clip's towers) or ``encode_text`` (a CLIP that is its own text tower); hooks on the blocks copy references to
    their outputs.

    Args:
        backbone: what to tap.

    Raises:
        RuntimeError: when another adapter already replaced that method.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> from cl_plugins.backbones import find_backbone
        >>> vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
        >>> taps = BackboneTaps(find_backbone(vit)).attach()
        >>> taps.want([0, 2])
        >>> _ = vit.train()(torch.zeros(1, 3, 8, 8))
        >>> record = taps.take()
        >>> sorted(record.taps), record.taps[2].requires_grad, vit.training
        ([0, 2], False, False)
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.wanted: set[int] = set()
        self.wants_image = backbone.kind == "text"  # token ids tell the mask and where the feature is read
        self.needs_final = True
        self.whole_in_eval = False
        self.frozen = True
        self.registers: Sequence[Tensor] = ()
        self.norms: Sequence[Mapping[str, Mapping[str, nn.Parameter]]] = ()
        self.choose: Callable[[], SideNetwork | None] | None = None
        self.reader: Callable[[Tensor], tuple[TapRecord, Tensor]] | None = None
        self._backbone = (backbone,)  # in a tuple, so that its weights are not saved twice
        self._record: TapRecord | None = None
        self._replayed: Tensor | None = None
        self._running = False
        self._handles: list[Any] = []

    @property
    def backbone(self) -> Backbone:
        """The backbone that is tapped."""
        return self._backbone[0]

    @property
    def running(self) -> bool:
        """Whether the backbone's own pass is under way."""
        return self._running

    def want(self, indices: Iterable[int], *, image: bool = False) -> None:
        """Take these taps, and the image, from now on, beside those wanted before.

        Raises:
            ValueError: for an index outside 0 to the number of blocks.
        """
        indices, depth = set(indices), len(self.backbone.blocks)
        outside = sorted(i for i in indices if not 0 <= i <= depth)
        if outside:
            raise ValueError(f"`indices` must be taps of the backbone, 0 to {depth}, got {outside!r}")
        self.wanted |= indices
        self.wants_image |= image

    @property
    def _method(self) -> str:
        if self.backbone.kind == "text" and hasattr(self.backbone.model, "encode_text"):
            return "encode_text"
        return "forward_features" if self.backbone.kind == "timm" else "forward"

    def attach(self) -> BackboneTaps:
        """Start tapping; a repeated call changes nothing."""
        if self._handles:
            return self
        model = self.backbone.model
        if self._method in vars(model):
            raise RuntimeError(
                f"`{type(model).__name__}.{self._method}` must be the backbone's own, but another adapter replaced it;"
                " detach that one first"
            )
        setattr(model, self._method, self._forward)
        self._handles.append(self.backbone.blocks[0].register_forward_pre_hook(self._enter_first))
        for index, block in enumerate(self.backbone.blocks):
            self._handles.append(block.register_forward_pre_hook(partial(self._enter, index)))
            self._handles.append(block.register_forward_hook(partial(self._leave, index)))
        return self

    def substitute_at(self, head: nn.Module) -> None:
        """Let replayed features enter ``head`` in place of what comes from the skipped backbone."""
        self._handles.append(head.register_forward_pre_hook(self._substitute, prepend=True))

    def detach(self) -> None:
        """Give the backbone its own method back."""
        vars(self.backbone.model).pop(self._method, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> TapRecord:
        """The record of the last pass, once.

        Raises:
            RuntimeError: when the backbone did not run since the last call.
        """
        if self._record is None:
            raise RuntimeError(
                f"the backbone's `{self._method}` must run before its classifier, got no pass;"
                " call the backbone itself in `forward`, not its blocks"
            )
        record, self._record = self._record, None
        return record

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        model = self.backbone.model
        self._replayed = None
        if is_row_ids(x):
            return self._replay(x)
        if model.training or any(block.training for block in self.backbone.blocks):
            model.eval()  # a parent's train() flips it each epoch
        if self.choose is not None:
            self._adapt(self.choose())
        self._record = self._told(TapRecord(image=x.detach() if self.wants_image else None))
        self._running = True
        try:
            with (
                torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen),
                _exchanged(self.backbone.blocks, self.norms),
            ):
                return getattr(type(model), self._method)(model, x, *args, **kwargs)
        except _Enough:
            return self._blank(len(x), x)
        finally:
            self._running = False

    def _adapt(self, side: SideNetwork | None) -> None:
        adaptation = None if side is None else side.adaptation()
        self.registers, self.norms = ((), ()) if adaptation is None else (adaptation.registers, adaptation.norms)
        self.frozen = adaptation is None  # what was put in must receive gradients through the backbone

    def again(self, image: Tensor, side: SideNetwork) -> TapRecord:
        """The taps of a further pass, in which ``side`` adapts the backbone.

        Args:
            image: what the backbone was given.
            side: one of the networks beside it.
        """
        before = self.choose, self.needs_final, self.whole_in_eval
        self.choose, self.needs_final, self.whole_in_eval = lambda: side, False, False
        try:
            self._forward(image)
        finally:
            self.choose, self.needs_final, self.whole_in_eval = before
        return self.take()

    def _replay(self, ids: Tensor) -> Tensor:
        if self.reader is None:
            raise RuntimeError(
                "the input must be images, got a vector of int64, which stands for rows of a feature cache, and no"
                " cache is open; put CacheFeatures into the callbacks"
            )
        record, self._replayed = self.reader(ids)
        self._record = self._told(record)
        return self._blank(len(ids), self._replayed)

    def _told(self, record: TapRecord) -> TapRecord:
        """A record that says how a text tower reads its token ids."""
        if self.backbone.kind == "text":
            assert record.image is not None
            record.position = text_position(self.backbone, record.image)
            record.causal = is_causal(self.backbone)
        return record

    def _blank(self, batch: int, like: Tensor) -> Tensor:
        """Zeros in the shape of the backbone's output; a hook on the classifier puts the feature there."""
        if self.backbone.kind == "timm":
            layout = token_layout(self.backbone)
            return like.new_zeros(1, 1, 1).expand(batch, layout.prefix + 1, self.backbone.embed_dim)
        if not like.is_floating_point():
            like = next(self.backbone.model.parameters())
        return like.new_zeros(1, 1).expand(batch, output_width(self.backbone))

    def base_feature(self, given: Tensor) -> Tensor:
        """What the frozen backbone put in front of the classifier: ``given``, or the stored feature in a replay.

        A view of all tokens is copied: who keeps the feature keeps nothing else.
        """
        feature, self._replayed = self._replayed, None
        return own_memory(given) if feature is None else feature

    def _substitute(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.base_feature(args[0]), *args[1:])

    @property
    def _batch_first(self) -> bool:
        """Whether blocks take ``(batch, tokens, dim)``; old open_clip towers have the tokens first."""
        transformer = getattr(self.backbone.model, "transformer", None)
        return self.backbone.kind == "timm" or bool(getattr(transformer, "batch_first", True))

    def _by_sample(self, tokens: Tensor) -> Tensor:
        """A block's input or output as ``(batch, tokens, dim)``."""
        return tokens if self._batch_first else tokens.transpose(0, 1)

    def _enter_first(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        if self._running and self._record is not None and 0 in self.wanted:
            self._record.taps[0] = self._by_sample(args[0])

    def _enter(self, index: int, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._running or not self.registers:
            return None
        tokens = self._by_sample(args[0])
        register = self.registers[index].to(tokens.dtype)
        return (self._by_sample(torch.cat([register.expand(len(tokens), -1, -1), tokens], 1)), *args[1:])

    def _leave(self, index: int, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._running or self._record is None:
            return None
        if index + 1 in self.wanted:
            self._record.taps[index + 1] = self._by_sample(output)
        enough = index + 1 >= max(self.wanted, default=len(self.backbone.blocks))
        if enough and not self.needs_final and (self.training or not self.whole_in_eval):
            raise _Enough
        if not self.registers:
            return None
        return self._by_sample(self._by_sample(output)[:, self.registers[index].shape[1] :])


def backbone_taps(module: nn.Module, backbone: Backbone, head: nn.Module) -> BackboneTaps:
    """The one tap of ``backbone`` under ``module.plugins``; side networks, which freeze it, and caches share it."""
    plugins = plugin_modules(module)
    if "taps" not in plugins:
        made = BackboneTaps(backbone).attach()
        made.substitute_at(head)
        made.frozen = False
        plugins["taps"] = made
    taps = plugins["taps"]
    assert isinstance(taps, BackboneTaps)
    return taps


@contextmanager
def _exchanged(
    blocks: Sequence[nn.Module], norms: Sequence[Mapping[str, Mapping[str, nn.Parameter]]]
) -> Iterator[None]:
    """The blocks compute with other weights of their norms inside; without ``norms`` nothing changes."""
    own: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for block, of_block in zip(blocks, norms, strict=False):
            for name, values in of_block.items():
                norm = getattr(block, name)
                for key, value in values.items():
                    own.append((norm, key, getattr(norm, key)))
                    setattr(norm, key, value)
        yield
    finally:
        for norm, key, value in own:
            setattr(norm, key, value)


@contextmanager
def tapping(backbone: Backbone, indices: Iterable[int]) -> Iterator[BackboneTaps]:
    """Tap a backbone inside a block.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> from cl_plugins.backbones import find_backbone
        >>> vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
        >>> with tapping(find_backbone(vit), [1]) as taps:
        ...     _ = vit(torch.zeros(2, 3, 8, 8))
        ...     taps.take().taps[1].shape
        torch.Size([2, 5, 16])
    """
    taps = BackboneTaps(backbone).attach()
    try:
        taps.want(indices)
        yield taps
    finally:
        taps.detach()
