"""Properties of the noise posterior, on simulated labels whose noise is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import WriteRecipe, in_process
from pydantic import ValidationError

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Recipe, Weights
from atlantis_ds.data.examples import Split, load_examples
from atlantis_ds.errors import InputError
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights import arms, posterior
from atlantis_ds.weights.formulas import log_weights
from atlantis_ds.weights.posterior import Noise, fit_noise, fit_noise_with_pairs, log_posterior
from atlantis_ds.weights.shards import load_scores

UNIFORM = np.full((5, 5), 0.05) + 0.75 * np.eye(5)
PAIRS = 0.8 * np.eye(5) + 0.2 * np.eye(5)[[1, 2, 3, 4, 0]]
"""Each label is written as the next one a fifth of the time."""


def simulated(
    n: int, matrix: np.ndarray, temperature: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Scores of a reference that knows its own doubt (at this temperature), given labels and true ones."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 5, (n, len(matrix)))
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    true = (chances.cumsum(axis=1) > draw.random((n, 1))).argmax(axis=1)
    given = (matrix[true].cumsum(axis=1) > draw.random((n, 1))).argmax(axis=1)
    return temperature * logits, given, true


def fit(scores: np.ndarray, given: np.ndarray, ratio: np.ndarray | None = None) -> Noise:
    return fit_noise(scores, np.zeros_like(scores) if ratio is None else ratio, given, seed=1)


@pytest.mark.parametrize("matrix", [UNIFORM, PAIRS], ids=["uniform", "by class"])
@pytest.mark.parametrize(("n", "most"), [(900, 0.05), (50_000, 0.01)])
def test_a_known_matrix_is_found_again(matrix: np.ndarray, n: int, most: float) -> None:
    scores, given, true = simulated(n, matrix)
    noise = fit(scores, given)
    drawn = np.array([np.bincount(given[true == label], minlength=5) / np.sum(true == label) for label in range(5)])
    assert np.abs(noise.matrix - drawn).max() < most
    assert noise.found and noise.interval[0] < np.mean(given != true) < noise.interval[1]


@pytest.mark.parametrize("temperature", [0.6, 2.0, 4.0])
def test_the_temperature_is_found(temperature: float) -> None:
    scores, given, _ = simulated(5000, UNIFORM, temperature)
    assert 0.8 < fit(scores, given).temperature / temperature < 1.25


def test_a_reference_that_knows_nothing_tells_no_noise() -> None:
    """It contradicts most labels, which would pass for noise of 80%."""
    scores, given, _ = simulated(900, UNIFORM)
    noise = fit(np.random.default_rng(1).permutation(scores), given)
    assert not noise.informed and not noise.found
    assert not log_posterior(scores, np.zeros_like(scores), given, noise).any()
    assert fit(scores, given).informed


def test_without_noise_every_weight_is_1() -> None:
    scores, given, _ = simulated(900, np.eye(5))
    noise = fit(scores, given)
    assert not noise.found and noise.rate < 0.02
    assert (log_posterior(scores, np.zeros_like(scores), given, noise) == 0).all()


def test_wrong_labels_weigh_less_and_hard_ones_keep_their_weight() -> None:
    scores, given, true = simulated(5000, PAIRS)
    weights = np.exp(log_posterior(scores, np.zeros_like(scores), given, fit(scores, given)))
    wrong = given != true
    assert weights[wrong].mean() < 0.2 < 0.9 < weights[~wrong].mean()


def test_known_pairs_find_noise_that_the_reference_has_learned() -> None:
    """Errors that are made in the same way again and again are invisible to a reference that was trained on them."""
    scores, _, true = simulated(900, np.eye(5))
    given = np.where((true == 1) & (np.arange(900) % 3 > 0), 0, true)  # two thirds of label 1 are written as label 0
    scores[given != true, 0] = scores[given != true, 1] + 4
    none = np.zeros_like(scores)
    assert not fit(scores, given).found
    pairs = np.diag([20, 7, 20, 20, 20])
    pairs[1, 0] = 13
    seen = fit_noise_with_pairs(scores, none, given, 1, pairs)
    assert seen.found and seen.pairs == 100 and seen.meaning is not None
    assert seen.interval[0] < np.mean(given != true) < seen.interval[1]
    weights = log_posterior(scores, none, given, seen)
    wrong = given != true
    assert weights[wrong].mean() < weights[~wrong & (given != 0)].mean() - 0.2


@pytest.mark.parametrize("matrix", [UNIFORM, PAIRS], ids=["uniform", "by class"])
def test_pairs_do_no_harm_where_the_scores_show_the_noise(matrix: np.ndarray) -> None:
    for seed in range(5):
        scores, given, true = simulated(900, matrix, seed=seed)
        pairs = np.zeros((5, 5), dtype=np.int64)
        np.add.at(pairs, (true[:50], given[:50]), 1)
        none = np.zeros_like(scores)
        blind, seen = fit(scores, given), fit_noise_with_pairs(scores, none, given, 1, pairs)
        assert seen.meaning is None and seen.pairs == 50
        blind_weights, weights = (np.exp(log_posterior(scores, none, given, noise)) for noise in (blind, seen))
        wrong = given != true
        on_wrong = [each[wrong].sum() / each.sum() for each in (blind_weights, weights)]
        assert on_wrong[1] < on_wrong[0] + 0.003


def test_clean_pairs_of_clean_labels_leave_weights_of_1() -> None:
    scores, given, _ = simulated(900, np.eye(5))
    noise = fit_noise_with_pairs(scores, np.zeros_like(scores), given, 1, 20 * np.eye(5, dtype=np.int64))
    assert not noise.found and not log_posterior(scores, np.zeros_like(scores), given, noise).any()


def test_orders_and_constants_do_not_count() -> None:
    scores, given, _ = simulated(900, PAIRS)
    none = np.zeros_like(scores)
    noise = fit(scores, given)
    found = log_posterior(scores, none, given, noise)
    draw = np.random.default_rng(3)
    # Another order of the labels: label k is now number places[k].
    places = draw.permutation(5)
    moved = np.empty_like(scores)
    moved[:, places] = scores
    other = fit(moved, places[given])
    np.testing.assert_allclose(other.matrix[np.ix_(places, places)], noise.matrix, atol=1e-6)
    np.testing.assert_allclose(log_posterior(moved, none, places[given], other), found, atol=1e-5)
    # Another order of the examples, and a constant for each of them.
    rows = draw.permutation(900)
    shifted = scores[rows] + draw.normal(0, 50, (900, 1))
    other = fit(shifted, given[rows])
    np.testing.assert_allclose(log_posterior(shifted, none, given[rows], other), found[rows], atol=1e-5)


def test_the_base_ratio_counts_where_it_knows_something() -> None:
    scores, given, _ = simulated(3000, UNIFORM)
    draw = np.random.default_rng(4)
    half = draw.random(scores.shape) < 0.5
    assert fit(scores, given, draw.normal(0, 5, scores.shape)).share == 0
    assert fit(np.where(half, scores, 0), given, np.where(half, 0, scores)).share == 1


def test_a_thousand_labels() -> None:
    draw = np.random.default_rng(5)
    true = draw.integers(1000, size=1500)
    scores = draw.normal(0, 1, (1500, 1000))
    scores[np.arange(1500), true] += 12
    given = np.where(draw.random(1500) < 0.2, draw.integers(1000, size=1500), true)
    noise = fit(scores[:1000], given[:1000])
    assert noise.found and 0.1 < noise.rate < 0.3
    weights = np.exp(log_posterior(scores, np.zeros_like(scores), given, noise))
    assert weights[given != true].mean() < 0.5 * weights[given == true].mean()


@pytest.mark.ranks
def test_from_shards_as_from_all_scores_at_once(
    tiny_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the noise is fitted on a sample, which takes some rows of each shard."""
    path = tiny_recipe(tmp_path, {"weights": {"formula": "posterior"}, "data.train_size": 300, "score.shard_size": 64})
    in_process(path, "prepare", "score")
    recipe, folder = load_recipe(path), RunFolder(tmp_path / "run")
    run, examples = Run(recipe, folder, Ranks.alone()), load_examples(folder)
    scores = load_scores(run, examples)
    found = arms.read_log_weights(run, examples, recipe.weights)
    np.testing.assert_array_equal(found.values, log_weights(scores, recipe.weights, recipe.seed))
    monkeypatch.setattr(posterior, "CELLS", 100 * 19)
    rows = posterior.sample_rows(300, len(examples.labels or ()), recipe.seed)
    every = scores.label_set
    assert len(rows) == 100 and every is not None
    sampled = fit_noise(every.reference[rows], (every.large - every.small)[rows], scores.labels[rows], recipe.seed)
    again = arms.read_log_weights(run, examples, recipe.weights).noise
    assert again is not None and again.as_json([]) == sampled.as_json([])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score.label_set": False}, "`weights.formula: posterior` needs `score.label_set: true`"),
        ({"weights.calibrate": "label_mean"}, "the posterior already compares labels"),
    ],
)
def test_what_the_posterior_needs(changes: dict[str, Any], said: str, tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        load_recipe(tiny_recipe(tmp_path, {"weights": {"formula": "posterior"}, **changes}))


def test_pairs_come_from_dev_labels_that_are_not_gold_themselves() -> None:
    def dev(targets: str, golds: list[str | None]) -> Split:
        table = pa.table({"target": list(targets), "gold": pa.array(golds, pa.string())})
        return Split(table, ["a", "b"], "", "")

    assert not arms.known_pairs(dev("abab", ["a", "b", "a", None]), 2).any()
    assert arms.known_pairs(dev("abab", ["a", "a", None, "b"]), 2).tolist() == [[1, 1], [0, 1]]


def test_responses_have_no_posterior() -> None:
    model = {"model_name_or_path": "x"}
    tree = {"name": "r", "data": {"task": "response", "train": "x.jsonl"}, "weights": {"formula": "posterior"}}
    with pytest.raises(ValidationError, match="needs a label set; responses have none"):
        Recipe.model_validate({**tree, "models": {"large": model, "small": model, "reference": {"kind": "finetuned"}}})
    assert Weights(formula="shuffled", shuffled_from="posterior").base_formula == "posterior"
