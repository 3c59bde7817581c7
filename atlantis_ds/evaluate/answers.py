"""Metrics of free responses: their log-likelihood, and how well a generated response matches the gold response."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from atlantis_ds.errors import InputError, RunError

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def captured(text: str, pattern: str | None) -> str | None:
    """The text that the pattern's first group captures in its last match, without surrounding white space.

    A response that reasons step by step states its answer last. Without a pattern: the whole text.

    Returns:
        None if nothing matches, or only white space is captured.
    """
    if pattern is None:
        return text.strip()
    last = None
    for match in re.finditer(pattern, text):
        last = match[1]
    return (last or "").strip() or None


def exact_match(gold: str | None, predicted: str | None) -> float:
    """1.0 if both texts of `captured` are equal, else 0.0; None equals nothing."""
    return float(gold is not None and gold == predicted)


def token_f1(gold: str | None, predicted: str | None) -> float:
    """F1 of the bags of words of both texts of `captured`, as in SQuAD (Rajpurkar et al. 2016), 0..1.

    Words are separated by white space, after lower-casing, without punctuation and English articles. If a text has no
    words, the value is 1.0 if neither has any, else 0.0; None gives 0.0.
    """
    if gold is None or predicted is None:
        return 0.0
    expected, found = (Counter(_words(text)) for text in (gold, predicted))
    if not expected or not found:
        return float(expected == found)
    return 2 * (expected & found).total() / (expected.total() + found.total())


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def gold_answers(ids: Sequence[str], gold: Sequence[str], pattern: str | None) -> list[str | None]:
    """`captured` of each gold response; also called before training, so that errors appear early.

    Raises:
        InputError: the pattern captures nothing in a gold response.
    """
    found = [captured(text, pattern) for text in gold]
    if pattern is not None and None in found:
        where = ids[found.index(None)]
        raise InputError(
            f"evaluate.answer: {pattern!r} captures nothing in the gold response of test example {where!r} "
            f"({found.count(None)} such); correct the pattern or the example"
        )
    return found


def response_metrics(
    ids: Sequence[str],
    gold: Sequence[str],
    predicted: Sequence[str],
    log_likelihood: Sequence[float],
    tokens: Sequence[int],
    pattern: str | None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All figures of one arm on free responses, ready for ``metrics.json``, and the figures of each example.

    Args:
        ids, gold, predicted: one text per example.
        log_likelihood: log-likelihood of each gold response, summed over its tokens.
        tokens: number of these tokens.
        pattern: the recipe's ``evaluate.answer``: only the captured text is compared; None compares whole texts.

    Returns:
        the figures: ``mean_log_likelihood`` (per token, over the tokens of all examples) and ``perplexity`` (exp of
        minus that; None beyond what a float holds), ``exact_match`` and ``token_f1`` (means over examples, 0..1),
        ``n``; figures that only label sets have are None. And ``exact_match`` and ``token_f1`` of each example, float64
        [n].

    Raises:
        InputError: an id is duplicated, there are no examples, or see `gold_answers`.
        RunError: a log-likelihood is not finite.
    """
    if not ids:
        raise InputError("there are no examples to evaluate; is the test set empty?")
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"example id {twice!r} occurs more than once; the ids of the test examples must be unique")
    for id, value in zip(ids, log_likelihood, strict=True):
        if not math.isfinite(value):
            raise RunError(f"test example {id!r}: its log-likelihood is {value}; the model diverged during training")
    pairs = [
        (answer, captured(text, pattern))
        for answer, text in zip(gold_answers(ids, gold, pattern), predicted, strict=True)
    ]
    values = {
        "exact_match": np.array([exact_match(*pair) for pair in pairs]),
        "token_f1": np.array([token_f1(*pair) for pair in pairs]),
    }
    mean = math.fsum(log_likelihood) / sum(tokens)
    figures = {
        "macro_f1": None,
        "accuracy": None,
        "official": None,
        "per_label": None,
        "mean_log_likelihood": mean,
        "perplexity": math.exp(-mean) if mean > -700 else None,
        **{name: float(of_each.mean()) for name, of_each in values.items()},
        "n": len(ids),
    }
    return figures, values
