"""The training jobs: one for each arm, one for each fold of the reference."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from atlantis_ds.config.schema import Arm, Model, Recipe, Train
from atlantis_ds.data.examples import Examples, Split
from atlantis_ds.errors import InputError
from atlantis_ds.files import fingerprint, read_json, read_table
from atlantis_ds.lm.load import model_identity, model_source
from atlantis_ds.reference import example_folds, reference_name, round_before
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.advice import ESS_REFUSE
from atlantis_ds.weights.arms import arm_weights
from atlantis_ds.weights.formulas import effective_sample_size

VERSION = 2
"""Must be raised if the same job gives different model weights than before."""
FREE = frozenset(
    {"logging_steps", "save_steps", "save_total_limit", "max_skipped_steps", "profile_steps"}
    | {"per_device_train_batch_size", "attn_implementation", "torch_compile"}
)
"""Keys of ``train`` that do not determine the model weights."""


@dataclass(frozen=True)
class Part:
    """Examples of one split, to train on."""

    split: Literal["train", "dev"]
    column: Literal["target", "gold"]
    """The target: the given or the gold one."""
    rows: np.ndarray
    """int64 [n], rows of the split."""

    def of(self, examples: Examples) -> Split:
        """Its split."""
        split: Split = getattr(examples, self.split)
        return split

    def fingerprint(self, examples: Examples) -> list[str]:
        split = self.of(examples)
        digest = split.gold_digest if self.column == "gold" else split.digest
        return [self.column, digest, hashlib.sha256(self.rows.tobytes()).hexdigest()]


@dataclass(frozen=True)
class Job:
    name: str
    """Name of its folders: arm, arm and seed, or ``reference``."""
    arm: str | None
    """Arm of the recipe; None for a reference."""
    model: Model
    parts: tuple[Part, ...]
    """The training data: n examples, one part after another."""
    weights: np.ndarray
    """float64 [n], one for each example."""
    settings: Train
    seed: int
    one_by_one: bool = False
    """Whether training on a part begins after the previous part has ended; else the parts are mixed."""

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    @property
    def phases(self) -> tuple[int, ...]:
        """Numbers of examples that are trained together, one phase after another."""
        return tuple(len(part.rows) for part in self.parts) if self.one_by_one else (len(self),)

    def find(self, place: int) -> tuple[int, int]:
        """One of the n examples: the number of its part, and its row in the split."""
        for number, part in enumerate(self.parts):
            if place < len(part.rows):
                return number, int(part.rows[place])
            place -= len(part.rows)
        raise IndexError(place)

    def ids(self, examples: Examples, places: np.ndarray) -> list[str]:
        """Ids of some of the n examples."""
        found = map(self.find, places.tolist())
        return [self.parts[part].of(examples).ids[row].as_py() for part, row in found]

    def fingerprint(self, run: Run, examples: Examples) -> str:
        """Of everything that determines the model weights; not how often to log or save, nor micro-batch or kernels."""
        free = {*FREE}
        if self.settings.early_stopping_patience is None:  # otherwise evaluations decide when training ends
            free |= {"early_stopping_patience", "eval_steps"}
        if (
            self.settings.metric_for_best_model == "loss"
        ):  # keeps the fingerprints of trainings from before there were other metrics
            free |= {"metric_for_best_model"}
        return fingerprint(
            [
                VERSION,
                examples.train_fingerprint,
                *(mark for part in self.parts for mark in part.fingerprint(examples)),
                *(["one by one"] if self.one_by_one else []),
                hashlib.sha256(self.weights.tobytes()).hexdigest(),
                model_identity(self.model),
                self.settings.model_dump(exclude=free),
                run.recipe.data.on_too_long,
                self.seed,
            ]
        )


def arm_job(run: Run, examples: Examples, arm: str, force: bool, seed: int | None = None) -> Job:
    """The training job of one arm: the large model on all training examples; examples left out have weight 0.

    Args:
        seed: the seed of the training, for one of several runs of the arm; default: the recipe's.

    Raises:
        InputError: there is no such arm, its weights, gold labels or ids to leave out are missing, or the effective
            sample size is below a tenth of the examples and ``force`` is off.
    """
    recipe, folder = run.recipe, run.folder
    if arm not in recipe.arms:
        raise InputError(f"--arm {arm}: no such arm; the recipe has {', '.join(recipe.arms)} (and `reference`)")
    options = recipe.arms[arm]
    weights = np.ones(len(examples.train)) if options.dev == "alone" else arm_weights(run, examples, arm)
    share = effective_sample_size(weights) / len(weights)
    if not (share >= ESS_REFUSE or force):
        raise InputError(
            f"arm {arm}: the effective sample size of its weights is {share:.1%} of the examples, below "
            f"{ESS_REFUSE:.0%}; stabilise them (e.g. weights.temper: 0.5), or train anyway with --force"
        )
    refuse_missing_gold(examples, arm, options)
    parts = [Part("train", "gold" if options.gold else "target", np.arange(len(weights)))]
    if options.dev:
        parts.append(_gold_dev(examples, f"arms.{arm}.dev"))
        # If examples are left out, the others get more weight: a gold label counts like one that is kept.
        weights = np.append(weights, np.full(len(parts[1].rows), weights[weights > 0].mean()))
    if options.dev == "alone":
        parts, weights = parts[1:], weights[len(parts[0].rows) :]
    return Job(
        arm if seed is None else f"{arm}-seed{seed}",
        arm,
        model_source(recipe, folder, "large"),
        tuple(parts),
        weights,
        _arm_settings(recipe, options),
        recipe.seed if seed is None else seed,
        one_by_one=options.dev == "last",
    )


def _arm_settings(recipe: Recipe, options: Arm) -> Train:
    return recipe.train.model_copy(update={"loss": options.loss or recipe.train.loss})


def trained_otherwise(recipe: Recipe, arm: str, summary: dict[str, Any]) -> str | None:
    """The settings with which an arm was trained, if they are not those of the recipe.

    For stages after training: it compares the ``train`` section, not the arm's weights nor its base model, which may be
    gone.

    Args:
        summary: from ``training_summary``.
    """
    old = summary["settings"]
    now = _arm_settings(recipe, recipe.arms[arm]).model_dump(mode="json")
    evaluations_decide = any(settings.get("early_stopping_patience") for settings in (old, now))
    free = FREE if evaluations_decide else FREE | {"eval_steps"}
    keys = [key for key in now if key in old and key not in free and old[key] != now[key]]
    return ", ".join(f"train.{key}: {old[key]}, not {now[key]}" for key in keys) or None


def refuse_missing_gold(examples: Examples, arm: str, options: Arm) -> None:
    """Raise InputError if an arm trains on gold labels that are not known, or on a dev split that is not there."""
    train = examples.train
    if options.gold and train.golds.null_count:
        row = train.golds.is_null().index(True).as_py()
        raise InputError(
            f"example {train.ids[row].as_py()}: it has no gold label, so no arm can train with `gold: true`"
        )
    if options.dev:
        _gold_dev(examples, f"arms.{arm}.dev")


def reference_jobs(run: Run, examples: Examples) -> list[Job]:
    """The training jobs of a fine-tuned reference, one for each fold; none if the reference is a checkpoint.

    The job of a fold trains on the other folds, so that no example is scored by a model that has seen it; after the
    first round, with the weights of the previous round. No weight depends on training with its own label. The weights
    of the other folds come from models that have seen this fold, and its labels affect only those weights.
    """
    recipe, folder = run.recipe, run.folder
    reference = recipe.models.reference
    if reference.kind == "checkpoint":
        return []
    changes = {
        key: value for key in ("num_train_epochs", "learning_rate") if (value := getattr(reference, key)) is not None
    }
    gold = [] if reference.on == "train" else [_gold_dev(examples, f"models.reference.on: {reference.on}")]
    if reference.on == "dev":
        return [_reference_job(run, 0, gold, np.ones(len(gold[0].rows)), changes)]
    train = examples.train
    before = round_before(recipe, folder)
    if before and not before.weights.exists():
        raise InputError(f"{before.weights}: missing; run `train --arm reference --round {before.round}` first")
    weight = read_table(before.weights, ["weight"])[0]["weight"].to_numpy() if before else np.ones(len(train))
    folds = np.full(len(train), -1) if reference.folds == 1 else example_folds(reference, train)
    jobs = []
    for fold in range(reference.folds):
        rows = np.flatnonzero(folds != fold)
        if reference.folds > 1 and len(rows) in (0, len(train)):
            raise InputError(f"models.reference.folds: {reference.folds} folds would leave one empty; use fewer")
        weights = weight[rows] / weight[rows].mean()
        weights = np.append(weights, [1.0] * sum(len(part.rows) for part in gold))
        jobs.append(_reference_job(run, fold, [Part("train", "target", rows), *gold], weights, changes))
    return jobs


def _reference_job(run: Run, fold: int, parts: Sequence[Part], weights: np.ndarray, changes: dict[str, Any]) -> Job:
    recipe = run.recipe
    return Job(
        reference_name(run.folder, fold, recipe.models.reference),
        None,
        model_source(recipe, run.folder, "reference"),
        tuple(parts),
        weights,
        # A reference must separate right from wrong labels by their likelihood, so it needs the cross-entropy.
        recipe.train.model_copy(update={**changes, "loss": "cross_entropy"}),
        recipe.seed,
    )


def _gold_dev(examples: Examples, key: str) -> Part:
    """The dev split to train on: its gold labels if known, else the labels in its own file.

    Args:
        key: the key of the recipe that requires it.

    Raises:
        InputError: there are no dev examples, or the gold label of some is unknown.
    """
    dev = examples.dev
    if not len(dev):
        raise InputError(f"{key}: there are no dev examples; set data.dev or data.dev_size")
    unknown = dev.golds.null_count
    if 0 < unknown < len(dev):
        row = dev.golds.is_null().index(True).as_py()
        raise InputError(
            f"{key}: dev example {dev.ids[row].as_py()} has no gold label, and {len(dev) - unknown} others have one; "
            "leave it out of data.dev"
        )
    if unknown and examples.info.get("dev_from_train"):
        raise InputError(
            f"{key}: data.dev_size takes dev from train, where no gold label is known; set data.dev to a file with "
            "gold labels"
        )
    return Part("dev", "target" if unknown else "gold", np.arange(len(dev)))


def training_summary(folder: RunFolder, name: str) -> dict[str, Any]:
    """The summary that ``train`` wrote when the job was finished: ``model/NAME/training.json``."""
    summary: dict[str, Any] = read_json(folder.model(name) / "training.json")
    return summary
