"""What the reference model would say of each example, and how far that agrees with the labels given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atlantis_ds.weights.formulas import Scores


@dataclass(frozen=True)
class Suggestions:
    """What the reference model would say of n examples; see ``suggestion``."""

    labels: np.ndarray
    """int32 [n] into the label set: the likeliest label."""
    p_label: np.ndarray
    """float64 [n]: its probability of the example's own label among those of the set."""
    p_suggested: np.ndarray
    """float64 [n]: that of the likeliest."""


def suggestion(scores: Scores) -> Suggestions:
    """The label that the reference model finds likeliest for each example, end-of-sequence token included, as in
    ranking; the label set must have been scored."""
    every = scores.label_set
    assert every is not None
    log_likelihood = every.reference + every.eos_reference
    chances = np.exp(log_likelihood - np.logaddexp.reduce(log_likelihood, axis=1, keepdims=True))
    best = chances.argmax(axis=1).astype(np.int32)
    rows = np.arange(len(best))
    return Suggestions(best, chances[rows, scores.labels], chances[rows, best])


def joined(parts: Sequence[Suggestions]) -> Suggestions:
    """Those of chunks as those of all: [n, K] numbers are never in memory together."""
    return Suggestions(
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.p_label for part in parts]),
        np.concatenate([part.p_suggested for part in parts]),
    )


def agreement(suggested: np.ndarray, given: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """How far the likeliest labels are those given.

    Args:
        suggested: int [n] into ``names``, the likeliest labels.
        given: int [n], the labels given.

    Returns:
        ``share`` of the examples where they are equal; ``majority`` and ``majority_share``: the most frequent label
        given, which is what saying always the same would reach; ``never_said``: labels that are given and that the
        reference finds likeliest nowhere, with the share of the examples that have them in ``never_said_share``.
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
