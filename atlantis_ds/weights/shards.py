"""The score shards of a run: their contents, and how to read and check them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds.config.schema import Recipe
from atlantis_ds.data.examples import Examples
from atlantis_ds.errors import InputError
from atlantis_ds.files import look_again, read_json, read_table
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.formulas import Scores

VERSION = 2
"""Must be raised if the same examples and settings give different scores than before."""
COLUMNS = ("large", "small", "reference")
LABEL_SET = "label_set_"
"""Prefix of columns that contain lists: one value for each label of the label set."""
_TYPES = {"logp": pa.float64(), "eos": pa.float64(), "tokens": pa.int64()}


def shard_path(folder: RunFolder, shard: int, of: int) -> Path:
    return folder.scores / f"shard-{shard:05d}-of-{of:05d}.parquet"


def scoring_inputs(recipe: Recipe, examples: Examples) -> dict[str, Any]:
    """Everything that the scores depend on except the models: what ``merge`` can check without them."""
    return {
        "version": VERSION,
        "examples": examples.train_fingerprint,
        "labels": examples.labels,
        "dtype": recipe.score.dtype,
        "tokens_per_batch": recipe.score.tokens_per_batch,
        "shard_size": recipe.score.shard_size,
        "label_set": recipe.score.label_set,
        "chat_template": recipe.models.reference.chat_template,
    }


def scored_by(models: Mapping[str, Any], reference_as_turn: bool) -> dict[str, str]:
    """For each pass by its name, the pass whose scores it has: an earlier one with the same model on the same prompts,
    or itself. A fold of the reference has examples of its own.

    Args:
        models: identity of each pass's model, in order: ``large``, ``small``, and ``reference`` or ``reference-FOLD``.
        reference_as_turn: the reference reads the prompts inside its chat template.
    """
    found: dict[str, str] = {}
    for name, model in models.items():
        alone = name.startswith("reference-") or (name == "reference" and reference_as_turn)
        same = (other for other in found if models[other] == model and not alone)
        found[name] = next(same, name)
    return found


def shard_schema(label_set: bool) -> pa.Schema:
    """Columns of a score shard; ``label_set`` as in the recipe."""
    fields = [("id", pa.string())]
    for column in COLUMNS:
        fields += [(f"{LABEL_SET}{kind}_{column}", pa.list_(_TYPES[kind])) for kind in _TYPES if label_set]
        fields += [(f"{kind}_{column}", _TYPES[kind]) for kind in _TYPES]
    return pa.schema(fields)


def read_shards(run: Run, examples: Examples) -> Iterator[Scores]:
    """The score shards, one after another, in the order of the training examples.

    Raises:
        InputError: a shard is missing, broken, duplicated, from another run or computed from other inputs; an example
            is missing or duplicated; or a score is not finite. The message names the file or example.
    """
    recipe, folder, train = run.recipe, run.folder, examples.train
    manifest = read_json(folder.scores / "scores.json")
    wanted = scoring_inputs(recipe, examples)
    if wanted["dtype"] == "auto":  # whatever the scoring machine used
        del wanted["dtype"]
    for key, value in wanted.items():
        if manifest["inputs"].get(key) != value:
            raise InputError(f"{folder.scores}: computed with another `{key}` than in this recipe; score again")
    of = manifest["shards"]
    expected = {shard_path(folder, shard, of).name for shard in range(of)}
    look_again(folder.scores)
    found = {path.name for path in folder.scores.glob("*.parquet")}
    if foreign := sorted(found - expected):
        raise InputError(f"{folder.scores / foreign[0]}: not a shard of this run ({of} shards); remove it")
    if missing := sorted(expected - found):
        raise InputError(
            f"{folder.scores / missing[0]}: missing ({len(missing)} of {of} shards are missing); run `score` to "
            "complete them"
        )
    schema, size = shard_schema(recipe.score.label_set), recipe.score.shard_size
    for shard in range(of):
        path = shard_path(folder, shard, of)
        table, info = read_table(path)
        if info.get("fingerprint") != manifest["fingerprint"] or info.get("shard") != shard:
            raise InputError(f"{path}: computed from other inputs than scores.json says; remove it and score again")
        if not table.schema.equals(schema):
            raise InputError(f"{path}: broken Parquet file (it has other columns); remove it and score again")
        _check_ids(path, table["id"], train.ids.slice(shard * size, size))
        yield _scores(folder, table, train.codes[shard * size :][:size], len(examples.labels or ()))


def _check_ids(path: Path, found: pa.ChunkedArray, expected: pa.ChunkedArray) -> None:
    if found.equals(expected):
        return
    ids, wanted = found.to_pylist(), expected.to_pylist()
    if double := sorted(id for id, times in Counter(ids).items() if times > 1):
        raise InputError(f"{path}: example {double[0]} is scored twice; remove it and score again")
    if foreign := set(ids) - set(wanted):
        raise InputError(f"{path}: example {min(foreign)} does not belong to this shard; remove it and score again")
    if gone := set(wanted) - set(ids):
        raise InputError(f"{path}: example {min(gone)} has no score ({len(gone)} in all); remove it and score again")
    raise InputError(f"{path}: its examples are in another order; remove it and score again")


def _scores(folder: RunFolder, table: pa.Table, labels: np.ndarray, label_set: int) -> Scores:
    def arrays(prefix: str) -> dict[str, Any]:
        return {
            f"{target}{column}": _array(folder, table, f"{prefix}{kind}_{column}", label_set)
            for column in COLUMNS
            for kind, target in (("logp", ""), ("eos", "eos_"), ("tokens", "tokens_"))
        }

    every = f"{LABEL_SET}logp_large" in table.column_names
    return Scores(
        **arrays(""),
        labels=labels,
        label_set=Scores(**arrays(LABEL_SET), labels=np.arange(label_set)) if every else None,
    )


def _array(folder: RunFolder, table: pa.Table, name: str, labels: int) -> np.ndarray:
    """A column of scores: [n], or [n, K] if it contains lists; without gaps, and finite."""
    column, lists = table[name], name.startswith(LABEL_SET)
    if column.null_count == 0 and (not lists or pc.all(pc.equal(pc.list_value_length(column), labels)).as_py()):
        values = (pc.list_flatten(column) if lists else column).to_numpy().reshape(len(table), -1)
        if np.isfinite(values).all():
            return values if lists else values[:, 0]
    short = [row for row, value in enumerate(column.to_pylist()) if not _finite(value, labels if lists else 1)]
    raise InputError(f"{folder.scores}: {name} of example {table['id'][short[0]].as_py()} is not finite, or incomplete")


def _finite(value: Any, length: int) -> bool:
    values = np.array(value if isinstance(value, list) else [value], dtype=np.float64)
    return len(values) == length and bool(np.isfinite(values).all())


def load_scores(run: Run, examples: Examples) -> Scores:
    """All shards of ``read_shards`` in one, for callers that need all scores at once."""

    def join(chunks: list[Scores]) -> Scores:
        names = [name for name in vars(chunks[0]) if name not in ("labels", "label_set")]
        every = [chunk.label_set for chunk in chunks if chunk.label_set]
        return Scores(
            **{name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names},
            labels=examples.train.codes if chunks[0].large.ndim == 1 else chunks[0].labels,
            label_set=join(every) if every else None,
        )

    return join(list(read_shards(run, examples)))
