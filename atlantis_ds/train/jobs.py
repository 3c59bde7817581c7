"""What there is to train: one job for each arm, one for each fold of the reference."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from atlantis_ds.config.schema import Model, Recipe, Train
from atlantis_ds.data.prepare import Examples
from atlantis_ds.data.splits import fold_of
from atlantis_ds.data.table import Example
from atlantis_ds.errors import InputError
from atlantis_ds.files import fingerprint, read_json, read_table
from atlantis_ds.lm.load import model_identity, model_source
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.diagnostics import ESS_REFUSE
from atlantis_ds.weights.formulas import effective_sample_size
from atlantis_ds.weights.merge import arm_weights
from atlantis_ds.weights.score import reference_name, round_before


@dataclass(frozen=True)
class Job:
    name: str
    """Name of its folders: arm, arm and seed, or ``reference``."""
    arm: str | None
    """Arm of the recipe; None for a reference."""
    model: Model
    examples: list[Example]
    weights: np.ndarray
    """float64 [n], mean 1, one for each example."""
    settings: Train
    seed: int

    def fingerprint(self, recipe: Recipe, examples: Examples) -> str:
        """Of all that decides the trained weights; how often to log or save, and the micro-batch, do not."""
        free = {"logging_steps", "eval_steps", "save_steps", "save_total_limit", "max_skipped_steps"}
        free |= {"per_device_train_batch_size"}
        return fingerprint(
            [
                examples.train_fingerprint,
                [[example.id, example.label] for example in self.examples],
                hashlib.sha256(self.weights.tobytes()).hexdigest(),
                model_identity(self.model),
                self.settings.model_dump(exclude=free),
                recipe.prompt.model_dump(),
                self.seed,
            ]
        )


def arm_job(
    recipe: Recipe, folder: RunFolder, examples: Examples, arm: str, force: bool, seed: int | None = None
) -> Job:
    """The training job of one arm: the large model on all training examples; what is left out has weight 0.

    Args:
        seed: of the training, for one of several runs of the arm; without it the recipe's.

    Raises:
        InputError: there is no such arm, its weights, gold labels or ids to leave out are missing, or the effective
            sample size is below a tenth of the examples and ``force`` is off.
    """
    if arm not in recipe.arms:
        raise InputError(f"--arm {arm}: no such arm; the recipe has {', '.join(recipe.arms)} (and `reference`)")
    weights = arm_weights(recipe, folder, examples, arm)
    share = effective_sample_size(weights) / len(weights)
    if not (share >= ESS_REFUSE or force):
        raise InputError(
            f"arm {arm}: the effective sample size of its weights is {share:.1%} of the examples, below "
            f"{ESS_REFUSE:.0%}; stabilise them (e.g. weights.temper: 0.5), or train all the same with --force"
        )
    options = recipe.arms[arm]
    train = gold_labelled(examples.train) if options.gold else examples.train
    settings = recipe.train.model_copy(update={"loss": options.loss or recipe.train.loss})
    name = arm if seed is None else f"{arm}-seed{seed}"
    large = model_source(recipe, folder, "large")
    return Job(name, arm, large, train, weights, settings, recipe.seed if seed is None else seed)


def gold_labelled(examples: Sequence[Example]) -> list[Example]:
    """The examples with their gold labels to train on.

    Raises:
        InputError: an example has none.
    """
    if unknown := next((example for example in examples if example.gold is None), None):
        raise InputError(f"example {unknown.id}: it has no gold label, so no arm can train with `gold: true`")
    return [replace(example, label=str(example.gold)) for example in examples]


def reference_jobs(recipe: Recipe, folder: RunFolder, examples: Examples) -> list[Job]:
    """The training jobs of a fine-tuned reference, one for each fold; none where the reference is a checkpoint.

    The job of a fold trains on the other folds, so that no example is scored by a model that has seen it; after the
    first round on the weights of the round before. No weight depends on its own label's training; those of the other
    folds come from models that have seen this one, so that its labels are felt in them, and nowhere else.
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
    before, weight = round_before(recipe, folder), {}
    if before:
        table = read_table(before.weights)[0]
        weight = dict(zip(table["id"].to_pylist(), table["weight"].to_pylist()))
    jobs = []
    for fold in range(reference.folds):
        seen = [e for e in source if reference.folds == 1 or fold_of(e, reference.folds, recipe.seed) != fold]
        if not seen or (reference.folds > 1 and len(seen) == len(source)):
            raise InputError(f"models.reference.folds: {reference.folds} folds leave one empty; take fewer")
        weights = np.array([weight[e.id] for e in seen]) if before else np.ones(len(seen))
        jobs.append(
            Job(
                reference_name(folder, fold, reference.folds),
                None,
                model_source(recipe, folder, "reference"),
                seen,
                weights / weights.mean(),
                # A reference is to tell right labels from wrong ones by their likelihood: no other loss will do.
                recipe.train.model_copy(update={**changes, "loss": "cross_entropy"}),
                recipe.seed,
            )
        )
    return jobs


def training_summary(folder: RunFolder, name: str) -> dict[str, Any]:
    """What ``train`` wrote when the job was finished: ``model/NAME/training.json``."""
    summary: dict[str, Any] = read_json(folder.model(name) / "training.json")
    return summary
