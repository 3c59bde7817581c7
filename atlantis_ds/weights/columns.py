"""Scores from columns in memory, named as in the score shards, for use without a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds.config.schema import Weights
from atlantis_ds.errors import InputError
from atlantis_ds.weights.formulas import Scores
from atlantis_ds.weights.shards import COLUMNS, LABEL_SET

MODELS = {
    "product": COLUMNS,
    "ratio": ("large", "small"),
    "influence": ("small", "reference"),
    "reference": ("reference",),
    "posterior": ("reference",),
    "uniform": (),
}
"""The models that a formula needs."""


def scores_of_columns(columns: Mapping[str, Any] | pa.Table, labels: Any, options: Weights) -> Scores:
    """The scores that a formula needs; values that it does not use are 0, with one token.

    Args:
        columns: see ``api.weights_from_scores``.
        labels: int or str [n]; None if no option uses them.
        options: the recipe's ``weights``.

    Raises:
        InputError: a column or the labels are missing, not finite, or have another length.
    """
    names = set(columns.column_names if isinstance(columns, pa.Table) else columns)
    of_set = options.base_formula == "posterior" or options.calibrate == "label_set"
    own = not of_set or (options.base_formula != "posterior" and any(f"logp_{model}" in names for model in COLUMNS))
    wanted = {prefix: _wanted(names, prefix, options) for prefix in ([LABEL_SET] * of_set + [""] * own)}
    arrays = {prefix: {name: _column(columns, prefix + name) for name in found} for prefix, found in wanted.items()}
    lengths = {prefix + name: len(array) for prefix, found in arrays.items() for name, array in found.items()}
    codes = None if labels is None else np.asarray(no_gaps("labels", texts_or_numbers("labels", labels)))
    if codes is not None:
        lengths["labels"] = len(codes)
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "nothing is given"
        raise InputError(f"scores: columns and labels must have the same length: {told}")
    if not (n := next(iter(lengths.values()))):
        raise InputError("scores: there are no examples to weight")
    if codes is None:
        if of_set or options.scope == "per_label" or options.calibrate != "none":
            raise InputError("labels: these weights.* options use the label of each example; give `labels` [n]")
        codes = np.zeros(n, dtype=np.int64)
    if not of_set:
        return _scores(arrays[""], (n,), codes)
    shape = _shape_of_set(arrays[LABEL_SET], codes)
    every = _scores(arrays[LABEL_SET], shape, np.arange(shape[1]))
    given = {name: array[np.arange(n), codes] for name, array in arrays[LABEL_SET].items()}
    return _scores(arrays.get("", given), (n,), codes, every)


def texts_or_numbers(name: str, values: Any) -> list[Any]:
    """Labels given as a list, array or column of any kind, None for those that are missing (None, NaN, NA).

    Raises:
        InputError: they are not [n], or of other or several kinds.
    """
    kinds = (pa.types.is_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    try:
        found = pa.array([] if isinstance(values, str) else list(values), from_pandas=True)
    except (TypeError, ValueError):
        found = None
    if found is None or isinstance(values, str) or not any(kind(found.type) for kind in kinds):
        raise InputError(f"{name}: give a list of texts or of whole numbers, one for each example")
    return list(found.to_pylist())


def no_gaps(name: str, values: list[Any]) -> list[Any]:
    """The values. Raises InputError: one is None."""
    if None in values:
        raise InputError(f"{name}: row {values.index(None)} has none; leave it out everywhere")
    return values


def _wanted(names: set[str], prefix: str, options: Weights) -> list[str]:
    """Names, without the prefix, of the columns to read."""
    formula = options.base_formula
    models = list(MODELS[formula])
    if formula == "posterior" and all(f"{prefix}logp_{model}" in names for model in COLUMNS):
        models = list(COLUMNS)  # the fit decides how much the base ratio counts
    kinds = ["logp", *["eos"] * options.eos, *["tokens"] * (options.length == "mean")]
    wanted = [f"{kind}_{model}" for model in models for kind in kinds]
    if missing := [prefix + name for name in wanted if prefix + name not in names]:
        raise InputError(f"scores: weights.formula: {formula} needs the columns {', '.join(missing)}")
    return wanted


def _column(columns: Mapping[str, Any] | pa.Table, name: str) -> np.ndarray:
    """A column as float64 [n], or [n, K] for the label set."""
    column = columns[name]
    try:
        if isinstance(column, (pa.Array, pa.ChunkedArray)) and pa.types.is_list(column.type):
            if pc.count_distinct(pc.list_value_length(column), mode="all").as_py() > 1:
                raise ValueError("not one length")
            values = pc.list_flatten(column).to_numpy().reshape(len(column), -1)
        else:
            values = np.asarray(column)
            values = np.asarray(list(values)) if values.dtype == object else values  # pandas: a list in each cell
        values = values.astype(np.float64)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(f"scores: {name}: not numbers, or rows of different lengths: {error}") from None
    if values.ndim != (2 if name.startswith(LABEL_SET) else 1):
        shape = "[n, K], one number per label" if name.startswith(LABEL_SET) else "[n]"
        raise InputError(f"scores: {name}: has shape {values.shape}; it must be {shape}")
    if len(bad := np.argwhere(~np.isfinite(values))):
        raise InputError(f"scores: {name}: row {bad[0][0]} is not finite")
    return values


def _shape_of_set(arrays: dict[str, np.ndarray], codes: np.ndarray) -> tuple[int, int]:
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1:
        raise InputError(f"scores: columns of the label set have different shapes: {sorted(shapes)}")
    (shape,) = shapes
    if codes.dtype.kind not in "iu" or (len(codes) and not (codes.min() >= 0 and codes.max() < shape[1])):
        raise InputError(
            f"labels: with a label set of {shape[1]}, they must be whole numbers: indices into the set, from 0"
        )
    return int(shape[0]), int(shape[1])


def _scores(
    arrays: dict[str, np.ndarray], shape: tuple[int, ...], labels: np.ndarray, every: Scores | None = None
) -> Scores:
    def array(kind: str, model: str) -> np.ndarray:
        return arrays.get(f"{kind}_{model}", np.full(shape, float(kind == "tokens")))

    return Scores(
        **{model: array("logp", model) for model in COLUMNS},
        **{f"{kind}_{model}": array(kind, model) for model in COLUMNS for kind in ("tokens", "eos")},
        labels=labels,
        label_set=every,
    )
