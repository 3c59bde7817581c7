"""The probability that each given label is true, from the scores of a closed label set and a fitted noise matrix.

The reference gives P_i(y) ∝ exp(z_i(y) / T) over the K labels, with z = r + λ (a - s): λ is the share of the base
ratio. The given label ỹ_i depends on M[y, ỹ], the probability that a true y is written as ỹ. M is fitted by EM,
with a Dirichlet prior worth ``PRIOR`` examples per row, for noise that is the same for all labels, at the estimated
rate; T and λ by the marginal likelihood Σ_i log Σ_y P_i(y) M[y, ỹ_i]. No gold label is used. The posterior is q_i(y) ∝
P_i(y) M[y, ỹ_i], and the weight of an example is q_i(ỹ_i).

If both labels are known for ``ENOUGH_PAIRS`` other examples, these also count in M. They also show whether the
reference has learned errors, which its scores then hide. In that case its prediction is a given label, M is counted
from the pairs, and P_i(y) = Σ_ỹ P_i(ỹ) C[ỹ, y], where C, also from the pairs, gives the true labels for given ones.

Sources: Patrini et al. 2017, Making deep neural networks robust to label noise; Northcutt et al. 2021, Confident
learning; the choice of T, λ and the translation by evidence is ours. Pure numpy, float64.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

TEMPERATURES = np.geomspace(0.5, 8, 17)
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)
"""Values of λ to try, if the large and small base models differ."""
LIKELIEST = 20
"""Labels per example that count; the probability of other labels is left out."""
CELLS = 1_000_000
"""Limit of examples times such labels for the noise fit; above it, a sample of the examples is used."""
PRIOR = 5.0
ROUNDS, ENOUGH = 300, 1e-6
"""EM ends after this many rounds, or when the mean evidence changes by less than this."""
ENOUGH_PAIRS = 50
INFORMED = 0.1
"""See ``Noise.informed``: the references of the studies reach 0.4 and more, a model without training 0.02."""
DRAWS = 100
"""Bootstrap draws for the interval of the noise rate."""
CLEAN = 0.01
"""A noise rate whose interval reaches below this counts as 0: a reference makes that many errors itself."""


@dataclass(frozen=True)
class Noise:
    """A fitted noise model."""

    matrix: np.ndarray
    """float64 [K, K]: rows are true labels, columns are given labels. Rows sum to 1."""
    temperature: float
    share: float
    """λ: the share of the base ratio that counts."""
    rate: float
    """Mean probability that a given label is wrong."""
    interval: tuple[float, float]
    """Interval of the rate: the middle 95% of ``DRAWS`` bootstrap draws over the examples, with fixed T and λ; Wilson's
    interval over the pairs if the rate comes from them."""
    evidence: float
    """Marginal log-likelihood of the given labels (natural log), mean over the examples of the fit."""
    evidence_clean: float
    """The same without noise (M = 1), at its own best T."""
    evidence_shares: float
    """The same for a model that knows only the frequencies of the given labels."""
    examples: int
    """Number of examples of the fit."""
    pairs: int = 0
    """Number of pairs of a true and a given label that count in M."""
    meaning: np.ndarray | None = None
    """float64 [K, K], if the reference has learned the errors: rows are its labels, columns the true labels."""

    @property
    def found(self) -> bool:
        """Whether there is significant noise, according to a reference that knows the labels at all."""
        if not self.informed:
            return False
        return self.interval[0] >= CLEAN and (self.evidence > self.evidence_clean or self.meaning is not None)

    @property
    def informed(self) -> bool:
        """Whether the reference explains the given labels better than their frequencies do, by a share ``INFORMED``.

        A reference that knows nothing contradicts most labels, which would look like noise."""
        best = max(self.evidence, self.evidence_clean)
        return best - self.evidence_shares > -INFORMED * self.evidence_shares

    def as_json(self, labels: list[str]) -> dict[str, Any]:
        """All fields, and the matrix with its labels."""
        arrays = {"matrix": self.matrix.tolist(), "meaning": None if self.meaning is None else self.meaning.tolist()}
        return {**vars(self), **arrays, "labels": labels, "found": self.found, "informed": self.informed}


def fit_noise(
    reference: np.ndarray, ratio: np.ndarray, given: np.ndarray, seed: int, pairs: np.ndarray | None = None
) -> Noise:
    """Fit M, T and λ.

    Args:
        reference: float64 [n, K], log-likelihoods r of every label under the reference.
        ratio: float64 [n, K], a - s for every label.
        given: int [n], the given labels.
        seed: seed of the bootstrap.
        pairs: int [K, K], additional known examples: how often a true label (row) is given as another (column).
    """
    labels = reference.shape[1]
    pairs = np.zeros((labels, labels)) if pairs is None else pairs
    own = [_chances(reference, given, t) for t in TEMPERATURES]
    best = int(np.argmax([_fit(chances, pairs)[1] for chances in own]))
    near = TEMPERATURES[max(0, best - 1) : best + 2]
    shares = SHARES if np.ptp(ratio - ratio[:, :1]) > 1e-9 else SHARES[:1]
    tried = [
        (_fit(_chances(reference + share * ratio, given, t), pairs), float(t), share)
        for t, share in itertools.product(near, shares)
    ]
    (matrix, evidence), temperature, share = max(tried, key=lambda fit: fit[0][1])
    chances = _chances(reference + share * ratio, given, temperature)
    clean = max(c.evidence_clean for c in own)
    rates = []
    draw = np.random.default_rng(seed)
    for _ in range(DRAWS):
        drawn = chances.take(draw.integers(len(given), size=len(given)))
        rates.append(1 - float(drawn.of_given(_fit(drawn, pairs, matrix)[0]).mean()))
    low, high = np.quantile(rates, [0.025, 0.975])
    rate = 1 - float(chances.of_given(matrix).mean())
    interval = (float(low), float(high))
    return Noise(matrix, temperature, share, rate, interval, evidence, clean, _of_shares(given), len(given))


def fit_noise_with_pairs(
    reference: np.ndarray, ratio: np.ndarray, given: np.ndarray, seed: int, pairs: np.ndarray
) -> Noise:
    """``fit_noise``, with additional pairs of a true and a given label.

    They count in M as known examples. If the share of wrong labels among them is significantly above the rate from the
    scores (Wilson's interval is above the rate's interval), the reference has learned errors: see the docstring of the
    module.

    Args:
        pairs: int [K, K], how often a true label (row) is known to be given as another (column).
    """
    blind = fit_noise(reference, ratio, given, seed)
    size, wrong = int(pairs.sum()), int(pairs.sum() - np.trace(pairs))
    interval = wilson(wrong, size)
    if interval[0] <= blind.interval[1]:
        return replace(fit_noise(reference, ratio, given, seed, pairs), pairs=size)
    own = [_chances(reference, given, t) for t in TEMPERATURES]
    clean = [chances.evidence_clean for chances in own]
    share, of_given = wrong / size, np.bincount(given, minlength=len(pairs)) / len(given)
    return replace(
        blind,
        matrix=_rows_to_1(pairs + PRIOR * _plain(share, of_given)),
        temperature=float(TEMPERATURES[np.argmax(clean)]),
        share=0.0,
        rate=share,
        interval=interval,
        pairs=size,
        meaning=_rows_to_1(pairs.T + PRIOR * np.eye(len(pairs))),
    )


def _of_shares(given: np.ndarray) -> float:
    shares = np.bincount(given) / len(given)
    return float((shares[shares > 0] * np.log(shares[shares > 0])).sum())


def wilson(count: int, of: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    from scipy.stats import binomtest

    interval = binomtest(count, of).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _plain(rate: float, of_given: np.ndarray) -> np.ndarray:
    """Noise [K, K] that is the same for all labels, where given labels have these shares."""
    return np.asarray((1 - rate) * np.eye(len(of_given)) + rate * of_given)


def _rows_to_1(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts / counts.sum(axis=1, keepdims=True))


def log_posterior(reference: np.ndarray, ratio: np.ndarray, given: np.ndarray, noise: Noise) -> np.ndarray:
    """log q_i(ỹ_i) of each example, float64 [n], at least -30; 0 if no noise was found.

    Weights are then all 1, so that right labels lose no weight because the reference finds them hard. Arguments as in
    ``fit_noise``.
    """
    if not noise.found:
        return np.zeros(len(given))
    chances = _chances(reference + noise.share * ratio, given, noise.temperature, noise.meaning)
    return np.log(np.maximum(chances.of_given(noise.matrix), np.exp(-30)))


def sample_rows(n: int, labels: int, seed: int) -> np.ndarray:
    """The examples for the fit, int64, in their order: all, or as many as ``CELLS`` allows."""
    size = max(1, CELLS // min(labels, LIKELIEST))
    return np.arange(n) if n <= size else np.sort(np.random.default_rng(seed).choice(n, size, replace=False))


@dataclass(frozen=True)
class _Chances:
    """P_i(y) of the most likely labels of each example, always including the given label."""

    labels: np.ndarray
    """int [n, m]"""
    values: np.ndarray
    """float64 [n, m], rows sum to 1."""
    given: np.ndarray
    """int [n]: the given label,"""
    column: np.ndarray
    """and its column."""

    def take(self, rows: np.ndarray) -> _Chances:
        return _Chances(self.labels[rows], self.values[rows], self.given[rows], self.column[rows])

    @property
    def evidence_clean(self) -> float:
        """Mean log-likelihood of the given labels if none is wrong."""
        return float(np.log(np.take_along_axis(self.values, self.column[:, None], 1)).mean())

    def of_given(self, matrix: np.ndarray) -> np.ndarray:
        """q_i(ỹ_i), float64 [n]."""
        joint = self.values * matrix[self.labels, self.given[:, None]]
        return np.asarray(np.take_along_axis(joint, self.column[:, None], 1)[:, 0] / joint.sum(axis=1))


def _chances(scores: np.ndarray, given: np.ndarray, temperature: float, meaning: np.ndarray | None = None) -> _Chances:
    rows = np.arange(len(given))
    values = np.exp((scores - scores.max(axis=1, keepdims=True)) / temperature)
    values /= values.sum(axis=1, keepdims=True)
    if meaning is not None:
        values = values @ meaning
    # A given label with probability 0 would make the evidence without noise infinite.
    values = np.maximum(values, 1e-13)
    if scores.shape[1] <= LIKELIEST:
        labels = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        column = given
    else:
        first = values.copy()
        first[rows, given] = np.inf
        labels = np.argpartition(-first, LIKELIEST - 1, axis=1)[:, :LIKELIEST]
        values = np.take_along_axis(values, labels, 1)
        column = (labels == given[:, None]).argmax(axis=1)
    return _Chances(labels, values / values.sum(axis=1, keepdims=True), given, column)


def _fit(chances: _Chances, pairs: np.ndarray, matrix: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """The noise matrix [K, K] by EM, from ``matrix`` or from 10% noise, and the mean evidence."""
    labels = len(pairs)
    of_given = np.bincount(chances.given, minlength=labels) / len(chances.given)
    cells = (chances.labels * labels + chances.given[:, None]).ravel()
    matrix = _plain(0.1, of_given) if matrix is None else matrix
    evidence = -np.inf
    for _ in range(ROUNDS):
        joint = chances.values * matrix.ravel()[cells].reshape(chances.values.shape)
        of_example = joint.sum(axis=1)
        before, evidence = evidence, float(np.log(of_example).mean())
        joint /= of_example[:, None]
        rate = 1 - float(np.take_along_axis(joint, chances.column[:, None], 1).mean())
        counts = np.bincount(cells, joint.ravel(), labels * labels).reshape(labels, labels)
        matrix = _rows_to_1(counts + pairs + PRIOR * _plain(rate, of_given))
        if abs(evidence - before) < ENOUGH:
            break
    return matrix, evidence
