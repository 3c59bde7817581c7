"""The output of a comparison: figures, a plot and a page on disk, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlantis_ds.config.schema import Data
from atlantis_ds.data.examples import Examples
from atlantis_ds.files import write_atomic, write_csv, write_json, write_text
from atlantis_ds.pages.page import DATA_COLOUR, GRID, MUTED, WEIGHT_COLOUR, page, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

WORDS = {"macro_f1": "macro-F1", "exact_match": "exact match", "token_f1": "token F1"}


def data_facts(data: Data, examples: Examples) -> dict[str, Any]:
    """The data of the comparison, ready for JSON: ``source``, ``task``, sizes of the splits, ``labels`` (their number;
    0 for responses), ``noise`` (share of labels made wrong on purpose) and ``fingerprint``."""
    sizes = {split: len(getattr(examples, split)) for split in ("train", "dev", "test")}
    source = data.train or data.hub_id or data.format
    noise = examples.info["noise"]["rows_changed"] / max(1, sizes["train"])
    return {
        "source": source if isinstance(source, str) else ", ".join(source or ()),
        "task": examples.task,
        **sizes,
        "labels": len(examples.labels or ()),
        "noise": noise,
        "fingerprint": examples.fingerprint,
    }


def write_comparison(folder: Path, comparison: Mapping[str, Any]) -> None:
    """Write ``comparison.json``, ``.csv``, ``.png`` and ``.html``, and ``runs.csv`` with one line per arm and seed.

    Args:
        folder: the folder to write to.
        comparison: from ``compare.compare_arms``.
    """
    flat = []
    for row in comparison["arms"]:
        line = {key: value for key, value in row.items() if key not in ("differences", "gap_closed")}
        figures = {f"minus_{peer}": row["differences"].get(peer) for peer in comparison["peers"]}
        for name, figure in (figures | {"gap_closed": row["gap_closed"]}).items():
            line |= {f"{name}_{key}": figure and figure[key] for key in ("mean", "low", "high")}
        flat.append(line)
    write_json(folder / "comparison.json", comparison)
    for name, lines in (("runs.csv", comparison["runs"]), ("comparison.csv", flat)):
        write_csv(folder / name, list(lines[0]), lines)
    plot_comparison(folder / "comparison.png", comparison)
    write_text(folder / "comparison.html", comparison_page(comparison))


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """One HTML file with all of ``comparison.json`` in it."""
    first = comparison["arms"][0]
    known = {"arm", "runs", comparison["metric"], "sd", "seconds", "differences", "gap_closed"}
    others = [key for key in first if key not in known and any(row[key] is not None for row in comparison["arms"])]
    return page(
        "comparison.html",
        found=comparison,
        metric=comparison["metric"],
        words=WORDS,
        result=in_words(comparison),
        others=others,
        pictures=_pictures(comparison),
        interval=_interval,
    )


def in_words(comparison: Mapping[str, Any]) -> list[str]:
    """The arms compared with the first peer, in sentences: which gain, which lose, which do not differ
    significantly."""
    peer, metric = next(iter(comparison["peers"]), None), WORDS[comparison["metric"]]
    found = {row["arm"]: row["differences"][peer] for row in comparison["arms"] if peer in row["differences"]}
    if not found:
        return ["No two arms can be compared: the recipe has no plain fine-tuning, or no other arm."]
    kinds: dict[str, list[str]] = {"gains": [], "loses": [], "same": [], "single": []}
    for arm, figure in sorted(found.items(), key=lambda item: item[0] == comparison["upper"]):
        mean, low, high = (figure[key] for key in ("mean", "low", "high"))
        name = f"{arm} (trained on the gold labels)" if arm == comparison["upper"] else arm
        signed = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        if figure["seeds"] == 1:
            kinds["single"].append(f"{name} {signed}")
        elif low > 0:
            kinds["gains"].append(f"{name} gains {mean:.3f} [{low:.3f}, {high:.3f}]")
        elif high < 0:
            kinds["loses"].append(f"{name} loses {-mean:.3f} [{-high:.3f}, {-low:.3f}]")
        else:
            kinds["same"].append(f"{name} ({signed})")
    seeds = sorted({figure["seeds"] for figure in found.values() if figure["seeds"] > 1})
    over = f"over {seeds[0]} seeds" if len(seeds) == 1 else f"over {seeds[0]} to {seeds[-1]} seeds" if seeds else ""
    ends = {
        "gains": f"{metric} on {peer} {over}.",
        "loses": f"{metric} against {peer} {over}.",
        "same": f"cannot be distinguished from {peer} in {metric} {over}.",
        "single": f"{metric} compared with {peer}, with one seed: this says nothing about other seeds.",
    }
    return [f"{_listed(arms)} {ends[kind]}" for kind, arms in kinds.items() if arms]


def _listed(texts: Sequence[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} and {last}" if most else last


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """The comparison for a rich console: means, spread over seeds, intervals of the differences, time."""
    from rich.table import Table

    peers, metric = comparison["peers"], comparison["metric"]
    table = Table("arm", header_style="bold", title=f"{metric} on {comparison['n']} test examples, mean over seeds")
    for column in (
        metric,
        "sd",
        *(f"minus {peer}, 95% interval" for peer in peers),
        "gap closed, 95% interval",
        "runs",
        "minutes",
    ):
        table.add_column(column, justify="right")
    for row in comparison["arms"]:
        table.add_row(
            row["arm"],
            f"{row[metric]:.3f}",
            "-" if row["sd"] is None else f"{row['sd']:.3f}",
            *(_interval(row["differences"].get(peer), "+.3f") for peer in peers),
            _interval(row["gap_closed"], ".0%"),
            str(row["runs"]),
            "-" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}",
        )
    table.caption = "\n".join(comparison["warnings"]) or None
    return table


def _interval(figure: Mapping[str, float] | None, form: str) -> str:
    if figure is None:
        return "-"
    return f"{figure['mean']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]{'*' * (figure['seeds'] == 1)}"


def plot_comparison(path: Path, comparison: Mapping[str, Any]) -> None:
    """Every run and the means, and the intervals of the differences from the first peer, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, _height(comparison)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _plot_runs(left, comparison)
    _plot_differences(right, comparison)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def _pictures(comparison: Mapping[str, Any]) -> list[str]:
    """The two halves of ``plot_comparison``, each as SVG for a page."""
    from matplotlib.figure import Figure

    pictures = []
    for name, says, plot in (
        ("runs", "Every run and the mean of each arm; the table of runs has the numbers", _plot_runs),
        ("differences", "Differences with their intervals; the table has the numbers", _plot_differences),
    ):
        figure = Figure(figsize=(6, _height(comparison)), layout="constrained")
        plot(figure.subplots(), comparison)
        pictures.append(picture(figure, name, says))
    return pictures


def _height(comparison: Mapping[str, Any]) -> float:
    return 1.4 + 0.36 * len(comparison["arms"])


def _plot_runs(axes: Axes, comparison: Mapping[str, Any]) -> None:
    metric = comparison["metric"]
    for y, row in enumerate(comparison["arms"]):
        figures = [run[metric] for run in comparison["runs"] if run["arm"] == row["arm"]]
        axes.plot(figures, [y] * len(figures), "o", color=DATA_COLOUR, ms=4)
        axes.plot(row[metric], y, "|", color=WEIGHT_COLOUR, ms=14, mew=2.4)
    axes.set_xlabel(f"{metric} on {comparison['n']} test examples (dots: seeds, bar: mean)")
    _name_arms(axes, comparison)


def _plot_differences(axes: Axes, comparison: Mapping[str, Any]) -> None:
    peer = next(iter(comparison["peers"]), "SFT")
    for y, row in enumerate(comparison["arms"]):
        if difference := row["differences"].get(peer):
            one = difference["seeds"] == 1
            sure = not one and (difference["low"] > 0 or difference["high"] < 0)
            colour = WEIGHT_COLOUR if sure else DATA_COLOUR
            axes.plot([difference["low"], difference["high"]], [y, y], ":" if one else "-", color=colour, lw=2)
            axes.plot(difference["mean"], y, "o", color=colour, ms=5)
    axes.axvline(0, color=MUTED, lw=0.8, ls=":")
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(
        f"difference from {peer} (95% interval over seeds and test examples;\ndotted: one seed, over test examples "
        "only)"
    )
    _name_arms(axes, comparison)


def _name_arms(axes: Axes, comparison: Mapping[str, Any]) -> None:
    rows = comparison["arms"]
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
