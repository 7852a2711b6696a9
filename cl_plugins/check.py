"""Which definition a published number follows: the published accuracy matrix against every definition known here."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_plugins._reading import read_json, read_text
from cl_plugins.compat import match_definitions


def _cell(text: str) -> float | None:
    """The number in a cell; NaN for an empty one, None for text."""
    word = text.strip().rstrip("%").strip()
    if word.lower() in ("", "-", ".", "nan", "n/a"):
        return math.nan
    try:
        return float(word)
    except ValueError:
        return None


def _matrix(rows: list[Any], path: Path) -> Tensor:
    """The matrix in a ``result.json``, checked cell by cell."""
    whole = rows and all(isinstance(r, list) and r and len(r) == len(rows[0]) for r in rows)
    cells = [c for row in rows if isinstance(row, list) for c in row]
    wrong = [
        c for c in cells if not (c is None or (isinstance(c, int | float) and not isinstance(c, bool) and 0 <= c <= 1))
    ]
    if not whole or wrong:
        found = f"the cell {wrong[0]!r}" if wrong else "rows that are empty or of different lengths"
        raise ValueError(f"`accuracy_matrix` in {str(path)!r} must be rows of numbers from 0 to 1 or null, got {found}")
    return torch.tensor([[math.nan if c is None else c for c in row] for row in rows], dtype=torch.float64)


def _counted(cells: Sequence[str]) -> bool:
    """Whether the cells are 0, 1, 2, ... or 1, 2, 3, ..."""
    words = [cell.strip() for cell in cells]
    return bool(words) and words in ([str(i + first) for i in range(len(words))] for first in (0, 1))


def _without_names(lines: list[list[str]]) -> list[list[str]]:
    """The lines without a header of names or counted numbers, and without a first column of the same."""
    header, first = lines[0], [line[0] for line in lines[1:]]
    named = all(_cell(c) is None for c in header if c.strip())
    corner = not header[0].strip() or _cell(header[0]) is None
    above = len(header) > 1 and corner and (named or _counted(header[1:]))  # what pandas writes over its row numbers
    index = above and _counted(first) and (not header[0].strip() or len(first) > 1)
    names = above and bool(first) and all(_cell(c) is None for c in first)
    if named or index or names or (len(header) > 2 and _counted(header)):
        lines = lines[1:]
    if index or (lines and all(_cell(line[0]) is None for line in lines)):
        lines = [line[1:] for line in lines]
    return lines


def _check_commas(lines: list[list[str]], path: Path) -> None:
    for sign in (";", "\t"):
        if lines and all(any(sign in cell for cell in (line[1:] or line)) for line in lines):
            raise ValueError(
                f"{str(path)!r} must be separated by commas, got {sign!r} between the cells; save it with commas, and"
                " with points in the numbers"
            )


def read_table(path: str | Path) -> tuple[Tensor, bool]:
    """An accuracy matrix from a CSV file or from a ``result.json``, and whether the file has percent.

    In a CSV file rows are evaluations and columns tasks. A first row or column of names is left out, and so is one that
    counts from 0 or 1 as pandas writes it: a column below an empty cell or a name, a row over at least three columns or
    beside such a cell. Empty cells are cells that were not measured, and numbers above 1 are taken for percent.

    Args:
        path: the file.

    Returns:
        ``(rows, tasks)`` float64 in [0, 1], NaN where not measured; and true where the numbers were percent.

    Raises:
        ValueError: naming the line and column of a cell that is no number, an empty or ragged table, or one that is not
            separated by commas.
    """
    path = Path(path)
    if path.suffix == ".json":
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("accuracy_matrix"), list):
            raise ValueError(f"{str(path)!r} must hold an `accuracy_matrix`, found none")
        return _matrix(content["accuracy_matrix"], path), False
    try:
        parsed = list(csv.reader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} must be a CSV file, got {error}") from None
    lines = [line for line in parsed if any(cell.strip() for cell in line)]
    _check_commas(lines, path)
    lines = _without_names(lines) if lines else []
    if not lines or not lines[0]:
        raise ValueError(f"{str(path)!r} must hold an accuracy matrix, found no numbers")
    width = max(len(line) for line in lines)
    table = torch.full((len(lines), width), math.nan, dtype=torch.float64)
    for i, line in enumerate(lines):
        for j, text in enumerate(line):
            value = _cell(text)
            if value is None:
                raise ValueError(f"{str(path)!r} must hold numbers, got {text!r} in row {i + 1}, column {j + 1}")
            table[i, j] = value
    percent = bool((table > 1).any())
    return table / 100 if percent else table, percent


def read_matrix(path: str | Path) -> Tensor:
    """The accuracy matrix of :func:`read_table` alone.

    Args:
        path: the file.

    Returns:
        ``(rows, tasks)`` float64 in [0, 1], NaN where not measured.

    Raises:
        ValueError: as there.
    """
    return read_table(path)[0]


def describe_table(matrix: Tensor, percent: bool) -> str:
    """What was read, in a line.

    Args:
        matrix: ``(rows, tasks)``.
        percent: whether the file has percent.

    Example:
        >>> describe_table(torch.zeros(3, 2), percent=True)
        '3 evaluations x 2 tasks, in percent'
    """
    rows, tasks = matrix.shape
    unit = "in percent" if percent else "as fractions"
    return f"{rows} evaluation{'s' * (rows != 1)} x {tasks} task{'s' * (tasks != 1)}, {unit}"


def check_report(matrix: Tensor, values: Mapping[str, float], tolerance: float = 5e-4) -> str:
    """Say for each published value which definitions give it.

    Args:
        matrix: ``(rows, tasks)`` in [0, 1], NaN where not given.
        values: published numbers by name, as fractions or percent.
        tolerance: largest difference of fractions.

    Returns:
        Text for a terminal.

    Example:
        >>> print(check_report(torch.tensor([[0.6, 0.4], [0.7, 0.8]]), {"F": 0.5}))
        F = 0.5000: no known definition gives this; nearest is forward_transfer[baseline=none] = 0.4000
    """
    lines = []
    for name, match in match_definitions(values, matrix, tolerance=tolerance).items():
        if match.agrees:
            lines.append(f"{name} = {match.value:.4f} is")
            lines += [f"    {definition}" for definition in match.agrees]
        elif match.nearest is not None:
            lines.append(
                f"{name} = {match.value:.4f}: no known definition gives this;"
                f" nearest is {match.nearest[0]} = {match.nearest[1]:.4f}"
            )
        else:
            lines.append(f"{name} = {match.value:.4f}: nothing is defined for this matrix")
    return "\n".join(lines)
