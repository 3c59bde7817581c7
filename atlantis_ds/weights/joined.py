"""Joins the weights of a run with its examples, or with a user's own rows, for training elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds.data.examples import load_examples
from atlantis_ds.errors import InputError
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.page import read_diagnosis

ROWS_AT_ONCE = 10_000
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def weighted_table(folder: RunFolder, messages: bool = False) -> pa.Table:
    """The training examples of a run with their weights.

    Args:
        messages: prompt and target as one chat: a user turn and an assistant turn, or the turns of the chat.

    Returns:
        ``id``, ``prompt`` and ``target`` (text; for chats lists of {role, content} turns), or ``messages`` instead of
        these two, and ``weight`` (float64, mean 1).

    Raises:
        InputError: the weights are missing, or do not belong to the run's scores and examples.
    """
    examples = load_examples(folder)
    weights = read_diagnosis(folder, examples)[0]
    texts = examples.train.table.select(["prompt", "target"])
    if examples.chat or messages:
        parts = [as_turns(batch, examples.chat, messages) for batch in texts.to_batches(ROWS_AT_ONCE)]
        texts = pa.concat_tables(parts)
    return pa.table(
        {"id": weights["id"], **{name: texts[name] for name in texts.column_names}, "weight": weights["weight"]}
    )


def as_turns(batch: pa.RecordBatch, chat: bool, messages: bool) -> pa.Table:
    """Prompts and targets of examples as lists of {role, content} turns: two columns, or one column ``messages``."""

    def turns(column: str, role: str) -> list[list[dict[str, str]]]:
        texts = batch[column].to_pylist()
        return [json.loads(text) if chat else [{"role": role, "content": text}] for text in texts]

    prompts, targets = turns("prompt", "user"), turns("target", "assistant")
    if messages:
        return pa.table({"messages": pa.array([[*before, *said] for before, said in zip(prompts, targets)], TURNS)})
    return pa.table({"prompt": pa.array(prompts, TURNS), "target": pa.array(targets, TURNS)})


def weights_of_ids(folder: RunFolder, ids: Iterable[Any]) -> np.ndarray:
    """The weights of a run in the order of these ids, float64 [n].

    Raises:
        InputError: an id is duplicated or has no weight, or a weight has no id; or as in ``weighted_table``.
    """
    weights = read_diagnosis(folder, load_examples(folder))[0]
    known, wanted = weights["id"].cast(pa.string()).combine_chunks(), pa.array(map(str, ids), pa.string())
    rows = pc.index_in(wanted, value_set=known)
    if rows.null_count:
        unknown = wanted.filter(rows.is_null())
        raise InputError(
            f"dataset: id {unknown[0].as_py()} has no weight in {folder.weights} ({len(unknown)} of {len(wanted)} "
            "have none): leave out what `prepare` left out, or use the dataset from which the run was made"
        )
    if (distinct := len(pc.unique(wanted))) < len(wanted):
        twice = pc.value_counts(wanted)
        first = twice.filter(pc.greater(twice.field("counts"), 1))[0].as_py()["values"]
        raise InputError(f"dataset: id {first} occurs more than once; ids must be unique")
    if distinct < len(known):
        gone = known.filter(pc.invert(pc.is_in(known, value_set=wanted)))
        raise InputError(
            f"dataset: example {gone[0].as_py()} of {folder.weights} is missing ({len(gone)} are missing): weights "
            "have mean 1 over all examples of the run, so all must be there"
        )
    return np.asarray(weights["weight"].to_numpy()[rows.to_numpy()])
