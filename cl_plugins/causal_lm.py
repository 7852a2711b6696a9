"""A small causal language model in plain torch: pre-norm transformer, rotary positions, tied embeddings.

It speaks the calling convention of transformers (``input_ids``, ``attention_mask``, ``position_ids``, ``labels``,
``past_key_values``; ``.loss`` and ``.logits`` come back), so a model of that library takes its place in one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

IGNORED = -100
"""Label of tokens that carry no loss."""

KeyValues = tuple[Tensor, Tensor]


@dataclass
class CausalLMOutput:
    """Output of :class:`CausalLM`.

    Attributes:
        logits: ``(batch, tokens, vocabulary)``.
        loss: mean cross-entropy over tokens with a label; None without labels.
        past_key_values: keys and values of each block, when asked for.
    """

    logits: Tensor
    loss: Tensor | None = None
    past_key_values: list[KeyValues] | None = None


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding of ``x (batch, heads, tokens, head dim)`` at ``positions (batch, tokens)``."""
    half = x.shape[-1] // 2
    speeds = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * speeds  # (batch, 1, tokens, half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with separate projections.

    Args:
        dim: width.
        heads: number of heads; ``dim`` must be divisible by twice as many.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, allowed: Tensor, past: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        """Attend from ``x (batch, tokens, dim)`` to itself and the past where ``allowed (batch, 1, tokens, keys)``."""
        batch, tokens, dim = x.shape
        q, k, v = (
            p(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, positions), rotate(k, positions)  # (batch, heads, tokens, head dim)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return output, (k, v)


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a residual path."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, positions: Tensor, allowed: Tensor, past: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        """``(batch, tokens, dim)`` to the same, and this block's keys and values."""
        mixed, present = self.attn(self.norm1(x), positions, allowed, past)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), present


class CausalLM(nn.Module):
    """A decoder-only transformer for small vocabularies.

    Args:
        vocab_size: number of token ids; 259 for :class:`~cl_plugins.byte_tokenizer.ByteTokenizer`.
        dim: width.
        depth: number of blocks.
        heads: of each block; the head dimension must be even.
        seed: of the initialization, which leaves the global generator alone.

    Raises:
        ValueError: when ``dim`` is not divisible by ``2 * heads``.

    Example:
        >>> model = CausalLM(vocab_size=16, dim=8, depth=1, heads=2)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 16])
    """

    def __init__(self, vocab_size: int = 259, dim: int = 128, depth: int = 4, heads: int = 4, seed: int = 0) -> None:
        super().__init__()
        if dim % (2 * heads):
            raise ValueError(f"`dim` must be divisible by 2 * heads = {2 * heads}, got {dim!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocab_size, dim)
            self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
            self.norm = nn.LayerNorm(dim)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    scale = (2 * depth) ** -0.5 if name.endswith(("o_proj.weight", "mlp.2.weight")) else 1.0
                    nn.init.normal_(parameter, std=0.02 * scale)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Sequence[KeyValues] | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        """Logits of the next token at every position.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, past + tokens)``, 0 for padding on either side.
            position_ids: ``(batch, tokens)``; counted from the mask when left out.
            labels: ``(batch, tokens)``, :data:`IGNORED` where no loss is wanted; shifted here.
            past_key_values: of the tokens before ``input_ids``.
            use_cache: give keys and values back.
        """
        batch, tokens = input_ids.shape
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, past + tokens)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        causal = torch.ones(tokens, past + tokens, dtype=torch.bool, device=input_ids.device).tril(past)
        itself = torch.eye(tokens, past + tokens, dtype=torch.bool, device=input_ids.device).roll(past, 1)
        allowed = (causal & attention_mask[:, None, None, :].bool()) | itself  # padding sees itself, so no row is empty
        x, presents = self.embed(input_ids), []
        for i, block in enumerate(self.blocks):
            x, present = block(x, position_ids, allowed, None if past_key_values is None else past_key_values[i])
            presents.append(present)
        logits = F.linear(self.norm(x), self.embed.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        return CausalLMOutput(logits, loss, presents if use_cache else None)


class LanguageModule(pl.LightningModule):
    """Trains a causal language model on batches of prompts and answers; it knows nothing of tasks.

    Args:
        model: :class:`CausalLM` or one of transformers.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay

    def forward(self, **inputs: Any) -> Any:
        """The model's output."""
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy of the answers' tokens."""
        return self._loss(batch)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the same as ``val_loss``."""
        self.log("val_loss", self._loss(batch), batch_size=len(batch["input_ids"]))

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        loss: Tensor = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what trains."""
        return torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=self.weight_decay
        )
