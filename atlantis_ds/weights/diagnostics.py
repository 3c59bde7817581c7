"""Can these weights be trusted? Effective sample size, Pareto k-hat, shares of classes, groups and lengths, and, where
gold labels are known, how well the weights find wrong labels; as numbers, as a table, as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atlantis_ds.files import write_atomic
from atlantis_ds.weights.facts import WeightFacts, against_gold, all_shares, largest
from atlantis_ds.weights.formulas import effective_sample_size, pareto_k, pareto_k_threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group
    from rich.table import Table

ESS_WARN = 0.5
ESS_REFUSE = 0.1
ESS_LEVEL = 0.9  # on gold labels, and on labels whose errors the reference had learned, it was 0.94 to 0.96
TAIL_WARN = 3.0  # no tail at all below this multiple of the mean: classes that peak side by side make a k-hat of 2, too
AUROC_WARN = 0.7
CLASS_RATIO = (0.5, 2.0)
LENGTH_WARN = 0.5
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
MOST_ROWS = 30
"""Rows of a table of shares in the terminal and the picture; ``weights.json`` and the page have all."""


def diagnose(
    weights: np.ndarray, log_weight: np.ndarray, facts: WeightFacts, noise: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Numbers and warnings about one set of weights, ready for JSON (None where a number is not defined).

    Args:
        weights: float64 [n], final, at least 0, not all 0.
        log_weight: float64 [n], before stabilising.
        facts: of the same n examples.
        noise: what ``formula: posterior`` fitted, from ``Noise.as_json``; it stands in the result as it is.

    Returns:
        ``n``; ``ess`` and ``ess_fraction`` (Kish 1965); ``pareto_k`` of ``log_weight``, ``pareto_k_final`` of the final
        weights and ``pareto_k_threshold`` (Vehtari et al. 2024; a k-hat is None where none can be fitted, see
        ``formulas.pareto_k``; the final one decides about the warning, unless no weight is large); ``max``;
        ``quantiles``; ``top_percent_share``: share of the weight on the heaviest 1% of examples.

        Lists of shares, each row with ``label``, ``data_share``, ``weight_share`` and their ``ratio``: ``classes``,
        most frequent first, None for responses; ``groups``, likewise, None where no group is known (beyond the 1,000
        largest one row for all others, with their number in ``of``); ``label_lengths``: the labels of equal length,
        shortest first, and ``target_lengths``: responses in up to ten ranges of tokens, shortest first; either is None
        for the other task, or without tokens. ``length_correlation``: Spearman's, of weight and length, for responses.

        ``gold``: None, or over the examples with a known gold target ``known`` (their number), ``auroc_correct`` (of
        the weight for "the target is right"), ``auroc_correct_within_class`` and ``auroc_correct_within_group`` (mean
        over the classes, or known groups, that have right and wrong examples, weighted by their number),
        ``share_wrong``, ``weight_share_wrong`` and ``lowest_tenth_wrong`` (share of wrong targets in the tenth with the
        lowest weights; equal weights at its border count by their mean).

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
        "gold": None if facts.correct is None else against_gold(weights, facts.correct, facts),
        "noise": noise,
    }
    return diagnosis | {"warnings": _warnings(diagnosis, k_final, facts.length)}


def noun(diagnosis: dict[str, Any]) -> str:
    """What a target of the diagnosed examples is called."""
    return "response" if diagnosis["classes"] is None else "label"


def diagnosis_table(diagnosis: dict[str, Any]) -> Group:
    """What ``diagnose`` returned, for a rich console: the numbers, the tables of shares, the warnings."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    threshold = diagnosis["pareto_k_threshold"]
    k_before, k_final = (_optional(diagnosis[key]) for key in ("pareto_k", "pareto_k_final"))
    numbers = Table.grid(padding=(0, 2))
    numbers.add_row(
        "effective sample size",
        f"{diagnosis['ess']:,.1f} of {diagnosis['n']:,} ({100 * diagnosis['ess_fraction']:.3g}%)",
    )
    numbers.add_row("Pareto k-hat", f"{k_before} before, {k_final} after stabilising (good below {threshold:.2f})")
    numbers.add_row("largest weight", f"{diagnosis['max']:,.4g} (the mean is 1)")
    numbers.add_row("weight on the top 1%", f"{diagnosis['top_percent_share']:.1%}")
    if diagnosis["length_correlation"] is not None:
        numbers.add_row("correlation with length", f"{diagnosis['length_correlation']:.2f} (Spearman)")
    for row in _noise_rows(diagnosis.get("noise")):
        numbers.add_row(*row)
    what = noun(diagnosis)
    if gold := diagnosis["gold"]:
        numbers.add_row(f"known gold {what}s", f"{gold['known']:,}, {gold['share_wrong']:.1%} of the {what}s wrong")
        aurocs = [f"{_optional(gold['auroc_correct'])} overall"]
        for part, shares in (("class", "classes"), ("group", "groups")):
            if diagnosis[shares]:
                aurocs.append(f"{_optional(gold[f'auroc_correct_within_{part}'])} within {part}")
        numbers.add_row(f"AUROC for right {what}s", ", ".join(aurocs))
        on_wrong = "–" if gold["weight_share_wrong"] is None else f"{gold['weight_share_wrong']:.1%}"
        numbers.add_row(f"weight on wrong {what}s", on_wrong)
        numbers.add_row("wrong in the lowest tenth", f"{gold['lowest_tenth_wrong']:.1%}")

    tables = [("label", "classes"), ("group", "groups"), ("tokens", "target_lengths")]
    shown = [_share_table(title, diagnosis[key]) for title, key in tables if diagnosis[key]]
    warnings = [Text(f"Warning: {warning}", style="yellow") for warning in diagnosis["warnings"]]
    return Group(numbers, *shown, *warnings)


def _noise_rows(noise: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """What ``formula: posterior`` found: see ``posterior.Noise``."""
    if noise is None:
        return
    low, high = noise["interval"]
    told = "" if noise["found"] else "; not told from none, so all weights are 1"
    yield "noise in the labels", f"{noise['rate']:.1%} [{low:.1%}, {high:.1%}]{told}"
    gain = noise["evidence"] - noise["evidence_clean"]
    yield (
        "noise model",
        f"T {noise['temperature']:.2f}, share of the base ratio {noise['share']:g}, {gain:.3f} nats an example better "
        "than no noise",
    )
    at = [(p, t, g) for t, row in enumerate(noise["matrix"]) for g, p in enumerate(row) if t != g]
    names = noise["labels"]
    worst = [f"{names[true]} as {names[given]} {p:.0%}" for p, true, given in sorted(at, reverse=True)[:3] if p > 0.01]
    if noise["found"] and worst:
        yield "most often written", "; ".join(worst)


def _share_table(title: str, shares: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title, header_style="bold")
    for column in ("data", "weight", "ratio"):
        table.add_column(column, justify="right")
    for row in largest(shares, MOST_ROWS):
        style = None if CLASS_RATIO[0] <= row["ratio"] <= CLASS_RATIO[1] else "yellow"
        numbers = f"{row['data_share']:.1%}", f"{row['weight_share']:.1%}", f"{row['ratio']:.2f}"
        table.add_row(Text(row["label"]), *numbers, style=style)
    return table


def plot_weights(path: Path, weights: np.ndarray, diagnosis: dict[str, Any]) -> None:
    """Write a PNG: the distribution of the weights; data share beside weight share, by label, or else by group, and by
    length.

    Args:
        path: the file to write.
        weights: float64 [n], final.
        diagnosis: what ``diagnose`` returned for them.
    """
    from matplotlib.figure import Figure

    kind = "group" if diagnosis["classes"] is None else "label"
    panels = [
        (title, largest(shares, MOST_ROWS))
        for title, shares in (
            (f"share of each {kind} (× = weight / data)", diagnosis["classes"] or diagnosis["groups"]),
            (f"share by tokens of the {noun(diagnosis)}", diagnosis["label_lengths"] or diagnosis["target_lengths"]),
        )
        if shares
    ]
    rows = max((len(shares) for _, shares in panels), default=0)
    size = (6 + 5.5 * len(panels), max(4.0, 1.5 + 0.34 * rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    first, *others = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    _plot_histogram(first, np.asarray(weights, dtype=np.float64), diagnosis)
    for axes, (title, shares) in zip(others, panels):
        _plot_shares(axes, shares, title)
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    for axes in (first, *others):
        axes.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


DATA_COLOUR, WEIGHT_COLOUR = "#9aa5b1", "#1f6f8b"


def _plot_histogram(axes: Axes, weights: np.ndarray, diagnosis: dict[str, Any]) -> None:
    # Weights below 1e-6 of the mean are as good as zero; they share the first bin.
    low, high = max(float(weights.min()), 1e-6), float(weights.max())
    if high / low < 1.5:
        low, high = low / 10, 10 * high
    bins = np.geomspace(low, high * (1 + 1e-9), 42).tolist()
    inside = np.clip(weights, low, high)
    n, total = len(weights), weights.sum()
    axes.hist(inside, bins, weights=np.full(n, 1 / n), color=DATA_COLOUR, label="share of examples")
    axes.hist(
        inside, bins, weights=weights / total, histtype="step", color=WEIGHT_COLOUR, lw=1.6, label="share of weight"
    )
    axes.axvline(1, color="0.35", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_xlabel("weight (the mean is 1" + ("; 1e-6 and below in the first bin)" if low == 1e-6 else ")"))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_title(
        f"effective sample size {diagnosis['ess']:,.0f} of {diagnosis['n']:,} "
        f"({100 * diagnosis['ess_fraction']:.3g}%), max {diagnosis['max']:,.4g}",
        fontsize=10.5,
    )
    axes.legend(frameon=False, fontsize=9)


def _plot_shares(axes: Axes, shares: list[dict[str, Any]], title: str) -> None:
    *shown, last = shares
    if "of" in last:  # one bar for all others would dwarf every other one
        shares, title = shown, f"{title}, {last['of']:,} smaller ones left out"
    at = np.arange(len(shares))
    for offset, key, colour, name in (
        (-0.2, "data_share", DATA_COLOUR, "data"),
        (0.2, "weight_share", WEIGHT_COLOUR, "weight"),
    ):
        axes.barh(at + offset, [row[key] for row in shares], 0.38, color=colour, label=name)
    for y, row in zip(at, shares):
        outside = not CLASS_RATIO[0] <= row["ratio"] <= CLASS_RATIO[1]
        axes.annotate(
            f"×{row['ratio']:.2f}",
            (max(row["data_share"], row["weight_share"]), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#b3261e" if outside else "0.35",
        )
    names = [row["label"] if len(row["label"]) <= 40 else row["label"][:39] + "…" for row in shares]
    axes.set_yticks(at, names, fontsize=9, parse_math=False)
    axes.set_ylim(len(shares) + 0.3, -0.6)  # with room for the legend below the bars
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_title(title, fontsize=10.5)
    axes.legend(frameon=False, fontsize=9, loc="lower right", ncols=2)


def _warnings(diagnosis: dict[str, Any], k: float, length: str) -> list[str]:
    warnings = []
    fraction, what = diagnosis["ess_fraction"], noun(diagnosis)
    or_mean = "" if length == "mean" else ", or weights.length: mean"
    spread = (
        f"the effective sample size is {diagnosis['ess']:,.1f} of {diagnosis['n']:,} examples ({100 * fraction:.3g}%)"
    )
    if fraction < ESS_REFUSE:
        warnings.append(
            f"{spread}, and the heaviest 1% hold {diagnosis['top_percent_share']:.0%} of the weight: `train` refuses "
            f"this without --force. Set weights.temper (0.5 asks for half of n){or_mean}."
        )
    elif fraction < ESS_WARN:
        warnings.append(
            f"{spread}: training will follow a minority of them. Set weights.temper (0.5 asks for half of n){or_mean}."
        )
    if diagnosis["max"] < TAIL_WARN:
        k = -math.inf
    if k == math.inf:
        warnings.append(
            "Pareto k-hat is beyond measure: nearly all weights are zero beside the largest few. "
            f"Set weights.temper{or_mean}."
        )
    elif k >= 1:
        warnings.append(
            f"Pareto k-hat is {k:.2f}: with 1 or more the weights have no mean, and another sample would give quite "
            f"other weights. Set weights.temper{or_mean}."
        )
    elif k >= diagnosis["pareto_k_threshold"]:
        warnings.append(
            f"Pareto k-hat is {k:.2f}, above {diagnosis['pareto_k_threshold']:.2f}: a few large weights decide "
            f"the result. Set weights.temper{or_mean}."
        )
    low, high = CLASS_RATIO
    outside = [row for row in diagnosis["classes"] or () if not low <= row["ratio"] <= high]
    if outside:
        outside.sort(key=lambda row: -abs(row["weight_share"] - row["data_share"]))
        named = "; ".join(
            f"{row['label']!r} has {row['data_share']:.1%} of the data and {row['weight_share']:.1%} of the weight"
            for row in outside[:3]
        )
        more = f"; and {len(outside) - 3} more" if len(outside) > 3 else ""
        warnings.append(
            f"the weights change the class shares by more than {high:g} times: {named}{more}. Set weights.scope: "
            f"per_label to keep every class's share, or weights.calibrate: label_mean{or_mean}."
        )
    correlation = diagnosis["length_correlation"]
    if correlation is not None and abs(correlation) > LENGTH_WARN:
        favoured = "long" if correlation > 0 else "short"
        advice = ", even with weights.length: mean." if length == "mean" else ". Set weights.length: mean."
        warnings.append(
            f"the weights follow the response length: Spearman's correlation is {correlation:.2f}, {favoured} "
            f"responses weigh more{advice}"
        )
    gold = diagnosis["gold"]
    aurocs = [gold[key] for key in ("auroc_correct", "auroc_correct_within_class") if gold and gold[key] is not None]
    rules = (
        f"Where rules or patterns made the {what}s, a reference trained on them learns their errors: train it on gold "
        f"{what}s (models.reference.on: dev)."
    )
    if (noise := diagnosis["noise"]) and not noise["found"]:
        warnings.append(
            f"no noise is found in the {what}s, so all weights are 1 and training on them is plain SFT. Either the "
            f"{what}s are right, or the reference has learned their errors. {rules}"
        )
    elif fraction > 1 - 1e-9:
        warnings.append("all weights are equal: training on them is plain SFT, and their order says nothing.")
    elif aurocs and min(aurocs) < AUROC_WARN:
        where = " (overall or within class)" if diagnosis["classes"] else ""
        warnings.append(
            f"the weights hardly tell right {what}s from wrong ones: AUROC {min(aurocs):.2f}{where}, "
            f"where 0.50 is chance. Train the reference longer, in more folds, in two rounds (models.reference). "
            f"{rules}"
        )
    elif gold is None and fraction > ESS_LEVEL:
        warnings.append(
            f"{spread}: the weights hardly differ. Either nearly all {what}s are right, and training without weights "
            f"(weights.formula: uniform) is the better choice, or the reference finds the wrong ones likely, too. "
            f"{rules}"
        )
    return warnings


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _optional(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}"
