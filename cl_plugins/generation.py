"""Answers of a causal language model: greedy decoding, exact match and ROUGE-L."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from cl_plugins.batches import to_device
from cl_plugins.byte_tokenizer import Tokenizer
from cl_plugins.evaluation import evaluating
from cl_plugins.plugin import module_device


def greedy_decode(
    model: Callable[..., Any],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: int,
    eos_id: int,
    check_every: int = 4,
) -> Tensor:
    """The most likely next token, again and again, with cached keys and values.

    Args:
        model: takes ``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values`` and ``use_cache``, as
            models of transformers and :class:`~cl_plugins.causal_lm.CausalLM` do.
        prompt_ids: ``(batch, tokens)``, padded on the left.
        prompt_mask: ``(batch, tokens)``, 0 for padding.
        max_new_tokens: longest answer, its end token included.
        eos_id: ends an answer; everything behind it is ``eos_id`` too.
        check_every: steps between two looks whether all answers have ended, each of which waits for the device.

    Returns:
        ``(batch, at most max_new_tokens)`` ids.

    Raises:
        ValueError: for a prompt padded on the right, or no token to make.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be 1 or more, got {max_new_tokens!r}")
    if not bool(prompt_mask[:, -1].all()):
        raise ValueError("`prompt_ids` must be padded on the left, got prompts whose last token is padding")
    ids, mask, past = prompt_ids, prompt_mask, None
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    answer = []
    for step in range(max_new_tokens):
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
        token = output.logits[:, -1].argmax(-1).masked_fill(ended, eos_id)
        answer.append(token)
        ended = ended | (token == eos_id)
        if (step + 1) % check_every == 0 and bool(ended.all()):
            break
        ids, past, positions = token[:, None], output.past_key_values, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(answer, dim=1)


def answers(module: nn.Module, batch: dict[str, Any], tokenizer: Tokenizer, max_new_tokens: int) -> list[str]:
    """The texts that a module answers to a batch's prompts, without white space around them."""
    model: Any = module
    made = greedy_decode(model, batch["prompt_ids"], batch["prompt_mask"], max_new_tokens, tokenizer.eos_id)
    return [tokenizer.decode(row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row).strip()
            for row in made.tolist()]  # fmt: skip


class ExactMatch(Metric):
    """Share of answers that equal their target, white space around them aside.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["yes", " no"], ["yes", "maybe"])
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.correct: Tensor
        self.total: Tensor
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[str], target: list[str]) -> None:
        """Count a batch of texts."""
        if len(preds) != len(target):
            raise ValueError(f"`preds` must be as many as `target`, {len(target)}, got {len(preds)}")
        self.correct += sum(p.strip() == t.strip() for p, t in zip(preds, target, strict=True))
        self.total += len(target)

    def compute(self) -> Tensor:
        """Correct answers over all answers."""
        return self.correct / self.total


def score_answers(
    module: nn.Module, batches: Iterable[dict[str, Any]], tokenizer: Tokenizer, max_new_tokens: int
) -> dict[str, float]:
    """Exact match and ROUGE-L (F1) of a module's answers.

    Args:
        module: answers; its modes are restored.
        batches: with "prompt_ids", "prompt_mask" and "outputs".
        tokenizer: turns ids into text.
        max_new_tokens: longest answer.

    Returns:
        ``exact_match`` and ``rouge_l`` in [0, 1], and the number of answers ``n``.
    """
    from torchmetrics.text import ROUGEScore

    exact, rouge, device = ExactMatch(), ROUGEScore(rouge_keys="rougeL"), module_device(module)
    with evaluating(module):
        for batch in batches:
            texts = answers(module, to_device(batch, device), tokenizer, max_new_tokens)
            exact.update(texts, batch["outputs"])
            rouge.update(texts, batch["outputs"])
    if int(exact.total) == 0:
        raise ValueError("`batches` must hold at least one answer, got none")
    return {
        "exact_match": float(exact.compute()),
        "rouge_l": float(rouge.compute()["rougeL_fmeasure"]),
        "n": float(exact.total),
    }
