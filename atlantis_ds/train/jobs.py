"""What there is to train: one job for each arm, one for each fold of the reference."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from atlantis_ds.data.prepare import Examples
from atlantis_ds.data.splits import fold_of
from atlantis_ds.data.table import Example
from atlantis_ds.errors import InputError
from atlantis_ds.lm.load import model_identity, model_source
from atlantis_ds.recipe import Model, Recipe, Train
from atlantis_ds.run_folder import RunFolder, fingerprint, read_json
from atlantis_ds.weights.diagnostics import ESS_REFUSE
from atlantis_ds.weights.formulas import effective_sample_size
from atlantis_ds.weights.merge import arm_weights
from atlantis_ds.weights.score import reference_name


@dataclass(frozen=True)
class Job:
    name: str
    """Arm, or ``reference``."""
    model: Model
    examples: list[Example]
    weights: np.ndarray
    """float64 [n], mean 1, one for each example."""
    settings: Train

    def fingerprint(self, recipe: Recipe, examples: Examples) -> str:
        """Of all that decides the trained weights; how often to log or save, and the micro-batch, do not."""
        free = {"logging_steps", "eval_steps", "save_steps", "save_total_limit", "max_skipped_steps"}
        free |= {"per_device_train_batch_size"}
        return fingerprint(
            [
                examples.fingerprint,
                [example.id for example in self.examples],
                hashlib.sha256(self.weights.tobytes()).hexdigest(),
                model_identity(self.model),
                self.settings.model_dump(exclude=free),
                recipe.prompt.model_dump(),
                recipe.seed,
            ]
        )


def arm_job(recipe: Recipe, folder: RunFolder, examples: Examples, arm: str, force: bool) -> Job:
    """The training job of one arm: the large model on all training examples.

    Raises:
        InputError: there is no such arm, its weights are missing, or their effective sample size is below a tenth of
            the examples and ``force`` is off.
    """
    if arm not in recipe.arms:
        raise InputError(f"--arm {arm}: no such arm; the recipe has {', '.join(recipe.arms)} (and `reference`)")
    weights = arm_weights(recipe, folder, examples, arm)
    share = effective_sample_size(weights) / len(weights)
    if share < ESS_REFUSE and not force:
        raise InputError(
            f"arm {arm}: the effective sample size of its weights is {share:.1%} of the examples, below "
            f"{ESS_REFUSE:.0%}; stabilise them (e.g. weights.temper: 0.5), or train all the same with --force"
        )
    return Job(arm, model_source(recipe, folder, "large"), examples.train, weights, recipe.train)


def reference_jobs(recipe: Recipe, folder: RunFolder, examples: Examples) -> list[Job]:
    """The training jobs of a fine-tuned reference, one for each fold; none where the reference is a checkpoint.

    The job of a fold trains on the other folds, so that no example is scored by a model that has seen it.
    """
    reference = recipe.models.reference
    if reference.kind == "checkpoint":
        return []
    changes = {
        key: value for key in ("num_train_epochs", "learning_rate") if (value := getattr(reference, key)) is not None
    }
    source = examples.train
    if reference.on == "dev":
        source = [replace(example, label=example.gold or example.label) for example in examples.dev]
        if not source:
            raise InputError("models.reference.on: dev: there are no dev examples; set data.dev or data.dev_size")
    jobs = []
    for fold in range(reference.folds):
        seen = [e for e in source if reference.folds == 1 or fold_of(e, reference.folds, recipe.seed) != fold]
        if not seen or (reference.folds > 1 and len(seen) == len(source)):
            raise InputError(f"models.reference.folds: {reference.folds} folds leave one empty; take fewer")
        jobs.append(
            Job(
                reference_name(fold, reference.folds),
                model_source(recipe, folder, "reference"),
                seen,
                np.ones(len(seen)),
                recipe.train.model_copy(update=changes),
            )
        )
    return jobs


def training_summary(folder: RunFolder, name: str) -> dict[str, Any]:
    """What ``train`` wrote when the job was finished: ``model/NAME/training.json``."""
    summary: dict[str, Any] = read_json(folder.model(name) / "training.json")
    return summary
