"""Text tasks from files: jsonl with instruction, input and output; the formats of the CoIN and TRACE benchmarks.

CoIN (arXiv 2403.08350): ``<root>/<task>/train.json`` and ``test.json``, conversations and questions with image paths.
TRACE (arXiv 2310.06762): ``<root>/<task>/train.json``, ``eval.json`` and ``test.json``, prompts with answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_plugins._text import did_you_mean


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
        instruction: what to do; the same for many examples of a task.
        input: what to do it with; may be empty.
        output: the answer.
        image: path of an image that belongs to it, as the file names it.
    """

    instruction: str
    input: str
    output: str
    image: str = ""


@dataclass(frozen=True)
class TextTask:
    """A task of a text stream.

    Args:
        name: distinct within a stream.
        train: to learn from.
        test: to be asked.
        validation: for validation during training; may be empty.
        description: a sentence about the task; its first instruction when empty.

    Raises:
        ValueError: without training or test examples.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    validation: Sequence[Example] = field(default=())
    description: str = ""

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            if not getattr(self, split):
                raise ValueError(f"`{split}` of text task {self.name!r} must hold at least one example, got none")

    @property
    def instructions(self) -> list[str]:
        """Distinct instructions of the training examples, in order of appearance."""
        return list(dict.fromkeys(e.instruction for e in self.train))


CODE_INSTRUCTION = "Continue the code."
"""Instruction of prompts that are code and nothing else."""


def _text(record: Any, key: str, where: str, default: str | None = None) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be an object with the key {key!r}, got {type(record).__name__}")
    value = record.get(key, default)
    if value is None:
        raise ValueError(f"{where}: must have the key {key!r}, got {sorted(record)}{did_you_mean(key, record)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be text, got {value!r}")
    return value


def _example(instruction: str, text: str, output: str, where: str, image: str = "") -> Example:
    if not instruction.strip():
        raise ValueError(f"{where}: the instruction must not be empty; say what the model is to do")
    if not output.strip():
        raise ValueError(f"{where}: the output must not be empty; an answer needs at least one character")
    return Example(instruction.strip(), text, output, image)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"there must be a file {str(path)!r}, got none") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8, got byte {error.start} that is not") from None


def read_jsonl(path: str | Path) -> list[Example]:
    """Examples of a file with one JSON object per line: ``instruction``, ``input`` (may be missing), ``output``.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a malformed line, naming file and line number.
    """
    path, examples = Path(path), []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: must be a JSON object, got {error.msg} at column {error.colno}") from None
        texts = _text(record, "instruction", where), _text(record, "input", where, ""), _text(record, "output", where)
        examples.append(_example(*texts, where))
    if not examples:
        raise ValueError(f"{path}: must hold at least one example, got an empty file")
    return examples


def _records(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        records = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: must be JSON, got {error.msg}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: must be a list of examples, got {type(records).__name__}")
    return ((f"{path}, record {number}", record) for number, record in enumerate(records, 1))


def read_trace(path: str | Path) -> list[Example]:
    """Examples of a TRACE file, a list of ``{"prompt": ..., "answer": ...}``.

    The first line of the prompt is the instruction, or its first sentence when there is one line only. Prompts of code
    alone (``<s> import ...``, as in Py150) hold none; they get :data:`CODE_INSTRUCTION`.
    """
    examples = []
    for where, record in _records(Path(path)):
        prompt, answer = _text(record, "prompt", where), _text(record, "answer", where)
        head, found, rest = prompt.strip().partition("\n")
        if head.startswith("<s>"):
            head, rest = CODE_INSTRUCTION, prompt.strip()
        elif not found:
            sentence, stop, rest = head.partition(". ")
            head = sentence + stop.strip()
        examples.append(_example(head, rest, answer, where))
    return examples


def coin_instruction(turn: str, task: str) -> tuple[str, str]:
    r"""Instruction and the rest of a question in CoIN's wording.

    It is the last line of the question, but the part before the colon for Grounding, and for ImageNet the line behind
    the image: its last line is that of other tasks, whose group ImageNet is not in. (The release takes that line in
    training, and the whole text of a test question.)

    Example:
        >>> coin_instruction("<image>\nWhat is it?\nAnswer the question using a single word.", "GQA")
        ('Answer the question using a single word.', 'What is it?')
    """
    lines = [line.strip() for line in turn.replace("<image>", "").strip().split("\n") if line.strip()]
    if not lines:
        return "", ""
    if task.lower().startswith("grounding") and ":" in lines[-1]:
        head, _, rest = lines[-1].partition(":")
        return head.strip(), "\n".join([*lines[:-1], rest.strip()])
    at = 0 if task.lower().startswith("imagenet") else len(lines) - 1
    return lines[at], "\n".join(lines[:at] + lines[at + 1 :])


def read_coin(path: str | Path, task: str = "") -> list[Example]:
    """Examples of a CoIN file: conversations for training, ``text`` with ``answer`` or ``answer_bbox`` for testing.

    Args:
        path: the file.
        task: its task's name; the folder's when empty.
    """
    path, examples = Path(path), []
    task = task or path.parent.name
    for where, record in _records(path):
        image = _text(record, "image", where, "")
        if "conversations" in record:
            turns = record["conversations"]
            if not isinstance(turns, list) or len(turns) < 2:
                raise ValueError(f"{where}: 'conversations' must hold a question and an answer, got {turns!r}")
            question, answer = _text(turns[0], "value", where), _text(turns[1], "value", where)
        else:
            key = "answer_bbox" if "answer_bbox" in record else "answer"
            question, answer = _text(record, "text", where), _text(record, key, where)
        instruction, rest = coin_instruction(question, task)
        examples.append(_example(instruction, rest, answer, where, image))
    return examples


_FORMATS: dict[str, tuple[Callable[[Path], list[Example]], str, str]] = {
    "jsonl": (read_jsonl, "jsonl", "validation"),
    "coin": (read_coin, "json", "val"),
    "trace": (read_trace, "json", "eval"),
}


def read_tasks(root: str | Path, names: Sequence[str] | None = None, format: str = "jsonl") -> list[TextTask]:
    """One task per folder of ``root``, each with a training and a test file, and perhaps one for validation.

    Args:
        root: folder of the tasks.
        names: folders in the order of the stream; all of them, sorted, when None.
        format: ``"jsonl"`` (train.jsonl, test.jsonl, validation.jsonl), ``"coin"`` or ``"trace"``.

    Raises:
        ValueError: for an unknown format or task, or a faulty file.
        FileNotFoundError: for a missing folder or file.
    """
    if format not in _FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(_FORMATS)}, got {format!r}")
    reader, suffix, extra = _FORMATS[format]
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"`root` must be a folder with one folder per task, got {str(root)!r}")
    found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    unknown = [n for n in names or () if n not in found]
    if unknown:
        raise ValueError(
            f"`names` must be folders of {str(root)!r}, got {unknown[0]!r}{did_you_mean(unknown[0], found)}"
        )
    if not found:
        raise FileNotFoundError(f"`root` must hold one folder per task, got none in {str(root)!r}")
    tasks = []
    for name in found if names is None else names:
        validation = root / name / f"{extra}.{suffix}"
        tasks.append(
            TextTask(
                name,
                reader(root / name / f"train.{suffix}"),
                reader(root / name / f"test.{suffix}"),
                reader(validation) if validation.is_file() else (),
            )
        )
    return tasks


def task_from_rows(
    name: str,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    columns: Mapping[str, str] | None = None,
    instruction: str = "",
) -> TextTask:
    """A task from rows, such as a ``DatasetDict`` of Hugging Face or lists of dicts.

    Args:
        name: of the task.
        splits: ``"train"``, ``"test"`` and perhaps ``"validation"``.
        columns: the data's own names of ``instruction``, ``input`` and ``output``, where they differ.
        instruction: for data without a column of instructions.

    Example:
        >>> rows = [{"question": "1 + 1", "answer": 2}]
        >>> names = {"input": "question", "output": "answer"}
        >>> task_from_rows("sums", {"train": rows, "test": rows}, names, instruction="Add.").train[0].output
        '2'
    """
    names = {"instruction": "instruction", "input": "input", "output": "output", **(columns or {})}
    missing = [s for s in ("train", "test") if s not in splits]
    if missing:
        raise ValueError(f"`splits` of {name!r} must have {missing[0]!r}, got {sorted(splits)}")

    def read(split: str) -> list[Example]:
        examples = []
        for number, row in enumerate(splits.get(split, ()), 1):
            where = f"{name}, {split}, row {number}"
            record = dict(row)
            told = instruction or _text(record, names["instruction"], where)
            texts = _text(record, names["input"], where, ""), _text(record, names["output"], where)
            examples.append(_example(told, *texts, where))
        return examples

    return TextTask(name, read("train"), read("test"), read("validation"))
