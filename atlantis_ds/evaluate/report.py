"""What an evaluation leaves on disk, and the table that puts the arms side by side."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from atlantis_ds.errors import InputError
from atlantis_ds.evaluate.metrics import UNMAPPED, metrics, write_answers
from atlantis_ds.files import write_atomic, write_json, write_table

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("arm", "macro10", "official", "accuracy", "unmapped", "n", "train_examples_per_s")
"""What a comparison holds for an arm; units as in `metrics.metrics`."""


def write_evaluation(
    folder: Path,
    task: str,
    ids: Sequence[str],
    gold: Sequence[str],
    predicted: Sequence[str],
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``predictions.parquet``, ``answers.txt``, ``confusion.png`` and, last, ``metrics.json``.

    Because it is written last, a ``metrics.json`` with the right fingerprint means that the evaluation is finished.

    Args:
        folder: ``eval/ARM`` of the run folder.
        task: the recipe's ``data.format``.
        ids, gold, predicted: one entry an example; ``predicted`` may hold ``UNMAPPED``.
        info: what goes beside the figures, ``fingerprint`` among it.

    Returns:
        the content of ``metrics.json``: the figures of `metrics.metrics` and ``info``.

    Raises:
        InputError: see `metrics.metrics` and `metrics.write_answers`; the old evaluation is then still in place.
    """
    figures = {**metrics(task, ids, gold, predicted), **info}
    write_answers(folder / "answers.txt", ids, predicted)
    # From here on the files of an older evaluation are replaced one by one: they are a finished one no more.
    (folder / "metrics.json").unlink(missing_ok=True)
    table = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "gold": pa.array(gold, pa.string()),
            "predicted": pa.array(predicted, pa.string()),
        }
    )
    write_table(folder / "predictions.parquet", table, dict(info))
    # `Other` and `None` are what is left when no relation holds: last, where the eye looks for them.
    labels = sorted({*gold, *predicted} - {UNMAPPED}, key=lambda label: (label in ("Other", "None"), label))
    plot_confusion(folder / "confusion.png", gold, predicted, labels)
    write_json(folder / "metrics.json", figures)
    return figures


def plot_confusion(path: Path, gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> None:
    """Draw the confusion matrix as a PNG: a row a gold label, counts in the cells, colours by share of the row.

    A last column "unmapped" appears when ``predicted`` holds ``UNMAPPED``. Zeros are left blank. Beyond 60 labels
    the cells shrink and carry colour only.

    Raises:
        InputError: a label of ``gold`` or ``predicted`` is not in ``labels``.
    """
    if foreign := {*gold, *predicted} - {*labels, UNMAPPED}:
        raise InputError(f"{path}: label {min(foreign)!r} is not among the labels of the plot")
    import matplotlib.figure
    import numpy as np
    from sklearn.metrics import confusion_matrix

    size = len(labels)
    counts = confusion_matrix(gold, predicted, labels=[*labels, UNMAPPED])[:size]
    unmapped = bool(counts[:, size].any())
    counts = counts if unmapped else counts[:, :size]
    support = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(support, 1)

    names = [label if len(label) <= 40 else f"{label[:39]}…" for label in labels]
    cell = max(0.42, 1.6 / size) if size <= 60 else 25 / size  # inches
    width, height = cell * counts.shape[1], cell * size
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=150)
    # The cells fill the figure; `bbox_inches="tight"` adds the room that the names, however long, need around it.
    axes = figure.add_axes((0, 0, 1, 1))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    font = 9 if size <= 60 else max(2.0, 50 * cell)
    columns = [*names, *(["unmapped"] if unmapped else [])]
    rows = [f"{name}  ({n})" for name, n in zip(names, support[:, 0], strict=True)]
    # Labels are the user's own text: a dollar sign in them is no formula.
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=font, parse_math=False)
    axes.set_yticks(range(size), rows, fontsize=font, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold (number of examples)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    if unmapped:
        axes.axvline(size - 0.5, color="0.3", linewidth=1.2)
    if size <= 60:
        for row, column in zip(*np.nonzero(counts), strict=True):
            number = int(counts[row, column])
            colour = "white" if shares[row, column] > 0.55 else "black"
            small = 8 if number < 1000 else 6.5
            axes.text(column, row, str(number), ha="center", va="center", fontsize=small, color=colour)
    bar_height = min(3.0, height)
    bar = figure.add_axes((1 + 0.2 / width, 0.5 - bar_height / height / 2, 0.15 / width, bar_height / height))
    figure.colorbar(image, cax=bar, label="share of the gold label")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", bbox_inches="tight"))


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The arms side by side, for the terminal: one row an arm, in the order given.

    Each row is the ``metrics.json`` of an arm with ``arm`` (its name) and, where known, ``train_examples_per_s``.
    ``official`` is in percent, ``macro10`` and ``accuracy`` are fractions.
    """
    from rich.table import Table

    unmapped = any(row["unmapped"] for row in rows)
    table = Table()
    table.add_column("arm", no_wrap=True)
    for name in ("macro10", "official", "accuracy", *(["unmapped"] if unmapped else []), "n", "train examples/s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["arm"],
            f"{row['macro10']:.3f}",
            _number(row["official"], 2),
            f"{row['accuracy']:.3f}",
            *([str(row["unmapped"])] if unmapped else []),
            str(row["n"]),
            _number(row.get("train_examples_per_s"), 1),
        )
    return table


def write_comparison(root: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``eval/comparison.json`` and ``eval/comparison.csv`` below the run folder ``root``.

    Both hold one entry an arm with the keys `COLUMNS`, unrounded; what an arm has no figure for is null in the JSON
    and empty in the CSV.
    """
    records = [{name: row.get(name) for name in COLUMNS} for row in rows]

    def write_csv(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)

    write_atomic(root / "eval" / "comparison.csv", write_csv)
    write_json(root / "eval" / "comparison.json", records)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
