"""The files of an evaluation, and the table that compares the arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from atlantis_ds.errors import InputError
from atlantis_ds.files import write_atomic, write_csv, write_json, write_table
from atlantis_ds.metrics import UNMAPPED, can_hold_answers, write_answers

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("arm", "macro_f1", "official", "accuracy", "unmapped", "n", "train_examples_per_s")
"""Columns of a comparison on a label set; units as in `metrics.metrics`."""
RESPONSE_COLUMNS = ("arm", "perplexity", "exact_match", "token_f1", "n", "train_examples_per_s")
"""Columns of a comparison on responses; units as in `answers.response_metrics`."""


def write_evaluation(
    folder: Path,
    figures: Mapping[str, Any],
    columns: Mapping[str, Any],
    info: Mapping[str, Any],
    label_set: bool,
) -> dict[str, Any]:
    """Write ``predictions.parquet``; for a label set ``answers.txt`` and ``confusion.png``; last ``metrics.json``.

    Because it is written last, a ``metrics.json`` with the right fingerprint means that the evaluation is finished.
    ``answers.txt`` is left out if an id or label contains a tab or line break, which its format does not allow.

    Args:
        folder: ``eval/ARM`` of the run folder.
        figures: from `metrics.metrics` or `answers.response_metrics`.
        columns: one entry per example: ``id``, ``gold`` and ``predicted`` (strings; for a label set ``predicted`` may
            be ``UNMAPPED``), and any other values of an example.
        info: additional values for the file, including ``fingerprint``.
        label_set: whether gold and predicted are labels of a set.

    Returns:
        the content of ``metrics.json``: the figures and ``info``.
    """
    written = {**figures, **info}
    # From here on, the files of an older evaluation are replaced one by one, so it no longer counts as finished.
    for name in ("metrics.json", "answers.txt", "confusion.png"):
        (folder / name).unlink(missing_ok=True)
    write_table(folder / "predictions.parquet", pa.table(dict(columns)), dict(info))
    if label_set:
        ids, gold, predicted = columns["id"], columns["gold"], columns["predicted"]
        if can_hold_answers([*ids, *predicted]):
            write_answers(folder / "answers.txt", ids, predicted)
        # `Other` and `None` mean that no relation applies: put them last, where readers expect them.
        labels = sorted({*gold, *predicted} - {UNMAPPED}, key=lambda label: (label in ("Other", "None"), label))
        plot_confusion(folder / "confusion.png", gold, predicted, labels)
    write_json(folder / "metrics.json", written)
    return written


def plot_confusion(path: Path, gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> None:
    """Draw the confusion matrix as a PNG: each row is a gold label, cells have counts, colours show the share of the
    row.

    If ``predicted`` contains ``UNMAPPED``, there is a last column "unmapped". Zeros are left blank. Above 60 labels,
    the cells are smaller and only coloured.

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

    flat = [" ".join(label.split()) for label in labels]
    names = [label if len(label) <= 40 else f"{label[:39]}…" for label in flat]
    cell = max(0.42, 1.6 / size) if size <= 60 else 25 / size  # inches
    width, height = cell * counts.shape[1], cell * size
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=150)
    # The cells fill the figure; `bbox_inches="tight"` adds the room that the names, however long, need around it.
    axes = figure.add_axes((0, 0, 1, 1))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    font = 9 if size <= 60 else max(2.0, 50 * cell)
    columns = [*names, *(["unmapped"] if unmapped else [])]
    rows = [f"{name}  ({n})" for name, n in zip(names, support[:, 0], strict=True)]
    # Labels are the user's own text: a dollar sign in them does not start a formula.
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
    """The table of arms for the terminal: one row per arm, in the given order.

    Each row is the ``metrics.json`` of an arm with ``arm`` (its name) and, where known, ``train_examples_per_s``.
    """
    from rich.table import Table

    names = [name for name in _columns(rows) if name != "unmapped" or any(row[name] for row in rows)]
    caption = "One run each: `compare` gives differences with intervals over seeds." if len(rows) > 1 else None
    table = Table(caption=caption, caption_justify="left")
    for name in names:
        title = "train examples/s" if name == "train_examples_per_s" else name
        table.add_column(title, justify="left" if name == "arm" else "right", no_wrap=name == "arm")
    digits = {"official": 2, "perplexity": 3, "train_examples_per_s": 1}
    for row in rows:
        values = (row.get(name) for name in names)
        table.add_row(
            *(
                "-" if value is None else f"{value:.{digits.get(name, 3)}f}" if isinstance(value, float) else str(value)
                for name, value in zip(names, values)
            )
        )
    return table


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns to compare: those of the task, and ``official`` only if an arm has it."""
    names = RESPONSE_COLUMNS if any("token_f1" in row for row in rows) else COLUMNS
    return [name for name in names if name != "official" or any(row[name] is not None for row in rows)]


def write_comparison(root: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``eval/comparison.json`` and ``eval/comparison.csv`` below the run folder ``root``.

    Both have one entry per arm with the keys `COLUMNS` or `RESPONSE_COLUMNS`, unrounded, ``official`` only if an arm
    has it; a missing figure is null in the JSON and empty in the CSV.
    """
    names = _columns(rows)
    records = [{name: row.get(name) for name in names} for row in rows]
    write_csv(root / "eval" / "comparison.csv", names, records)
    write_json(root / "eval" / "comparison.json", records)
