"""Which group a reworded instruction finds, and which tasks a threshold puts together: words alone, no training.

Every task has a group of its own in the first table. "unseen" are the paraphrases of the rules, which no training task
holds; "left out" are the training wordings, each held back in turn from its own group. "as a set" decides by all unseen
wordings of a task at once, as the release does for a test set.

    python benchmarks/ema_allocation.py
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sklearn.feature_extraction.text import HashingVectorizer

from cl_plugins.instruction_groups import InstructionGroups
from cl_plugins.scenarios.instruction_rules import RULES
from cl_plugins.scenarios.instructions import DEFAULT_RULES

RELATED = ("first-letter", "last-letter", "count-vowels", "drop-vowels")
"""Two pairs of related rules, which the released threshold groups in any order."""


def letters(texts: Sequence[str]) -> Any:
    """An encoder that needs no download: counts of 3 to 5 neighboring letters ``(texts, 65536)``."""
    hashed = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=2**16, alternate_sign=False)
    return hashed.transform(list(texts)).toarray()


def codebook(encoder: Any, reduce: Any, texts: Sequence[Sequence[str]]) -> InstructionGroups:
    """A codebook with one group per task, whatever their similarity."""
    groups = InstructionGroups(encoder, threshold=1.0, reduce=reduce, encoder_id="letters" if callable(encoder) else "")
    groups.groups = [list(t) for t in texts]
    return groups


def allocation(encoder: Any, reduce: str, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Right decisions of all, by kind of test."""
    rules = [RULES[n] for n in names]
    groups = codebook(encoder, reduce, [r.wordings for r in rules])
    found = {"seen": 0, "unseen": 0, "as a set": 0, "left out": 0}
    total = dict.fromkeys(found, 0)
    for task, rule in enumerate(rules):
        decisions = {
            "seen": groups.allocate_samples(rule.wordings),
            "unseen": groups.allocate_samples(rule.unseen),
            "as a set": [groups.allocate(rule.unseen).group],
            "left out": [],
        }
        for text in rule.wordings:
            rest = [[w for w in r.wordings if w != text] for r in rules]
            decisions["left out"] += codebook(encoder, reduce, rest).allocate_samples([text])
        for kind, chosen in decisions.items():
            found[kind] += sum(c == task for c in chosen)
            total[kind] += len(chosen)
    return {kind: (found[kind], total[kind]) for kind in found}


def partition(names: Sequence[str], threshold: float) -> list[list[str]]:
    """The groups that the tasks form when they come in this order."""
    groups = InstructionGroups(threshold=threshold)
    for name in names:
        groups.commit(groups.match(RULES[name].wordings), name)
    made: dict[int, list[str]] = {}
    for entry in groups.history:
        made.setdefault(entry["group"], []).append(entry["task"])
    return list(made.values())


def sets(groups: Sequence[Sequence[str]]) -> set[frozenset[str]]:
    """Groups without an order."""
    return {frozenset(g) for g in groups}


def main() -> None:
    print("| tasks | similarity | reduce | seen | unseen | as a set | left out |\n|---|---|---|---|---|---|---|")
    encoders = {"tfidf-pair": "tfidf-pair", "tfidf-corpus": "tfidf-corpus", "3 to 5 letters": letters}
    for names in (DEFAULT_RULES, tuple(RULES)):
        for label, encoder in encoders.items():
            for reduce in ("mean", "max"):
                cells = [f"{right} of {all_}" for right, all_ in allocation(encoder, reduce, names).values()]
                print(f"| {len(names)} | {label} | {reduce} | " + " | ".join(cells) + " |")
    print("\n| tasks | threshold | groups of more than one task | same in other orders |\n|---|---|---|---|")
    for names in (DEFAULT_RULES, tuple(RULES), RELATED):
        last = None
        for percent in range(15, 61):
            made = partition(names, percent / 100)
            if made == last:
                continue
            last = made
            shared = "; ".join(", ".join(g) for g in made if len(g) > 1) or "none"
            rng = random.Random(0)
            orders = [rng.sample(list(names), len(names)) for _ in range(50)]
            same = sum(sets(partition(order, percent / 100)) == sets(made) for order in orders)
            print(f"| {len(names)} | from {percent / 100:.2f} | {shared} | {same} of 50 |")


if __name__ == "__main__":
    main()
