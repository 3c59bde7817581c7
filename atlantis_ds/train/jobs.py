"""What there is to train: one job for each arm, one for each fold of the reference."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from atlantis_ds.config.schema import Model, Train
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
"""Goes up where the same job trains to other weights than before."""


@dataclass(frozen=True)
class Job:
    name: str
    """Name of its folders: arm, arm and seed, or ``reference``."""
    arm: str | None
    """Arm of the recipe; None for a reference."""
    model: Model
    split: Literal["train", "dev"]
    column: Literal["target", "gold"]
    """What is trained on."""
    rows: np.ndarray
    """int64 [n], of the split."""
    weights: np.ndarray
    """float64 [n], mean 1, one for each row."""
    settings: Train
    seed: int

    def fingerprint(self, run: Run, examples: Examples) -> str:
        """Of all that decides the trained weights; how often to log or save, and the micro-batch, do not."""
        free = {"logging_steps", "eval_steps", "save_steps", "save_total_limit", "max_skipped_steps"}
        free |= {"per_device_train_batch_size"}
        split: Split = getattr(examples, self.split)
        return fingerprint(
            [
                VERSION,
                examples.train_fingerprint,
                self.column,
                split.gold_digest if self.column == "gold" else split.digest,
                hashlib.sha256(self.rows.tobytes()).hexdigest(),
                hashlib.sha256(self.weights.tobytes()).hexdigest(),
                model_identity(self.model),
                self.settings.model_dump(exclude=free),
                run.recipe.data.on_too_long,
                self.seed,
            ]
        )


def arm_job(run: Run, examples: Examples, arm: str, force: bool, seed: int | None = None) -> Job:
    """The training job of one arm: the large model on all training examples; what is left out has weight 0.

    Args:
        seed: of the training, for one of several runs of the arm; without it the recipe's.

    Raises:
        InputError: there is no such arm, its weights, gold labels or ids to leave out are missing, or the effective
            sample size is below a tenth of the examples and ``force`` is off.
    """
    recipe, folder = run.recipe, run.folder
    if arm not in recipe.arms:
        raise InputError(f"--arm {arm}: no such arm; the recipe has {', '.join(recipe.arms)} (and `reference`)")
    weights = arm_weights(run, examples, arm)
    share = effective_sample_size(weights) / len(weights)
    if not (share >= ESS_REFUSE or force):
        raise InputError(
            f"arm {arm}: the effective sample size of its weights is {share:.1%} of the examples, below "
            f"{ESS_REFUSE:.0%}; stabilise them (e.g. weights.temper: 0.5), or train all the same with --force"
        )
    options = recipe.arms[arm]
    if options.gold:
        _refuse_unknown_gold(examples.train)
    settings = recipe.train.model_copy(update={"loss": options.loss or recipe.train.loss})
    return Job(
        arm if seed is None else f"{arm}-seed{seed}",
        arm,
        model_source(recipe, folder, "large"),
        "train",
        "gold" if options.gold else "target",
        np.arange(len(examples.train)),
        weights,
        settings,
        recipe.seed if seed is None else seed,
    )


def _refuse_unknown_gold(train: Split) -> None:
    if train.golds.null_count:
        row = train.golds.is_null().index(True).as_py()
        raise InputError(
            f"example {train.ids[row].as_py()}: it has no gold label, so no arm can train with `gold: true`"
        )


def reference_jobs(run: Run, examples: Examples) -> list[Job]:
    """The training jobs of a fine-tuned reference, one for each fold; none where the reference is a checkpoint.

    The job of a fold trains on the other folds, so that no example is scored by a model that has seen it; after the
    first round on the weights of the round before. No weight depends on its own label's training; those of the other
    folds come from models that have seen this one, so that its labels are felt in them, and nowhere else.
    """
    recipe, folder = run.recipe, run.folder
    reference = recipe.models.reference
    if reference.kind == "checkpoint":
        return []
    changes = {
        key: value for key in ("num_train_epochs", "learning_rate") if (value := getattr(reference, key)) is not None
    }
    on_dev = reference.on == "dev"
    source = examples.dev if on_dev else examples.train
    column = _gold_column(run, source) if on_dev else "target"
    before = round_before(recipe, folder)
    weight = read_table(before.weights, ["weight"])[0]["weight"].to_numpy() if before else np.ones(len(source))
    folds = None if reference.folds == 1 else example_folds(reference, source)
    jobs = []
    for fold in range(reference.folds):
        rows = np.arange(len(source))
        if folds is not None:
            rows = rows[folds != fold]
            if not len(rows) or len(rows) == len(source):
                raise InputError(f"models.reference.folds: {reference.folds} folds leave one empty; take fewer")
        weights = weight[rows]
        jobs.append(
            Job(
                reference_name(folder, fold, reference),
                None,
                model_source(recipe, folder, "reference"),
                "dev" if on_dev else "train",
                column,
                rows,
                weights / weights.mean(),
                # A reference is to tell right labels from wrong ones by their likelihood: no other loss will do.
                recipe.train.model_copy(update={**changes, "loss": "cross_entropy"}),
                recipe.seed,
            )
        )
    return jobs


def _gold_column(run: Run, dev: Split) -> Literal["target", "gold"]:
    """Which column of the dev split holds its gold labels: ``gold`` where known, else what a file of its own says.

    Raises:
        InputError: there are no dev examples, or some whose gold label is not known.
    """
    key = "models.reference.on: dev"
    if not len(dev):
        raise InputError(f"{key}: there are no dev examples; set data.dev or data.dev_size")
    unknown = dev.golds.null_count
    if not unknown:
        return "gold"
    if unknown < len(dev):
        row = dev.golds.is_null().index(True).as_py()
        raise InputError(
            f"{key}: dev example {dev.ids[row].as_py()} has no gold label, and {len(dev) - unknown} others have one; "
            "leave it out of data.dev"
        )
    if run.recipe.data.dev is None and run.recipe.data.hub_id is None:
        raise InputError(
            f"{key}: data.dev_size cuts dev from train, where no gold label is known; name gold examples: data.dev"
        )
    return "target"


def training_summary(folder: RunFolder, name: str) -> dict[str, Any]:
    """What ``train`` wrote when the job was finished: ``model/NAME/training.json``."""
    summary: dict[str, Any] = read_json(folder.model(name) / "training.json")
    return summary
