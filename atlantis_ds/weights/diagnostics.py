"""Can these weights be trusted? Effective sample size, Pareto k-hat, shares of classes, groups and lengths and, if gold
labels are known, how well the weights find wrong labels; as numbers and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from atlantis_ds.weights.advice import CLASS_RATIO, noun, warnings
from atlantis_ds.weights.agreement import agreement
from atlantis_ds.weights.facts import WeightFacts, against_gold, all_shares, groups_differ_p, largest
from atlantis_ds.weights.formulas import effective_sample_size, in_order, pareto_k, pareto_k_threshold

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
MOST_ROWS = 30
"""Rows of a table of shares in the terminal and the plot; ``weights.json`` and the page have all."""


def diagnose(
    weights: np.ndarray, log_weight: np.ndarray, facts: WeightFacts, noise: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Numbers and warnings about a set of weights, ready for JSON (None if a number is undefined).

    Args:
        weights: float64 [n], final, at least 0, not all 0.
        log_weight: float64 [n], before stabilising.
        facts: facts about the same n examples.
        noise: what ``formula: posterior`` fitted, from ``Noise.as_json``; it is copied into the result.

    Returns:
        ``n``; ``ess`` and ``ess_fraction`` (Kish 1965); ``pareto_k`` of ``log_weight``, ``pareto_k_final`` of the final
        weights and ``pareto_k_threshold`` (Vehtari et al. 2024; a k-hat is None if none can be fitted, see
        ``formulas.pareto_k``; the final one decides about the warning, unless no weight is large); ``max``;
        ``quantiles``; ``top_percent_share``: share of the weight on the heaviest 1% of examples.

        Lists of shares, each row with ``label``, ``examples`` (how many), ``data_share``, ``weight_share`` and their
        ``ratio``: ``classes``, most frequent first, None for responses; ``groups``, likewise, None if no group is known
            (beyond the 1,000 largest, one row for all others, with their number in ``of``); ``label_lengths``: labels
            grouped by length, shortest first, and ``target_lengths``: responses in up to ten ranges of tokens, shortest
            first; either is None for the other task, or without tokens. Classes and groups also have ``contradicted``,
            the share of ``judged`` examples for which the reference finds another label more likely (None if folds are
            by group and the reference has seen other examples of the group), and ``wrong``, the share known to be
            wrong. Groups then also have ``precision``, the share that is not contradicted, with its 95% interval.
        ``length_correlation``: Spearman's correlation of weight and length, for responses.

        ``tied``: share of the examples that have the most frequent weight. ``one_base``: whether the large and small
            base are the same model. ``agreement``: see ``agreement.agreement``; None if the label set was not scored.
        ``groups_differ_p``: p-value for the groups' differences in ``contradicted`` (chi-squared test).

        ``gold``: None, or over the examples with a known gold target ``known`` (their number), ``auroc_correct`` (of
        the weight for "the target is right"), ``auroc_correct_global`` (with ``scope: global``; None if that is set),
        ``auroc_correct_unbounded`` (without ``clip`` and ``truncate``), ``auroc_correct_within_class`` and
        ``auroc_correct_within_group`` (mean over the classes, or known groups, that have right and wrong examples,
        weighted by their number), each with an ``_interval`` (95%, over examples), ``share_wrong``,
        ``weight_share_wrong`` and ``lowest_tenth_wrong`` (share of wrong targets in the tenth with the lowest weights;
        equal weights at its border count by their mean).

        ``warnings``: plain sentences.
    """
    weights = np.asarray(weights, dtype=np.float64)
    n, total = len(weights), weights.sum()
    ess = effective_sample_size(weights)
    with np.errstate(divide="ignore"):
        final_log = np.maximum(np.log(weights / weights.max()), -1e4)
    k_final = pareto_k(final_log)
    diagnosis: dict[str, Any] = {
        "n": n,
        "ess": ess,
        "ess_fraction": ess / n,
        "pareto_k": _finite(pareto_k(log_weight)),
        "pareto_k_final": _finite(k_final),
        "pareto_k_threshold": pareto_k_threshold(n),
        "max": float(weights.max()),
        "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(weights, QUANTILES))},
        "top_percent_share": float(np.sort(weights)[-max(1, round(0.01 * n)) :].sum() / total),
        **all_shares(weights, facts),
        "tied": float(np.unique(in_order(weights), return_counts=True)[1].max() / n),
        "one_base": facts.one_base,
        "agreement": None,
        "groups_differ_p": groups_differ_p(facts),
        "gold": against_gold(weights, log_weight, facts),
        "noise": noise,
    }
    if facts.suggested is not None and facts.labels is not None:
        diagnosis["agreement"] = agreement(facts.suggested.labels, facts.labels, facts.label_names)
    return diagnosis | {"warnings": warnings(diagnosis | {"pareto_k_final": k_final}, facts)}


def diagnosis_table(diagnosis: dict[str, Any]) -> Group:
    """The result of ``diagnose`` for a rich console: the numbers, the tables of shares, the warnings."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    numbers = Table.grid(padding=(0, 2))
    for name, value in number_rows(diagnosis):
        numbers.add_row(Text(name), Text(value))
    tables = [("label", "classes"), ("group", "groups"), ("tokens", "target_lengths")]
    shown = [_share_table(title, diagnosis[key]) for title, key in tables if diagnosis[key]]
    warned = [Text(f"Warning: {warning}", style="yellow") for warning in diagnosis["warnings"]]
    return Group(numbers, *shown, *warned)


def number_rows(diagnosis: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The numbers of a diagnosis as names and texts, for the terminal and the page."""
    what, threshold = noun(diagnosis), diagnosis["pareto_k_threshold"]
    k_before, k_final = (_optional(diagnosis[key]) for key in ("pareto_k", "pareto_k_final"))
    yield (
        "effective sample size",
        f"{diagnosis['ess']:,.1f} of {diagnosis['n']:,} ({100 * diagnosis['ess_fraction']:.3g}%)",
    )
    yield "Pareto k-hat", f"{k_before} before, {k_final} after stabilising (good below {threshold:.2f})"
    yield "largest weight", f"{diagnosis['max']:,.4g} (the mean is 1)"
    yield "weight on the top 1%", f"{diagnosis['top_percent_share']:.1%}"
    if diagnosis["length_correlation"] is not None:
        yield "correlation with length", f"{diagnosis['length_correlation']:.2f} (Spearman)"
    if diagnosis["one_base"]:
        yield "base models", "large and small are the same model: the base ratio is 1, and product equals reference"
    if found := diagnosis["agreement"]:
        often = f"{found['majority']!r} alone: {found['majority_share']:.1%}"
        yield "reference agrees with", f"{found['share']:.1%} of the labels ({often})"
    if noise := diagnosis["noise"]:
        yield from _noise_rows(noise)
    if gold := diagnosis["gold"]:
        yield f"known gold {what}s", f"{gold['known']:,}, {gold['share_wrong']:.1%} of the {what}s wrong"
        parts = [("overall", "correct"), ("with scope: global", "correct_global")]
        parts += [(f"within {part}", f"correct_within_{part}") for part in ("class", "group")]
        for where, key in parts:
            if (auroc := gold[f"auroc_{key}"]) is not None:
                low, high = gold[f"auroc_{key}_interval"]
                yield f"AUROC for right {what}s, {where}", f"{auroc:.3f} [{low:.3f}, {high:.3f}]"
        if gold["weight_share_wrong"] is not None:
            yield f"weight on wrong {what}s", f"{gold['weight_share_wrong']:.1%}"
        yield "wrong in the lowest tenth", f"{gold['lowest_tenth_wrong']:.1%}"


def _noise_rows(noise: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The noise that ``formula: posterior`` found: see ``posterior.Noise``."""
    low, high = noise["interval"]
    why = "not significant" if noise["informed"] else "but the reference hardly knows the labels"
    told = "" if noise["found"] else f"; {why}, so all weights are 1"
    yield "noise in the labels", f"{noise['rate']:.1%} [{low:.1%}, {high:.1%}]{told}"
    gain = noise["evidence"] - noise["evidence_clean"]
    if noise["pairs"]:
        learned = "; the reference has learned the errors" if noise["meaning"] else ""
        yield "counted in the noise", f"{noise['pairs']:,} dev examples with a given and a gold label{learned}"
    if not noise["meaning"]:
        yield (
            "noise model",
            f"T {noise['temperature']:.2f}, share of the base ratio {noise['share']:g}, {gain:.3f} nats per example "
            "better than no noise",
        )
    at = [(p, t, g) for t, row in enumerate(noise["matrix"]) for g, p in enumerate(row) if t != g]
    names = noise["labels"]
    worst = [f"{names[true]} as {names[given]} {p:.0%}" for p, true, given in sorted(at, reverse=True)[:3] if p > 0.01]
    if noise["found"] and worst:
        yield "most often written", "; ".join(worst)


def _share_table(title: str, shares: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    estimated = any(row.get("precision") for row in shares)
    extra = ["precision" if estimated else "contradicted", "wrong"]
    extra = [key for key in extra if any(row.get(key) is not None for row in shares)]
    table = Table(title, header_style="bold")
    for column in ("examples", "data", "weight", "ratio", *extra):
        table.add_column(column, justify="right")
    for row in largest(shares, MOST_ROWS):
        style = None if CLASS_RATIO[0] <= row["ratio"] <= CLASS_RATIO[1] else "yellow"
        numbers = [
            f"{row['examples']:,}",
            f"{row['data_share']:.1%}",
            f"{row['weight_share']:.1%}",
            f"{row['ratio']:.2f}",
        ]
        numbers += [share_text(row.get(key)) for key in extra]
        table.add_row(Text(row["label"]), *numbers, style=style)
    return table


def share_text(share: float | list[float] | None) -> str:
    """A share in percent, or an estimate with its interval."""
    if share is None:
        return "–"
    if isinstance(share, float):
        return f"{share:.1%}"
    estimate, low, high = share
    return f"{estimate:.0%} [{low:.0%}, {high:.0%}]"


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _optional(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}"
