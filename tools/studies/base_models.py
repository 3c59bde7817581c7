"""What the base models add to the reference: one table from the scores of runs, nothing scored or trained again.

    python tools/studies/base_models.py RUN:BASE [RUN:BASE ...]

RUN has the scores of a reference (r), BASE those of a large and a small base model (a, s). The two may have other
tokenizers, prompts and noise, since all labels of a set are scored; the examples that both have are counted.

AUROC is that of the formula for "the label is right", before stabilising. Intervals are the middle 95% of 1,000
bootstrap draws over the examples, the same draws for all rows of a pair; that of a difference is of paired draws.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Weights
from atlantis_ds.data.examples import Split, load_examples
from atlantis_ds.errors import InputError
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.formulas import Scores, evidence, label_set_evidence
from atlantis_ds.weights.posterior import fit_noise, log_posterior
from atlantis_ds.weights.shards import load_scores

DRAWS = 1000
COLUMNS = ("run", "bases", "n", "formula", "AUROC", "minus r", "within class", "minus r, within")
SETTINGS = {
    "sum": Weights(length="sum"),
    "sum, label_set": Weights(length="sum", calibrate="label_set"),
    "mean": Weights(length="mean"),
    "mean, label_set": Weights(length="mean", calibrate="label_set"),
}
"""Columns of AUROC, overall and within class. Those with intervals are of the default: sums, for responses means."""


def main() -> None:
    columns = [*COLUMNS, *SETTINGS]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for pair in sys.argv[1:]:
        run, _, base = pair.partition(":")
        try:
            right, labels, scores = read_pair(Path(run), Path(base))
        except InputError as error:
            sys.exit(str(error))
        n = len(right)
        draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS)
        counts = np.vstack([np.ones(n), draws])  # the first is the data as it is
        every = {name: rankings(scores, options) for name, options in SETTINGS.items()}
        shown = every["mean" if labels is None else "sum"]
        of_reference = aurocs(shown["r"][0], right, labels, counts)
        for formula, (score, _) in shown.items():
            cells = [Path(run).name, Path(base).name, str(n), formula]
            for auroc, reference in zip(aurocs(score, right, labels, counts), of_reference):
                cells += [interval(auroc), interval(auroc - reference, "+")]
            cells += ["-"] * (len(COLUMNS) - len(cells))
            for found in every.values():
                if formula not in found:
                    cells.append("-")
                    continue
                score, note = found[formula]
                points = aurocs(score, right, labels, counts[:1])[:, 0]
                cells.append(", ".join(f"{point:.3f}" for point in points) + note)
            print(f"| {' | '.join(cells)} |", flush=True)


def read_pair(run: Path, base: Path) -> tuple[np.ndarray, np.ndarray | None, Scores]:
    """Of the examples that both have and whose gold label is known: whether the label is right, its number, the scores.

    Raises:
        InputError: they do not go together, or a file is missing or broken.
    """
    train, scores = read(run)
    base_train, base_scores = read(base)
    rows = pc.index_in(train.ids, value_set=base_train.ids.combine_chunks()).fill_null(-1).to_numpy()
    here = np.flatnonzero((rows >= 0) & (train.correct >= 0))
    rows = rows[here]
    if train.labels != base_train.labels:
        raise InputError(f"{base}: has another label set than {run}")
    if train.labels is None and not train.targets.take(here).equals(base_train.targets.take(rows)):
        raise InputError(f"{base}: has other responses than {run}")
    scores = mixed(taken(scores, here), taken(base_scores, rows))
    return train.correct[here] == 1, scores.labels if train.labels else None, scores


def read(root: Path) -> tuple[Split, Scores]:
    folder = RunFolder(root)
    examples = load_examples(folder)
    return examples.train, load_scores(Run(load_recipe(folder.recipe), folder, Ranks.alone()), examples)


def taken(scores: Scores, rows: np.ndarray) -> Scores:
    """Some of the examples."""
    names = [field.name for field in fields(scores) if field.name not in ("labels", "label_set")]

    def of(part: Scores) -> dict[str, Any]:
        return {name: getattr(part, name)[rows] for name in names}

    every = scores.label_set
    return Scores(**of(scores), labels=scores.labels[rows], label_set=replace(every, **of(every)) if every else None)


def mixed(scores: Scores, base: Scores) -> Scores:
    """The reference of ``scores`` with the large and small model of ``base``, for the labels of ``scores``."""
    names = [f"{kind}{model}" for kind in ("", "tokens_", "eos_") for model in ("large", "small")]
    if scores.label_set is None or base.label_set is None:
        return replace(scores, **{name: getattr(base, name) for name in names})
    every, own = base.label_set, scores.labels[:, None]
    return replace(
        scores,
        **{name: np.take_along_axis(getattr(every, name), own, 1)[:, 0] for name in names},
        label_set=replace(scores.label_set, **{name: getattr(every, name) for name in names}),
    )


def rankings(scores: Scores, options: Weights) -> dict[str, tuple[np.ndarray, str]]:
    """For each formula the log weight of each example, float64 [n], and what is to be said of it.

    The posterior is the same whatever ``calibrate`` is, so it is there for ``none`` alone. It ranks even where no noise
    is told, and `merge` would make all weights 1.
    """
    if scores.label_set is None and options.calibrate == "label_set":
        return {}
    a, s, r = evidence(scores, options)
    plain = {"r": r, "a": a, "s": s, "a - s": a - s, "a - s + r": a - s + r, "r - s": r - s}
    found = {formula: (score, "") for formula, score in plain.items()}
    if scores.label_set is not None and options.calibrate == "none":
        a, s, r = label_set_evidence(scores, options)
        none = np.zeros_like(r)
        posteriors = {"a": (a, none), "r": (r, none), "a - s + r": (a - s + r, none), "r + λ(a - s)": (r, a - s)}
        for name, (reference, ratio) in posteriors.items():
            noise = fit_noise(reference, ratio, scores.labels, seed=1)
            notes = [f"λ = {noise.share:g}"] if ratio is not none else []
            notes += [f"noise {noise.rate:.1%}" + ("" if noise.found else ", not told from none")]
            told = replace(noise, interval=(1.0, 1.0), evidence_clean=-np.inf)  # else all weights may be 1
            score = log_posterior(reference, ratio, scores.labels, told)
            found[f"posterior of {name}"] = score, f" ({', '.join(notes)})"
    return found


def aurocs(score: np.ndarray, right: np.ndarray, labels: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
    """AUROC overall, and its mean over the labels (if any) by their number of examples: float64 [2 or 1, draws].

    Args:
        counts: [draws, n], how often each example stands in each draw.
    """

    def auroc(rows: np.ndarray) -> np.ndarray:
        good, bad = rows & right, rows & ~right
        above = np.sign(score[good][:, None] - score[bad]) / 2 + 0.5
        wins = ((counts[:, good] @ above) * counts[:, bad]).sum(axis=1)
        return np.asarray(wins / (counts[:, good].sum(axis=1) * counts[:, bad].sum(axis=1)))

    overall = auroc(np.ones(len(right), dtype=bool))
    if labels is None:
        return overall[None]
    with np.errstate(invalid="ignore"):  # a draw without right or without wrong examples of a label
        within = np.array([auroc(labels == label) for label in np.unique(labels)])
    sizes = np.array([counts[:, labels == label].sum(axis=1) for label in np.unique(labels)])
    sizes = np.where(np.isnan(within), 0, sizes)
    return np.array([overall, (np.nan_to_num(within) * sizes).sum(axis=0) / sizes.sum(axis=0)])


def interval(draws: np.ndarray, sign: str = "") -> str:
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return f"{draws[0]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


if __name__ == "__main__":
    main()
