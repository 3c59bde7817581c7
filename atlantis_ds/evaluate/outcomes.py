"""The outcomes of arms on the test examples, for ``comparison``: from a run folder, or from files of predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlantis_ds.config.schema import Recipe
from atlantis_ds.data.examples import Examples
from atlantis_ds.data.rows import BadRow, label_text
from atlantis_ds.data.sources import read_rows
from atlantis_ds.errors import InputError
from atlantis_ds.evaluate.answers import captured, exact_match, gold_answers, token_f1
from atlantis_ds.evaluate.compare import FIGURES, Trained
from atlantis_ds.files import read_json, read_table
from atlantis_ds.metrics import label_apart, metrics
from atlantis_ds.run import Run
from atlantis_ds.train.jobs import training_summary

Predictions = dict[str, tuple[str, str]]
"""Gold and predicted text of each test example, by its id."""


def metric_of(recipe: Recipe) -> str:
    """The metric by which arms are compared."""
    if recipe.task != "response":
        return "macro_f1"
    return "exact_match" if recipe.evaluate.answer else "token_f1"


def apart_of(recipe: Recipe, examples: Examples) -> str | None:
    """The label that does not count as a class, see ``metrics.label_apart``; None for responses."""
    return label_apart(examples.labels, recipe.data.negative_label) if examples.labels else None


def trained_arm(run: Run, arm: str, seed: int, name: str, figures: dict[str, Any]) -> Trained:
    """The evaluation in ``eval/NAME``, with the ``figures`` from its ``metrics.json``."""
    column = "predicted" if run.recipe.task != "response" else metric_of(run.recipe)
    outcomes = read_table(run.folder.evaluation(name) / "predictions.parquet", [column])[0][column].to_pylist()
    summary = training_summary(run.folder, name)
    return Trained(
        arm, seed, outcomes, figures, summary["seconds"], summary.get("hardware", ""), summary.get("versions", {})
    )


def evaluated_arms(run: Run, ids: list[str], gold: list[str]) -> list[Trained]:
    """All evaluated arms of a run, with the seeds of ``compare``, or else with the single run of ``run``.

    Args:
        ids, gold: the test examples of the run.

    Raises:
        InputError: no arm is evaluated, or one was evaluated on other test examples.
    """
    recipe = run.recipe
    of_seeds = [(arm, seed, f"{arm}-seed{seed}") for arm in recipe.arms for seed in recipe.seeds]
    for names in (of_seeds, [(arm, recipe.seed, arm) for arm in recipe.arms]):
        done = [(*name, run.folder.evaluation(name[2]) / "metrics.json") for name in names]
        if found := [(arm, seed, name, path) for arm, seed, name, path in done if path.exists()]:
            for *_, path in found:
                table = read_table(path.with_name("predictions.parquet"), ["id", "gold"])[0]
                if table.to_pydict() != {"id": ids, "gold": gold}:
                    raise InputError(
                        f"{path.parent}: evaluated on other test examples than the run has now; run `evaluate` or "
                        "`compare` again"
                    )
            return [trained_arm(run, arm, seed, name, read_json(path)) for arm, seed, name, path in found]
    raise InputError(f"{run.folder.root / 'eval'}: no arm is evaluated yet; run `evaluate` or `compare` first")


def read_arms(
    arms: Mapping[str, str | Path | Sequence[str | Path]],
    metric: str,
    negative_label: str | None,
    answer: str | None = None,
) -> tuple[list[str], list[Trained]]:
    """Read the predictions of arms.

    Args:
        arms: for each arm the files of its runs, or folders ``eval/ARM`` of a run folder; see ``api.compare_runs``.
        metric: one of ``FIGURES``.
        negative_label: the recipe's ``data.negative_label``.
        answer: for responses, the recipe's ``evaluate.answer``.

    Returns:
        gold, n texts, and one entry per arm and run, with its outcomes in the order of gold.

    Raises:
        InputError: a file is missing or broken, lacks a column, or has other test examples than the first one; or
            responses in a folder ``eval/ARM`` were evaluated with another ``answer``.
    """
    files = {arm: [paths] if isinstance(paths, str | Path) else [*paths] for arm, paths in arms.items()}
    found = {(arm, run): Path(path) for arm, paths in files.items() for run, path in enumerate(paths)}
    if empty := [arm for arm, paths in files.items() if not paths]:
        raise InputError(f"arm {empty[0]}: give a file of predictions for each of its runs")
    first: Predictions | None = None
    trained = []
    for (arm, run), path in found.items():
        if path.is_dir() and metric != "macro_f1":
            _refuse_other_answer(path, answer)
        predictions = _read(path / "predictions.parquet" if path.is_dir() else path)
        first = predictions if first is None else first
        _refuse_other_examples(path, predictions, first)
        gold, predicted = [gold for gold, _ in first.values()], [predictions[id][1] for id in first]
        trained.append(_trained(arm, run, [*first], gold, predicted, metric, negative_label, answer))
    if first is None:
        raise InputError("there are no arms to compare")
    return [gold for gold, _ in first.values()], trained


def _read(path: Path) -> Predictions:
    def refuse(where: str, what: str) -> None:
        raise InputError(f"{where}: {what}")

    predictions: Predictions = {}
    for row in read_rows([path], refuse):
        if missing := {"id", "gold", "predicted"} - row.values.keys():
            raise InputError(f"{row.where}: no column {min(missing)!r}; predictions need id, gold, predicted")
        id = str(row.values["id"])
        if id in predictions:
            raise InputError(f"{row.where}: id {id} is a duplicate")
        gold, predicted = (_text(row.where, row.values[name]) for name in ("gold", "predicted"))
        if not gold:
            raise InputError(f"{row.where}: id {id} has no gold answer; leave it out of all files")
        predictions[id] = (gold, predicted)
    if not predictions:
        raise InputError(f"{path}: contains no predictions")
    return predictions


def _text(where: str, value: Any) -> str:
    """An answer as text, as ``prepare`` reads labels: 0 is a label. Empty if there is none, as in CSV an empty cell."""
    if isinstance(value, float) and not value.is_integer():
        return "" if math.isnan(value) else str(value)  # a response may be a number such as 3.5
    try:
        return label_text(value) or ""
    except BadRow as problem:
        raise InputError(f"{where}: {problem}") from None


def _refuse_other_answer(folder: Path, answer: str | None) -> None:
    used = read_json(folder / "metrics.json").get("settings", {}).get("answer")
    if used != answer:
        raise InputError(f"{folder}: evaluated with evaluate.answer: {used!r}, not {answer!r}; give it as `answer`")


def _refuse_other_examples(path: Path, predictions: Predictions, first: Predictions) -> None:
    if other := sorted(predictions.keys() ^ first.keys()):
        raise InputError(f"{path}: has other test examples than the first file, such as id {other[0]}")
    if other := [id for id in first if predictions[id][0] != first[id][0]]:
        raise InputError(f"{path}: id {other[0]} has another gold answer than in the first file")


def _trained(
    arm: str,
    run: int,
    ids: list[str],
    gold: list[str],
    predicted: list[str],
    metric: str,
    negative_label: str | None,
    answer: str | None,
) -> Trained:
    figures: dict[str, Any]
    if metric == "macro_f1":
        figures = metrics(sorted(set(gold)), ids, gold, predicted, negative_label)
        return Trained(arm, run, predicted, figures, None)
    pairs = list(zip(gold_answers(ids, gold, answer), (captured(text, answer) for text in predicted)))
    of_each = {
        name: [measure(*pair) for pair in pairs]
        for name, measure in (("exact_match", exact_match), ("token_f1", token_f1))
    }
    figures = dict.fromkeys(FIGURES[metric]) | {name: float(np.mean(values)) for name, values in of_each.items()}
    return Trained(arm, run, of_each[metric], figures, None)
