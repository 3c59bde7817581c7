"""From three log-likelihoods per example to one weight per example: pure numpy, float64, in log space.

``log_weights`` applies a formula. ``stabilise`` turns its result into final weights, in this order:

1. centre: subtract the log of the mean weight
2. power: log w becomes power · log w
3. smooth: ``psis`` replaces the largest weights by quantiles of a fitted generalized Pareto distribution
4. truncate: ``sqrt_n`` limits every weight to sqrt(n) times the mean weight at this step
5. clip: the weights become clip(c·w, lo, hi), with the scale c that makes their mean 1
6. temper: w becomes w^τ, with the largest τ in (0, 1] that reaches the requested effective sample size
7. normalise to mean 1

With ``scope: per_label``, steps 1, 3, 4, 5 and 7 are done within each label, and n is the number of its examples; τ is
one number for all labels. With ``clip``, every final weight is in [lo, hi] (up to rounding), because step 5 already
gives mean 1 and tempering only moves weights towards their mean. With ``truncate`` alone, the largest final weight may
exceed sqrt(n), since normalising divides by a mean that the limit has lowered.

Sources: ATLANTIS (Liu et al., ACL 2025, Algorithm 1, Eq. 7 and 8); Ionides 2008, Truncated importance sampling;
Vehtari et al. 2024, Pareto smoothed importance sampling (JMLR 25); Kish 1965, Survey sampling. The normalisation,
the calibration, the clipping and the tempering are not in the ATLANTIS paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from atlantis_ds.config import schema as recipe
from atlantis_ds.errors import InputError
from atlantis_ds.weights.posterior import fit_noise, log_posterior, sample_rows

MIN_PSIS = 25
"""Fewest weights to which PSIS can be fitted: the tail, a fifth of them, needs five points."""


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods (natural log) of n labels under the three models."""

    large: np.ndarray
    """float64 [n]: log p_L, summed over the label's own tokens; the same for ``small`` and ``reference``."""
    small: np.ndarray
    reference: np.ndarray
    tokens_large: np.ndarray
    """int [n]: tokens of the label, at least 1, without the end-of-sequence token; likewise below."""
    tokens_small: np.ndarray
    tokens_reference: np.ndarray
    eos_large: np.ndarray
    """float64 [n]: log-probability of the end-of-sequence token after the label; likewise below."""
    eos_small: np.ndarray
    eos_reference: np.ndarray
    labels: np.ndarray
    """int or str [n]: the label that was scored."""
    label_set: Scores | None = None
    """The same for every label of the label set, if it was scored: arrays [n, K], ``labels`` [K]."""


def log_weights(scores: Scores, options: recipe.Weights, seed: int) -> np.ndarray:
    """Log weight of each example before stabilising: float64 [n].

    With a, s, r the log-likelihoods under the large, the small and the reference model: ``product`` a - s + r
    (ATLANTIS, Algorithm 1), ``ratio`` a - s (Eq. 7), ``influence`` r - s (Eq. 8), ``reference`` r, ``uniform`` 0,
    ``shuffled`` a permutation, drawn with ``seed``, of the result of ``options.shuffled_from``. Before the formula is
    applied, each of a, s and r includes the end-of-sequence token (``eos``), is divided by its number of tokens
    (``length: mean``; the end-of-sequence token counts as one), and is reduced by its mean over the examples of the
    same label (``calibrate: label_mean``), or by the log of the sum of the probabilities of all labels (``label_set``).
    ``posterior`` is described in ``posterior.py``; its ``labels`` are indices into the label set.

    Raises:
        InputError: ``calibrate: label_set`` or ``posterior`` without the scores of the label set.
    """
    if options.base_formula == "posterior":
        large, small, reference = label_set_evidence(scores, options)
        some = sample_rows(len(reference), reference.shape[1], seed)
        noise = fit_noise(reference[some], (large - small)[some], scores.labels[some], seed)
        return shuffled(log_posterior(reference, large - small, scores.labels, noise), options, seed)
    return combine(evidence(scores, options), scores.labels, options, seed)


def label_set_evidence(scores: Scores, options: recipe.Weights) -> np.ndarray:
    """``evidence`` for every label of the label set: float64 [3, n, K].

    Raises:
        InputError: the label set was not scored.
    """
    if scores.label_set is None:
        raise InputError("weights.formula: posterior: the scores lack the label set; score with score.label_set: true")
    return evidence(scores.label_set, options)


def evidence(scores: Scores, options: recipe.Weights) -> np.ndarray:
    """a, s and r of each example according to the options, before any step that uses other examples.

    Returns:
        float64 [3, n], in the order large, small, reference; it can be computed for chunks of the examples.
    """
    return np.stack([_score(scores, model, options) for model in ("large", "small", "reference")])


def combine(models: np.ndarray, labels: np.ndarray, options: recipe.Weights, seed: int) -> np.ndarray:
    """Log weights, float64 [n], from the ``evidence`` [3, n] of all examples, which may be changed; see log_weights."""
    formula = options.base_formula
    if formula == "uniform":
        return np.zeros(len(labels))
    if options.calibrate == "label_mean":
        for rows in _groups(labels, "per_label"):
            models[:, rows] -= models[:, rows].mean(axis=1, keepdims=True)
    large, small, reference = models
    if formula == "reference":
        log_weight = reference
    elif formula == "influence":
        log_weight = reference - small
    else:
        log_weight = large - small + (reference if formula == "product" else 0)
    return shuffled(log_weight, options, seed)


def shuffled(log_weight: np.ndarray, options: recipe.Weights, seed: int) -> np.ndarray:
    """The log weights, in an order drawn with ``seed`` if the formula is ``shuffled``."""
    return np.random.default_rng(seed).permutation(log_weight) if options.formula == "shuffled" else log_weight


def stabilise(log_weight: np.ndarray, labels: np.ndarray, options: recipe.Weights) -> np.ndarray:
    """Final weights, float64 [n], with mean 1 (within each label for ``scope: per_label``); see the docstring of the
    module.

    Args:
        log_weight: float64 [n], from ``log_weights``.
        labels: int or str [n].
        options: the recipe's ``weights``.

    Raises:
        InputError: there are no examples, or a log weight is not finite.
    """
    log_weight = np.asarray(log_weight, dtype=np.float64)
    if not len(log_weight):
        raise InputError("weights: there are no examples to weight")
    if len(bad := np.flatnonzero(~np.isfinite(log_weight))):
        raise InputError(f"weights: the log weight of row {bad[0]} is {log_weight[bad[0]]}; score that example again")

    groups = _groups(labels, options.scope)
    stable = np.empty_like(log_weight)
    for rows in groups:
        group = log_weight[rows] - _log_mean(log_weight[rows])
        group = options.power * group
        if options.smooth == "psis":
            group = psis(group)[0]
        if options.truncate == "sqrt_n":
            group = np.minimum(group, _log_mean(group) + 0.5 * math.log(len(group)))
        if options.clip is not None:
            group = _clip(group, *options.clip)
        stable[rows] = group
    exponent = 1.0 if options.temper is None else _tempering_exponent(stable, groups, options.temper)
    return _normalise(exponent * stable, groups)


def in_order(weights: np.ndarray) -> np.ndarray:
    """Numbers in the order of the weights, float64 [n], equal where weights differ only by rounding.

    With ``scope: per_label``, weights at a bound of ``clip`` differ by rounding from one label to the next.
    """
    with np.errstate(divide="ignore"):
        return np.round(np.maximum(np.log(weights), -1e4), 9)


def effective_sample_size(weights: np.ndarray) -> float:
    """(Σw)² / Σw², between 1 and n (Kish 1965), for weights of any scale, not all zero."""
    weights = np.asarray(weights, dtype=np.float64)
    weights = weights / weights.max()
    return float(weights.sum() ** 2 / np.square(weights).sum())


def pareto_k(log_weight: np.ndarray) -> float:
    """Tail shape k̂ of the weights by PSIS (Vehtari et al. 2024), from log weights of any scale.

    -inf: the largest weights are all equal, so there is no tail. nan: undefined, for fewer than 25 weights or because
    too many weights are equal at the start of the tail. inf: the weights vary so much that a quarter of the tail is
    zero compared with the largest weight.
    """
    return psis(np.asarray(log_weight, dtype=np.float64))[1]


def pareto_k_threshold(n: int) -> float:
    """k̂ below this is good for n weights: min(1 - 1/log10 n, 0.7) (Vehtari et al. 2024); 0 up to n = 10."""
    return min(1 - 1 / math.log10(max(n, 10)), 0.7)


def psis(log_weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed log weights, float64 [n], whose weights sum to 1, and k̂.

    If no tail can be fitted (see ``pareto_k``), the log weights are returned unchanged. Equal weights in the tail get
    neighbouring quantiles, in unspecified order.
    """
    n = len(log_weight)
    if n and np.ptp(log_weight) < 1e-9:
        return log_weight, -math.inf
    if n < MIN_PSIS:
        return log_weight, math.nan
    from arviz_stats.base import array_stats

    try:
        with np.errstate(all="ignore"):
            # It expects log-likelihoods, as for leave-one-out, and negates them to get log weights.
            smoothed, fitted = array_stats.psislw(-log_weight)
    except ValueError:  # "All tail values are the same"
        return log_weight, -math.inf
    k = float(fitted)
    if not math.isfinite(k) or not np.isfinite(smoothed).all():
        # arviz's fit starts from the lower quartile of the tail, which must differ from zero in plain float64.
        tail = np.sort(log_weight)[-_tail_size(n) :]
        underflow = tail[len(tail) // 4] - tail[-1] < -700
        return log_weight, math.inf if underflow else math.nan
    return np.asarray(smoothed, dtype=np.float64), k


def _tail_size(n: int) -> int:
    return int(3 * math.sqrt(n)) if n > 225 else n // 5


def _score(scores: Scores, model: str, options: recipe.Weights) -> np.ndarray:
    score = np.asarray(getattr(scores, model), dtype=np.float64)
    tokens = np.asarray(getattr(scores, f"tokens_{model}"))
    if options.eos:
        score = score + getattr(scores, f"eos_{model}")
        tokens = tokens + 1
    if options.length == "mean":
        score = score / tokens
    if options.calibrate == "label_set":
        if scores.label_set is None:
            raise InputError(
                "weights.calibrate: label_set: the scores lack the label set; score with score.label_set: true"
            )
        every = _score(scores.label_set, model, options.model_copy(update={"calibrate": "none"}))
        score = score - np.logaddexp.reduce(every, axis=1)
    return score


def _groups(labels: np.ndarray, scope: str) -> list[np.ndarray]:
    """Row numbers of each group that is normalised separately."""
    if scope == "global":
        return [np.arange(len(labels))]
    _, code = np.unique(labels, return_inverse=True)
    return np.split(np.argsort(code, kind="stable"), np.cumsum(np.bincount(code))[:-1])


def _log_mean(log_weight: np.ndarray) -> float:
    """log of the mean of exp(log_weight)."""
    largest = log_weight.max()
    return float(largest + np.log(np.exp(log_weight - largest).mean()))


def _clip(log_weight: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """log clip(c·w, lo, hi) with the scale c that makes the mean 1, so that the bounds still hold after normalising.

    The mean grows with c: it is at most 1 where the largest c·w is 1, at least 1 where the smallest is.
    """
    log_lo, log_hi = (math.log(bound) if bound > 0 else -math.inf for bound in (lo, hi))

    def clipped(log_scale: float) -> np.ndarray:
        return np.clip(log_weight + log_scale, log_lo, log_hi)

    low, high = -float(log_weight.max()), -float(log_weight.min())
    for _ in range(100):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if np.exp(clipped(middle)).mean() < 1:
            low = middle
        else:
            high = middle
    return clipped(high)


def _tempering_exponent(log_weight: np.ndarray, groups: list[np.ndarray], target: float) -> float:
    """Largest τ in [0, 1] with ESS(normalised w^τ)/n >= target, to 1e-15 from below.

    ESS falls as τ grows (log Σw^τ is convex in τ), so bisection finds it. τ nears 0 only for a target near 1.
    """

    def reached(exponent: float) -> bool:
        return effective_sample_size(_normalise(exponent * log_weight, groups)) / len(log_weight) >= target

    if reached(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if reached(middle) else (low, middle)
    return low


def _normalise(log_weight: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """exp, with mean 1 in each group."""
    weights = np.empty_like(log_weight)
    for rows in groups:
        group = np.exp(log_weight[rows] - log_weight[rows].max())
        weights[rows] = group / group.mean()
    return weights
