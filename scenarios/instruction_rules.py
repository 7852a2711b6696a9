"""Text tasks with exact answers, made from rules and from the Unicode tables: nothing to download, nothing to guess."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from unicodedata import ucd_3_2_0 as unicode_data

from cl_plugins._text import did_you_mean

from .text_data import Example, TextTask


@dataclass(frozen=True)
class TextRule:
    """How a task's examples are made.

    Attributes:
        wordings: instructions with the same meaning.
        inputs: all inputs, in a fixed order.
        answer: the output of an input.
        closed: test inputs are among those of training, for facts that no rule gives; elsewhere they are new.
    """

    wordings: tuple[str, ...]
    inputs: Callable[[], Sequence[str]]
    answer: Callable[[str], str]
    closed: bool = False


@cache
def _words() -> tuple[str, ...]:
    """Words of 3 to 6 letters in the names of Unicode characters, in alphabetical order; the same in every Python."""
    words: set[str] = set()
    for code in range(0x20, 0x30000):
        for word in unicode_data.name(chr(code), "").lower().replace("-", " ").split():
            if 3 <= len(word) <= 6 and word.isalpha() and word.isascii():
                words.add(word)
    return tuple(sorted(words))


@cache
def _characters() -> tuple[str, ...]:
    """Symbols and punctuation whose names are short."""
    found = []
    for code in range(0xA1, 0x2800):
        name = unicode_data.name(chr(code), "")
        if unicode_data.category(chr(code)) in ("Sm", "So", "Sc", "Po", "Pd") and 4 <= len(name) <= 18:
            found.append(chr(code))
    return tuple(found[:150])


@cache
def _numbers() -> tuple[str, ...]:
    return tuple(str(n) for n in range(1, 1000))


@cache
def _pairs() -> tuple[str, ...]:
    return tuple(f"{a} + {b}" for a in range(1, 50) for b in range(1, 50))


def roman(number: int) -> str:
    """A Roman numeral.

    Example:
        >>> roman(1994)
        'MCMXCIV'
    """
    parts = zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"),
        strict=True,
    )
    text = ""
    for value, letters in parts:
        times, number = divmod(number, value)
        text += letters * times
    return text


def _shift(word: str) -> str:
    return "".join(chr((ord(c) - 96) % 26 + 97) for c in word)


def _sum(text: str) -> str:
    left, right = text.split(" + ")
    return str(int(left) + int(right))


RULES: dict[str, TextRule] = {
    "upper-case": TextRule(
        (
            "Write the word in capital letters.",
            "Change the word to upper case.",
            "Capitalize every letter of the word.",
        ),
        _words,
        str.upper,
    ),
    "reverse": TextRule(
        ("Write the word backwards.", "Reverse the letters of the word.", "Spell the word from its end to its start."),
        _words,
        lambda w: w[::-1],
    ),
    "sort-letters": TextRule(
        (
            "Sort the letters of the word.",
            "Put the letters of the word in alphabetical order.",
            "Arrange the word's letters from a to z.",
        ),
        _words,
        lambda w: "".join(sorted(w)),
    ),
    "count-vowels": TextRule(
        (
            "Count the vowels in the word.",
            "How many vowels does the word have?",
            "Give the number of vowels in the word.",
        ),
        _words,
        lambda w: str(sum(c in "aeiou" for c in w)),
    ),
    "roman": TextRule(
        (
            "Write the number as a Roman numeral.",
            "Convert the number to Roman numerals.",
            "Give the Roman numeral of the number.",
        ),
        _numbers,
        lambda n: roman(int(n)),
    ),
    "first-letter": TextRule(
        (
            "Give the first letter of the word.",
            "Which letter does the word begin with?",
            "Name the initial of the word.",
        ),
        _words,
        lambda w: w[0],
    ),
    "last-letter": TextRule(
        (
            "Give the last letter of the word.",
            "Which letter does the word end with?",
            "Name the final letter of the word.",
        ),
        _words,
        lambda w: w[-1],
    ),
    "double-letters": TextRule(
        ("Write every letter of the word twice.", "Double each letter of the word.", "Repeat each letter in the word."),
        _words,
        lambda w: "".join(2 * c for c in w),
    ),
    "next-letters": TextRule(
        (
            "Replace each letter by the next one in the alphabet.",
            "Shift every letter of the word by one.",
            "Move each letter one step along the alphabet.",
        ),
        _words,
        _shift,
    ),
    "drop-vowels": TextRule(
        ("Remove the vowels from the word.", "Write the word without its vowels.", "Delete all vowels of the word."),
        lambda: tuple(w for w in _words() if any(c not in "aeiou" for c in w)),
        lambda w: "".join(c for c in w if c not in "aeiou"),
    ),
    "add": TextRule(("Add the two numbers.", "Compute the sum.", "What do the numbers make together?"), _pairs, _sum),
    "character-name": TextRule(
        (
            "Give the Unicode name of the character.",
            "What is this character called in Unicode?",
            "Name the Unicode character.",
        ),
        _characters,
        lambda c: unicode_data.name(c).lower(),
        closed=True,
    ),
}
"""Rules by the name of the task they make."""


def rule_task(name: str, n_train: int = 500, n_test: int = 100, seed: int = 0, wordings: int = 3) -> TextTask:
    """A task of a rule: inputs of the test are new, unless the rule is closed.

    Args:
        name: a key of :data:`RULES`.
        n_train: training examples; inputs repeat with other wordings when there are not enough.
        n_test: test examples, at most as many as there are inputs left.
        seed: of the choice of inputs and wordings.
        wordings: how many instructions are used, from the front.

    Raises:
        ValueError: for an unknown rule or faulty numbers.

    Example:
        >>> rule_task("reverse", n_train=1, n_test=1).train[0].output == rule_task("reverse", 1, 1).train[0].input[::-1]
        True
    """
    if name not in RULES:
        raise ValueError(f"`name` must be a rule, got {name!r}{did_you_mean(str(name), RULES)}")
    for text, value in (("n_train", n_train), ("n_test", n_test), ("wordings", wordings)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{text}` must be an integer of 1 or more, got {value!r}")
    rule, rng = RULES[name], random.Random(f"{seed}/{name}")
    inputs = list(rule.inputs())
    rng.shuffle(inputs)
    if rule.closed:
        pool = inputs
        asked = [pool[i % len(pool)] for i in range(min(n_test, len(pool)))]
    else:
        n_test = min(n_test, len(inputs) // 3)
        asked, pool = inputs[:n_test], inputs[n_test:]
    told = rule.wordings[:wordings]

    def example(text: str) -> Example:
        return Example(rng.choice(told), text, rule.answer(text))

    train = [example(pool[i % len(pool)]) for i in range(n_train)]
    return TextTask(name, train, [example(text) for text in asked], description=told[0])
