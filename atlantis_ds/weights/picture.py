"""The plot of the weights: their distribution, the shares by label or group and by length, the fitted noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from atlantis_ds.files import write_atomic
from atlantis_ds.pages.page import DATA_COLOUR, MUTED, WEIGHT_COLOUR, WRONG_COLOUR, picture
from atlantis_ds.weights.advice import CLASS_RATIO, noun
from atlantis_ds.weights.diagnostics import MOST_ROWS
from atlantis_ds.weights.facts import largest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CELLS = 40
"""The noise matrix is drawn up to this many labels; ``weights.json`` always has it."""


class Panel(NamedTuple):
    """A part of the plot."""

    name: str
    says: str
    height: float
    """Inches."""
    draw: Callable[[Axes], None]


def plot_weights(path: Path, weights: np.ndarray, diagnosis: dict[str, Any]) -> None:
    """Write a PNG: the distribution of the weights; data share and weight share, by label or else by group, and by
    length; the fitted noise.

    Args:
        path: the file to write.
        weights: float64 [n], final.
        diagnosis: the result of ``diagnose`` for them.
    """
    from matplotlib.figure import Figure

    panels = _panels(weights, diagnosis)
    down, across = (1, len(panels)) if len(panels) <= 3 else (2, 2)
    height = max(panel.height for panel in panels)
    figure = Figure(figsize=(0.5 + 5.5 * across, down * height), dpi=150, layout="constrained")
    for axes, panel in zip(figure.subplots(down, across, squeeze=False).ravel(), panels):
        panel.draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def weights_pictures(weights: np.ndarray, diagnosis: dict[str, Any]) -> list[str]:
    """The panels of ``plot_weights``, each as SVG for a page."""
    from matplotlib.figure import Figure

    pictures = []
    for panel in _panels(weights, diagnosis):
        figure = Figure(figsize=(6, panel.height), layout="constrained")
        axes = figure.subplots()
        panel.draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        pictures.append(picture(figure, panel.name, panel.says))
    return pictures


def _panels(weights: np.ndarray, diagnosis: dict[str, Any]) -> list[Panel]:
    kind = "group" if diagnosis["classes"] is None else "label"
    size = f"effective sample size {diagnosis['ess']:,.0f} of {diagnosis['n']:,}"
    histogram = partial(_plot_histogram, weights=np.asarray(weights, dtype=np.float64), diagnosis=diagnosis)
    panels = [Panel("weights", f"Distribution of the weights; {size}", 4.0, histogram)]
    for name, title, shares in (
        ("shares", f"share of each {kind} (× = weight / data)", diagnosis["classes"] or diagnosis["groups"]),
        (
            "lengths",
            f"share by tokens of the {noun(diagnosis)}",
            diagnosis["label_lengths"] or diagnosis["target_lengths"],
        ),
    ):
        if shares:
            shown = largest(shares, MOST_ROWS)
            draw = partial(_plot_shares, shares=shown, title=title)
            panels.append(Panel(name, f"{title}; the table below has the numbers", 1.5 + 0.34 * len(shown), draw))
    noise = diagnosis["noise"]
    if noise is not None and noise["found"] and len(noise["labels"]) <= MOST_CELLS:
        says = "Noise matrix: how often a true label (row) is given as another (column)"
        panels.append(Panel("noise", says, 1.5 + 0.3 * len(noise["labels"]), partial(_plot_noise, noise=noise)))
    return [panel._replace(height=max(4.0, panel.height)) for panel in panels]


def _plot_histogram(axes: Axes, weights: np.ndarray, diagnosis: dict[str, Any]) -> None:
    # Weights below 1e-6 of the mean are practically zero; they share the first bin.
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
    axes.axvline(1, color=MUTED, lw=0.8, ls=":")
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
    if "of" in last:  # one bar for all others would make every other bar tiny
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
            color=WRONG_COLOUR if outside else MUTED,
        )
    axes.set_yticks(at, [_short(row["label"]) for row in shares], fontsize=9, parse_math=False)
    axes.set_ylim(len(shares) + 0.3, -0.6)  # with room for the legend below the bars
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_title(title, fontsize=10.5)
    axes.legend(frameon=False, fontsize=9, loc="lower right", ncols=2)


def _plot_noise(axes: Axes, noise: dict[str, Any]) -> None:
    """The noise matrix: each row is a true label, each column a given label, the cells are probabilities."""
    matrix, names = np.array(noise["matrix"]), [_short(name) for name in noise["labels"]]
    # Not imshow: its pixels would be blurred on a page.
    axes.pcolormesh(matrix, cmap="Blues", vmin=0, vmax=1, edgecolors=MUTED, linewidth=0.2)
    axes.invert_yaxis()
    if len(names) <= 15:
        for (true, given), chance in np.ndenumerate(matrix):
            colour = "white" if chance > 0.6 else "0.2"
            if chance >= 0.005:
                axes.text(
                    given + 0.5, true + 0.5, f"{100 * chance:.0f}", ha="center", va="center", fontsize=8, color=colour
                )
    axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=45, ha="right", fontsize=8, parse_math=False)
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=8, parse_math=False)
    axes.set_xlabel("given label")
    axes.set_ylabel("true label")
    low, high = noise["interval"]
    axes.set_title(f"noise in %: {noise['rate']:.1%} of labels wrong [{low:.1%}, {high:.1%}]", fontsize=10.5)


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "…"
