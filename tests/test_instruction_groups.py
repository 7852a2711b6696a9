"""Grouping of tasks by instructions, class names and features."""

from __future__ import annotations

import json
import logging
import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from cl_plugins import Task
from cl_plugins.feature_groups import FeatureGroups, bootstrap_threshold, suggest_threshold
from cl_plugins.group_match import THRESHOLDS
from cl_plugins.instruction_groups import InstructionGroups, task_texts
from cl_plugins.scenarios.instruction_rules import RULES
from cl_plugins.scenarios.instructions import DEFAULT_RULES
from cl_plugins.text_similarity import clean_texts, pairwise_tfidf

TRANSLATE = ["Translate the sentence into French", "Give a French translation of the sentence"]
SUMMARIZE = ["Summarize the article in two sentences", "Write a short summary of the article"]
WORDS = ["translate", "sentence", "french", "article", "short", "the", "of", "a", "count", "vowels", "Vowels", "x"]


def _fitted_pair(left: str, right: str) -> float:
    """scikit-learn fitted on the two texts, as the released code does for every pair."""
    try:
        rows = TfidfVectorizer(stop_words="english").fit_transform([left, right]).toarray()
    except ValueError:  # only stop words
        return 0.0
    return float(rows[0] @ rows[1])


@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_closed_form_equals_a_fit_per_pair(texts):
    half = len(texts) // 2
    expected = [[_fitted_pair(x, y) for y in texts[half:]] for x in texts[:half]]
    np.testing.assert_allclose(pairwise_tfidf(texts[:half], texts[half:]), expected, atol=1e-12)


def test_closed_form_by_hand():
    u = 1 + math.log(1.5)
    assert pairwise_tfidf(["alpha beta"], ["alpha gamma"])[0, 0] == pytest.approx(1 / (1 + u * u))


@pytest.mark.parametrize("encoder", ["tfidf-pair", "tfidf-corpus"])
def test_reuse_and_expand(encoder, caplog):
    groups = InstructionGroups(encoder, threshold=0.25)
    with caplog.at_level(logging.INFO, logger="cl_plugins.instruction_groups"):
        assert groups.commit(groups.match(TRANSLATE), "french") == 0
        assert groups.commit(groups.match(SUMMARIZE), "summary") == 1
        match = groups.match(["Translate the sentence into Spanish"])
        assert groups.groups == [sorted(TRANSLATE), sorted(SUMMARIZE)]  # a match alone changes nothing
        assert groups.commit(match, "spanish") == 0
    assert not match.expanded
    assert match.scores[0] > 0.25 > match.scores[1]
    assert "Translate the sentence into Spanish" in groups.groups[0]
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["french", "summary", "spanish"]
    assert "reuse group 0: best score" in caplog.text
    assert "is below the threshold 0.250" in groups.history[1]["reason"]


def test_mean_is_not_max():
    texts = ["Sort the letters", "Explain the picture"]
    mean, best = InstructionGroups(), InstructionGroups(reduce="max")
    for groups in (mean, best):
        groups.commit(groups.match(texts))
    assert best.match(["Sort the letters"]).scores[0] == pytest.approx(1.0)
    assert mean.match(["Sort the letters"]).scores[0] == pytest.approx(0.5)


def _letters(texts: list[str]) -> np.ndarray:
    return np.array([[t.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts], dtype=float)


def test_any_encoder_with_its_own_threshold():
    calls = []

    def encoder(texts):
        calls.append(len(texts))
        return _letters(texts)

    groups = InstructionGroups(encoder, threshold=0.9, encoder_id="letters 1")
    groups.commit(groups.match(["listen"]))
    assert not groups.match(["silent"]).expanded
    assert groups.match(["quartz fjord"]).expanded
    assert sum(calls) == 3  # each text once
    with pytest.raises(ValueError, match="`threshold` must be given with an encoder of your own"):
        InstructionGroups(_letters)


@pytest.mark.parametrize(
    ("encoder", "text"),
    [
        (lambda t: np.zeros(3), r"one vector per text, \(1, dim\), got shape \(3,\)"),
        (lambda t: np.full((len(t), 2), np.nan), "finite vectors"),
    ],
)
def test_faulty_encoders_are_refused(encoder, text):
    groups = InstructionGroups(encoder, threshold=0.5)
    groups.groups = [["other"]]
    with pytest.raises(ValueError, match=text):
        groups.match(["some text"])


@pytest.mark.parametrize(("unmatched", "group"), [("best", 0), ("last", 1)])
def test_allocation_of_sets_and_samples(unmatched, group, caplog):
    groups = InstructionGroups(threshold=0.3, unmatched=unmatched)
    groups.commit(groups.match(TRANSLATE))
    groups.commit(groups.match(SUMMARIZE))
    assert groups.allocate(SUMMARIZE).matched
    with caplog.at_level(logging.INFO, logger="cl_plugins.instruction_groups"):
        strange = groups.allocate(["Plot the function"])
    assert f"unmatched test text 'Plot the function': group {group} ({unmatched}): best score 0.000" in caplog.text
    assert (strange.group, strange.matched, strange.expanded) == (group, False, False)
    assert groups.allocate_samples([SUMMARIZE[0], TRANSLATE[1], "What is it", SUMMARIZE[0]]) == [1, 0, group, 1]
    assert len(groups.groups) == 2


def test_a_text_of_one_group_alone_belongs_to_it():
    groups = InstructionGroups(threshold=0.9)
    first, second = ["Reverse the letters", "Spell it backwards"], ["Sort the letters"]
    groups.commit(groups.match(first), "reverse")
    groups.commit(groups.match(second), "sort")
    groups.groups[1].append("Reverse letters")  # now the mean speaks for the other group
    assert groups.allocate(["Reverse the letters"]).group == 1
    assert groups.allocate_samples([" Reverse  the letters", "Sort the letters"]) == [0, 1]
    groups.groups[1].append("Reverse the letters")  # held by both: the score decides
    assert groups.allocate_samples(["Reverse the letters"]) == [1]


def test_allocation_may_refuse():
    groups = InstructionGroups(unmatched="error")
    with pytest.raises(RuntimeError, match="`allocate` needs a group"):
        groups.allocate(["Sort"])
    groups.commit(groups.match(TRANSLATE))
    with pytest.raises(ValueError, match="`texts` must resemble a group, got 'Plot the function'"):
        groups.allocate(["Plot the function"])


def test_bounds_on_texts_and_groups():
    groups = InstructionGroups(max_texts=5, max_groups=1, seed=3)
    many = [f"Translate item{i} into French" for i in range(50)]
    first = groups.match(many)
    assert first.texts == groups.match(many[::-1]).texts  # the choice does not depend on the order
    assert len(first.texts) == 5
    groups.commit(first)
    match = groups.match(["Count vowels"])
    assert (match.group, match.expanded) == (0, False)
    assert "`max_groups` is reached" in match.reason


def test_codebook_round_trip(tmp_path):
    groups = InstructionGroups(threshold="strict")
    groups.commit(groups.match(TRANSLATE), "french")
    again = InstructionGroups()
    again.load(groups.save(tmp_path / "codebook.json"))
    assert again.state_dict() == groups.state_dict()
    assert again.threshold == THRESHOLDS["strict"]
    assert json.loads((tmp_path / "codebook.json").read_text())["groups"] == [sorted(TRANSLATE)]
    with pytest.raises(ValueError, match="must be of encoder 'letters', got one of 'tfidf-pair'"):
        InstructionGroups(_letters, threshold=0.5, encoder_id="letters").load(tmp_path / "codebook.json")


def test_tasks_without_instructions():
    assert task_texts(Task(0, (0,), description="Sort the letters")) == ["Sort the letters"]
    assert task_texts(Task(0, (0, 1), class_names=("cat", "dog")), "this is a {}") == ["this is a cat", "this is a dog"]
    with pytest.raises(ValueError, match="'task 0' must have a description or class names"):
        task_texts(Task(0, (0,)))


@pytest.mark.parametrize(
    ("texts", "error", "text"),
    [
        ([], ValueError, "got no text"),
        (["Sort", " "], ValueError, "got an empty one"),
        (["What is it?"], ValueError, "must hold a word that is no stop word, got 'What is it\\?'"),
        ("Sort", TypeError, r"got one text 'Sort'; write \[text\]"),
        (["Sort", 3], TypeError, "must hold strings, got 3"),
    ],
)
def test_bad_instructions_are_refused(texts, error, text):
    groups = InstructionGroups()
    with pytest.raises(error, match=text):
        groups.match(texts)
    assert groups.groups == []


def test_duplicate_task_names_are_refused():
    groups = InstructionGroups()
    groups.commit(groups.match(TRANSLATE), "french")
    with pytest.raises(ValueError, match="`task_name` must be new, got 'french' a second time"):
        groups.commit(groups.match(SUMMARIZE), "french")
    assert len(groups.groups) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"encoder": "bert"}, "`encoder` must be one of tfidf-pair, tfidf-corpus or a callable, got 'bert'"),
        ({"reduce": "sum"}, "`reduce` must be 'mean' or 'max'"),
        ({"unmatched": "first"}, "`unmatched` must be"),
        ({"threshold": 1.5}, r"`threshold` must be in \[-1, 1\], got 1.5"),
        ({"threshold": "medium"}, "one of strict, loose, got 'medium'"),
        ({"max_texts": 0}, "`max_texts` must be 1 or more"),
        ({"max_groups": 0}, "`max_groups` must be 1 or more, or None"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        InstructionGroups(**options)


def test_white_space_and_order_do_not_matter():
    assert clean_texts(["b  c", "a", "b c\n"]) == ["a", "b c"]


def test_suggested_threshold_separates():
    groups = InstructionGroups()
    texts = [TRANSLATE, ["Translate the sentence into Spanish"], SUMMARIZE, ["Summarize the news article"]]
    threshold = suggest_threshold(groups, texts, labels=[0, 0, 1, 1])
    assert suggest_threshold(groups, texts) == pytest.approx(threshold, abs=0.2)
    found = InstructionGroups(threshold=threshold)
    assert [found.commit(found.match(t)) for t in texts] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="`labels` must be separable"):
        suggest_threshold(groups, texts, labels=[0, 1, 0, 1])
    with pytest.raises(ValueError, match="`tasks` must be at least 3"):
        suggest_threshold(groups, texts[:2])


@pytest.mark.parametrize(("reduce", "right"), [("mean", 8), ("max", 9)])
def test_reworded_instructions_find_their_group_less_often(reduce, right):
    """The figures of docs/ema.md: every seen wording, and 8 or 9 of 12 paraphrases, with a group per task."""
    groups = InstructionGroups(threshold=0.3, reduce="mean")
    for name in DEFAULT_RULES:
        assert groups.match(RULES[name].wordings).expanded
        groups.commit(groups.match(RULES[name].wordings), name)
    groups.reduce = reduce
    assert all(groups.share_allocated(RULES[n].wordings, i) == 1.0 for i, n in enumerate(DEFAULT_RULES))
    shares = [groups.share_allocated(RULES[n].unseen, i) for i, n in enumerate(DEFAULT_RULES)]
    assert sum(shares) * 2 == right
    with pytest.raises(ValueError, match="`texts` must hold at least one text"):
        groups.share_allocated([], 0)


@pytest.mark.parametrize("threshold", [0.28, "loose", 0.49])
def test_related_rules_share_a_group_in_any_order(threshold):
    for order in permutations(["first-letter", "last-letter", "count-vowels", "drop-vowels"]):
        groups = InstructionGroups(threshold=threshold)
        of = {n: groups.commit(groups.match(RULES[n].wordings), n) for n in order}
        assert of["first-letter"] == of["last-letter"] != of["count-vowels"] == of["drop-vowels"]


def _features(direction: int, n: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.eye(6)[direction] + 5.0 + 0.3 * rng.normal(size=(n, 6))


def test_features_group_tasks_without_text():
    plain = FeatureGroups(threshold=bootstrap_threshold(_features(0)))
    for direction, expected in ((0, 0), (1, 1), (2, 2)):
        assert plain.commit(plain.match(_features(direction))) == expected
    assert not plain.match(_features(1, seed=5)).expanded
    assert plain.allocate_samples(_features(2, seed=9) * 1.0).count(2) > 30
    again = FeatureGroups(threshold=0.0)
    again.load_state_dict(plain.state_dict())
    assert again.state_dict() == plain.state_dict()


def test_feature_errors():
    groups = FeatureGroups(threshold=0.5)
    with pytest.raises(ValueError, match=r"must have the shape \(samples, dim\), got \(3,\)"):
        groups.match(np.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        groups.match(np.full((2, 2), np.inf))
    with pytest.raises(RuntimeError, match="needs a group"):
        groups.allocate_samples(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="at least 4 samples"):
        bootstrap_threshold(np.zeros((2, 2)))
    match = groups.match(_features(0))
    groups.commit(match)
    with pytest.raises(RuntimeError, match="`commit` must follow `match`"):
        groups.commit(match)
