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
        unseen: more instructions of the same meaning, for tests in words that training did not have.
    """

    wordings: tuple[str, ...]
    inputs: Callable[[], Sequence[str]]
    answer: Callable[[str], str]
    closed: bool = False
    unseen: tuple[str, ...] = ()


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
        unseen=("Turn the word into upper-case letters.", "Make all letters of the word large."),
    ),
    "reverse": TextRule(
        ("Write the word backwards.", "Reverse the letters of the word.", "Spell the word from its end to its start."),
        _words,
        lambda w: w[::-1],
        unseen=("Turn the word around.", "Give the letters of the word in reverse order."),
    ),
    "sort-letters": TextRule(
        (
            "Sort the letters of the word.",
            "Put the letters of the word in alphabetical order.",
            "Arrange the word's letters from a to z.",
        ),
        _words,
        lambda w: "".join(sorted(w)),
        unseen=("Order the word's letters alphabetically.", "Bring the letters into the order of the alphabet."),
    ),
    "count-vowels": TextRule(
        (
            "Count the vowels in the word.",
            "How many vowels does the word have?",
            "Give the number of vowels in the word.",
        ),
        _words,
        lambda w: str(sum(c in "aeiou" for c in w)),
        unseen=("Tell how many of the letters are vowels.", "Find the number of vowels."),
    ),
    "roman": TextRule(
        (
            "Write the number as a Roman numeral.",
            "Convert the number to Roman numerals.",
            "Give the Roman numeral of the number.",
        ),
        _numbers,
        lambda n: roman(int(n)),
        unseen=("Express the number in Roman numerals.", "How did the Romans write this number?"),
    ),
    "first-letter": TextRule(
        (
            "Give the first letter of the word.",
            "Which letter does the word begin with?",
            "Name the initial of the word.",
        ),
        _words,
        lambda w: w[0],
        unseen=("What is the first letter of the word?", "Say which letter the word starts with."),
    ),
    "last-letter": TextRule(
        (
            "Give the last letter of the word.",
            "Which letter does the word end with?",
            "Name the final letter of the word.",
        ),
        _words,
        lambda w: w[-1],
        unseen=("What is the last letter of the word?", "Say which letter the word ends in."),
    ),
    "double-letters": TextRule(
        ("Write every letter of the word twice.", "Double each letter of the word.", "Repeat each letter in the word."),
        _words,
        lambda w: "".join(2 * c for c in w),
        unseen=("Put each letter of the word down two times.", "Make every letter double."),
    ),
    "next-letters": TextRule(
        (
            "Replace each letter by the next one in the alphabet.",
            "Shift every letter of the word by one.",
            "Move each letter one step along the alphabet.",
        ),
        _words,
        _shift,
        unseen=(
            "Exchange every letter for its successor in the alphabet.",
            "Use the following letter of the alphabet each time.",
        ),
    ),
    "drop-vowels": TextRule(
        ("Remove the vowels from the word.", "Write the word without its vowels.", "Delete all vowels of the word."),
        lambda: tuple(w for w in _words() if any(c not in "aeiou" for c in w)),
        lambda w: "".join(c for c in w if c not in "aeiou"),
        unseen=("Leave out all vowels of the word.", "Strip the word of its vowels."),
    ),
    "add": TextRule(
        ("Add the two numbers.", "Compute the sum.", "What do the numbers make together?"),
        _pairs,
        _sum,
        unseen=("What is the sum of the two numbers?", "Add them up and give the total."),
    ),
    "character-name": TextRule(
        (
            "Give the Unicode name of the character.",
            "What is this character called in Unicode?",
            "Name the Unicode character.",
        ),
        _characters,
        lambda c: unicode_data.name(c).lower(),
        closed=True,
        unseen=("Tell the name of the character in Unicode.", "Which name does Unicode give to this character?"),
    ),
}
"""Rules by the name of the task they make."""

TEST_WORDINGS = ("same", "unseen")
"""Whether a test asks in the words of training."""


def rule_task(
    name: str, n_train: int = 500, n_test: int = 100, seed: int = 0, wordings: int = 3, test_wordings: str = "same"
) -> TextTask:
    """A task of a rule: inputs of the test are new, unless the rule is closed.

    Args:
        name: a key of :data:`RULES`.
        n_train: training examples; inputs repeat with other wordings when there are not enough.
        n_test: test examples, at most as many as there are inputs left.
        seed: of the choice of inputs and wordings.
        wordings: how many instructions are used, from the front.
        test_wordings: ``"same"`` as in training, or ``"unseen"`` ones of the same meaning. Training examples and test
            inputs do not depend on it.

    Raises:
        ValueError: for an unknown rule or kind of wordings, or faulty numbers.

    Example:
        >>> rule_task("reverse", n_train=1, n_test=1).train[0].output == rule_task("reverse", 1, 1).train[0].input[::-1]
        True
    """
    if name not in RULES:
        raise ValueError(f"`name` must be a rule, got {name!r}{did_you_mean(str(name), RULES)}")
    for text, value in (("n_train", n_train), ("n_test", n_test), ("wordings", wordings)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{text}` must be an integer of 1 or more, got {value!r}")
    if test_wordings not in TEST_WORDINGS:
        raise ValueError(f"`test_wordings` must be one of {', '.join(TEST_WORDINGS)}, got {test_wordings!r}")
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
    later = told if test_wordings == "same" else rule.unseen

    def example(text: str, instructions: Sequence[str]) -> Example:
        return Example(rng.choice(instructions), text, rule.answer(text))

    train = [example(pool[i % len(pool)], told) for i in range(n_train)]
    return TextTask(name, train, [example(text, later) for text in asked], description=told[0])
