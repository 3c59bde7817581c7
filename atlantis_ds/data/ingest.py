"""Reads each split of the data files once: checks every row and renders its prompt, into a temporary Arrow file."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds.config.schema import Data, Recipe
from atlantis_ds.data.examples import ROWS, SPLITS, map_table, write_arrow
from atlantis_ds.data.prompts import render_prompt, template_for
from atlantis_ds.data.reading import first_examples, read_split
from atlantis_ds.data.relation import NO_RELATION, SEMEVAL_LABELS
from atlantis_ds.data.rows import BadRow, BadRows, Found
from atlantis_ds.data.splits import key_hash, text_key
from atlantis_ds.errors import InputError
from atlantis_ds.run_folder import missing_folder

READ = pa.schema([(name, pa.string()) for name in ("id", "prompt", "target", "gold", "group", "key")])


@dataclass
class Read:
    """One split as read: the texts are in a temporary file, the numbers here."""

    table: pa.Table
    """Table with the schema ``READ``, memory-mapped."""
    keys: np.ndarray
    """uint64 [n], see ``splits.key_hash``."""
    template: str | None
    whole_ids: bool
    """Whether every id is a whole number."""
    named: int
    """Rows with an id of their own; the others have their row number."""
    unlabelled: int
    """Training rows left out because they have no label."""
    bad: BadRows

    def __len__(self) -> int:
        return len(self.keys)

    def texts(self, column: str) -> Iterator[str]:
        for batch in self.table.select([column]).to_batches():
            yield from batch[0].to_pylist()


def look_at_data(recipe: Recipe) -> None:
    """Read the first rows of each split and fill in the template, as ``check`` does on a login node.

    A data set on the hub is not downloaded; a local folder must exist.

    Raises:
        InputError: a file or column is missing, a row is invalid, or a label is unknown if the set is given.
    """
    if recipe.data.hub_id and (problem := missing_folder(recipe.data.hub_id)):
        raise InputError(f"data.hub_id: {problem}")
    labels = known_labels(recipe.data)
    files = recipe.data.format != "grammar" and not recipe.data.hub_id
    templates: dict[str, str | None] = {}
    for split in SPLITS if files else ():
        for found in first_examples(recipe, split):
            try:
                _target(found, split, labels)
                templates[split] = templates.get(split) or _template(recipe, found)
                _key(templates[split] or "", found)
            except BadRow as problem:
                if recipe.data.on_bad_row == "refuse":
                    raise InputError(f"{problem.at or found.where}: {problem}") from None
    refuse_two_kinds(templates)


def label_set(recipe: Recipe) -> list[str] | None:
    """The label set of a recipe: its own, the format's, or all labels in train; None for responses.

    Raises:
        InputError: a label is duplicated or empty, or there are more than ``data.max_labels``.
    """
    data = recipe.data
    if recipe.task == "response":
        return None
    if (known := known_labels(data)) is not None:
        return known
    found: set[str] = set()
    for example in read_split(recipe, "train", lambda where, what: None) or ():
        found |= {label for label in (example.target, example.gold) if label is not None}
        if len(found) > data.max_labels:
            raise InputError(
                f"data.labels: more than {data.max_labels} different labels in train, such as "
                f"{example.target or example.gold!r:.60}; raise data.max_labels, or set data.task: response if the "
                "targets are free text"
            )
    whole = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in found)
    labels = sorted(found, key=lambda label: (int(label) if whole else 0, label))
    if data.negatives and NO_RELATION in labels:  # last, as the drawn pairs would put it
        labels.remove(NO_RELATION)
        labels.append(NO_RELATION)
    if data.negative_label is not None and data.negative_label not in labels:
        raise InputError(
            f"data.negative_label: {data.negative_label!r} is not a label in train ({', '.join(labels[:10])})"
        )
    return labels


def known_labels(data: Data) -> list[str] | None:
    """The label set that the recipe or its format names; None if it must be read from the data."""
    if data.labels is None:
        return list(SEMEVAL_LABELS) if data.format in ("semeval2010_task8", "grammar") else None
    if not data.labels or len(set(data.labels)) < len(data.labels) or not all(map(str.strip, data.labels)):
        raise InputError("data.labels: give at least one label, without duplicates or empty labels")
    return data.labels


def ingest(recipe: Recipe, split: str, labels: list[str] | None, place: Path) -> Read | None:
    """One whole split; only dev may be empty; None if there is no such split."""
    bad = BadRows(recipe.data.on_bad_row == "drop")
    source = read_split(recipe, split, bad)
    if source is None:
        if split == "test" and recipe.data.hub_id is None:
            return None  # only weights are wanted
        if split != "train":
            return None
        raise InputError("data.train: no training examples")
    read = Read(pa.table([]), np.empty(0, np.uint64), None, True, 0, 0, bad)
    keys: list[np.ndarray] = []
    path = place / f"{split}.arrow"
    write_arrow(path, READ, _read_batches(recipe, split, source, labels, read, keys), {})
    bad.refuse()
    read.table = map_table(path)[0]
    read.keys = np.concatenate([read.keys, *keys])
    if 0 < read.named < len(read):
        _refuse_double_ids(split, read)
    if not len(read) and split != "dev":
        paths = recipe.data.hub_id or getattr(recipe.data, split)
        where = paths if isinstance(paths, str) else ", ".join(paths)
        why = [(read.unlabelled, "have no label"), (bad.count, "cannot be read")]
        also = " and ".join(f"{count} rows {what}" for count, what in why if count)
        raise InputError(f"data.{split}: {where}: contains no example" + (f" ({also})" if also else ""))
    return read


def _read_batches(
    recipe: Recipe, split: str, source: Iterator[Found], labels: list[str] | None, read: Read, keys: list[np.ndarray]
) -> Iterator[pa.RecordBatch]:
    """The rows of a split as record batches of ``READ``; also fills in ``read`` and ``keys``."""
    seen: set[int] = set()
    rows: list[tuple[str | None, ...]] = []

    def batch() -> pa.RecordBatch:
        keys.append(np.array([key_hash(str(row[5])) for row in rows], dtype=np.uint64))
        made = pa.record_batch([pa.array(column, pa.string()) for column in zip(*rows)], schema=READ)
        rows.clear()
        return made

    for found in source:
        try:
            target = _target(found, split, labels)
            if target is None:
                read.unlabelled += 1
                continue
            read.template = read.template or _template(recipe, found)
            key = _key(read.template, found)
            prompt = render_prompt(read.template, found.fields, recipe.prompt, labels)
            id = str(found.number if found.id is None else found.id)
            if hash(id) in seen:
                raise BadRow(f"the id {id!r} is a duplicate in {split}")
            if found.id is not None:
                seen.add(hash(id))
                read.named += 1
            read.whole_ids &= not isinstance(found.id, str) and len(id) < 19  # certain to fit an int64
        except BadRow as problem:
            read.bad(problem.at or found.where, str(problem))
            continue
        rows.append((id, prompt, target, found.gold, found.group, text_key(key)))
        if len(rows) == ROWS:
            yield batch()
    if rows:
        yield batch()


def _refuse_double_ids(split: str, read: Read) -> None:
    """Refuse a split in which some rows have ids, and one of these is the row number of a row without an id."""
    counts = pc.value_counts(read.table["id"])
    double = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(double):
        raise InputError(
            f"data.{split}: the id {double[0].as_py()['values']!r} is a duplicate: {len(read) - read.named} of "
            f"{len(read)} rows have no id and get their row number; give all rows an id, or none"
        )


def _template(recipe: Recipe, found: Found) -> str:
    """The template of a split, for the columns of its first row; if it does not fit, the row is not to blame."""
    if "messages" in found.fields and recipe.task == "response":
        if recipe.prompt.template is not None:
            raise InputError(
                f"{found.where}: prompt.template: the tokenizer's own chat template formats a chat; remove the key"
            )
        return "{messages}"
    try:
        return template_for(recipe.task, recipe.prompt, found.fields)
    except BadRow as problem:
        raise InputError(f"{found.where}: {problem}") from None


def _key(template: str, found: Found) -> str:
    """The key by which examples are equal. Raises BadRow: the prompt would contain nothing from the row."""
    names = set(re.findall(r"\{(\w+)\}", template)) - {"options"}
    named = [text for name, text in found.fields.items() if name in names]
    if found.fields and not named:
        raise BadRow(
            f"the row has {', '.join(found.fields)}, but the rows before it have {', '.join(sorted(names))}; all rows "
            "of a data set must have the same columns"
        )
    if not any(map(str.strip, named)):
        raise BadRow(f"the prompt is empty: there is no text in {', '.join(sorted(names))}")
    return found.key if found.key is not None else "\t".join(named)


def refuse_two_kinds(templates: dict[str, str | None]) -> None:
    """Refuse chats in one split and single prompts in another: no model can read both."""
    for split, template in templates.items():
        if template is not None and is_chat(template) != is_chat(templates.get("train")):
            raise InputError(
                f"data.{split}: one split has chats and another has single prompts; use one kind in all splits"
            )


def is_chat(template: str | None) -> bool:
    """Whether prompts are chats, whose template is the turns themselves."""
    return template == "{messages}"


def _target(found: Found, split: str, labels: list[str] | None) -> str | None:
    """The target of an example; None for a training row without one. Outside train, gold is used instead."""
    target = found.target if split == "train" or found.target is not None else found.gold
    if target is None and split != "train":
        raise BadRow(
            "empty label: there is neither a label (or response) nor a gold one; -1 is no label, unless data.labels "
            "lists it as a class"
        )
    if labels is not None:
        for label, kind in ((target, "label"), (found.gold, "gold label")):
            if label is not None and label not in labels:
                raise BadRow(f"unknown {kind} {label!r}; {of_labels(label, labels)}", found.label_at)
    return target


def of_labels(label: str, labels: list[str]) -> str:
    """For messages: the label set that lacks a label, or the labels similar to it."""
    if len(labels) <= 20:
        return f"the label set is {', '.join(labels)}"
    close = difflib.get_close_matches(label, labels, n=3)
    return f"it is not one of the {len(labels)} labels" + (f"; similar: {', '.join(close)}" if close else "")


def equal_but_for_case(labels: list[str]) -> list[list[str]]:
    """Groups of labels that differ only in case or white space."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups["".join(label.split()).casefold()].append(label)
    return [same for same in groups.values() if len(same) > 1]
