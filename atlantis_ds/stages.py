"""The stages of a run in their order, each on all ranks: examples → reference → scores → weights → arms → figures."""

from __future__ import annotations

import yaml

from atlantis_ds.cluster.claim import claimed
from atlantis_ds.cluster.preemption import leave_if_asked
from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.schema import Recipe, Weights
from atlantis_ds.data.prepare import Examples, load_examples, refuse_other_data
from atlantis_ds.data.prepare import prepare as prepare_examples
from atlantis_ds.errors import InputError
from atlantis_ds.files import read_json, read_table, write_text
from atlantis_ds.progress import console
from atlantis_ds.run_folder import RunFolder


def prepare(recipe: Recipe, folder: RunFolder, ranks: Ranks) -> None:
    """Write ``examples/``, and the base models that the recipe builds itself; rank 0 does it."""
    if ranks.is_main:
        examples = prepare_examples(recipe, folder)
        _keep_recipe(recipe, folder)
        console.print(
            f"prepare: {len(examples.train)} train, {len(examples.dev)} dev, {len(examples.test)} test examples, "
            f"{len(examples.labels)} labels"
        )
        for reason, count in examples.dropped.items():
            split, other = reason.split("_in_")
            if count:
                console.print(f"prepare: left out {count} rows of {split} whose sentence stands in {other}, too")
        for name in ("large", "small"):
            if getattr(recipe.models, name).scratch:
                from atlantis_ds.demo.scratch import build_scratch_model

                build_scratch_model(recipe, folder, name, examples.labels, show=True)
    ranks.barrier()


def _keep_recipe(recipe: Recipe, folder: RunFolder) -> None:
    text = yaml.safe_dump(recipe.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)
    write_text(folder.recipe, text)


def train(recipe: Recipe, folder: RunFolder, ranks: Ranks, arm: str, force: bool) -> None:
    """Train one arm, or all folds of the ``reference``, into ``model/``."""
    from atlantis_ds.train.jobs import arm_job, reference_jobs
    from atlantis_ds.train.trainer import fit

    if ranks.is_main:
        refuse_other_data(recipe, folder)
    if arm == "reference" and not folder.round:
        for earlier in range(1, recipe.models.reference.rounds):
            _reference_round(recipe, RunFolder(folder.root, earlier), ranks, force)
    examples = load_examples(folder)
    jobs = (
        reference_jobs(recipe, folder, examples)
        if arm == "reference"
        else [arm_job(recipe, folder, examples, arm, force)]
    )
    for job in jobs:
        with claimed(folder, f"train-{job.name}", ranks):
            fit(recipe, folder, examples, job, ranks)


def _reference_round(recipe: Recipe, folder: RunFolder, ranks: Ranks, force: bool) -> None:
    """A round before the last: its folds, their scores and the weights for the next one.

    The weights are the recommended ones (docs/results.md), whatever the recipe's own: those may change without new
    training, and the base models have no part in them.
    """
    from atlantis_ds.lm.load import model_source

    train(recipe, folder, ranks, "reference", force)
    start = model_source(recipe, folder, "reference")
    models = recipe.models.model_copy(update={"large": start, "small": start})
    weights = Weights(formula="reference", scope="per_label", power=2, clip=[0, 1.6])
    recipe = recipe.model_copy(update={"models": models, "weights": weights})
    score(recipe, folder, ranks)
    merge(recipe, folder, ranks)


def score(recipe: Recipe, folder: RunFolder, ranks: Ranks, part: tuple[int, int] = (1, 1)) -> None:
    """Write ``scores/``: the I-th of N parts of the shards, counted from 1."""
    from atlantis_ds.weights.score import score as score_shards

    if ranks.is_main:
        refuse_other_data(recipe, folder)
    with claimed(folder, f"score-{part[0]}-of-{part[1]}", ranks):
        score_shards(recipe, folder, ranks, part)
    if ranks.is_main and not folder.round:
        _keep_recipe(recipe, folder)  # `diagnose` reads there how the scores were made


def merge(recipe: Recipe, folder: RunFolder, ranks: Ranks) -> None:
    """Write ``weights.parquet``, ``weights.json`` and ``weights.png``; rank 0 does it."""
    if ranks.is_main:
        from atlantis_ds.weights.diagnostics import diagnosis_table
        from atlantis_ds.weights.merge import merge as merge_scores

        console.print(diagnosis_table(merge_scores(recipe, folder)))
    ranks.barrier()


def run(recipe: Recipe, folder: RunFolder, ranks: Ranks, force: bool) -> None:
    """All stages; what is finished and valid is skipped. Ends with the table of arms."""
    from atlantis_ds.weights.diagnostics import diagnosis_table

    weighted = _weigh(recipe, folder, ranks, force)
    _refuse_bad_arms(recipe, folder, load_examples(folder), force)
    for arm in recipe.arms:
        train(recipe, folder, ranks, arm, force)
    evaluate(recipe, folder, ranks, list(recipe.arms))
    if ranks.is_main and weighted:
        # Shown before training, when there is still time to stop, and again beside the figures they explain.
        console.print(diagnosis_table(read_json(folder.weights_info)))
        console.print(f"weights: {folder.weights_plot}")


def _weigh(recipe: Recipe, folder: RunFolder, ranks: Ranks, force: bool) -> bool:
    """All stages before the arms; False where every arm has uniform weights, and nothing needs scores."""
    prepare(recipe, folder, ranks)
    weighted = any((options.weights or recipe.weights).formula != "uniform" for options in recipe.arms.values())
    if weighted:
        train(recipe, folder, ranks, "reference", force)
        score(recipe, folder, ranks)
        merge(recipe, folder, ranks)
    return weighted


def _refuse_bad_arms(recipe: Recipe, folder: RunFolder, examples: Examples, force: bool) -> None:
    """An arm that cannot be trained or evaluated says so before the first one is, not after a night."""
    from atlantis_ds.train.jobs import arm_job

    if recipe.evaluate.checkpoint == "best" and not examples.dev:
        raise InputError(
            "evaluate.checkpoint: best: there are no dev examples to choose by; set data.dev or data.dev_size"
        )
    for arm in recipe.arms:
        arm_job(recipe, folder, examples, arm, force)


def compare(recipe: Recipe, folder: RunFolder, ranks: Ranks, part: tuple[int, int], force: bool) -> None:
    """Train and evaluate every arm with every seed on one set of scores; write ``compare/`` and print the table.

    Args:
        part: (I, N): the I-th of N parts of the trainings, counted from 1, for N jobs that share them. With N > 1 the
            weights must be there, and nothing is compared.
    """
    from atlantis_ds.evaluate.compare import Trained, compare_arms, comparison_table
    from atlantis_ds.evaluate.predict import evaluate as evaluate_arm
    from atlantis_ds.train.jobs import arm_job, training_summary
    from atlantis_ds.train.trainer import fit

    if part[1] == 1:
        _weigh(recipe, folder, ranks, force)
    elif ranks.is_main:
        refuse_other_data(recipe, folder)
    examples = load_examples(folder)
    _refuse_bad_arms(recipe, folder, examples, force)
    # Seeds outside, arms inside: a comparison that is cut off has all arms for the seeds it came to.
    trainings = [(seed, arm) for seed in recipe.seeds for arm in recipe.arms]
    trained: list[Trained] = []
    for seed, arm in trainings[part[0] - 1 :: part[1]]:
        leave_if_asked(folder, ranks, f"before {arm} with seed {seed}")
        job = arm_job(recipe, folder, examples, arm, force, seed)
        with claimed(folder, f"train-{job.name}", ranks):
            fit(recipe, folder, examples, job, ranks)
            metrics = evaluate_arm(recipe, folder, job.name, ranks)
        if ranks.is_main and part[1] == 1:
            predicted = read_table(folder.evaluation(job.name) / "predictions.parquet")[0]["predicted"].to_pylist()
            summary = training_summary(folder, job.name)
            trained.append(Trained(arm, seed, predicted, metrics, summary["seconds"], summary.get("hardware", "")))
            comparison = compare_arms(
                recipe, folder, [example.gold or example.label for example in examples.test], trained
            )
    if ranks.is_main:
        if part[1] == 1:
            console.print(comparison_table(comparison))
            console.print(f"comparison: {folder.root / 'compare'}")
        else:
            console.print(
                f"compare: part {part[0]} of {part[1]} is done; when all are, `compare` without --part writes the table"
            )
    ranks.barrier()


def evaluate(recipe: Recipe, folder: RunFolder, ranks: Ranks, arms: list[str]) -> None:
    """Write ``eval/ARM/`` for each arm, and the table of these and all that were evaluated before; print it."""
    from atlantis_ds.evaluate.predict import evaluate as evaluate_arm
    from atlantis_ds.evaluate.predict import finished_evaluation
    from atlantis_ds.evaluate.report import comparison_table, write_comparison
    from atlantis_ds.train.card import write_cards
    from atlantis_ds.train.jobs import training_summary

    if unknown := [arm for arm in arms if arm not in recipe.arms]:
        raise InputError(f"--arm {unknown[0]}: no such arm; the recipe has {', '.join(recipe.arms)}")
    if ranks.is_main:
        refuse_other_data(recipe, folder)
    for arm in arms:
        leave_if_asked(folder, ranks, f"before the evaluation of {arm}")
        metrics = evaluate_arm(recipe, folder, arm, ranks)
        if ranks.is_main:
            write_cards(folder.model(arm), training_summary(folder, arm), metrics, recipe.evaluate.checkpoint)
    if ranks.is_main:
        rows = [
            {**found, "arm": arm, "train_examples_per_s": training_summary(folder, arm)["examples_per_s"]}
            for arm in recipe.arms
            if (found := finished_evaluation(recipe, folder, arm))
        ]
        write_comparison(folder.root, rows)
        console.print(comparison_table(rows))
    ranks.barrier()
