"""A stream at a glance: a few samples of each task, and how many samples each class has.

As a picture (:func:`draw_sheet`) or as text for a terminal (:func:`text_sheet`); no model and no training is involved.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

_INK, _SOFT, _BAR, _PAPER, _LINE = "#1a1a1a", "#6b6b6b", "#4269d0", "#ffffff", "#dddddd"
_MARGIN, _SIDE, _CAPTION, _NAME, _BARS = 16, 80, 34, 170, 240
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MOST_BARS = 60


@dataclass(frozen=True)
class Sample:
    """A training sample as a reader sees it.

    Attributes:
        caption: names of its classes, or for text the answer.
        image: ``(3, height, width)`` in [0, 1], as evaluations see it; None for text.
        text: the prompt; empty for images.
    """

    caption: str
    image: Tensor | None = None
    text: str = ""


def label_counts(stream: Any, index: int) -> list[tuple[str, int]]:
    """Name and number of training samples of each class of a task, in the order of its classes; decodes nothing.

    A stream of text has one class a task, the task itself.
    """
    task = stream.tasks[index]
    texts = getattr(stream, "text_tasks", None)
    if texts is not None:
        return [(task.name, len(texts[index].train))]
    names = task.class_names or tuple(map(str, task.classes))
    targets = getattr(stream.train, "targets", None)
    if targets is not None:  # several labels an image
        rows = np.asarray(targets)[stream.train.of(index)]
        return [(n, int((rows[:, c] > 0).sum())) for n, c in zip(names, task.classes, strict=True)]
    counts = np.bincount(stream.train.labels[stream.train.of(index)], minlength=max(task.classes) + 1)
    return [(n, int(counts[c])) for n, c in zip(names, task.classes, strict=True)]


def _size(stream: Any, index: int) -> int:
    texts = getattr(stream, "text_tasks", None)
    return len(stream.train.of(index)) if texts is None else len(texts[index].train)


def _classes(n: int) -> str:
    return f"{n} class{'es' * (n != 1)}"


def task_samples(stream: Any, index: int, count: int, seed: int = 0) -> list[Sample]:
    """Some training samples of a task: one of each class in turn, drawn by ``seed``, as evaluations see them.

    Raises:
        ValueError: for fewer than one sample.
    """
    if count < 1:
        raise ValueError(f"`count` must be 1 or more, got {count!r}")
    generator = np.random.default_rng((seed, index))
    texts = getattr(stream, "text_tasks", None)
    if texts is not None:
        examples = texts[index].train
        drawn = generator.choice(len(examples), min(count, len(examples)), replace=False)
        return [Sample(e.output, text=" ".join((e.instruction, e.input)).strip()) for e in (examples[i] for i in drawn)]
    data = stream.train_loader_for_features(index).dataset
    labels = np.asarray(stream.train.labels[stream.train.of(index)])
    chosen = list(_in_turn(labels, stream.tasks[index].classes, generator, min(count, len(data))))
    return [_picture(stream.tasks[index], *data[i][:2]) for i in chosen]


def _in_turn(labels: Any, classes: Sequence[int], generator: Any, count: int) -> Iterator[int]:
    """Positions of samples, a class after the other, then those that are left in a drawn order."""
    order = generator.permutation(len(labels))
    of = {c: [int(i) for i in order if labels[i] == c] for c in classes}
    rest = [int(i) for i in order if labels[i] not in of]  # samples of other tasks, as blurry streams have them
    turns = [of[c][k] for k in range(max(map(len, of.values()), default=0)) for c in classes if k < len(of[c])]
    yield from [*turns, *rest][:count]


def _picture(task: Any, x: Any, y: Any) -> Sample:
    image = torch.as_tensor(x).float()
    if image.ndim != 3:
        raise ValueError(f"`stream` must give images (channels, height, width) or text, got {tuple(image.shape)}")
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:  # normalized by mean and deviation
        image = (image - low) / max(high - low, 1e-12)
    names = dict(zip(task.classes, task.class_names or map(str, task.classes), strict=True))
    target = torch.as_tensor(y)
    classes = [int(target)] if target.ndim == 0 else [int(c) for c in (target > 0).nonzero()[:, 0]]
    return Sample(", ".join(names.get(c, f"class {c}") for c in classes), image)


def _font(size: int) -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _lines(draw: ImageDraw, text: str, font: FreeTypeFont, width: int, most: int) -> list[str]:
    """Text broken to a width in pixels; the last line ends in an ellipsis when some is left."""
    lines: list[str] = []
    for word in textwrap.wrap(text, 400) and text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(joined, font) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    cut = len(lines) > most
    lines = lines[:most]
    for i, line in enumerate(lines):
        shortened = cut and i == most - 1
        while line and draw.textlength(line + "…" * shortened, font) > width:
            line, shortened = line[:-1], True
        lines[i] = line + "…" * shortened
    return lines


def draw_sheet(stream: Any, tasks: Sequence[int] | None = None, columns: int = 8, seed: int = 0) -> Image:
    """One row a task: its name, samples with the names of their classes, and the number of samples of each class.

    Args:
        stream: any stream of images or text.
        tasks: which tasks; all when None.
        columns: samples a task.
        seed: draws the samples.

    Raises:
        ValueError: for a task that is not there.
    """
    from PIL import Image as Images
    from PIL import ImageDraw as Drawing

    chosen = _chosen(stream, tasks)
    small, plain = _font(10), _font(13)
    rows = [(task_samples(stream, i, columns, seed), label_counts(stream, i)) for i in chosen]
    of_text = rows[0][0][0].image is None
    cell = 220 if of_text else _SIDE + 12
    shown = max(len(samples) for samples, _ in rows)
    width = 2 * _MARGIN + _NAME + shown * cell + _BARS
    row_height = _SIDE + _CAPTION + 14
    sheet = Images.new("RGB", (width, 2 * _MARGIN + 34 + len(rows) * row_height), _PAPER)
    draw = Drawing.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), f"{stream.name}: {len(stream.tasks)} tasks", _INK, _font(17))
    left = _MARGIN + _NAME + shown * cell
    draw.text((left + 8, _MARGIN + 4), "training samples a class", _SOFT, plain)
    most = max(n for _, counts in rows for _, n in counts)
    for index, (number, (samples, counts)) in enumerate(zip(chosen, rows, strict=True)):
        top = _MARGIN + 34 + index * row_height
        draw.line((_MARGIN, top - 7, width - _MARGIN, top - 7), _LINE)
        for k, line in enumerate(_lines(draw, stream.tasks[number].name, plain, _NAME - 12, 2)):
            draw.text((_MARGIN, top + 16 * k), line, _INK, plain)
        draw.text((_MARGIN, top + 36), f"{_size(stream, number):,} samples", _SOFT, small)
        draw.text((_MARGIN, top + 50), "" if of_text else _classes(len(counts)), _SOFT, small)
        for k, sample in enumerate(samples):
            corner = _MARGIN + _NAME + k * cell
            below = top + _SIDE + 3
            if sample.image is None:
                lines = _lines(draw, sample.text, small, cell - 14, 5)
                for j, line in enumerate(lines):
                    draw.text((corner, top + 14 * j), line, _INK, small)
                below = top + 14 * len(lines) + 4
            else:
                sheet.paste(_pixels(sample.image), (corner, top))
            for j, line in enumerate(_lines(draw, sample.caption, small, cell - 12, 2)):
                draw.text((corner, below + 13 * j), line, _SOFT, small)
        _draw_bars(draw, [n for _, n in counts], most, (left + 8, top, left + _BARS, top + _SIDE), small)
    return sheet


def _pixels(image: Tensor) -> Image:
    from PIL import Image as Images

    height, width = image.shape[1:]
    scale = _SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    mode = "nearest" if scale >= 1 else "area"
    pixels = F.interpolate(image[None], size=size, mode=mode)[0].clamp(0, 1).mul(255).round().byte()
    return Images.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _draw_bars(
    draw: ImageDraw, counts: Sequence[int], most: int, box: tuple[int, int, int, int], font: FreeTypeFont
) -> None:
    left, top, right, bottom = box
    heights, merged = _merge(counts)
    step = min(18.0, (right - left) / len(heights))
    for k, n in enumerate(heights):
        x, y = left + k * step, bottom - (bottom - top) * n / max(most, 1)
        draw.rectangle((x, min(y, bottom - 1), x + max(step - 2, 0.5), bottom), _BAR)
    draw.line((left, bottom + 1, left + step * len(heights), bottom + 1), _SOFT)
    low, high = min(counts), max(counts)
    text = f"{low:,} each" if low == high else f"{low:,} to {high:,}"
    draw.text((left, bottom + 5), text + (f", means of {merged} classes a bar" if merged > 1 else ""), _SOFT, font)


def _merge(counts: Sequence[int]) -> tuple[list[float], int]:
    """At most sixty bars: means over so many neighbors each."""
    size = -(-len(counts) // _MOST_BARS)
    return [float(np.mean(counts[i : i + size])) for i in range(0, len(counts), size)], size


def _chosen(stream: Any, tasks: Sequence[int] | None) -> list[int]:
    chosen = list(range(len(stream.tasks)) if tasks is None else tasks)
    wrong = [i for i in chosen if not 0 <= i < len(stream.tasks)]
    if wrong or not chosen:
        raise ValueError(f"`tasks` must be from 0 to {len(stream.tasks) - 1}, got {wrong[0] if wrong else tasks!r}")
    return chosen


def text_sheet(
    stream: Any,
    tasks: Sequence[int] | None = None,
    columns: int = 4,
    seed: int = 0,
    *,
    colors: bool = False,
    width: int = 100,
) -> str:
    """The same for a terminal: classes with their numbers of samples, and samples as text.

    Args:
        stream: any stream of images or text.
        tasks: which tasks; all when None.
        columns: samples a task.
        seed: draws the samples.
        colors: draw images as colored half blocks, for terminals with 24-bit colors; else names alone.
        width: of the terminal in characters.
    """
    parts = [f"{stream.name}: {len(stream.tasks)} tasks"]
    for index in _chosen(stream, tasks):
        counts, samples = label_counts(stream, index), task_samples(stream, index, columns, seed)
        numbers = [n for _, n in counts]
        bars = "".join(_BLOCKS[math.ceil(8 * h / max(*numbers, 1))] for h in _merge(numbers)[0])
        spread = f"{min(numbers):,} each" if min(numbers) == max(numbers) else f"{min(numbers):,} to {max(numbers):,}"
        head = f"\n{stream.tasks[index].name}: {_size(stream, index):,} training samples"
        of_text = samples[0].image is None
        parts.append(head if of_text else f"{head}, {_classes(len(counts))} |{bars}| {spread}")
        if of_text:
            for sample in samples:
                lines = textwrap.wrap(f"{sample.text} -> {sample.caption}", max(width - 4, 20), max_lines=3)
                parts += [f"  {'- ' if k == 0 else '  '}{line}" for k, line in enumerate(lines)]
            continue
        if colors:
            side = min(32, max(8, (width - 2) // max(len(samples), 1) - 1))
            blocks = [_half_blocks(s.image, side) for s in samples if s.image is not None]
            parts += ["  " + " ".join(line) for line in zip(*blocks, strict=True)]
        parts += textwrap.wrap(
            "; ".join(s.caption for s in samples), width - 2, initial_indent="  ", subsequent_indent="  "
        )
    return "\n".join(parts)


def _half_blocks(image: Tensor, side: int) -> list[str]:
    """Lines of a square of ``side`` x ``side`` pixels, two rows of pixels a line."""
    even = side - side % 2
    mode = "nearest" if even > image.shape[-1] else "area"
    pixels = F.interpolate(image[None], size=(even, even), mode=mode)[0].clamp(0, 1).mul(255).round().int()
    lines = []
    for row in range(0, even, 2):
        above, below = pixels[:, row].T.tolist(), pixels[:, row + 1].T.tolist()
        cells = [f"\x1b[38;2;{a};{b};{c};48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in zip(above, below, strict=True)]
        lines.append("".join(cells) + "\x1b[0m")
    return lines
