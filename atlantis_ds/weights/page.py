"""``atlantis-ds diagnose``: the diagnosis of the weights, as a page to read and a list to work through."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds.data.examples import Examples, Split, load_examples
from atlantis_ds.errors import InputError
from atlantis_ds.files import read_json, write_csv, write_json, write_text
from atlantis_ds.pages.page import page
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.advice import CLASS_RATIO, noun
from atlantis_ds.weights.agreement import Suggestions, joined, suggestion
from atlantis_ds.weights.arms import WEIGHTS_VERSION, lowest_first, read_weights
from atlantis_ds.weights.diagnostics import number_rows, share_text
from atlantis_ds.weights.picture import plot_weights, weights_pictures
from atlantis_ds.weights.shards import read_shards

COLUMNS = ("id", "prompt", "target", "suggested_label", "p_label", "p_suggested", "weight", "gold", "group")
CORRECTED = "corrected"
"""The empty column of ``label_errors.csv`` for people to fill in; see ``corrections.py``."""
SHOWN = 50
"""Rows of a list on the page; the CSV file has all rows."""
ROWS_AT_ONCE = 10_000


def write_diagnosis(run: Run) -> dict[str, Any]:
    """Write ``diagnosis/`` in the run folder: ``diagnosis.json``, ``diagnosis.html``, ``weights.png`` and
    ``label_errors.csv``: all training examples, those with the lowest weights first.

    Returns:
        the contents of ``diagnosis.json``: the diagnosis from ``weights.json``, with the options of the weights.

    Raises:
        InputError: the weights are missing, or do not belong to the run's scores and examples; or the existing list
            contains corrections.
    """
    folder = run.folder
    examples = load_examples(folder)
    table, diagnosis = read_diagnosis(folder, examples)
    weights = table["weight"].to_numpy()
    order = lowest_first(weights, table["log_weight"].to_numpy())
    target = folder.root / "diagnosis"
    _refuse_to_lose_corrections(target / "label_errors.csv")
    listed = Listing(examples, weights, _suggestions(run, examples))
    write_csv(target / "label_errors.csv", [*COLUMNS, CORRECTED], listed.entries(order))
    plot_weights(target / "weights.png", weights, diagnosis)
    lowest, highest = (list(listed.entries(rows)) for rows in (order[:SHOWN], order[::-1][:SHOWN]))
    of_groups = _lowest_of_groups(examples, diagnosis, order, listed)
    pictures = weights_pictures(weights, diagnosis)
    write_text(target / "diagnosis.html", _page(run.recipe.name, diagnosis, lowest, highest, pictures, of_groups))
    write_json(target / "diagnosis.json", diagnosis)
    return diagnosis


def read_diagnosis(folder: RunFolder, examples: Examples) -> tuple[pa.Table, dict[str, Any]]:
    """``weights.parquet`` (see ``read_weights``) and ``weights.json``, which must belong together.

    Raises:
        InputError: one is missing, or they do not belong to the run's scores and examples.
    """
    diagnosis = read_json(folder.weights_info)
    table, info = read_weights(folder)
    if diagnosis.get("version") != WEIGHTS_VERSION:
        raise InputError(f"{folder.weights_info}: written by another version; run `merge` again")
    if info["fingerprint"] != diagnosis["fingerprint"]:
        raise InputError(f"{folder.weights}: does not belong to {folder.weights_info.name}; run `merge` again")
    if not table["id"].cast(pa.string()).equals(examples.train.ids):
        raise InputError(f"{folder.weights}: has other examples than the run; run `merge` again")
    return table, diagnosis


def _lowest_of_groups(
    examples: Examples, diagnosis: dict[str, Any], order: np.ndarray, listed: Listing
) -> dict[str, dict[str, Any]]:
    """The example with the lowest weight in each of the largest groups, by group name."""
    rows, groups, names = examples.train.memberships
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    first = np.full(len(names) + 1, len(order))
    np.minimum.at(first, groups, place[rows])  # -1 (no group) indexes the last entry
    shown = {row["label"] for row in (diagnosis["groups"] or ())[:SHOWN]}
    chosen = [number for number, name in enumerate(names) if name in shown]
    return dict(zip([names[number] for number in chosen], listed.entries(order[first[chosen]])))


def _suggestions(run: Run, examples: Examples) -> Suggestions | None:
    if not run.recipe.score.label_set:
        return None
    return joined([suggestion(chunk) for chunk in read_shards(run, examples)])


class Listing:
    """The training examples as rows for people to read, created only when needed."""

    def __init__(self, examples: Examples, weights: np.ndarray, suggested: Suggestions | None) -> None:
        """
        Args:
            examples: the examples of the run, with n training examples.
            weights: float64 [n].
            suggested: for the training examples; None if there is no label set or it was not scored.
        """
        self._train, self._weights, self._suggested = examples.train, weights, suggested
        self._labels = examples.labels or []
        self._show_prompt = prompt_view(examples.train.prompts, examples.chat)
        self._show_target: Callable[[str], str] = turns_text if examples.chat else str

    def entries(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        """The examples of these rows, in this order: dicts with the keys ``COLUMNS``.

        ``suggested_label``, ``p_label`` and ``p_suggested`` are None if the label set was not scored, ``gold`` and
        ``group`` if unknown.
        """
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            said = self._suggested
            labels, p_label, p_suggested = [[None] * len(some)] * 3
            if said is not None:
                labels = [self._labels[number] for number in said.labels[some]]
                p_label, p_suggested = said.p_label[some].tolist(), said.p_suggested[some].tolist()
            ids, prompts, targets, golds, groups = taken(self._train, some)
            for row in zip(
                ids,
                map(self._show_prompt, prompts),
                map(self._show_target, targets),
                labels,
                p_label,
                p_suggested,
                self._weights[some].tolist(),
                (None if gold is None else self._show_target(gold) for gold in golds),
                groups,
            ):
                yield dict(zip(COLUMNS, row))


def taken(split: Split, rows: np.ndarray) -> list[list[Any]]:
    """Ids, prompts, targets, golds and groups of the rows, in their order, as lists of str or None.

    Works chunk by chunk: Arrow's own ``take`` first joins the chunks of a text column, which fails above 2 GB.
    """
    columns = [split.ids, split.prompts, split.targets, split.golds, split.groups]
    order = np.argsort(rows, kind="stable")
    ascending, start, found = rows[order], 0, []
    for batch in pa.table(columns, names=["id", "prompt", "target", "gold", "group"]).to_batches():
        end = start + batch.num_rows
        inside = slice(*np.searchsorted(ascending, [start, end]))
        if inside.start < inside.stop:
            found.append(batch.take(pa.array(ascending[inside] - start)))
        start = end
    place = np.argsort(order).tolist()
    lists = [column.to_pylist() for column in pa.Table.from_batches(found).columns]
    return [[values[at] for at in place] for values in lists]


def prompt_view(prompts: pa.ChunkedArray, chat: bool) -> Callable[[str], str]:
    """A function that shows a prompt without the common beginning and end of all ``prompts``; a chat as lines."""
    if chat:
        skip = common_turns(prompts)
        return lambda text: turns_text(text, skip)
    start, end = distinct_part(prompts)
    return lambda text: text[start : len(text) - end].strip()


def distinct_part(prompts: pa.ChunkedArray) -> tuple[int, int]:
    """Number of common characters at the beginning and at the end of all prompts, cut at a space or line end.

    At least one character of every prompt is left; (0, 0) if all prompts are equal.
    """
    low, high = _bounds(prompts)
    if low == high:
        return 0, 0
    shortest = pc.min(pc.utf8_length(prompts)).as_py()
    start = _whole_words(_common_start(low, high)[: shortest - 1])
    backwards = None
    for chunk in prompts.chunks:
        # Reversing all texts would take longer than checking that a chunk ends like those before it.
        if backwards is None or not pc.all(pc.ends_with(chunk, backwards[::-1])).as_py():
            ends = _bounds(pc.utf8_reverse(chunk))
            backwards = _common_start(*ends, *([] if backwards is None else [backwards]))
    end = _whole_words((backwards or "")[: shortest - 1])
    return start, end if start + end < shortest else 0


def common_turns(prompts: pa.ChunkedArray) -> int:
    """Number of common first turns of all chats, without the last turn of the shortest. ``prompts`` are JSON lists."""
    start = _common_start(*_bounds(prompts))
    decoder, at, turns = json.JSONDecoder(), 1, 0
    while True:
        try:
            _, at = decoder.raw_decode(start, at)
        except ValueError:  # this turn differs between chats
            return turns
        if start[at : at + 2] != ", ":
            return turns
        at, turns = at + 2, turns + 1


def turns_text(text: str, skip: int = 0) -> str:
    """The turns of a chat, from JSON, as lines ``role: content``, without the first ``skip``."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in json.loads(text)[skip:])


def _bounds(texts: pa.Array | pa.ChunkedArray) -> tuple[str, str]:
    """The first and last in alphabetical order: their common beginning is common to all."""
    bounds = pc.min_max(texts).as_py()
    return bounds["min"] or "", bounds["max"] or ""


def _common_start(*texts: str) -> str:
    low, high = min(texts), max(texts)
    return low[: next((at for at, (one, other) in enumerate(zip(low, high)) if one != other), len(low))]


def _whole_words(text: str) -> int:
    """Length of the text up to and including its last white space."""
    return next((at for at in range(len(text), 0, -1) if text[at - 1].isspace()), 0)


def _refuse_to_lose_corrections(path: Path) -> None:
    """Refuse to overwrite a list that may contain hours of somebody's work."""
    if not path.exists():
        return
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        csv.field_size_limit(2**31 - 1)
        rows = csv.reader(file)
        head = next(rows, [])
        changed = head not in ([*COLUMNS], [*COLUMNS, CORRECTED])
        changed |= any(len(row) != len(head) or (CORRECTED in head and row[-1].strip() != "") for row in rows)
    if changed:
        raise InputError(
            f"{path}: contains corrections, or was changed; save it under another name before you run `diagnose`"
        )


def _page(
    name: str,
    diagnosis: dict[str, Any],
    lowest: Sequence[dict[str, Any]],
    highest: Sequence[dict[str, Any]],
    pictures: Sequence[str],
    of_groups: dict[str, dict[str, Any]],
) -> str:
    what = noun(diagnosis)
    errors = "likely label errors" if what == "label" else "likely wrong responses"
    return page(
        "diagnosis.html",
        name=name,
        diagnosis=diagnosis,
        what=what,
        numbers=list(number_rows(diagnosis)),
        ratio=CLASS_RATIO,
        share_text=share_text,
        of_groups=of_groups,
        pictures=pictures,
        options={key: value for key, value in diagnosis["options"].items() if value is not None},
        lists=[(f"Lowest weights: {errors}", lowest), ("Highest weights", highest)],
        shown=SHOWN,
    )
