"""Merge the score shards into one weight per training example, and say whether the weights can be trusted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds import __version__
from atlantis_ds.config.schema import Recipe, Weights
from atlantis_ds.data.prepare import Examples, TrainLabels, load_train_labels, refuse_other_data
from atlantis_ds.errors import InputError
from atlantis_ds.files import fingerprint, finished, read_json, read_table, write_json, write_table
from atlantis_ds.progress import Steps
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.diagnostics import diagnose, plot_weights
from atlantis_ds.weights.formulas import Scores, combine, evidence, stabilise
from atlantis_ds.weights.score import COLUMNS, LABEL_SET, scoring_inputs, shard_path

WEIGHTS_VERSION = 2
"""Goes up where the same scores and options give other weights or other diagnostics than before."""
_TYPES = {"logp": pa.float64(), "eos": pa.float64(), "tokens": pa.int64()}


def shard_schema(label_set: bool) -> pa.Schema:
    """Columns of a score shard; ``label_set`` as in the recipe."""
    fields = [("id", pa.string())]
    for column in COLUMNS:
        fields += [(f"{LABEL_SET}{kind}_{column}", pa.list_(_TYPES[kind])) for kind in _TYPES if label_set]
        fields += [(f"{kind}_{column}", _TYPES[kind]) for kind in _TYPES]
    return pa.schema(fields)


def read_shards(recipe: Recipe, folder: RunFolder, train: TrainLabels) -> Iterator[Scores]:
    """The score shards one after another, in the order of the training examples.

    Raises:
        InputError: a shard is missing, broken, doubled, foreign or made from other inputs; an example is missing or
            doubled; a score is not finite. The file or example is named.
    """
    manifest = read_json(folder.scores / "scores.json")
    for key, value in scoring_inputs(recipe, train.train_fingerprint, train.label_set).items():
        if manifest["inputs"].get(key) != value:
            raise InputError(f"{folder.scores}: made with another `{key}` than this recipe's; score again")
    of = manifest["shards"]
    expected = {shard_path(folder, shard, of).name for shard in range(of)}
    found = {path.name for path in folder.scores.glob("*.parquet")}
    if foreign := sorted(found - expected):
        raise InputError(f"{folder.scores / foreign[0]}: not a shard of this run ({of} shards); remove it")
    if missing := sorted(expected - found):
        raise InputError(
            f"{folder.scores / missing[0]}: missing ({len(missing)} of {of} shards are); run `score` to complete them"
        )
    schema, size = shard_schema(recipe.score.label_set), recipe.score.shard_size
    for shard in range(of):
        path = shard_path(folder, shard, of)
        table, info = read_table(path)
        if info.get("fingerprint") != manifest["fingerprint"] or info.get("shard") != shard:
            raise InputError(f"{path}: made from other inputs than scores.json says; remove it and score again")
        if not table.schema.equals(schema):
            raise InputError(f"{path}: broken Parquet file (it has other columns); remove it and score again")
        _check_ids(path, table["id"], train.ids.slice(shard * size, size))
        yield _scores(folder, table, train.labels[shard * size :][:size], len(train.label_set))


def _check_ids(path: Path, found: pa.ChunkedArray, expected: pa.ChunkedArray) -> None:
    if found.equals(expected):
        return
    ids, wanted = found.to_pylist(), expected.to_pylist()
    if double := sorted(id for id, times in Counter(ids).items() if times > 1):
        raise InputError(f"{path}: example {double[0]} is scored twice; remove it and score again")
    if foreign := set(ids) - set(wanted):
        raise InputError(f"{path}: example {min(foreign)} is not of this shard; remove it and score again")
    if gone := set(wanted) - set(ids):
        raise InputError(f"{path}: example {min(gone)} has no score ({len(gone)} in all); remove it and score again")
    raise InputError(f"{path}: holds its examples in another order; remove it and score again")


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
    """A column of scores: [n], or [n, K] where it holds lists; without gaps, and finite."""
    column, lists = table[name], name.startswith(LABEL_SET)
    if column.null_count == 0 and (not lists or pc.all(pc.equal(pc.list_value_length(column), labels)).as_py()):
        values = (pc.list_flatten(column) if lists else column).to_numpy().reshape(len(table), -1)
        if np.isfinite(values).all():
            return values if lists else values[:, 0]
    short = [row for row, value in enumerate(column.to_pylist()) if not _finite(value, labels if lists else 1)]
    raise InputError(f"{folder.scores}: {name} of example {table['id'][short[0]].as_py()} is not finite, or not whole")


def _finite(value: Any, length: int) -> bool:
    values = np.array(value if isinstance(value, list) else [value], dtype=np.float64)
    return len(values) == length and bool(np.isfinite(values).all())


def load_scores(recipe: Recipe, folder: RunFolder, train: TrainLabels) -> Scores:
    """All shards of ``read_shards`` in one, for those who want every score at once."""

    def join(chunks: list[Scores]) -> Scores:
        names = [name for name in vars(chunks[0]) if name not in ("labels", "label_set")]
        every = [chunk.label_set for chunk in chunks if chunk.label_set]
        return Scores(
            **{name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names},
            labels=train.labels if chunks[0].large.ndim == 1 else chunks[0].labels,
            label_set=join(every) if every else None,
        )

    return join(list(read_shards(recipe, folder, train)))


def read_log_weights(
    recipe: Recipe, folder: RunFolder, train: TrainLabels, options: Weights
) -> tuple[np.ndarray, np.ndarray]:
    """Log weights before stabilising, read shard by shard: memory holds a few numbers an example, however many labels.

    Returns:
        log weights, float64 [n], and the number of tokens of each label under the large model, int32 [n].

    Raises:
        InputError: see ``read_shards``.
    """
    models = np.empty((3, len(train.labels)))
    tokens = np.empty(len(train.labels), dtype=np.int32)
    shards = math.ceil(len(train.labels) / recipe.score.shard_size)
    done = 0
    with Steps("merge", shards, "shards", show=shards >= 100, every=shards // 10) as steps:
        for chunk in read_shards(recipe, folder, train):
            rows = slice(done, done + len(chunk.labels))
            models[:, rows], tokens[rows] = evidence(chunk, options), chunk.tokens_large
            done = rows.stop
            steps.advance()
    return combine(models, train.labels, options, recipe.seed), tokens


def merge(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """Write ``weights.parquet``, ``weights.png`` and, last, ``weights.json``.

    Returns:
        what stands in ``weights.json``: diagnostics, options and fingerprints.
    """
    refuse_other_data(recipe, folder)
    train = load_train_labels(folder)
    scores_fingerprint = _scores_fingerprint(folder)
    mark = _weights_fingerprint(recipe, recipe.weights, scores_fingerprint)
    if finished(folder.weights_info, mark) and finished(folder.weights, mark) and folder.weights_plot.exists():
        return read_json(folder.weights_info)
    log_weight, tokens = read_log_weights(recipe, folder, train, recipe.weights)
    weight = stabilise(log_weight, train.labels, recipe.weights)
    diagnosis = diagnose(weight, log_weight, train.labels, train.gold, train.names, tokens)
    info = {
        "fingerprint": mark,
        "scores": scores_fingerprint,
        "options": recipe.weights.model_dump(),
        "seed": recipe.seed,
        "atlantis_ds": __version__,
        **diagnosis,
    }
    write_table(
        folder.weights,
        pa.table({"id": train.ids, "log_weight": log_weight, "weight": weight}),
        {"fingerprint": mark, "scores": scores_fingerprint},
    )
    plot_weights(folder.weights_plot, weight, diagnosis)
    write_json(folder.weights_info, info)
    return info


def arm_weights(recipe: Recipe, folder: RunFolder, examples: Examples, arm: str) -> np.ndarray:
    """The weights of one arm: float64 [n], mean 1, in the order of the training examples; 0 for what it leaves out.

    Uniform weights need no scores. The recipe's own are read from ``weights.parquet``; other formulas are computed
    from the same scores.

    Raises:
        InputError: the weights are missing or were merged from other scores or options; the arm's file of ids to
            leave out is missing or names an unknown id, or nothing is left.
    """
    options = recipe.arms[arm]
    weights, log_weight = _merged_weights(recipe, folder, examples, options.weights or recipe.weights)
    kept = np.ones(len(weights))
    if options.drop_lowest:
        if np.ptp(weights) == 0:
            raise InputError(f"arm {arm}: all its weights are equal, so `drop_lowest` has nothing to go by")
        kept[lowest_first(weights, log_weight)[: round(options.drop_lowest * len(weights))]] = 0
        weights = np.ones(len(weights))
    if options.drop_ids:
        kept[_rows_of_ids(Path(options.drop_ids), examples)] = 0
    if kept.all():
        return weights
    if not (weights * kept).any():
        raise InputError(f"arm {arm}: no example is left to train on")
    return weights * kept / np.mean(weights * kept)


def _rows_of_ids(path: Path, examples: Examples) -> list[int]:
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of ids, one a line: {error}") from None
    rows = {example.id: row for row, example in enumerate(examples.train)}
    if unknown := next((id for id in ids if id not in rows), None):
        raise InputError(f"{path}: id {unknown} is no training example of this run")
    return [rows[id] for id in ids]


def lowest_first(weights: np.ndarray, log_weight: np.ndarray) -> np.ndarray:
    """Row numbers, int64 [n], lowest weight first; weights that a bound made equal by what they were before."""
    return np.lexsort((log_weight, weights))


def read_weights(folder: RunFolder) -> tuple[pa.Table, dict[str, Any]]:
    """``weights.parquet`` (``id``, ``log_weight``, ``weight``) and what it was made from.

    Raises:
        InputError: it is missing or broken, or was merged from other scores than lie beside it now.
    """
    table, info = read_table(folder.weights)
    if (folder.scores / "scores.json").exists() and info["scores"] != _scores_fingerprint(folder):
        raise InputError(f"{folder.weights}: merged from other scores than those in scores/; run `merge` again")
    return table, info


def _merged_weights(
    recipe: Recipe, folder: RunFolder, examples: Examples, options: Weights
) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and log weights before stabilising, float64 [n] each."""
    if options.formula == "uniform":
        return np.ones(len(examples.train)), np.zeros(len(examples.train))
    if options != recipe.weights:
        train = load_train_labels(folder)
        log_weight = read_log_weights(recipe, folder, train, options)[0]
        return stabilise(log_weight, train.labels, options), log_weight
    table, info = read_weights(folder)
    if info["fingerprint"] != _weights_fingerprint(recipe, options, info["scores"]):
        raise InputError(f"{folder.weights}: merged with other options than this recipe's; run `merge` again")
    if table["id"].to_pylist() != [example.id for example in examples.train]:
        raise InputError(f"{folder.weights}: holds other examples than the run; run `merge` again")
    return table["weight"].to_numpy(), table["log_weight"].to_numpy()


def _scores_fingerprint(folder: RunFolder) -> str:
    return str(read_json(folder.scores / "scores.json")["fingerprint"])


def _weights_fingerprint(recipe: Recipe, options: Weights, scores: str) -> str:
    return fingerprint([WEIGHTS_VERSION, scores, options.model_dump(), recipe.seed])
