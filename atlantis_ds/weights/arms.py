"""The weights of one arm: the run's own, another formula's from the same scores, or a hard selection."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds.config.schema import Recipe, Weights
from atlantis_ds.data.examples import Examples, Split
from atlantis_ds.errors import InputError
from atlantis_ds.files import fingerprint, read_json, read_table
from atlantis_ds.progress import Steps
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.agreement import Suggestions, joined, suggestion
from atlantis_ds.weights.formulas import Scores, combine, evidence, in_order, label_set_evidence, shuffled, stabilise
from atlantis_ds.weights.posterior import (
    ENOUGH_PAIRS,
    Noise,
    fit_noise,
    fit_noise_with_pairs,
    log_posterior,
    sample_rows,
)
from atlantis_ds.weights.shards import read_shards

WEIGHTS_VERSION = 5
"""Must be raised if the same scores and options give different weights or diagnostics than before."""


def arm_weights(run: Run, examples: Examples, arm: str) -> np.ndarray:
    """The weights of one arm: float64 [n], mean 1, in the order of the training examples; 0 for examples that it leaves
    out.

    Uniform weights need no scores. The recipe's own weights are read from ``weights.parquet``; other formulas are
    computed from the same scores.

    Raises:
        InputError: the weights are missing or were merged from other scores or options; the arm's file of ids is
            missing or names an unknown id; or no example is left.
    """
    options = run.recipe.arms[arm]
    weights, log_weight = _merged_weights(run, examples, options.weights or run.recipe.weights)
    kept = np.ones(len(weights))
    if options.drop_lowest:
        if np.ptp(in_order(weights)) == 0:
            raise InputError(f"arm {arm}: all its weights are equal, so `drop_lowest` cannot choose")
        kept[lowest_first(weights, log_weight)[: round(options.drop_lowest * len(weights))]] = 0
        weights = np.ones(len(weights))
    if options.drop_ids:
        kept[_rows_of_ids(Path(options.drop_ids), examples)] = 0
    if kept.all():
        return weights
    if not (weights * kept).any():
        raise InputError(f"arm {arm}: no example is left to train on")
    return weights * kept / np.mean(weights * kept)


def _rows_of_ids(path: Path, examples: Examples) -> np.ndarray:
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of ids, one per line: {error}") from None
    rows = pc.index_in(pa.array(ids, pa.string()), value_set=examples.train.ids.combine_chunks())
    if rows.null_count:
        unknown = ids[rows.is_null().to_pylist().index(True)]
        raise InputError(f"{path}: id {unknown} is not a training example of this run")
    return rows.to_numpy()


def lowest_first(weights: np.ndarray, log_weight: np.ndarray) -> np.ndarray:
    """Row numbers, int64 [n], lowest weight first; weights made equal by a bound are ordered by their values before
    it."""
    return np.lexsort((log_weight, in_order(weights)))


def read_weights(folder: RunFolder) -> tuple[pa.Table, dict[str, Any]]:
    """``weights.parquet`` (``id``, ``log_weight``, ``weight``) and the ``info`` about its inputs.

    Raises:
        InputError: it is missing or broken, or was merged from other scores than those that are there now.
    """
    table, info = read_table(folder.weights)
    if (folder.scores / "scores.json").exists() and info["scores"] != scores_fingerprint(folder):
        raise InputError(f"{folder.weights}: merged from other scores than those in scores/; run `merge` again")
    return table, info


def _merged_weights(run: Run, examples: Examples, options: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and log weights before stabilising, float64 [n] each."""
    if options.formula == "uniform":
        return np.ones(len(examples.train)), np.zeros(len(examples.train))
    if options != run.recipe.weights:
        log_weight = read_log_weights(run, examples, options).values
        return stabilise(log_weight, examples.train.codes, options), log_weight
    folder = run.folder
    table, info = read_weights(folder)
    if info["fingerprint"] != weights_fingerprint(run.recipe, examples, options, info["scores"]):
        raise InputError(f"{folder.weights}: merged with other options than this recipe's; run `merge` again")
    if not table["id"].cast(pa.string()).equals(examples.train.ids):
        raise InputError(f"{folder.weights}: has other examples than the run; run `merge` again")
    return table["weight"].to_numpy(), table["log_weight"].to_numpy()


@dataclass(frozen=True)
class LogWeights:
    """The log weights of a run, before stabilising."""

    values: np.ndarray
    """float64 [n]"""
    tokens: np.ndarray
    """int32 [n]: tokens of each target under the large model."""
    noise: Noise | None
    """The noise model that ``posterior`` fitted."""
    suggested: Suggestions | None
    """The labels that the reference would give; None if the label set was not scored."""
    one_base: bool
    """Whether the large and small base give the same log-likelihood to every example."""


def read_log_weights(run: Run, examples: Examples, options: Weights) -> LogWeights:
    """Log weights, computed shard by shard: memory holds only a few numbers per example, for any number of labels.

    Raises:
        InputError: see ``read_shards``.
    """
    seed, n = run.recipe.seed, len(examples.train)
    noise = _fit_noise(run, examples, options) if options.base_formula == "posterior" else None
    tokens, values, models = np.empty(n, dtype=np.int32), np.empty(n), np.empty((3, n))
    said: list[Suggestions] = []
    for rows, chunk in _chunks(run, examples):
        models[:, rows], tokens[rows] = evidence(chunk, options), chunk.tokens_large
        if chunk.label_set is not None:
            said.append(suggestion(chunk))
        if noise is not None:
            large, small, reference = label_set_evidence(chunk, options)
            values[rows] = log_posterior(reference, large - small, chunk.labels, noise)
    one_base = np.array_equal(models[0], models[1])
    if noise is not None:
        values = shuffled(values, options, seed)
    else:
        values = combine(models, examples.train.codes, options, seed)
    return LogWeights(values, tokens, noise, joined(said) if said else None, one_base)


def _fit_noise(run: Run, examples: Examples, options: Weights) -> Noise:
    """The noise of the given labels, from all examples, or from a sample if there are many."""
    chosen = sample_rows(len(examples.train), len(examples.labels or ()), run.recipe.seed)
    parts = []
    for rows, chunk in _chunks(run, examples):
        here = chosen[np.searchsorted(chosen, rows.start) : np.searchsorted(chosen, rows.stop)] - rows.start
        parts.append(label_set_evidence(chunk, options)[:, here])
    large, small, reference = np.concatenate(parts, axis=1)
    given, seed = examples.train.codes[chosen], run.recipe.seed
    pairs = known_pairs(examples.dev, len(examples.labels or ()))
    if pairs.sum() >= ENOUGH_PAIRS:
        return fit_noise_with_pairs(reference, large - small, given, seed, pairs)
    return fit_noise(reference, large - small, given, seed)


def known_pairs(dev: Split, labels: int) -> np.ndarray:
    """How often a true label (row) is given as another (column) in dev, int [K, K].

    All 0 if every label in dev equals its gold label: then its labels were made in another way than those of train.
    """
    counts = np.zeros((labels, labels), dtype=np.int64)
    if (dev.correct == 0).any():
        known = dev.correct >= 0
        np.add.at(counts, (dev.gold_codes[known], dev.codes[known]), 1)
    return counts


def _chunks(run: Run, examples: Examples) -> Iterator[tuple[slice, Scores]]:
    """The scores shard by shard, each with its rows among the training examples."""
    shards = math.ceil(len(examples.train) / run.recipe.score.shard_size)
    done = 0
    with Steps("merge", shards, "shards", show=shards >= 100, every=shards // 10) as steps:
        for chunk in read_shards(run, examples):
            yield slice(done, done + len(chunk.labels)), chunk
            done += len(chunk.labels)
            steps.advance()


def scores_fingerprint(folder: RunFolder) -> str:
    return str(read_json(folder.scores / "scores.json")["fingerprint"])


def weights_fingerprint(recipe: Recipe, examples: Examples, options: Weights, scores: str) -> str:
    pairs = [examples.dev.gold_digest] if options.base_formula == "posterior" else []
    return fingerprint([WEIGHTS_VERSION, scores, options.model_dump(), recipe.seed, *pairs])
