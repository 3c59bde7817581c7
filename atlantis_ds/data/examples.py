"""The prepared examples of a run: one memory-mapped Arrow file per split, read by all stages and ranks without
copies."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds.config.schema import Task
from atlantis_ds.data.rows import GROUPS
from atlantis_ds.errors import InputError
from atlantis_ds.files import read_json, stage_of, write_atomic
from atlantis_ds.run_folder import RunFolder

SPLITS = ("train", "dev", "test")
ROWS = 8192
"""Rows per record batch, and per token file."""
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("gold", pa.string()),
        pa.field("group", pa.string()),
        pa.field("fold", pa.uint64(), nullable=False),
    ]
)
"""``prompt`` and ``target`` (a label or response) are text; in a chat both are JSON lists of turns. ``gold`` is the
true target, where it is known. ``fold`` is a seeded draw, equal for equal texts: modulo the number of folds, it is the
example's fold."""


@dataclass(frozen=True)
class Split:
    """The n examples of one split, as columns."""

    table: pa.Table
    labels: list[str] | None
    """The label set; None for responses."""
    digest: str
    """Digest of ids, prompts and targets, on which scores and training depend."""
    gold_digest: str
    """Digest of ids, prompts and gold targets."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def ids(self) -> pa.ChunkedArray:
        return self.table["id"]

    @property
    def prompts(self) -> pa.ChunkedArray:
        return self.table["prompt"]

    @property
    def targets(self) -> pa.ChunkedArray:
        return self.table["target"]

    @property
    def golds(self) -> pa.ChunkedArray:
        """Null where the true target is unknown."""
        return self.table["gold"]

    @property
    def groups(self) -> pa.ChunkedArray:
        return self.table["group"]

    @functools.cached_property
    def memberships(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Examples, int [m], in order, and their groups, int [m], as indices into the names, the first group first; -1
        if an example has none."""
        split = pc.split_pattern(pc.fill_null(self.groups, ""), GROUPS).combine_chunks()
        rows, each = pc.list_parent_indices(split).to_numpy(), pc.list_flatten(split)
        names = pc.unique(each)
        names = names.filter(pc.not_equal(names, ""))
        groups = pc.fill_null(pc.index_in(each, value_set=names), -1).to_numpy()
        return rows, groups, names.to_pylist()

    @functools.cached_property
    def codes(self) -> np.ndarray:
        """int32 [n]: the index of each target in the label set."""
        return self._numbers("target")

    @functools.cached_property
    def gold_codes(self) -> np.ndarray:
        """int32 [n]: the same for the gold labels; -1 where none is known."""
        return self._numbers("gold")

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """int8 [n]: 1 if the target equals the gold target, 0 if not, -1 if no gold target is known."""
        equal = pc.equal(self.targets, self.golds)
        return np.asarray(pc.fill_null(equal.cast(pa.int8()), -1).to_numpy(), dtype=np.int8)

    def folds(self, number: int) -> np.ndarray:
        """int64 [n]: the fold of each example, out of ``number``; equal texts share a fold."""
        return np.asarray(self.text_codes % np.uint64(number), dtype=np.int64)

    @property
    def text_codes(self) -> np.ndarray:
        """uint64 [n]: equal for equal texts."""
        return np.asarray(self.table["fold"].to_numpy(), dtype=np.uint64)

    def _numbers(self, column: str) -> np.ndarray:
        names = pa.array(self.labels or [], pa.string())
        found = pc.fill_null(pc.index_in(self.table[column], value_set=names), -1)
        return np.asarray(found.to_numpy(), dtype=np.int32)


@dataclass(frozen=True)
class Examples:
    """The prepared examples of a run."""

    train: Split
    dev: Split
    test: Split
    labels: list[str] | None
    """The label set, in order; None for responses."""
    task: Task
    chat: bool
    """Whether prompts and targets are lists of turns."""
    fingerprint: str
    train_fingerprint: str
    """Digest of the seed, label set, training and dev examples, on which scores and training depend; not of test or
    gold."""
    info: dict[str, Any]
    """The contents of ``examples.json``: counts, what was left out, notes."""


def load_examples(folder: RunFolder) -> Examples:
    """The examples that ``prepare`` wrote.

    Raises:
        InputError: a file is missing or broken, or the files do not belong together.
    """
    info = read_json(folder.examples_info)
    if not isinstance(info, dict) or not {"train_fingerprint", "labels", "task", "digests"} <= info.keys():
        raise InputError(f"{folder.examples_info}: not written by this version; remove examples/ and run prepare again")
    splits = {
        split: Split(_map(folder.split(split), info["fingerprint"]), info["labels"], *info["digests"][split])
        for split in SPLITS
    }
    return Examples(
        **splits,
        labels=info["labels"],
        task=info["task"],
        chat=info["chat"],
        fingerprint=info["fingerprint"],
        train_fingerprint=info["train_fingerprint"],
        info=info,
    )


def _map(path: Path, fingerprint: str) -> pa.Table:
    table, found = map_table(path)
    if found.get("fingerprint") != fingerprint:
        raise InputError(f"{path}: does not belong to examples.json; remove examples/ and run prepare again")
    return table


def map_table(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Memory-map an Arrow file of the run folder.

    Returns:
        the table, and the ``info`` with which it was written.

    Raises:
        InputError: the file is missing or broken.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return table.replace_schema_metadata(None), json.loads((table.schema.metadata or {})[b"atlantis_ds"])
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run `{stage_of(path)}` first") from None
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path}: broken Arrow file ({reason}); remove it and run `{stage_of(path)}` again") from None


def write_arrow(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], info: dict[str, Any]) -> None:
    """Write an Arrow file batch by batch, with ``info`` in its metadata; it is complete or absent."""
    schema = schema.with_metadata({"atlantis_ds": json.dumps(info, sort_keys=True)})

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))

    write_atomic(path, write)
