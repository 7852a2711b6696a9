"""Which tasks share their weights: grouping by the similarity of instructions, class names, or features.

Paper: "Large Continual Instruction Assistant", Jingyang Qiao, Zhizhong Zhang, Xin Tan, Yanyun Qu, Shouhong Ding, Yuan
Xie, ICML 2025, arXiv 2410.10868. Implemented: the released matching (mean over all pairs of texts of their pairwise
TF-IDF cosine), over-the-corpus TF-IDF, any text encoder, and features for tasks without text. The weights of a group
are not held here.

    score_j = mean over i in task, h in group j of similarity(i, h)         (`reduce="max"` for the paper's wording)
    best = argmax_j score_j                                                  (lowest j on a tie)
    training: best >= threshold reuses the group, else a new one            testing: best >= threshold, else `unmatched`
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cl_plugins.group_match import Match, check_threshold
from cl_plugins.task import Task
from cl_plugins.text_similarity import (
    Array,
    TextEncoder,
    clean_texts,
    corpus_tfidf,
    cosines,
    encode,
    pairwise_tfidf,
    wordless,
)

log = logging.getLogger(__name__)

_BUILT_IN = ("tfidf-pair", "tfidf-corpus")


def task_texts(task: Task, prompt: str = "a photo of a {}") -> list[str]:
    """Texts that stand for a task: its description, else a prompt per class name.

    Raises:
        ValueError: when the task has neither.

    Example:
        >>> task_texts(Task(0, (3, 5), class_names=("cat", "dog")))
        ['a photo of a cat', 'a photo of a dog']
    """
    if task.description.strip():
        return [task.description]
    if task.class_names:
        return [prompt.format(name) for name in task.class_names]
    raise ValueError(
        f"{task.name!r} must have a description or class names to be grouped by text, got neither;"
        " set Task.description, or group by features with FeatureGroups"
    )


class InstructionGroups:
    """Groups tasks whose instructions resemble each other.

    WHEN: :meth:`match` at a task's start (it changes nothing), :meth:`commit` after the task was trained,
    :meth:`allocate` at test time.

    Args:
        encoder: ``"tfidf-pair"`` (released), ``"tfidf-corpus"``, or a callable that maps n texts to ``(n, dim)``
            vectors, such as ``SentenceTransformer(...).encode``.
        threshold: similarity from which a group is reused, in [-1, 1], or a key of
            :data:`~cl_plugins.group_match.THRESHOLDS`. TF-IDF defaults to ``"loose"``; an encoder needs a value
            of its own, see :func:`suggest_threshold`.
        reduce: ``"mean"`` over all pairs (released) or ``"max"``.
        unmatched: group of a test text below the threshold: ``"best"``, ``"last"`` (released), or ``"error"``.
        max_texts: distinct texts per task that are compared and kept; more are thinned out by ``seed``.
        max_groups: from this many groups on the best one is reused whatever its score; None for no bound.
        encoder_id: name and version of a callable encoder; a saved codebook refuses another one.
        seed: of the thinning.

    Raises:
        ValueError: for an unknown encoder name or option, or an encoder without a threshold.

    Example:
        >>> groups = InstructionGroups(threshold=0.3)
        >>> groups.commit(groups.match(["Translate the sentence into French"]), "french")
        0
        >>> groups.match(["Translate the sentence into Spanish"]).expanded
        False
        >>> groups.match(["Count the vowels"]).reason
        'new group 1: best score 0.000 (group 0) is below the threshold 0.300'
    """

    def __init__(
        self,
        encoder: str | TextEncoder = "tfidf-pair",
        threshold: float | str | None = None,
        reduce: Literal["mean", "max"] = "mean",
        unmatched: Literal["best", "last", "error"] = "best",
        max_texts: int = 200,
        max_groups: int | None = None,
        encoder_id: str = "",
        seed: int = 0,
    ) -> None:
        if not callable(encoder) and encoder not in _BUILT_IN:
            raise ValueError(f"`encoder` must be one of {', '.join(_BUILT_IN)} or a callable, got {encoder!r}")
        if reduce not in ("mean", "max"):
            raise ValueError(f"`reduce` must be 'mean' or 'max', got {reduce!r}")
        if unmatched not in ("best", "last", "error"):
            raise ValueError(f"`unmatched` must be 'best', 'last' or 'error', got {unmatched!r}")
        if max_texts < 1:
            raise ValueError(f"`max_texts` must be 1 or more, got {max_texts!r}")
        if max_groups is not None and max_groups < 1:
            raise ValueError(f"`max_groups` must be 1 or more, or None, got {max_groups!r}")
        self.encoder = encoder
        self.threshold = check_threshold(threshold, callable(encoder))
        self.reduce = reduce
        self.unmatched = unmatched
        self.max_texts = max_texts
        self.max_groups = max_groups
        self.seed = seed
        self.encoder_id = encoder_id or (encoder if isinstance(encoder, str) else "")
        self.groups: list[list[str]] = []
        self.history: list[dict[str, Any]] = []
        self._vectors: dict[str, Array] = {}

    def checked(self, texts: Sequence[str]) -> list[str]:
        """The texts that would be compared: distinct, in order, thinned.

        Raises:
            TypeError: for one string instead of a list, or what is no string.
            ValueError: for no text, an empty one, or texts of stop words only where TF-IDF could not see them.
        """
        chosen = self._thin(clean_texts(texts))
        silent = [] if callable(self.encoder) else wordless(chosen)
        if silent:
            raise ValueError(
                f"`texts` must hold a word that is no stop word, got {silent[0]!r};"
                " write what the task does, or use an `encoder` that reads whole sentences"
            )
        return chosen

    def match(self, texts: Sequence[str]) -> Match:
        """Decide for a task that is about to be trained; changes nothing.

        Raises:
            ValueError: for texts that :meth:`checked` refuses.
        """
        chosen = self.checked(texts)
        scores = self.scores(chosen)
        best = int(np.argmax(scores)) if scores else 0
        if not scores:
            return Match(0, (), True, "new group 0: there is none yet", tuple(chosen), matched=False)
        beside = f"best score {scores[best]:.3f} (group {best})"
        if scores[best] >= self.threshold:
            reason = f"reuse group {best}: {beside} reaches the threshold {self.threshold:.3f}"
            return Match(best, scores, False, reason, tuple(chosen))
        if self.max_groups is not None and len(scores) >= self.max_groups:
            reason = f"reuse group {best}: {beside} is below the threshold, but `max_groups` is reached"
            return Match(best, scores, False, reason, tuple(chosen), matched=False)
        new = len(scores)
        reason = f"new group {new}: {beside} is below the threshold {self.threshold:.3f}"
        return Match(new, scores, True, reason, tuple(chosen), matched=False)

    def commit(self, match: Match, task_name: str = "") -> int:
        """Store the texts of a trained task in its group and log the reason.

        Returns:
            The group.

        Raises:
            ValueError: when a task of this name was committed before.
        """
        if task_name and any(h["task"] == task_name for h in self.history):
            raise ValueError(f"`task_name` must be new, got {task_name!r} a second time; give each task its own name")
        if match.group > len(self.groups):
            raise ValueError(f"`match` must be of this codebook, got group {match.group} of {len(self.groups)}")
        if match.group == len(self.groups):
            self.groups.append([])
        group = self.groups[match.group]
        group.extend(t for t in match.texts if t not in group)
        log.info("%s: %s", task_name or f"task {len(self.history)}", match.reason)
        self.history.append(
            {"task": task_name, "group": match.group, "scores": list(match.scores), "expanded": match.expanded,
             "reason": match.reason}
        )  # fmt: skip
        return match.group

    def allocate(self, texts: Sequence[str]) -> Match:
        """The group for test data that carry these texts, all of one task.

        Raises:
            RuntimeError: before any task was committed.
            ValueError: for a score below the threshold when ``unmatched`` is ``"error"``.
        """
        if not self.groups:
            raise RuntimeError("`allocate` needs a group; commit the match of a trained task first")
        chosen = self._thin(clean_texts(texts))
        scores = self.scores(chosen)
        best = int(np.argmax(scores))
        beside = f"best score {scores[best]:.3f} (group {best})"
        if scores[best] >= self.threshold:
            reason = f"group {best}: {beside} reaches the threshold {self.threshold:.3f}"
            return Match(best, scores, False, reason, tuple(chosen))
        if self.unmatched == "error":
            raise ValueError(f"`texts` must resemble a group, got {chosen[0]!r}: {beside} < {self.threshold:.3f}")
        group = best if self.unmatched == "best" else len(self.groups) - 1
        reason = f"group {group} ({self.unmatched}): {beside} is below the threshold {self.threshold:.3f}"
        log.info("unmatched test text %r: %s", chosen[0], reason)
        return Match(group, scores, False, reason, tuple(chosen), matched=False)

    def allocate_samples(self, texts: Sequence[str]) -> list[int]:
        """The group of each text on its own, for a batch of unknown origin; equal texts are compared once.

        A text that one group alone holds, word for word, belongs to it, whatever the scores: the mean over a group's
        other wordings would speak against it. (The release decides by one score for a whole test set.)
        """
        known: dict[str, int] = {}
        for text in dict.fromkeys(texts):
            holders = [j for j, group in enumerate(self.groups) if clean_texts([text])[0] in group]
            known[text] = holders[0] if len(holders) == 1 else self.allocate([text]).group
        return [known[text] for text in texts]

    def share_allocated(self, texts: Sequence[str], group: int) -> float:
        """Share of the texts that :meth:`allocate_samples` gives to a group, in [0, 1]; equal texts count each.

        Raises:
            ValueError: for no text.
        """
        if not texts:
            raise ValueError("`texts` must hold at least one text, got none")
        return sum(chosen == group for chosen in self.allocate_samples(texts)) / len(texts)

    def scores(self, texts: Sequence[str]) -> tuple[float, ...]:
        """Similarity of a set of texts to each group."""
        reduce = np.mean if self.reduce == "mean" else np.max
        return tuple(float(reduce(self.similarities(texts, group))) for group in self.groups)

    def similarities(self, left: Sequence[str], right: Sequence[str]) -> Array:
        """Similarity of every pair of texts ``(left, right)``."""
        if callable(self.encoder):
            return cosines(self._encode(left), self._encode(right))
        if self.encoder == "tfidf-pair":
            return pairwise_tfidf(left, right)
        return corpus_tfidf(left, right, sorted({*left, *right, *(t for g in self.groups for t in g)}))

    def _encode(self, texts: Sequence[str]) -> Array:
        assert callable(self.encoder)
        missing = [t for t in dict.fromkeys(texts) if t not in self._vectors]
        if missing:
            self._vectors.update(zip(missing, encode(self.encoder, missing), strict=True))
        return np.stack([self._vectors[t] for t in texts])

    def _thin(self, texts: list[str]) -> list[str]:
        if len(texts) <= self.max_texts:
            return texts
        return sorted(random.Random(self.seed).sample(texts, self.max_texts))

    def state_dict(self) -> dict[str, Any]:
        """Plain Python: texts, decisions, threshold and the encoder's name."""
        return {
            "encoder_id": self.encoder_id,
            "threshold": self.threshold,
            "reduce": self.reduce,
            "groups": [list(g) for g in self.groups],
            "history": [dict(h) for h in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a saved codebook.

        Raises:
            ValueError: when it was made with another encoder.
        """
        if state["encoder_id"] != self.encoder_id:
            raise ValueError(
                f"the codebook must be of encoder {self.encoder_id!r}, got one of {state['encoder_id']!r};"
                " similarities of different encoders do not compare"
            )
        self.threshold, self.reduce = float(state["threshold"]), state["reduce"]
        self.groups = [list(g) for g in state["groups"]]
        self.history = [dict(h) for h in state["history"]]

    def save(self, path: str | Path) -> Path:
        """Write the codebook as JSON."""
        target = Path(path)
        target.write_text(json.dumps(self.state_dict(), indent=1, ensure_ascii=False), encoding="utf-8")
        return target

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote."""
        self.load_state_dict(json.loads(Path(path).read_text(encoding="utf-8")))
