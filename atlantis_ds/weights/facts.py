"""Facts about weighted examples: their shares of the weight by class, group and length, and comparison with gold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from atlantis_ds.config.schema import Reference, Weights
from atlantis_ds.weights.agreement import Suggestions
from atlantis_ds.weights.formulas import in_order, stabilise
from atlantis_ds.weights.posterior import wilson

if TYPE_CHECKING:
    from atlantis_ds.data.examples import Split

LENGTH_BINS = 10
MOST_GROUPS = 1000  # groups with their own row: a column of sources may have a different text in almost every example


@dataclass(frozen=True)
class WeightFacts:
    """What is known about n examples besides their weights; see ``weight_facts``."""

    labels: np.ndarray | None = None
    """int [n], indices into ``label_names``: the labels to train on; None for responses."""
    label_names: Sequence[str] = ()
    groups: np.ndarray | None = None
    """int [m], indices into ``group_names``: what made the labels; -1 if unknown."""
    group_rows: np.ndarray | None = None
    """int [m]: the example of each group, if several groups made one label; None if each has one group, m = n."""
    group_names: Sequence[str] = ()
    tokens: np.ndarray | None = None
    """int [n], tokens of each label or response under the large model."""
    correct: np.ndarray | None = None
    """int [n]: 1 if the label or response equals the gold one, 0 if not, -1 if unknown."""
    suggested: Suggestions | None = None
    """The labels that the reference would give; None if the label set was not scored."""
    judged: np.ndarray | None = None
    """bool [m]: whether the example's reference has seen nothing of that group; None if folds are by text."""
    options: Weights = field(default_factory=Weights)
    """Options of the weights: no warning suggests what is already set,"""
    reference: Reference = field(default_factory=Reference)
    """or what the recipe refuses."""
    one_base: bool = False
    """Whether the large and small base are the same model."""

    @property
    def grouped(self) -> np.ndarray:
        """int [m]: the example of each of ``groups``."""
        assert self.groups is not None
        return np.arange(len(self.groups)) if self.group_rows is None else self.group_rows

    @property
    def contradicted(self) -> np.ndarray | None:
        """float64 [n]: 1 if the reference finds another label more likely, 0 if not."""
        if self.suggested is None or self.labels is None:
            return None
        return np.asarray(self.suggested.labels != self.labels, dtype=np.float64)

    @property
    def wrong(self) -> np.ndarray | None:
        """float64 [n]: 1 if the label differs from the gold one, 0 if it is equal, NaN if unknown."""
        if self.correct is None or not (self.correct >= 0).any():
            return None
        return np.where(self.correct < 0, np.nan, 1.0 - self.correct)


def weight_facts(train: Split, options: Weights, **known: Any) -> WeightFacts:
    """The facts that ``diagnose`` needs about the n training examples, plus ``known`` fields of ``WeightFacts``."""
    rows, groups, names = train.memberships
    return WeightFacts(
        labels=None if train.labels is None else train.codes,
        label_names=train.labels or (),
        groups=groups if names else None,
        group_rows=rows,
        group_names=names,
        correct=train.correct,
        options=options,
        **known,
    )


def all_shares(weights: np.ndarray, facts: WeightFacts) -> dict[str, Any]:
    """The lists of shares that ``diagnose`` returns, and the correlation with length."""
    found: dict[str, Any] = dict.fromkeys(
        ("classes", "groups", "label_lengths", "target_lengths", "length_correlation")
    )
    tokens = facts.tokens
    means = {"contradicted": facts.contradicted, "wrong": facts.wrong}
    if facts.labels is not None:
        classes = _shares(weights, facts.labels, facts.label_names, **means)
        found["classes"] = _most_frequent_first(classes)
        found["label_lengths"] = None if tokens is None else _shares(weights, tokens)
    elif tokens is not None:
        found["target_lengths"] = _shares(weights, *_length_bins(tokens))
        found["length_correlation"] = _rank_correlation(weights, tokens)
    if facts.groups is not None and (facts.groups >= 0).any():
        # -1 (no group) indexes the last name.
        names = [*facts.group_names, "(no group)"]
        shares = _shares(weights, facts.groups, names, facts.grouped, facts.judged, **means)
        found["groups"] = largest(_most_frequent_first(shares), MOST_GROUPS)
        if facts.judged is not None:
            for share in found["groups"]:
                share["precision"] = _precision(share.get("contradicted"), share.get("judged", 0))
    return found


def _precision(contradicted: float | None, judged: int) -> list[float] | None:
    """Estimated share of right labels in a group, by references that have not seen it, with Wilson's 95% interval."""
    if contradicted is None:
        return None
    return [1 - contradicted, *wilson(round((1 - contradicted) * judged), judged)]


def groups_differ_p(facts: WeightFacts) -> float | None:
    """p-value for the differences between groups of one label in how often the reference contradicts them.

    Pearson's chi-squared test within each label, since some labels are harder than others; an example counts for its
    first group. Groups with less than one expected contradiction are pooled. None if no label has two groups.
    """
    if facts.contradicted is None or facts.labels is None or facts.groups is None:
        return None
    from scipy.stats import chi2, chi2_contingency

    rows = facts.grouped
    first = np.unique(rows, return_index=True)[1]
    counted = first[(facts.groups[first] >= 0) & (True if facts.judged is None else facts.judged[first])]
    rows, groups, statistic, freedom = rows[counted], facts.groups[counted], 0.0, 0
    for label in np.unique(facts.labels[rows]):
        inside = facts.labels[rows] == label
        size = np.bincount(groups[inside])
        against = np.bincount(groups[inside], facts.contradicted[rows[inside]])
        small = size * against.sum() / size.sum() < 1
        table = np.stack([against, size - against])
        table = np.column_stack([table[:, ~small], table[:, small].sum(axis=1)])
        table = table[:, table.sum(axis=0) > 0]
        if table.shape[1] > 1 and table.sum(axis=1).all():
            found = chi2_contingency(table, correction=False)
            statistic, freedom = statistic + found.statistic, freedom + found.dof
    return float(chi2.sf(statistic, freedom)) if freedom else None


def _shares(
    weights: np.ndarray,
    codes: np.ndarray,
    names: Sequence[str] | None = None,
    rows: np.ndarray | None = None,
    judged: np.ndarray | None = None,
    **means: np.ndarray | None,
) -> list[dict[str, Any]]:
    """Share of the examples and of the weight of each code, in the order of the codes.

    Args:
        weights: float64 [n].
        codes: int [m].
        names: names of the codes.
        rows: int [m], the example of each code; None for m = n.
        judged: bool [m], which entries count in ``contradicted``; None for all.
        means: float64 [n], NaN where unknown: each becomes the mean over the known values.
    """
    rows = np.arange(len(weights)) if rows is None else rows
    numbers, code = np.unique(codes, return_inverse=True)
    counts = np.bincount(code)
    data_share = counts / len(weights)
    weight_share = np.bincount(code, weights[rows]) / weights.sum()
    shares = [
        {
            "label": str(number) if names is None else names[number],
            "examples": int(count),
            "data_share": float(data),
            "weight_share": float(weight),
            "ratio": float(weight / data),
        }
        for number, count, data, weight in zip(numbers, counts, data_share, weight_share)
    ]
    for key, values in means.items():
        if values is None:
            continue
        known = ~np.isnan(values[rows])
        if key == "contradicted" and judged is not None:
            known &= judged
        total = np.bincount(code[known], values[rows][known], len(numbers))
        for share, sum_of, count in zip(shares, total, np.bincount(code[known], minlength=len(numbers)).tolist()):
            share[key] = float(sum_of / count) if count else None
            if key == "contradicted":
                share["judged"] = count
    return shares


def _most_frequent_first(shares: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(shares, key=lambda row: -row["data_share"])


def largest(shares: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The rows with the largest shares of the data, in their order; then one row for all others, if any."""
    if len(shares) <= most:
        return shares
    # A row that already represents others is the last, and stays with them.
    by_size = sorted(range(len(shares)), key=lambda row: ("of" in shares[row], -shares[row]["data_share"]))
    kept, rest = sorted(by_size[:most]), [shares[row] for row in by_size[most:]]
    data, weight = (math.fsum(row[key] for row in rest) for key in ("data_share", "weight_share"))
    count = sum(row.get("of", 1) for row in rest)
    others = {"label": f"and {count:,} more", "of": count, "examples": sum(row["examples"] for row in rest)}
    return [
        *(shares[row] for row in kept),
        {**others, "data_share": data, "weight_share": weight, "ratio": weight / data},
    ]


def _length_bins(tokens: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The range of tokens of each response, int [n], and the names of the ranges: 1-16."""
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


def against_gold(weights: np.ndarray, log_weight: np.ndarray, facts: WeightFacts) -> dict[str, Any] | None:
    """What ``diagnose`` returns as ``gold``: how well the weights separate right targets from wrong ones.

    Args:
        weights: float64 [n], final.
        log_weight: float64 [n], before stabilising.
    """
    correct = facts.correct
    if correct is None or not (known := correct >= 0).any():
        return None
    right, size, place = correct[known] == 1, max(1, round(0.1 * known.sum())), in_order(weights[known])
    border = np.sort(place)[size - 1]
    below, tied = place < border, place == border
    wrong_below = (~right)[below].sum() + (size - below.sum()) * (~right)[tied].mean()
    everywhere = np.zeros(known.sum(), dtype=np.int64)
    found = {"correct": _auroc(weights[known], right, everywhere)}
    for key, changes in (("global", {"scope": "global"}), ("unbounded", {"clip": None, "truncate": "none"})):
        options = facts.options.model_copy(update=changes)
        if options == facts.options or facts.labels is None:
            found[f"correct_{key}"] = (None, None) if key == "global" else found["correct"]
        else:
            other = stabilise(log_weight, facts.labels, options)
            found[f"correct_{key}"] = _auroc(other[known], right, everywhere)
    found["correct_within_class"] = found["correct_within_group"] = (None, None)
    if facts.labels is not None:
        found["correct_within_class"] = _auroc(weights[known], right, facts.labels[known])
    if facts.groups is not None:
        kept = known[facts.grouped]
        rows = facts.grouped[kept]
        found["correct_within_group"] = _auroc(weights[rows], correct[rows] == 1, facts.groups[kept])
    total = weights[known].sum()
    return {
        "known": int(known.sum()),
        **{f"auroc_{key}": auroc for key, (auroc, _) in found.items()},
        **{f"auroc_{key}_interval": interval for key, (_, interval) in found.items()},
        "share_wrong": float((~right).mean()),
        "weight_share_wrong": float(weights[known][~right].sum() / total) if total else None,
        "lowest_tenth_wrong": float(wrong_below / size),
    }


def _auroc(weights: np.ndarray, right: np.ndarray, codes: np.ndarray) -> tuple[float | None, list[float] | None]:
    """Mean AUROC over the codes from 0 (at most the 1,000 most frequent), weighted by their number, and its interval.

    (None, None) if it is undefined for all of them.
    """
    from sklearn.metrics import roc_auc_score

    place, order = in_order(weights), np.argsort(codes, kind="stable")
    numbers, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    aurocs, sizes = [], []
    for part in np.sort(np.argsort(-counts, kind="stable")[:MOST_GROUPS]):
        rows = order[starts[part] :][: counts[part]]
        ups = int(right[rows].sum())
        if numbers[part] >= 0 and 0 < ups < len(rows):
            aurocs.append(roc_auc_score(right[rows], place[rows]))
            sizes.append((ups, len(rows) - ups))
    if not aurocs:
        return None, None
    mean = float(np.average(aurocs, weights=np.sum(sizes, axis=1)))
    return mean, auroc_interval(mean, np.array(sizes))


def auroc_interval(auroc: float, sizes: np.ndarray) -> list[float]:
    """95% interval of a mean AUROC over parts, each weighted by its number of examples.

    Newcombe 2006, Confidence intervals for an effect size measure based on the Mann-Whitney statistic, method 5: the
    values from which the observed AUROC is within 1.96 of their own standard errors (Hanley and McNeil 1982). It is
    also valid for few examples.

    Args:
        sizes: int [parts, 2], right and wrong examples of each part, at least one of each.
    """
    from scipy.optimize import brentq

    right, wrong = sizes.T.astype(np.float64)
    share = (right + wrong) / sizes.sum()

    def beyond(value: float, way: float) -> float:
        """How far the observed AUROC is beyond 1.96 standard errors from ``value``."""
        mean = (right + wrong) / 2 - 1
        pairs = 1 + mean * (1 - value) / (2 - value) + mean * value / (1 + value)
        variance = float((share**2 * value * (1 - value) * pairs / (right * wrong)).sum())
        return way * (auroc - value) - 1.96 * math.sqrt(variance)

    edge = 1e-9
    low = brentq(beyond, edge, max(auroc - edge, 2 * edge), args=(1.0,)) if auroc > 3 * edge else 0.0
    high = brentq(beyond, min(auroc + edge, 1 - 2 * edge), 1 - edge, args=(-1.0,)) if auroc < 1 - 3 * edge else 1.0
    return [low, high]
