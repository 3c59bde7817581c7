"""Puts wrong labels into the training examples on purpose, and keeps the true labels."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np

from atlantis_ds.config.schema import Noise
from atlantis_ds.errors import InputError


def noisy_labels(
    labels: np.ndarray, gold: np.ndarray, order: np.ndarray, id_of: Callable[[int], str], noise: Noise,
    names: list[str], seed: int,
) -> np.ndarray:  # fmt: skip
    """Make exactly ``round(rate * n)`` right labels wrong.

    The rows are drawn uniformly from those whose label is right (equal to gold, if gold is given) and, for
    ``confusion``, whose true label has a table row with probability for other labels. The wrong label is drawn
    uniformly, or from that table row without the true label. The draw depends only on the seed and the example's id, so
    a higher rate changes a superset of the rows, and the order of the rows does not matter.

    Args:
        labels, gold: int32 [n], indices into ``names``; gold is -1 where unknown.
        order: draw of each row's id, uint64 [n].
        id_of: the id of a row.

    Returns:
        int32 [n]: the new labels.

    Raises:
        InputError: the table has an unknown label or an invalid probability, or too few rows can be made wrong.
    """
    wrong = _wrong_labels(noise, names)
    can = np.array([bool(wrong.get(name)) for name in names])
    chosen = _choose(noise, np.flatnonzero(((gold == -1) | (gold == labels)) & can[labels]), order, len(labels))
    number = {name: index for index, name in enumerate(names)}
    noisy = labels.copy()
    for row in chosen.tolist():
        others = wrong[names[labels[row]]]
        drawn = random.Random(f"{seed}:wrong label:{id_of(row)}").choices(list(others), list(others.values()))[0]
        noisy[row] = number[drawn]
    return noisy


def noisy_responses(order: np.ndarray, text_of: Callable[[int], str], noise: Noise) -> np.ndarray:
    """Give ``round(rate * n)`` randomly drawn examples the response of another drawn example that has a different text.

    Args:
        order: draw of each row's id, uint64 [n].
        text_of: the response of a row.

    Returns:
        int64 [n]: the row whose response each example gets.

    Raises:
        InputError: all drawn responses are the same text.
    """
    source = np.arange(len(order))
    chosen = _choose(noise, source, order, len(order)).tolist()
    for at, row in enumerate(chosen):
        others = itertools.chain(chosen[at + 1 :], chosen[:at])
        other = next((other for other in others if text_of(other) != text_of(row)), None)
        if other is None:
            raise InputError("data.noise.rate: all drawn responses are the same; there is no wrong one to use")
        source[row] = other
    return source


def _choose(noise: Noise, open_rows: np.ndarray, order: np.ndarray, n: int) -> np.ndarray:
    count = round(noise.rate * n)
    if count > len(open_rows):
        raise InputError(
            f"data.noise.rate: {count} of {n} labels should be made wrong, but only {len(open_rows)} can be (their "
            "label is right and has possible wrong labels); lower the rate"
        )
    return open_rows[np.argsort(order[open_rows], kind="stable")[:count]]


def _wrong_labels(noise: Noise, labels: list[str]) -> dict[str, dict[str, float]]:
    """True label -> {wrong label: weight above 0}."""
    if noise.table is None:
        return {label: {other: 1.0 for other in labels if other != label} for label in labels}
    table: dict[str, dict[str, float]] = {}
    for label, row in noise.table.items():
        for name in (label, *row):
            if name not in labels:
                where = f"data.noise.table.{label}" if name == label else f"data.noise.table.{label}.{name}"
                raise InputError(f"{where}: {name!r} is not in the label set ({', '.join(labels)})")
        for other, weight in row.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise InputError(f"data.noise.table.{label}.{other}: a probability must be 0 or more, not {weight}")
        table[label] = {other: weight for other, weight in row.items() if other != label and weight > 0}
    return table
