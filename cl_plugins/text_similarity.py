"""Similarity of short texts: pairwise TF-IDF in closed form, TF-IDF over a corpus, or any encoder.

pairwise, counts x and y, w = 1 for a word of both texts and u = 1 + ln(3/2) for a word of one:
similarity = sum_shared x y / (|w x| |w y|),   |w x|^2 = sum_shared x^2 + u^2 (sum x^2 - sum_shared x^2)
corpus:      cosine of TF-IDF rows fitted on all texts at once
encoder:     cosine of its vectors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
TextEncoder = Callable[[list[str]], Any]
"""Takes n texts and gives n vectors ``(n, dim)`` as an array, or a tensor of any dtype on any device."""

_UNSHARED = 1.0 + math.log(1.5)


def clean_texts(texts: Sequence[str]) -> list[str]:
    """Distinct texts in sorted order, with white space collapsed.

    Raises:
        TypeError: when ``texts`` is one string or holds something else than strings.
        ValueError: for no text or an empty one.

    Example:
        >>> clean_texts(["Sort  the letters", "Sort the letters", "Add"])
        ['Add', 'Sort the letters']
    """
    if isinstance(texts, str):
        raise TypeError(f"`texts` must be a list of texts, got one text {texts!r}; write [text]")
    wrong = [t for t in texts if not isinstance(t, str)]
    if wrong:
        raise TypeError(f"`texts` must hold strings, got {wrong[0]!r}")
    cleaned = {" ".join(t.split()) for t in texts}
    if not cleaned or "" in cleaned:
        found = "no text" if not cleaned else "an empty one"
        raise ValueError(f"`texts` must hold texts with at least one word, got {found}; give every task an instruction")
    return sorted(cleaned)


def wordless(texts: Sequence[str]) -> list[str]:
    """Texts that hold stop words and single letters only, so TF-IDF sees nothing in them.

    Example:
        >>> wordless(["What is it", "Sort the letters"])
        ['What is it']
    """
    from sklearn.feature_extraction.text import CountVectorizer

    analyze = CountVectorizer(stop_words="english").build_analyzer()
    return [t for t in texts if not analyze(t)]


def pairwise_tfidf(left: Sequence[str], right: Sequence[str]) -> Array:
    """For every pair the cosine of scikit-learn's TF-IDF rows fitted on these two texts alone, without fitting any.

    Texts without a word have similarity 0.

    Returns:
        Similarities ``(left, right)``.

    Example:
        >>> pairwise_tfidf(["Translate the sentence into French"], ["Translate the sentence into Spanish"]).round(4)
        array([[0.5031]])
    """
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(stop_words="english", dtype=np.float64)
    if len(wordless([*left, *right])) == len(left) + len(right):
        return np.zeros((len(left), len(right)))
    counts = vectorizer.fit_transform([*left, *right])
    x, y = counts[: len(left)], counts[len(left) :]

    def lengths(a: Any, b: Any) -> Array:
        squares = a.multiply(a)
        shared = np.asarray((squares @ (b > 0).astype(np.float64).T).todense())
        whole = np.asarray(squares.sum(axis=1))  # (rows, 1)
        return cast("Array", np.sqrt(shared + _UNSHARED**2 * (whole - shared)))

    products = np.asarray((x @ y.T).todense())
    norms = lengths(x, y) * lengths(y, x).T
    return cast("Array", np.divide(products, norms, out=np.zeros_like(products), where=norms > 0))


def cosines(left: Array, right: Array) -> Array:
    """Cosine of every pair of rows ``(left, right)``; 0 where a row is zero."""

    def unit(rows: Array) -> Array:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return cast("Array", np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0))

    return cast("Array", unit(left) @ unit(right).T)


def corpus_tfidf(left: Sequence[str], right: Sequence[str], corpus: Sequence[str]) -> Array:
    """Cosines of TF-IDF rows whose document frequencies come from ``corpus``."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(wordless(corpus)) == len(corpus):
        return np.zeros((len(left), len(right)))
    vectorizer = TfidfVectorizer(stop_words="english").fit(list(corpus))
    rows = [np.asarray(vectorizer.transform(list(texts)).todense(), dtype=np.float64) for texts in (left, right)]
    return cosines(rows[0], rows[1])


def encode(encoder: TextEncoder, texts: Sequence[str]) -> Array:
    """Vectors ``(texts, dim)`` as float64.

    Raises:
        ValueError: when the encoder gives another number of rows or values that are not finite.
    """
    made = encoder(list(texts))
    if isinstance(made, Tensor):
        made = made.detach().double().cpu()  # NumPy has no bfloat16 and takes no tensor with a gradient
    vectors = np.asarray(made, dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"`encoder` must give one vector per text, ({len(texts)}, dim), got shape {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise ValueError("`encoder` must give finite vectors, got NaN or infinity")
    return vectors
