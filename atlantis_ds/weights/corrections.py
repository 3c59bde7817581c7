"""``atlantis-ds relabel``: turns a corrected list of likely label errors into training data."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds.data.examples import Examples, load_examples
from atlantis_ds.data.ingest import label_set, of_labels
from atlantis_ds.data.prepare import refuse_other_data
from atlantis_ds.data.relabel import SUFFIX, Corrections, refuse_unwritable, write_corrected
from atlantis_ds.data.sources import read_text
from atlantis_ds.errors import InputError
from atlantis_ds.run import Run
from atlantis_ds.weights.page import CORRECTED, Listing

DROP = "DROP"
"""Value in the column of corrections: leave the row out."""
COMPARED = 1000
"""Characters of a text that must equal those of the run, ignoring white space: spreadsheets cut very long cells."""


@dataclass(frozen=True)
class Relabelled:
    """The result of ``relabel``."""

    files: dict[str, Path]
    """Split -> file."""
    changed: int
    dropped: int
    kept: int
    """Number of the other training examples of the run."""
    labels: list[str] | None
    """The label set, if the recipe must now name it because the last example of a label is gone."""


@dataclass(frozen=True)
class Line:
    """A line of the file of corrections, as read."""

    where: str
    id: str
    prompt: str
    target: str
    corrected: str


def relabel(run: Run, file: Path, out: Path | None) -> Relabelled:
    """Write the training data of a run with the corrections of a file.

    Args:
        file: ``label_errors.csv`` with its last column filled in, see docs/your-data.md.
        out: the file to write; None for ``diagnosis/train_corrected`` with the suffix of its format.

    Raises:
        InputError: a line is invalid (with file and line), or the data cannot be written. Then nothing is written.
    """
    data = run.recipe.data
    refuse_unwritable(data)
    examples = load_examples(run.folder)
    refuse_other_data(run.recipe, run.folder)
    if examples.chat and data.train_on == "all":
        raise InputError(
            "data.train_on: all: several answers of a chat cannot be corrected in one cell; edit your file instead"
        )
    corrections = read_corrections(file, examples)
    if not corrections:
        raise InputError(f"{file}: contains no correction; fill in the column `{CORRECTED}`")
    dropped = sum(right is None for right in corrections.values())
    if dropped == len(examples.train):
        raise InputError(f"{file}: drops all training examples")
    target = out or run.folder.root / "diagnosis" / f"train_corrected{SUFFIX[data.format]}"
    files = write_corrected(run.recipe, corrections, target)
    changed = len(corrections) - dropped
    return Relabelled(files, changed, dropped, len(examples.train) - len(corrections), _lost(run, examples, target))


def _lost(run: Run, examples: Examples, corrected: Path) -> list[str] | None:
    """The label set, if it would be different without a list in the recipe."""
    data = run.recipe.data.model_copy(update={"hub_id": None, "train": str(corrected), "negative_label": None})
    found = label_set(run.recipe.model_copy(update={"data": data}))
    return examples.labels if found != examples.labels else None


def read_corrections(file: Path, examples: Examples) -> Corrections:
    """The corrections in a file, but only those that change something.

    Raises:
        InputError: with file and line: an unknown or duplicate id, a label or text that differs from the run's, an
            unknown label, or a missing column.
    """
    if examples.labels and DROP in examples.labels:
        raise InputError(
            f"data.labels: there is a label {DROP}, but in this file that word means to leave a row out; rename the "
            "label"
        )
    lines = list(_lines(file))
    ids = pa.array([line.id for line in lines], pa.string())
    rows = pc.index_in(ids, value_set=examples.train.ids.combine_chunks())
    seen: dict[str, str] = {}
    for line, row in zip(lines, rows.to_pylist()):
        if row is None:
            raise InputError(
                f"{line.where}: id {line.id!r} is not a training example of this run; does the file belong to another "
                "run?"
            )
        if line.id in seen:
            raise InputError(f"{line.where}: id {line.id!r} is also in {seen[line.id]}; give each row once")
        seen[line.id] = line.where
    found: dict[str, str | None] = {}
    own = Listing(examples, np.ones(len(examples.train)), None).entries(rows.to_numpy()) if lines else iter(())
    for line, entry in zip(lines, own):
        _refuse_other_row(line, entry["prompt"], entry["target"])
        right = _right(line, examples)
        if right != _words(entry["target"], examples.chat):
            found[line.id] = right
    return {id: right for id, right in found.items() if right != ""}


def _lines(file: Path) -> Iterator[Line]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
        needed = ("id", "prompt", "target", CORRECTED)
        for name in needed:
            if header.count(name) != 1:
                raise InputError(
                    f"{file}:1: needs the column `{name}`, once; the file has {', '.join(header)[:200]}. Save it as "
                    "CSV with commas, with the columns of label_errors.csv"
                )
        start = reader.line_num + 1
        for cells in reader:
            if any(cells):
                if len(cells) != len(header):
                    raise InputError(f"{file}:{start}: {len(cells)} cells, but the header has {len(header)}")
                row = dict(zip(header, cells))
                yield Line(f"{file}:{start}", *(row[name].strip() for name in needed))
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: cannot be read as CSV: {error}") from None


def _refuse_other_row(line: Line, prompt: str, target: str) -> None:
    """Refuse a file from another run, or one in which only one column was sorted."""
    for name, found, own in (("target", line.target, target), ("prompt", line.prompt, prompt)):
        if _start(found) != _start(own):
            raise InputError(
                f"{line.where}: the {name} of {line.id!r} is {_start(own)[:60]!r} in this run, not "
                f"{_start(found)[:60]!r}; does the file belong to another run? Fill in only `{CORRECTED}`, and sort "
                "whole rows"
            )


def _start(text: str) -> str:
    return " ".join(text.split())[:COMPARED]


def _right(line: Line, examples: Examples) -> str | None:
    """The correction of a line: a label or response, None to leave the row out, empty for no correction."""
    if line.corrected == DROP:
        return None
    if examples.labels and line.corrected and line.corrected not in examples.labels:
        raise InputError(
            f"{line.where}: unknown label {line.corrected!r}; {of_labels(line.corrected, examples.labels)} (or {DROP})"
        )
    return _words(line.corrected, examples.chat)


def _words(text: str, chat: bool) -> str:
    """A turn of a chat is listed as ``assistant: …``."""
    return text.removeprefix("assistant: ") if chat else text
