"""The weight formulas and their stabilisers, mostly as properties of random scores."""

import math
from dataclasses import replace

import numpy as np
import pytest
from arviz_stats.base import array_stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from atlantis_ds.config import schema as recipe
from atlantis_ds.errors import InputError
from atlantis_ds.weights import formulas

tried = settings(deadline=None, max_examples=60)

MODELS = ("large", "small", "reference")
ARRAYS = [f"{kind}{model}" for kind in ("", "tokens_", "eos_") for model in MODELS]
LABELS = np.array(["Kill", "Live_In", "Work_For"])


def make_scores(seed: int, n: int, spread: float = 20.0) -> formulas.Scores:
    """Scores between -spread and 0 for labels of 1 to 5 tokens; each model has its own tokenizer."""
    rng = np.random.default_rng(seed)
    k = len(LABELS)
    every = {model: -spread * rng.random((n, k)) for model in MODELS}
    every |= {f"tokens_{model}": np.tile(rng.integers(1, 6, k), (n, 1)) for model in MODELS}
    every |= {f"eos_{model}": -rng.random((n, k)) for model in MODELS}
    own = rng.integers(k, size=n)
    draws = {name: values[np.arange(n), own] for name, values in every.items()}
    return formulas.Scores(**draws, labels=LABELS[own], label_set=formulas.Scores(**every, labels=LABELS))


def final(scores: formulas.Scores, options: recipe.Weights, seed: int = 0) -> np.ndarray:
    return formulas.stabilise(formulas.log_weights(scores, options, seed), scores.labels, options)


def take(scores: formulas.Scores, rows: np.ndarray) -> formulas.Scores:
    def taken(part: formulas.Scores, **others) -> formulas.Scores:
        return formulas.Scores(**{n: v[rows] for n, v in vars(part).items() if n in ARRAYS}, **others)

    return taken(scores, labels=scores.labels[rows], label_set=taken(scores.label_set, labels=LABELS))


def shifted(scores: formulas.Scores, model: str, shift: float | np.ndarray) -> formulas.Scores:
    every = replace(scores.label_set, **{model: getattr(scores.label_set, model) + np.reshape(shift, (-1, 1))})
    return replace(scores, label_set=every, **{model: getattr(scores, model) + shift})


seeds = st.integers(0, 2**31)
sizes = st.integers(1, 300)
options_any = st.builds(
    recipe.Weights,
    formula=st.sampled_from(["product", "ratio", "influence", "reference", "shuffled"]),
    shuffled_from=st.sampled_from(["product", "ratio", "influence", "reference"]),
    length=st.sampled_from(["sum", "mean"]),
    eos=st.booleans(),
    calibrate=st.sampled_from(["none", "label_mean", "label_set"]),
    scope=st.sampled_from(["global", "per_label"]),
    power=st.floats(0.1, 3),
    smooth=st.sampled_from(["none", "psis"]),
    truncate=st.sampled_from(["none", "sqrt_n"]),
    clip=st.sampled_from([None, [0.0, 5.0], [0.1, 10.0], [0.5, 1.5]]),
    temper=st.sampled_from([None, 0.3, 0.9]),
)


@tried
@given(seeds, sizes, options_any, st.sampled_from([1.0, 30.0, 1e4]))
def test_mean_is_one_bounds_hold_and_nothing_overflows(seed, n, options, spread):
    scores = make_scores(seed, n, spread)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        weights = final(scores, options)
    assert weights.dtype == np.float64 and weights.shape == (n,)
    assert np.isfinite(weights).all() and (weights >= 0).all()
    groups = [scores.labels == label for label in set(scores.labels)] if options.scope == "per_label" else [slice(None)]
    for rows in groups:
        assert weights[rows].mean() == pytest.approx(1, rel=1e-12)
    if options.clip:
        assert weights.min() >= options.clip[0] - 1e-9 and weights.max() <= options.clip[1] + 1e-9
    if options.temper:
        untempered = final(scores, options.model_copy(update={"temper": None}))
        reached = formulas.effective_sample_size(weights) / n >= options.temper
        assert reached or np.array_equal(weights, untempered)


@tried
@given(seeds, sizes, st.sampled_from(MODELS), st.floats(-1000, 1000), options_any)
def test_adding_a_constant_to_a_models_scores_changes_nothing(seed, n, model, shift, options):
    options = options.model_copy(update={"length": "sum", "smooth": "none"})
    scores = make_scores(seed, n)
    np.testing.assert_allclose(final(shifted(scores, model, shift), options), final(scores, options), rtol=1e-7)


@tried
@given(seeds, st.integers(25, 300), st.floats(-1000, 1000))
def test_adding_a_constant_leaves_psis_alone(seed, n, shift):
    options = recipe.Weights(smooth="psis")
    scores = make_scores(seed, n, 5.0)
    np.testing.assert_allclose(final(shifted(scores, "large", shift), options), final(scores, options), rtol=1e-6)


@tried
@given(seeds, sizes, st.sampled_from(["sum", "mean"]), st.booleans())
def test_calibration_removes_what_is_common_to_a_label(seed, n, length, eos):
    options = recipe.Weights(length=length, eos=eos, calibrate="label_mean", formula="ratio")
    scores = make_scores(seed, n)
    label_shift = np.select([scores.labels == "Kill", scores.labels == "Live_In"], [7.0, -3.0], 0.5)
    tokens = (scores.tokens_large + eos) if length == "mean" else 1
    moved = shifted(scores, "large", label_shift * tokens)
    np.testing.assert_allclose(
        formulas.log_weights(moved, options, 0), formulas.log_weights(scores, options, 0), atol=1e-9
    )


@tried
@given(seeds, st.integers(2, 300), st.floats(0.1, 3), st.sampled_from([None, 0.3, 0.9]))
def test_power_and_tempering_keep_the_order(seed, n, power, temper):
    scores = make_scores(seed, n)
    plain = final(scores, recipe.Weights())
    weights = final(scores, recipe.Weights(power=power, temper=temper))
    assert (np.diff(weights[np.argsort(plain)]) >= 0).all()


@tried
@given(seeds, sizes, options_any)
def test_permuting_the_examples_permutes_the_weights(seed, n, options):
    if options.formula == "shuffled":
        options = options.model_copy(update={"formula": "product"})
    scores = make_scores(seed, n)
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_allclose(final(take(scores, order), options), final(scores, options)[order], rtol=1e-6)


@tried
@given(seeds, sizes, options_any)
def test_uniform_is_exactly_one(seed, n, options):
    options = options.model_copy(update={"formula": "uniform"})
    assert (final(make_scores(seed, n), options) == 1.0).all()


@tried
@given(seeds, st.integers(2, 300), st.floats(0.05, 1))
def test_tempering_takes_the_largest_exponent_that_reaches_the_target(seed, n, target):
    scores = make_scores(seed, n)
    log_weight = formulas.log_weights(scores, recipe.Weights(), 0)
    weights = final(scores, recipe.Weights(temper=target))
    fraction = formulas.effective_sample_size(weights) / n
    assert fraction >= target
    plain = final(scores, recipe.Weights())
    if not np.array_equal(weights, plain):
        assert fraction == pytest.approx(target, abs=1e-9)
        # The tempered log weights are a straight line of the plain ones: one exponent, below 1, for all.
        slope, offset = np.polyfit(log_weight, np.log(weights), 1)
        np.testing.assert_allclose(np.log(weights), slope * log_weight + offset, atol=1e-6)
        assert -1e-9 <= slope < 1


@tried
@given(seeds, st.integers(2, 300), st.sampled_from(["global", "per_label"]))
def test_truncation_is_ionides_cap(seed, n, scope):
    options = recipe.Weights(truncate="sqrt_n", scope=scope)
    scores = make_scores(seed, n)
    log_weight = formulas.log_weights(scores, options, 0)
    groups = [scores.labels == label for label in set(scores.labels)] if scope == "per_label" else [np.full(n, True)]
    for rows in groups:
        group = log_weight[rows]
        cap = logsumexp(group) - np.log(len(group)) + 0.5 * np.log(len(group))
        expected = np.exp(np.minimum(group, cap) - cap)
        actual = formulas.stabilise(log_weight, scores.labels, options)[rows]
        np.testing.assert_allclose(actual, expected / expected.mean(), rtol=1e-9)


@tried
@given(seeds, st.integers(25, 2000), st.floats(0.2, 3))
def test_psis_agrees_with_arviz(seed, n, scale):
    log_weight = np.random.default_rng(seed).normal(0, scale, n)
    expected, k = array_stats.psislw(-log_weight)
    weights = formulas.stabilise(log_weight, np.full(n, "a"), recipe.Weights(smooth="psis"))
    np.testing.assert_allclose(weights, n * np.exp(expected), rtol=1e-8)
    assert formulas.pareto_k(log_weight) == pytest.approx(float(k), abs=1e-9)


def test_pareto_k_finds_the_shape_of_a_pareto_tail():
    uniform = np.random.default_rng(0).random(20_000)
    for shape in (0.3, 0.6, 1.2):  # u^-k has tail shape k
        assert formulas.pareto_k(-shape * np.log(uniform)) == pytest.approx(shape, abs=0.1)


def test_pareto_k_where_there_is_no_tail_to_fit():
    assert formulas.pareto_k(np.full(100, -7.3)) == -math.inf
    assert formulas.pareto_k(np.minimum(np.linspace(-10, 10, 1000), 0)) == -math.inf
    assert math.isnan(formulas.pareto_k(np.arange(24.0)))
    assert formulas.pareto_k(np.array([1.0])) == -math.inf
    assert formulas.pareto_k(-1e4 * np.random.default_rng(0).random(100)) == math.inf
    assert math.isnan(formulas.pareto_k(np.r_[np.zeros(990), np.arange(1, 11)]))


def test_pareto_k_threshold():
    assert formulas.pareto_k_threshold(100) == pytest.approx(0.5)
    assert formulas.pareto_k_threshold(8000) == 0.7
    assert formulas.pareto_k_threshold(1) == 0


def test_effective_sample_size():
    assert formulas.effective_sample_size(np.ones(7)) == 7
    assert formulas.effective_sample_size(np.array([3.0, 0, 0])) == 1
    assert formulas.effective_sample_size(np.array([1e200, 3e200])) == pytest.approx(1.6)


def test_each_formula_by_hand():
    one = np.array([1.0, 1.0])
    scores = formulas.Scores(
        large=np.array([-6.0, -2.0]),
        small=np.array([-9.0, -4.0]),
        reference=np.array([-3.0, -1.0]),
        tokens_large=np.array([3, 1]),
        tokens_small=np.array([2, 1]),
        tokens_reference=np.array([3, 1]),
        eos_large=-0.5 * one,
        eos_small=-1.0 * one,
        eos_reference=-2.0 * one,
        labels=np.array(["Kill", "Live_In"]),
    )

    def log_weight(**options):
        return formulas.log_weights(scores, recipe.Weights(**options), 0).tolist()

    assert log_weight() == [0, 1]
    assert log_weight(formula="ratio") == [3, 2]
    assert log_weight(formula="influence") == [6, 3]
    assert log_weight(formula="reference") == [-3, -1]
    assert log_weight(formula="uniform") == [0, 0]
    assert log_weight(eos=True) == [-1.5, -0.5]
    assert log_weight(length="mean") == [-2 + 4.5 - 1, 1]
    assert log_weight(length="mean", eos=True, formula="ratio") == pytest.approx([-6.5 / 4 + 10 / 3, -2.5 / 2 + 5 / 2])
    assert log_weight(calibrate="label_mean") == [0, 0]
    with pytest.raises(InputError, match=r"score\.label_set"):
        log_weight(calibrate="label_set")


@tried
@given(seeds, sizes, st.sampled_from(["sum", "mean"]), st.booleans())
def test_label_set_calibration_gives_probabilities_over_the_labels(seed, n, length, eos):
    scores = make_scores(seed, n, 1e4)
    options = recipe.Weights(formula="reference", calibrate="label_set", length=length, eos=eos)
    total = np.zeros(n)
    for column, label in enumerate(LABELS):  # as if each label in turn were the example's own
        own = {name: value[:, column] for name, value in vars(scores.label_set).items() if name in ARRAYS}
        relabelled = formulas.Scores(**own, labels=np.full(n, label), label_set=scores.label_set)
        total += np.exp(formulas.log_weights(relabelled, options, 0))
    np.testing.assert_allclose(total, 1, rtol=1e-9)
    if length == "sum" and not eos:
        plain = np.exp(scores.reference - logsumexp(scores.label_set.reference, axis=1))
        np.testing.assert_allclose(np.exp(formulas.log_weights(scores, options, 0)), plain, rtol=1e-9)


@tried
@given(seeds, st.integers(30, 100))
def test_shuffled_is_a_seeded_permutation(seed, n):
    scores = make_scores(seed, n)
    ratio = formulas.log_weights(scores, recipe.Weights(formula="ratio"), seed)
    options = recipe.Weights(formula="shuffled", shuffled_from="ratio")
    shuffled = formulas.log_weights(scores, options, seed)
    assert np.array_equal(np.sort(shuffled), np.sort(ratio)) and not np.array_equal(shuffled, ratio)
    assert np.array_equal(shuffled, formulas.log_weights(scores, options, seed))
    assert not np.array_equal(shuffled, formulas.log_weights(scores, options, seed + 1))


def test_clip_holds_where_one_round_of_clip_and_normalise_would_not():
    log_weight = np.r_[np.full(10, 12.0), np.zeros(990)]
    weights = formulas.stabilise(log_weight, np.full(1000, "a"), recipe.Weights(clip=[0.0, 5.0]))
    assert weights[:10] == pytest.approx(5)
    assert weights[10:] == pytest.approx((1000 - 50) / 990)


@pytest.mark.parametrize("clip", [[2.0, 3.0], [0.1, 0.9]])
def test_clip_bounds_without_the_mean_are_refused(clip):
    with pytest.raises(ValueError, match="lo <= 1 <= hi"):
        recipe.Weights(clip=clip)


@pytest.mark.parametrize("log_weight", [[], [0.0, math.nan], [0.0, -math.inf]])
def test_what_cannot_be_weighted_is_refused(log_weight):
    with pytest.raises(InputError, match="weights"):
        formulas.stabilise(np.array(log_weight), np.full(len(log_weight), "a"), recipe.Weights())
