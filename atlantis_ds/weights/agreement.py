"""The label that the reference model would give to each example, and how far it agrees with the given labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atlantis_ds.weights.formulas import Scores


@dataclass(frozen=True)
class Suggestions:
    """The labels that the reference model would give to n examples; see ``suggestion``."""

    labels: np.ndarray
    """int32 [n], indices into the label set: the most likely label."""
    p_label: np.ndarray
    """float64 [n]: the probability of the example's own label among those of the set."""
    p_suggested: np.ndarray
    """float64 [n]: the probability of the most likely label."""


def suggestion(scores: Scores) -> Suggestions:
    """The label that the reference model finds most likely for each example, including the end-of-sequence token, as in
    ranking; the label set must have been scored."""
    every = scores.label_set
    assert every is not None
    log_likelihood = every.reference + every.eos_reference
    chances = np.exp(log_likelihood - np.logaddexp.reduce(log_likelihood, axis=1, keepdims=True))
    best = chances.argmax(axis=1).astype(np.int32)
    rows = np.arange(len(best))
    return Suggestions(best, chances[rows, scores.labels], chances[rows, best])


def joined(parts: Sequence[Suggestions]) -> Suggestions:
    """Joins the suggestions of chunks, so that the [n, K] numbers are never all in memory."""
    return Suggestions(
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.p_label for part in parts]),
        np.concatenate([part.p_suggested for part in parts]),
    )


def agreement(suggested: np.ndarray, given: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """How often the most likely labels equal the given labels.

    Args:
        suggested: int [n], indices into ``names``: the most likely labels.
        given: int [n], the given labels.

    Returns:
        ``share`` of the examples for which they are equal; ``majority`` and ``majority_share``: the most frequent given
        label, and its share, which a constant prediction would reach; ``never_said``: given labels that the reference
        finds most likely for no example, with their share of the examples in ``never_said_share``.
    """
    counts = np.bincount(given, minlength=len(names))
    never = np.flatnonzero((counts > 0) & (np.bincount(suggested, minlength=len(names)) == 0)).tolist()
    return {
        "share": float(np.mean(suggested == given)),
        "majority": names[int(counts.argmax())],
        "majority_share": float(counts.max() / len(given)),
        "never_said": [names[label] for label in never],
        "never_said_share": float(counts[never].sum() / len(given)),
    }
