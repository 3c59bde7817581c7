"""What is known of weighted examples: their shares of the weight, by class, group and length, and against gold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.compute as pc

if TYPE_CHECKING:
    from atlantis_ds.config.schema import Weights
    from atlantis_ds.data.examples import Split

LENGTH_BINS = 10
MOST_GROUPS = 1000  # with rows of their own: a column of sources may have another text in nearly every example


@dataclass(frozen=True)
class WeightFacts:
    """What is known of n examples beside their weights; see ``weight_facts``."""

    labels: np.ndarray | None = None
    """int [n] into ``label_names``, the labels trained on; None for responses."""
    label_names: Sequence[str] = ()
    groups: np.ndarray | None = None
    """int [n] into ``group_names``, what made the labels; -1 where it is not known."""
    group_names: Sequence[str] = ()
    tokens: np.ndarray | None = None
    """int [n], tokens of each label or response under the large model."""
    correct: np.ndarray | None = None
    """int [n]: 1 where the label or response is the gold one, 0 where it is not, -1 where that is not known."""
    length: Literal["sum", "mean"] = "sum"
    """``weights.length``: no warning advises what is set already."""


def weight_facts(train: Split, options: Weights, tokens: np.ndarray | None = None) -> WeightFacts:
    """What ``diagnose`` wants to know of the training examples.

    Args:
        train: the n training examples.
        options: of the weights.
        tokens: int [n], tokens of each target under the large model.
    """
    names = pc.unique(train.groups).drop_null()
    return WeightFacts(
        labels=None if train.labels is None else train.codes,
        label_names=train.labels or (),
        groups=pc.fill_null(pc.index_in(train.groups, value_set=names), -1).to_numpy() if len(names) else None,
        group_names=names.to_pylist(),
        tokens=tokens,
        correct=train.correct,
        length=options.length,
    )


def all_shares(weights: np.ndarray, facts: WeightFacts) -> dict[str, Any]:
    """The lists of shares that ``diagnose`` returns, and the correlation with length."""
    found: dict[str, Any] = dict.fromkeys(
        ("classes", "groups", "label_lengths", "target_lengths", "length_correlation")
    )
    tokens = facts.tokens
    if facts.labels is not None:
        found["classes"] = _most_frequent_first(_shares(weights, facts.labels, facts.label_names))
        found["label_lengths"] = None if tokens is None else _shares(weights, tokens)
    elif tokens is not None:
        found["target_lengths"] = _shares(weights, *_length_bins(tokens))
        found["length_correlation"] = _rank_correlation(weights, tokens)
    if facts.groups is not None and (facts.groups >= 0).any():
        # -1, no group, comes last among the names.
        shares = _shares(weights, facts.groups, [*facts.group_names, "(no group)"])
        found["groups"] = largest(_most_frequent_first(shares), MOST_GROUPS)
    return found


def _shares(weights: np.ndarray, groups: np.ndarray, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Share of the examples and of the weight of each group, in the order of the groups' numbers."""
    numbers, code = np.unique(groups, return_inverse=True)
    data_share = np.bincount(code) / len(groups)
    weight_share = np.bincount(code, weights) / weights.sum()
    return [
        {
            "label": str(number) if names is None else names[number],
            "data_share": float(data),
            "weight_share": float(weight),
            "ratio": float(weight / data),
        }
        for number, data, weight in zip(numbers, data_share, weight_share)
    ]


def _most_frequent_first(shares: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(shares, key=lambda row: -row["data_share"])


def largest(shares: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The rows with the largest shares of the data, in their order; then one row for all others, if there are any."""
    if len(shares) <= most:
        return shares
    # A row that stands for others already is the last, and stays among them.
    by_size = sorted(range(len(shares)), key=lambda row: ("of" in shares[row], -shares[row]["data_share"]))
    kept, rest = sorted(by_size[:most]), [shares[row] for row in by_size[most:]]
    data, weight = (math.fsum(row[key] for row in rest) for key in ("data_share", "weight_share"))
    count = sum(row.get("of", 1) for row in rest)
    others = {"label": f"and {count:,} more", "data_share": data, "weight_share": weight, "ratio": weight / data}
    return [*(shares[row] for row in kept), {**others, "of": count}]


def _length_bins(tokens: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Number of the range of tokens that each response falls into, int [n], and the names of the ranges: 1-16."""
    quantiles = np.linspace(0, 1, LENGTH_BINS + 1)[1:]
    last = np.unique(np.quantile(tokens, quantiles, method="inverted_cdf")).astype(np.int64)
    first = np.append(tokens.min(), last[:-1] + 1)
    names = [str(end) if start == end else f"{start}-{end}" for start, end in zip(first, last)]
    return np.searchsorted(last, tokens), names


def _rank_correlation(weights: np.ndarray, tokens: np.ndarray) -> float | None:
    if np.ptp(weights) == 0 or np.ptp(tokens) == 0:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(weights, tokens).statistic)


def against_gold(weights: np.ndarray, correct: np.ndarray, facts: WeightFacts) -> dict[str, Any] | None:
    known = correct >= 0
    if not known.any():
        return None
    weights, wrong = weights[known], correct[known] == 0
    labels, groups = (None if codes is None else codes[known] for codes in (facts.labels, facts.groups))
    size = max(1, round(0.1 * len(weights)))
    border = np.sort(weights)[size - 1]
    below, tied = weights < border, weights == border
    wrong_below = wrong[below].sum() + (size - below.sum()) * wrong[tied].mean()
    return {
        "known": int(known.sum()),
        "auroc_correct": _auroc(weights, ~wrong),
        "auroc_correct_within_class": None if labels is None else _auroc_within(weights, ~wrong, labels),
        "auroc_correct_within_group": None if groups is None else _auroc_within(weights, ~wrong, groups),
        "share_wrong": float(wrong.mean()),
        "weight_share_wrong": float(weights[wrong].sum() / weights.sum()) if weights.sum() else None,
        "lowest_tenth_wrong": float(wrong_below / size),
    }


def _auroc_within(weights: np.ndarray, correct: np.ndarray, codes: np.ndarray) -> float | None:
    """Mean AUROC over the codes from 0, of the most frequent ones at most 1,000; None where it is defined in none."""
    order = np.argsort(codes, kind="stable")
    numbers, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    aurocs, sizes = [], []
    for part in np.sort(np.argsort(-counts, kind="stable")[:MOST_GROUPS]):
        rows = order[starts[part] :][: counts[part]]
        if numbers[part] >= 0 and (auroc := _auroc(weights[rows], correct[rows])) is not None:
            aurocs.append(auroc)
            sizes.append(len(rows))
    return float(np.average(aurocs, weights=sizes)) if aurocs else None


def _auroc(weights: np.ndarray, correct: np.ndarray) -> float | None:
    if correct.all() or not correct.any():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(correct, weights))
