"""Can these weights be trusted? Effective sample size, Pareto k-hat, class shares, and, where gold labels are known,
how well the weights find wrong labels; as numbers, as a table, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atlantis_ds.files import write_atomic
from atlantis_ds.weights.formulas import effective_sample_size, pareto_k, pareto_k_threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group

ESS_WARN = 0.5
ESS_REFUSE = 0.1
ESS_LEVEL = 0.9  # on gold labels, and on labels whose errors the reference had learned, it was 0.94 to 0.96
TAIL_WARN = 3.0  # no tail at all below this multiple of the mean: classes that peak side by side make a k-hat of 2, too
AUROC_WARN = 0.7
CLASS_RATIO = (0.5, 2.0)
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def diagnose(
    weights: np.ndarray,
    log_weight: np.ndarray,
    labels: np.ndarray,
    gold: np.ndarray | None,
    names: Sequence[str],
    label_tokens: np.ndarray | None = None,
) -> dict[str, Any]:
    """Numbers and warnings about one set of weights, ready for JSON (None where a number is not defined).

    Args:
        weights: float64 [n], final, at least 0, not all 0.
        log_weight: float64 [n], before stabilising.
        labels: int [n] into ``names``, the labels trained on.
        gold: int [n] into ``names``, the true labels; -1 where it is not known. Or None.
        names: the labels' names.
        label_tokens: int [n], tokens of each label under the large model.

    Returns:
        ``n``; ``ess`` and ``ess_fraction`` (Kish 1965); ``pareto_k`` of ``log_weight``, ``pareto_k_final`` of the final
        weights and ``pareto_k_threshold`` (Vehtari et al. 2024; a k-hat is None where none can be fitted, see
        ``formulas.pareto_k``; the final one decides about the warning, unless no weight is large); ``max``;
        ``quantiles``; ``top_percent_share``: share of the weight on the heaviest 1% of examples; ``classes``:
        ``label``, ``data_share``, ``weight_share`` and their ``ratio``, most frequent first; ``label_lengths``: the
        same for the labels of equal length, shortest first, None without ``label_tokens``; ``gold``: None, or over the
        examples with a gold label ``known`` (their number), ``auroc_correct`` (of the weight for "the label is right"),
        ``auroc_correct_within_class`` (mean over the labels that have right and wrong examples, weighted by their
        number), ``share_wrong``, ``weight_share_wrong`` and ``lowest_tenth_wrong`` (share of wrong labels in the tenth
        with the lowest weights; equal weights at its border count by their mean); ``warnings``: plain sentences.
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
        "classes": sorted(_shares(weights, labels, names), key=lambda row: -row["data_share"]),
        "label_lengths": None if label_tokens is None else _shares(weights, label_tokens),
        "gold": None if gold is None else _against_gold(weights, labels, gold),
    }
    return diagnosis | {"warnings": _warnings(diagnosis, k_final)}


def diagnosis_table(diagnosis: dict[str, Any]) -> Group:
    """What ``diagnose`` returned, for a rich console: the numbers, the class table, the warnings."""
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
    if gold := diagnosis["gold"]:
        numbers.add_row("known gold labels", f"{gold['known']:,}, {gold['share_wrong']:.1%} of the labels wrong")
        overall, within = (_optional(gold[key]) for key in ("auroc_correct", "auroc_correct_within_class"))
        numbers.add_row("AUROC for right labels", f"{overall} overall, {within} within class")
        on_wrong = "–" if gold["weight_share_wrong"] is None else f"{gold['weight_share_wrong']:.1%}"
        numbers.add_row("weight on wrong labels", on_wrong)
        numbers.add_row("wrong in the lowest tenth", f"{gold['lowest_tenth_wrong']:.1%}")

    classes = Table("label", header_style="bold")
    for column in ("data", "weight", "ratio"):
        classes.add_column(column, justify="right")
    for row in diagnosis["classes"]:
        style = None if CLASS_RATIO[0] <= row["ratio"] <= CLASS_RATIO[1] else "yellow"
        shares = f"{row['data_share']:.1%}", f"{row['weight_share']:.1%}", f"{row['ratio']:.2f}"
        classes.add_row(Text(row["label"]), *shares, style=style)
    warnings = [Text(f"Warning: {warning}", style="yellow") for warning in diagnosis["warnings"]]
    return Group(numbers, classes, *warnings)


def plot_weights(path: Path, weights: np.ndarray, diagnosis: dict[str, Any]) -> None:
    """Write a PNG: the distribution of the weights; data share beside weight share, by label and by label length.

    Args:
        path: the file to write.
        weights: float64 [n], final.
        diagnosis: what ``diagnose`` returned for them.
    """
    from matplotlib.figure import Figure

    panels = [("share of each label (× = weight / data)", diagnosis["classes"])]
    if diagnosis["label_lengths"]:
        panels.append(("share by tokens of the label", diagnosis["label_lengths"]))
    rows = max(len(shares) for _, shares in panels)
    size = (6 + 5.5 * len(panels), max(4.0, 1.2 + 0.34 * rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    first, *others = figure.subplots(1, 1 + len(panels))
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
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_title(title, fontsize=10.5)
    axes.legend(frameon=False, fontsize=9, loc="best")


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


def _against_gold(weights: np.ndarray, labels: np.ndarray, gold: np.ndarray) -> dict[str, Any] | None:
    known = gold >= 0
    if not known.any():
        return None
    weights, labels = weights[known], labels[known]
    wrong = labels != gold[known]
    aurocs, sizes = [], []
    for label in np.unique(labels):
        rows = labels == label
        if (auroc := _auroc(weights[rows], ~wrong[rows])) is not None:
            aurocs.append(auroc)
            sizes.append(int(rows.sum()))
    size = max(1, round(0.1 * len(weights)))
    border = np.sort(weights)[size - 1]
    below, tied = weights < border, weights == border
    wrong_below = wrong[below].sum() + (size - below.sum()) * wrong[tied].mean()
    return {
        "known": int(known.sum()),
        "auroc_correct": _auroc(weights, ~wrong),
        "auroc_correct_within_class": float(np.average(aurocs, weights=sizes)) if aurocs else None,
        "share_wrong": float(wrong.mean()),
        "weight_share_wrong": float(weights[wrong].sum() / weights.sum()) if weights.sum() else None,
        "lowest_tenth_wrong": float(wrong_below / size),
    }


def _auroc(weights: np.ndarray, correct: np.ndarray) -> float | None:
    if correct.all() or not correct.any():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(correct, weights))


def _warnings(diagnosis: dict[str, Any], k: float) -> list[str]:
    warnings = []
    fraction = diagnosis["ess_fraction"]
    spread = (
        f"the effective sample size is {diagnosis['ess']:,.1f} of {diagnosis['n']:,} examples ({100 * fraction:.3g}%)"
    )
    if fraction < ESS_REFUSE:
        warnings.append(
            f"{spread}, and the heaviest 1% hold {diagnosis['top_percent_share']:.0%} of the weight: `train` refuses "
            f"this without --force. Set weights.temper (0.5 asks for half of n), or weights.length: mean."
        )
    elif fraction < ESS_WARN:
        warnings.append(
            f"{spread}: training will follow a minority of them. Set weights.temper (0.5 asks for half of n), or "
            f"weights.length: mean."
        )
    if diagnosis["max"] < TAIL_WARN:
        k = -math.inf
    if k == math.inf:
        warnings.append(
            "Pareto k-hat is beyond measure: nearly all weights are zero beside the largest few. "
            "Set weights.temper, or weights.length: mean."
        )
    elif k >= 1:
        warnings.append(
            f"Pareto k-hat is {k:.2f}: with 1 or more the weights have no mean, and another sample would give quite "
            f"other weights. Set weights.temper, or weights.length: mean."
        )
    elif k >= diagnosis["pareto_k_threshold"]:
        warnings.append(
            f"Pareto k-hat is {k:.2f}, above {diagnosis['pareto_k_threshold']:.2f}: a few large weights decide "
            f"the result. Set weights.temper, or weights.length: mean."
        )
    low, high = CLASS_RATIO
    outside = [row for row in diagnosis["classes"] if not low <= row["ratio"] <= high]
    if outside:
        outside.sort(key=lambda row: -abs(row["weight_share"] - row["data_share"]))
        named = "; ".join(
            f"{row['label']!r} has {row['data_share']:.1%} of the data and {row['weight_share']:.1%} of the weight"
            for row in outside[:3]
        )
        more = f"; and {len(outside) - 3} more" if len(outside) > 3 else ""
        warnings.append(
            f"the weights change the class shares by more than {high:g} times: {named}{more}. Set weights.scope: "
            f"per_label to keep every class's share, or weights.calibrate: label_mean, or weights.length: mean."
        )
    gold = diagnosis["gold"]
    aurocs = [gold[key] for key in ("auroc_correct", "auroc_correct_within_class") if gold and gold[key] is not None]
    rules = (
        "Where rules or patterns made the labels, a reference trained on them learns their errors: train it on gold "
        "labels (models.reference.on: dev)."
    )
    if fraction > 1 - 1e-9:
        warnings.append("all weights are equal: training on them is plain SFT, and their order says nothing.")
    elif aurocs and min(aurocs) < AUROC_WARN:
        warnings.append(
            f"the weights hardly tell right labels from wrong ones: AUROC {min(aurocs):.2f} (overall or within class), "
            f"where 0.50 is chance. Train the reference longer, in more folds, in two rounds (models.reference). "
            f"{rules}"
        )
    elif gold is None and fraction > ESS_LEVEL:
        warnings.append(
            f"{spread}: the weights hardly differ. Either nearly all labels are right, and training without weights "
            f"(weights.formula: uniform) is the better choice, or the reference finds the wrong ones likely, too. "
            f"{rules}"
        )
    return warnings


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _optional(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}"
