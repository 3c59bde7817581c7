"""Reads the training files of a recipe again and writes them with corrected labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from atlantis_ds.config.schema import Data, Recipe
from atlantis_ds.data.reading import label_column, response_columns, row_id
from atlantis_ds.data.relation import read_semeval
from atlantis_ds.data.rows import BadRow, BadRows
from atlantis_ds.data.sources import Row, expand, read_hub_rows, read_rows, read_text
from atlantis_ds.errors import InputError
from atlantis_ds.files import write_atomic, write_text

Corrections = Mapping[str, str | None]
"""Id of an example -> its right label or response; None to leave it out."""

SUFFIX = {None: ".jsonl", "semeval2010_task8": ".txt", "spert": ".json"}
"""Suffix of the written file, by ``data.format``."""


def refuse_unwritable(data: Data) -> None:
    """Raise InputError if training data of this kind cannot be written with corrections."""
    noise = data.noise
    if noise.rate or noise.kind == "confusion":
        raise InputError("data.noise: its wrong labels are only in the run; your files have nothing to correct")
    if data.format == "grammar":
        raise InputError("data.format: grammar has no files to correct; relabel is for your own data")
    if data.format and data.hub_id:
        raise InputError(
            f"data.format: {data.format} with data.hub_id; write the data set to files, and run with those"
        )


def write_corrected(recipe: Recipe, corrections: Corrections, out: Path) -> dict[str, Path]:
    """Write the training data of a recipe with corrections, in a format that ``data.train`` reads.

    Args:
        out: the file to write; JSON Lines unless the recipe has a ``data.format``.

    Returns:
        split -> file: ``train``; for a data set from the hub also ``dev`` and ``test``, written unchanged next to it.

    Raises:
        InputError: a correction is impossible in this format, or belongs to no training row; or ``out`` is unsuitable.
    """
    data = recipe.data
    files = expand(data.train, "data.train") if data.train is not None else []
    if out.suffix != SUFFIX[data.format]:
        raise InputError(f"--out {out}: the name of the corrected file must end in {SUFFIX[data.format]}")
    if out.exists() and any(out.samefile(file) for file in files):
        raise InputError(f"--out {out}: is one of the run's own training files; give another name")
    left = set(corrections)
    if data.format == "semeval2010_task8":
        pieces: Iterable[str] = [_semeval_text(file, corrections, left) for file in files]
    elif data.format == "spert":
        pieces = [_spert_text(files, corrections, left)]
    else:
        pieces = _row_lines(recipe, files, corrections, left)

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.writelines(pieces)
        if left:
            raise InputError(
                f"data.train: no row has the id {min(left)} any more; have the data changed since the run?"
            )

    write_atomic(out, write)
    return {"train": out} | (_other_splits(data.hub_id, out) if data.hub_id else {})


def _row_lines(recipe: Recipe, files: list[Path], corrections: Corrections, left: set[str]) -> Iterator[str]:
    """The rows as JSON Lines; removes from ``left`` what was corrected."""
    data, bad = recipe.data, BadRows(recipe.data.on_bad_row == "drop")
    for row in _rows(data, files, bad):
        values = row.values
        try:
            found = row_id(data.columns, values)
            id = str(row.number if found is None else found)
            if id in corrections:
                left.discard(id)
                if (right := corrections[id]) is None:
                    continue
                values = _corrected(recipe, values, right)
        except BadRow as problem:
            bad(row.where, str(problem))
            continue
        # With its row number as an id, a row keeps its seeded draws even if earlier rows are left out.
        yield _json_line(values if found is not None else {data.columns.id: row.number, **values})
    bad.refuse()


def _rows(data: Data, files: list[Path], bad: BadRows) -> Iterator[Row]:
    if data.hub_id:
        return read_hub_rows(data.hub_id, "train", bad) or iter(())
    return read_rows(files, bad)


def _corrected(recipe: Recipe, values: dict[str, Any], right: str) -> dict[str, Any]:
    columns = recipe.data.columns
    if recipe.task != "response":
        return {**values, label_column(recipe, values): right}
    messages, response = response_columns(columns, values)
    if messages is None:
        return {**values, str(response): right}
    turns = values[messages]
    last = max(at for at, turn in enumerate(turns) if turn["role"] == "assistant")
    return {**values, messages: [*turns[:last], {**turns[last], "content": right}, *turns[last + 1 :]]}


def _json_line(values: dict[str, Any]) -> str:
    """A row as a line that reads back as the same row: dates and the like become the text used in a prompt."""
    kept = (str, int, float, list, dict, NoneType)
    plain = {name: item if isinstance(item, kept) else json.dumps(item, default=str) for name, item in values.items()}
    return json.dumps(plain, ensure_ascii=False, default=str) + "\n"


def _other_splits(hub_id: str, out: Path) -> dict[str, Path]:
    written = {}
    for split in ("dev", "test"):
        bad = BadRows(drop=False)
        rows = read_hub_rows(hub_id, split, bad)
        if rows is not None:
            written[split] = out.with_name(f"{out.stem}-{split}{out.suffix}")
            text = "".join(_json_line(row.values) for row in rows)
            bad.refuse()
            write_text(written[split], text)
    return written


def _semeval_text(file: Path, corrections: Corrections, left: set[str]) -> str:
    """The official file with corrected label lines, and without the records to drop."""
    lines = read_text(file).split("\n")
    dropped: set[int] = set()
    for found in read_semeval(file, lambda where, what: None):
        id = str(found.id)
        if id not in corrections:
            continue
        left.discard(id)
        first, label = (int(str(where).rpartition(":")[2]) - 1 for where in (found.where, found.label_at))
        if (right := corrections[id]) is not None:
            lines[label] = right + "\r" * lines[label].endswith("\r")
            continue
        end = label + 1
        while end < len(lines) and lines[end].strip():  # the comment
            end += 1
        dropped |= set(range(first, end + 1))
    return "\n".join(line for at, line in enumerate(lines) if at not in dropped).rstrip() + "\n\n"


def _spert_text(files: list[Path], corrections: Corrections, left: set[str]) -> str:
    """SpERT's JSON with corrected relation types."""
    if gone := [id for id, right in corrections.items() if right is None]:
        raise InputError(
            f"{gone[0]}: a relation in SpERT's format cannot be dropped, because its pair could be drawn as a "
            "negative; list the id in the file arms.NAME.drop_ids"
        )
    documents = []
    for file in files:
        for index, document in enumerate(json.loads(read_text(file))):
            origin = document.get("orig_id", index)
            for number, relation in enumerate(document["relations"]):
                id = f"conll04-train-{origin}-{number}"
                if id in corrections:
                    left.discard(id)
                    relation["type"] = corrections[id]
            documents.append(document)
    if drawn := [id for id in left if id.rpartition("-")[2].startswith("n")]:
        raise InputError(
            f"{min(drawn)}: a drawn negative is in no file and cannot be corrected; list the id in the file "
            "arms.NAME.drop_ids"
        )
    return json.dumps(documents, ensure_ascii=False) + "\n"
