"""The stages of a run, in order, each on all ranks: examples → reference → scores → weights → arms → figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from atlantis_ds.cluster.claim import claimed
from atlantis_ds.cluster.preemption import leave_if_asked
from atlantis_ds.config.rounds import OF_A_ROUND
from atlantis_ds.data.examples import SPLITS, Examples, load_examples
from atlantis_ds.data.prepare import prepare as prepare_examples
from atlantis_ds.data.prepare import refuse_other_data
from atlantis_ds.errors import InputError
from atlantis_ds.files import finished, read_json, write_text
from atlantis_ds.progress import console
from atlantis_ds.run import Run

if TYPE_CHECKING:
    from atlantis_ds.evaluate.compare import Trained


def prepare(run: Run) -> None:
    """Write ``examples/`` and ``tokens/``, and the base models that the recipe builds itself."""
    try:
        with claimed(run.folder, "prepare", run.ranks):
            if run.ranks.is_main:
                _prepare_examples(run)
            run.ranks.barrier()
    except InputError:
        for empty in (run.folder.root / "claims", run.folder.root) if run.ranks.is_main else ():
            with contextlib.suppress(OSError):  # bad input leaves no empty folders behind; other folders stay
                empty.rmdir()
        raise
    _encode_ahead(run, load_examples(run.folder))


def _prepare_examples(run: Run) -> None:
    recipe, folder = run.recipe, run.folder
    judges = []
    if recipe.data.on_too_long == "drop":
        from functools import partial

        from atlantis_ds.lm.load import model_source
        from atlantis_ds.lm.tokens import too_long

        judges = [partial(too_long, model_source(recipe, folder, name)) for name in ("large", "small", "reference")]
    examples = prepare_examples(recipe, folder, judges)
    _keep_recipe(run)
    _say_what_was_read(examples)
    _say_equal_by_construction(run, examples)
    for name in ("large", "small"):
        if getattr(recipe.models, name).scratch:
            from atlantis_ds.demo.scratch import build_scratch_model

            build_scratch_model(recipe, folder, name, examples.labels or [], show=True)


def _say_what_was_read(examples: Examples) -> None:
    info, labels = examples.info, examples.labels
    sizes = ", ".join(f"{info['counts'][split]} {split}" for split in SPLITS)
    console.print(f"prepare: {sizes} examples" + (f", {len(labels)} labels" if labels else ""))
    for reason, count in info["dropped"].items():
        split, other = reason.split("_", 1)[0], reason.rsplit("_", 1)[1]
        if count and reason.endswith("too_long"):
            console.print(f"prepare: left out {count} rows of {split} that are longer than a model's context")
        elif count:
            console.print(f"prepare: left out {count} rows of {split} whose text is also in {other}")
    if info["unlabelled"]:
        what = "no label (empty, null, or -1 unless data.labels lists it as a class)" if labels else "no response"
        console.print(f"prepare: left out {info['unlabelled']} rows of train that have {what}")
    for split, kinds in info["bad_rows"].items():
        told = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        console.print(f"prepare: left out {sum(kinds.values())} rows of {split} that cannot be read: {told}")
    for note in info["notes"]:
        console.print(f"prepare: {note}")


def _say_equal_by_construction(run: Run, examples: Examples) -> None:
    """With ``per_label``, a label's only example has weight 1, whatever its scores; this is known before training."""
    if run.recipe.weights.scope != "per_label" or not examples.labels or not len(examples.train):
        return
    counts = np.bincount(examples.train.codes)
    alone, labels = int((counts == 1).sum()), int((counts > 0).sum())
    if alone == labels:
        console.print(
            "prepare: Warning: weights.scope: per_label, and no label has two training examples: all weights will be "
            "1, which is plain SFT. Set weights.scope: global."
        )
    elif alone:
        console.print(
            f"prepare: {alone} of {labels} labels have only one training example; with per_label, its weight is 1"
        )


def _encode_ahead(run: Run, examples: Examples) -> None:
    """Encode all splits for the three models, so that examples too long for one of them are found before training.

    If a tokenizer is not available here (such as on a login node), the stage that loads the model encodes the splits.
    """
    from atlantis_ds.lm.load import load_config, load_tokenizer, model_source
    from atlantis_ds.lm.tokens import encode_split

    for name in ("large", "small", "reference"):
        chat = name == "reference" and run.recipe.models.reference.chat_template
        missing = None
        if run.ranks.is_main:
            try:
                model = model_source(run.recipe, run.folder, name)
                load_tokenizer(model)
                load_config(model)
            except InputError as error:
                missing = str(error)
        if missing := run.ranks.broadcast(missing):
            run.say(f"prepare: models.{name} is not available here, so its tokens will be computed later ({missing})")
            continue
        model = model_source(run.recipe, run.folder, name)
        splits = {"large": SPLITS, "small": ("train",), "reference": ("train", "dev")}[name]
        for split in splits:
            encode_split(run, examples, split, model, as_turn=chat)


def _keep_recipe(run: Run) -> None:
    text = yaml.safe_dump(run.recipe.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)
    write_text(run.folder.recipe, text)


def train(run: Run, arm: str, force: bool, part: tuple[int, int] = (1, 1), of_round: int | None = None) -> None:
    """Train one arm, or all folds of the ``reference``, into ``model/``.

    Args:
        part: (I, N): for a reference, part I of N of its folds, counted from 1, for N jobs that share the work. With N
            > 1, the previous round must be finished.
        of_round: for a reference, only this round (and its weights for the next one, unless it is a part).
    """
    if of_round and of_round > run.recipe.models.reference.rounds:
        raise InputError(f"--round {of_round}: models.reference.rounds is {run.recipe.models.reference.rounds}")
    if of_round and of_round < run.recipe.models.reference.rounds:
        return _reference_round(run.of_round(of_round), force, part)
    from atlantis_ds.train.jobs import arm_job, reference_jobs
    from atlantis_ds.train.trainer import fit

    if run.ranks.is_main:
        refuse_other_data(run.recipe, run.folder)
    if arm == "reference" and not run.folder.round and not of_round and part[1] == 1:
        for earlier in range(1, run.recipe.models.reference.rounds):
            _reference_round(run.of_round(earlier), force)
    examples = load_examples(run.folder)
    _refuse_bad_recipe(run, examples, run.recipe.arms if arm == "reference" else [arm])
    if arm == "reference":
        jobs = reference_jobs(run, examples)[part[0] - 1 :: part[1]]
    else:
        jobs = [arm_job(run, examples, arm, force)]
    for job in jobs:
        with claimed(run.folder, f"train-{job.name}", run.ranks):
            fit(run, examples, job)


def _reference_round(run: Run, force: bool, part: tuple[int, int] = (1, 1)) -> None:
    """A round before the last: its folds, scores, and weights for the next one; for a ``part`` only its folds.

    These weights do not depend on the recipe's own weights, which may change without new training, nor on the base
    models.
    """
    from dataclasses import replace

    from atlantis_ds.lm.load import model_source

    train(run, "reference", force, part)
    if part[1] > 1:
        return
    start = model_source(run.recipe, run.folder, "reference")
    models = run.recipe.models.model_copy(update={"large": start, "small": start})
    weights = OF_A_ROUND[run.recipe.task]
    run = replace(run, recipe=run.recipe.model_copy(update={"models": models, "weights": weights}))
    score(run)
    merge(run)


def score(run: Run, part: tuple[int, int] = (1, 1)) -> None:
    """Write ``scores/``: part I of N of the shards, counted from 1."""
    from atlantis_ds.weights.score import score as score_shards

    if run.ranks.is_main:
        refuse_other_data(run.recipe, run.folder)
        _refuse_other_references(run)
    with claimed(run.folder, f"score-{part[0]}-of-{part[1]}", run.ranks):
        score_shards(run, part)
    if run.ranks.is_main and not run.folder.round:
        _keep_recipe(run)  # `diagnose` reads from it how the scores were computed


def _refuse_other_references(run: Run) -> None:
    """Refuse references that were trained with other settings or folds: they may have seen what they are to score."""
    from atlantis_ds.train.jobs import reference_jobs

    examples = load_examples(run.folder)
    for job in reference_jobs(run, examples):
        done = run.folder.model(job.name) / "training.json"
        if done.exists() and not finished(done, job.fingerprint(run, examples)):
            raise InputError(
                f"{done.parent}: trained with other data or settings than this recipe's; choose another `name`, or "
                "remove it and run `train --arm reference`"
            )


def merge(run: Run) -> None:
    """Write ``weights.parquet``, ``weights.json`` and ``weights.png``, on rank 0."""
    if run.ranks.is_main:
        from atlantis_ds.weights.diagnostics import diagnosis_table
        from atlantis_ds.weights.merge import merge as merge_scores

        console.print(diagnosis_table(merge_scores(run)))
    run.ranks.barrier()


def run(run: Run, force: bool) -> None:
    """Run all stages, skip those that are finished and valid, and print the table of arms."""
    from atlantis_ds.weights.diagnostics import diagnosis_table

    weighted = _weigh(run, force)
    examples = load_examples(run.folder)
    _refuse_bad_arms(run, examples, force)
    for arm in run.recipe.arms:
        train(run, arm, force)
    if len(examples.test):
        evaluate(run, list(run.recipe.arms))
    else:
        run.say("evaluate: the recipe names no test examples (data.test), so the arms are not compared")
    if run.ranks.is_main and weighted:
        # Shown before training, when the user can still stop, and again next to the figures that they explain.
        console.print(diagnosis_table(read_json(run.folder.weights_info)))
        console.print(f"weights: {run.folder.weights_plot}")


def _weigh(run: Run, force: bool) -> bool:
    """Run all stages before the arms; False if every arm has uniform weights, so that no scores are needed."""
    prepare(run)
    _refuse_bad_recipe(run, load_examples(run.folder), run.recipe.arms)
    if run.recipe.weighted:
        train(run, "reference", force)
        score(run)
        merge(run)
    return run.recipe.weighted


def _refuse_bad_recipe(run: Run, examples: Examples, arms: Iterable[str]) -> None:
    """Refuse what the examples show before any training starts, not hours later: these arms could not be trained or
    evaluated."""
    from atlantis_ds.train.jobs import refuse_missing_gold

    recipe, train = run.recipe, run.recipe.train
    options = {arm: recipe.arms[arm] for arm in arms if arm in recipe.arms}
    for key, asked in (
        ("early_stopping_patience", train.early_stopping_patience is not None),
        ("metric_for_best_model", train.metric_for_best_model != "loss"),
    ):
        if asked and not len(examples.dev):
            raise InputError(f"train.{key}: there are no dev examples; set data.dev or data.dev_size")
    if recipe.evaluate.checkpoint == "best":
        if not len(examples.dev):
            raise InputError(
                "evaluate.checkpoint: best: there are no dev examples to choose the model by; set data.dev or "
                "data.dev_size"
            )
        for arm in (arm for arm, of_arm in options.items() if of_arm.dev):
            raise InputError(
                f"evaluate.checkpoint: best: arm {arm} trains on the dev examples that would choose its model"
            )
    if examples.labels and recipe.evaluate.method == "generate":
        from atlantis_ds.data.ingest import equal_but_for_case

        for same in equal_but_for_case(examples.labels):
            raise InputError(
                f"evaluate.method: generate: the labels {', '.join(map(repr, same))} differ only in case or spaces, "
                "which are ignored when a text is mapped to a label; rename one, or use method: rank"
            )
    if recipe.task == "response":
        from atlantis_ds.evaluate.answers import gold_answers
        from atlantis_ds.evaluate.predict import gold_of_test

        gold_answers(examples.test.ids.to_pylist(), gold_of_test(examples), recipe.evaluate.answer)
    for arm, of_arm in options.items():
        refuse_missing_gold(examples, arm, of_arm)


def _refuse_bad_arms(run: Run, examples: Examples, force: bool) -> None:
    """Refuse an arm whose weights cannot be used before the first arm is trained."""
    from atlantis_ds.train.jobs import arm_job

    for arm in run.recipe.arms:
        arm_job(run, examples, arm, force)


def compare(run: Run, part: tuple[int, int], force: bool) -> None:
    """Train and evaluate every arm with every seed on one set of scores; write ``compare/`` and print the table.

    Args:
        part: (I, N): part I of N of the training runs, counted from 1, for N jobs that share the work. With N > 1, the
            weights must exist, and nothing is compared.
    """
    from atlantis_ds.evaluate.compare_report import comparison_table
    from atlantis_ds.evaluate.outcomes import trained_arm
    from atlantis_ds.evaluate.predict import evaluate as evaluate_arm
    from atlantis_ds.train.jobs import arm_job
    from atlantis_ds.train.trainer import fit

    if part[1] == 1:
        _weigh(run, force)
    elif run.ranks.is_main:
        refuse_other_data(run.recipe, run.folder)
    examples = load_examples(run.folder)
    if not len(examples.test):
        raise InputError("data.test: `compare` needs test examples")
    _refuse_bad_recipe(run, examples, run.recipe.arms)
    _refuse_bad_arms(run, examples, force)
    # Loop over seeds, then arms: an interrupted comparison has all arms for the seeds that are done.
    trainings = [(seed, arm) for seed in run.recipe.seeds for arm in run.recipe.arms]
    trained: list[Trained] = []
    comparison: dict[str, Any] = {}
    for seed, arm in trainings[part[0] - 1 :: part[1]]:
        leave_if_asked(run.folder, run.ranks, f"before {arm} with seed {seed}")
        job = arm_job(run, examples, arm, force, seed)
        with claimed(run.folder, f"train-{job.name}", run.ranks):
            fit(run, examples, job)
            metrics = evaluate_arm(run, job.name)
        if run.ranks.is_main and part[1] == 1:
            trained.append(trained_arm(run, arm, seed, job.name, metrics))
            comparison = _compare(run, examples, trained)
    if run.ranks.is_main:
        if part[1] == 1:
            console.print(comparison_table(comparison))
            console.print(f"comparison: {run.folder.root / 'compare' / 'comparison.html'}")
        else:
            console.print(
                f"compare: part {part[0]} of {part[1]} is done; when all parts are done, `compare` without --part "
                "writes the table"
            )
    run.ranks.barrier()


def _compare(run: Run, examples: Examples, trained: list[Trained]) -> dict[str, Any]:
    from atlantis_ds.evaluate.compare import compare_arms
    from atlantis_ds.evaluate.compare_report import data_facts
    from atlantis_ds.evaluate.outcomes import apart_of, metric_of
    from atlantis_ds.evaluate.predict import gold_of_test

    recipe, gold = run.recipe, gold_of_test(examples)
    data = data_facts(recipe.data, examples)
    return compare_arms(recipe, run.folder, gold, trained, metric_of(recipe), apart_of(recipe, examples), data)


def evaluate(run: Run, arms: list[str]) -> None:
    """Write ``eval/ARM/`` for each arm; write and print the table of these and all arms evaluated before."""
    from atlantis_ds.evaluate.predict import evaluate as evaluate_arm
    from atlantis_ds.evaluate.predict import finished_evaluation
    from atlantis_ds.evaluate.report import comparison_table, write_comparison
    from atlantis_ds.train.card import write_cards
    from atlantis_ds.train.jobs import trained_otherwise, training_summary

    recipe, folder = run.recipe, run.folder
    if unknown := [arm for arm in arms if arm not in recipe.arms]:
        raise InputError(f"--arm {unknown[0]}: no such arm; the recipe has {', '.join(recipe.arms)}")
    if run.ranks.is_main:
        refuse_other_data(recipe, folder)
        for arm in (arm for arm in arms if (folder.model(arm) / "training.json").exists()):
            if other := trained_otherwise(recipe, arm, training_summary(folder, arm)):
                raise InputError(
                    f"{folder.model(arm)}: trained with other settings than this recipe's ({other}); evaluate with "
                    "those, or choose another `name` or remove it, and train again"
                )
    for arm in arms:
        leave_if_asked(folder, run.ranks, f"before the evaluation of {arm}")
        metrics = evaluate_arm(run, arm)
        if run.ranks.is_main:
            write_cards(folder.model(arm), training_summary(folder, arm), metrics, recipe.evaluate.checkpoint)
    if run.ranks.is_main:
        done = {arm: found for arm in recipe.arms if (found := finished_evaluation(run, arm))}
        summaries = {arm: training_summary(folder, arm) for arm in done}
        rows = [
            {**done[arm], "arm": arm, "train_examples_per_s": summaries[arm]["examples_per_s"]}
            for arm in done
            if not trained_otherwise(recipe, arm, summaries[arm])
        ]
        write_comparison(folder.root, rows)
        console.print(comparison_table(rows))
    run.ranks.barrier()
