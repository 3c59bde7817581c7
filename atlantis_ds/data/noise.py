"""Wrong labels put into the training examples on purpose, with the true label kept beside."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from atlantis_ds.config.schema import Noise
from atlantis_ds.data.splits import draw_order
from atlantis_ds.data.table import Example
from atlantis_ds.errors import InputError


def add_noise(examples: list[Example], noise: Noise, labels: list[str], seed: int) -> list[Example]:
    """Make exactly ``round(rate * n)`` right labels wrong.

    The rows are drawn uniformly among those whose label is right (equal to gold, where gold is given) and, for
    ``confusion``, whose true label has a row with mass off itself in the table; the wrong label is drawn uniformly,
    or from that row with the true label left out. The draw depends on the seed and the example's id alone, so a
    higher rate hits a superset of the rows, and another order of the rows changes nothing.

    Returns:
        the examples in order, ``gold`` filled in on every row. With rate 0 nothing is touched, ``gold`` included.

    Raises:
        InputError: the table names an unknown label, holds a bad probability, or too few rows can be made wrong.
    """
    wrong_labels = _wrong_labels(noise, labels)
    count = round(noise.rate * len(examples))
    if noise.rate == 0:
        return list(examples)
    open_rows = [e for e in examples if e.gold in (None, e.label) and wrong_labels.get(e.label)]
    if count > len(open_rows):
        raise InputError(
            f"data.noise.rate: {count} labels of {len(examples)} are to be made wrong, but only {len(open_rows)} can be"
            " (their label is right and another label is open to them); lower the rate"
        )
    chosen = {e.id for e in sorted(open_rows, key=lambda e: draw_order(seed, "noise", e.id))[:count]}
    noisy = []
    for example in examples:
        label = example.label
        if example.id in chosen:
            wrong = wrong_labels[label]
            label = random.Random(f"{seed}:wrong label:{example.id}").choices(list(wrong), list(wrong.values()))[0]
        noisy.append(replace(example, label=label, gold=example.label if example.gold is None else example.gold))
    return noisy


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
                raise InputError(f"data.noise.table.{label}.{other}: a probability is 0 or more, not {weight}")
        table[label] = {other: weight for other, weight in row.items() if other != label and weight > 0}
    return table
