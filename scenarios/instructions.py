"""Streams of text tasks: prompts with masked instructions, answers by greedy decoding, exact match as accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_plugins.byte_tokenizer import ByteTokenizer, Tokenizer
from cl_plugins.causal_lm import IGNORED
from cl_plugins.generation import answers
from cl_plugins.task import Task

from ._seeds import check_seed
from .data import Split
from .instruction_rules import rule_task
from .stream import TaskStream
from .text_data import TextTask, read_tasks

DEFAULT_RULES = ("upper-case", "next-letters", "reverse", "double-letters", "sort-letters", "drop-vowels")
RIGHT, WRONG = 0, 1


@dataclass(frozen=True)
class PromptCollator:
    """Makes a batch of text examples; only the answers carry a loss.

    Args:
        tokenizer: turns text into ids.
        max_tokens: of a prompt with its answer; longer prompts lose their beginning.

    Returns:
        A dict with "input_ids", "attention_mask" and "labels" ``(batch, tokens)`` for training, padded on the right;
        "prompt_ids" and "prompt_mask" ``(batch, prompt tokens)`` for generation, padded on the left; the texts
        "instructions", "inputs", "outputs" and "images" as lists; and "label", always 0 (a right answer).
    """

    tokenizer: Tokenizer
    max_tokens: int = 1024

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch from dicts with "instruction", "input" and "output"."""
        prompts, sequences = [], []
        for sample in samples:
            answer = [*self.tokenizer.encode(sample["output"]), self.tokenizer.eos_id]
            if len(answer) >= self.max_tokens:
                raise ValueError(
                    f"`max_tokens` must exceed the longest answer, {len(answer)} tokens, got {self.max_tokens!r}"
                )
            text = prompt_text(sample["instruction"], sample["input"])
            prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(text)][-(self.max_tokens - len(answer)) :]
            prompts.append(prompt)
            sequences.append((prompt, answer))
        pad = self.tokenizer.pad_id
        input_ids = _padded([p + a for p, a in sequences], pad)
        return {
            "input_ids": input_ids,
            "attention_mask": _padded([[1] * len(p + a) for p, a in sequences], 0),
            "labels": _padded([[IGNORED] * len(p) + a for p, a in sequences], IGNORED),
            "prompt_ids": _padded(prompts, pad, left=True),
            "prompt_mask": _padded([[1] * len(p) for p in prompts], 0, left=True),
            "label": torch.tensor([sample["label"] for sample in samples]),
            **{f"{key}s": [sample[key] for sample in samples] for key in ("instruction", "input", "output", "image")},
        }


def prompt_text(instruction: str, text: str) -> str:
    r"""What the model reads before it answers.

    Example:
        >>> prompt_text("Reverse the word.", "abc")
        'Reverse the word.\nabc\n'
    """
    return f"{instruction}\n{text}\n" if text else f"{instruction}\n"


def _padded(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    length = max(len(row) for row in rows)
    fill = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for row, f in zip(rows, fill, strict=True)])


class InstructionStream(TaskStream):
    """A stream of text tasks, learned one after the other and scored by exact match of greedy answers.

    Every task has the two classes "right" and "wrong", and every test sample the label "right"; :meth:`predict`
    answers the prompt and gives the logits of the two. So the accuracy matrix, and all numbers from it, are of exact
    matches.

    Args:
        tasks: text tasks, or names of rules; the built-in :data:`DEFAULT_RULES` when None.
        root: folder of tasks to read instead, see :func:`~cl_plugins.scenarios.text_data.read_tasks`.
        format: of the files in ``root``: ``"jsonl"``, ``"coin"`` or ``"trace"``.
        n_train: training examples per rule.
        n_test: test examples per rule.
        test_wordings: of the rules: ``"same"`` as in training, or ``"unseen"`` paraphrases, to see what a method that
            reads the instruction does with one it has not met. Training does not depend on it.
        order_seed: shuffles the tasks; None keeps their order.
        data_seed: of the rules' examples and of the order of samples.
        tokenizer: turns text into ids; bytes by default.
        max_tokens: of a prompt with its answer.
        name: for reports and checkpoints.
        batch_size: in training, per process.
        eval_batch_size: for answers.
        num_workers: processes that prepare batches.

    Raises:
        ValueError: for two tasks of one name, no task, both ``tasks`` and ``root``, faulty files, or unseen wordings
            of tasks that are no rules.

    Example:
        >>> stream = InstructionStream(["reverse", "add"], n_train=8, n_test=2, batch_size=4)
        >>> sorted(next(iter(stream.train_dataloader())))[:4]
        ['attention_mask', 'images', 'input_ids', 'inputs']
    """

    modality: str = "text"

    def __init__(
        self,
        tasks: Sequence[TextTask | str] | None = None,
        *,
        root: str | Path | None = None,
        format: str = "jsonl",
        n_train: int = 500,
        n_test: int = 100,
        test_wordings: str = "same",
        order_seed: int | None = None,
        data_seed: int = 0,
        tokenizer: Tokenizer | None = None,
        max_tokens: int = 1024,
        name: str = "instructions",
        batch_size: int = 32,
        eval_batch_size: int = 100,
        num_workers: int = 0,
    ) -> None:
        if root is not None and tasks is not None and not all(isinstance(t, str) for t in tasks):
            raise ValueError(
                "`tasks` must be names of folders, or None, beside `root`, got text tasks; give one of the two"
            )
        if root is None and format != "jsonl":
            raise ValueError(f"`root` must be a folder of files in format {format!r}, got None")
        if test_wordings != "same" and (root is not None or not all(isinstance(t, str) for t in tasks or ())):
            raise ValueError(
                f"`test_wordings` must be 'same' for tasks that are no rules, got {test_wordings!r};"
                " their test examples hold their own instructions"
            )
        data_seed = check_seed("data_seed", data_seed)
        if root is not None:
            made = read_tasks(root, None if tasks is None else [str(t) for t in tasks], format)
        else:
            chosen: Sequence[TextTask | str] = DEFAULT_RULES if tasks is None else tasks
            made = [
                t if isinstance(t, TextTask) else rule_task(t, n_train, n_test, data_seed, 3, test_wordings)
                for t in chosen
            ]
        if order_seed is not None:
            order = np.random.default_rng(check_seed("order_seed", order_seed)).permutation(len(made))
            made = [made[i] for i in order]
        names = [t.name for t in made]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"`tasks` must have distinct names, got {twice[0]!r} twice; rename one of them")
        self.text_tasks: tuple[TextTask, ...] = tuple(made)
        self.tokenizer: Tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        self.max_tokens = max_tokens
        super().__init__(
            [
                Task(i, (RIGHT, WRONG), t.name, t.description or t.instructions[0], ("right", "wrong"))
                for i, t in enumerate(made)
            ],
            train=_split([t.train for t in made]),
            test=_split([t.test for t in made]),
            validation=_split([t.validation for t in made]) if any(t.validation for t in made) else None,
            name=name,
            class_order=(RIGHT, WRONG),
            seeds={"order": order_seed, "data": data_seed},
            shared_classes=True,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            collate_fn=PromptCollator(self.tokenizer, max_tokens),
        )
        self.use_tokenizer(self.tokenizer)

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Turn text into the ids of another tokenizer, such as that of the model to be trained."""
        self.tokenizer = tokenizer
        self.collate_fn = PromptCollator(tokenizer, self.max_tokens)
        longest = max((e.output for t in self.text_tasks for e in [*t.train, *t.test]), key=lambda x: len(x.encode()))
        self.max_new_tokens = len(tokenizer.encode(longest)) + 1

    def instructions(self, index: int) -> list[str]:
        """Distinct instructions of a task's training data, for grouping."""
        return self.text_tasks[index].instructions

    def test_instructions(self, index: int) -> list[str]:
        """The instruction of every test example of a task, one entry per example."""
        return [e.instruction for e in self.text_tasks[index].test]

    def predict(self, module: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Logits ``(batch, 2)`` of a right and a wrong answer; pass it to ``fit_stream`` as ``predict``."""
        made = answers(module, batch, self.tokenizer, self.max_new_tokens)
        hits = torch.tensor([m == o.strip() for m, o in zip(made, batch["outputs"], strict=True)])
        return torch.stack([hits, ~hits], dim=1).float().to(batch["prompt_ids"].device)

    def provenance(self) -> dict[str, Any]:
        """Plain values that say what the stream is, with the names and instructions of its tasks."""
        texts = [{"name": t.name, "instructions": t.instructions[:20]} for t in self.text_tasks]
        return {**super().provenance(), "texts": texts}

    def _present(self, split: Split) -> set[int]:
        return {RIGHT, WRONG}  # no sample is labeled "wrong"


def _split(tasks: Sequence[Sequence[Any]]) -> Split:
    source = [asdict(example) for examples in tasks for example in examples]
    task_of = np.repeat(np.arange(len(tasks)), [len(examples) for examples in tasks])
    return Split.by_task(source, np.zeros(len(source), np.int64), task_of, len(tasks))
