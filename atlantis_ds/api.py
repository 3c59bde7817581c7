"""The Python interface, for notebooks and other trainers: each function does what a command does, but writes no files.

Bad input raises ``atlantis_ds.errors.InputError``: one line that says what is wrong and what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlantis_ds.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset


def weights_from_scores(
    scores: str | Path | Mapping[str, Any] | pa.Table, labels: Any = None, *, seed: int = 0, **options: Any
) -> np.ndarray:
    """Weights from scores, as ``merge`` computes them.

    Args:
        scores: a run folder, whose examples, labels and seed are then used; ``posterior`` also uses the pairs of given
            and gold labels in its dev split. Or columns with the names used in score shards, as a mapping of arrays or
            a pyarrow Table: ``logp_large``, ``logp_small``, ``logp_reference`` (float64 [n], natural log, sums over a
            target's tokens), with ``length="mean"`` also ``tokens_*`` (int [n]), with ``eos=True`` also ``eos_*``
            (float64 [n]). ``formula="posterior"`` and ``calibrate="label_set"`` use ``label_set_logp_*`` and the like:
            [n, K], one number per label. Only the models of the formula are needed; ``posterior`` needs the reference,
            and uses the base ratio as evidence if all three models are given.
        labels: int or str [n], the label of each example; together with a label set, its index in the set. None if no
            option uses labels.
        seed: for ``shuffled`` weights, and for the bootstrap and the sample of ``posterior``; not with a run folder.
        options: keys of the recipe's ``weights`` section (``formula``, ``power``, ``scope``, …). Default: the run's own
            or, without a run folder, the defaults of the section for any task.

    Returns:
        float64 [n], mean 1, in the order of the scores.

    Raises:
        InputError: an option is unknown or cannot work; a column is missing, not finite, or has the wrong shape; or
            ``merge`` would refuse the scores of the run folder.
    """
    if isinstance(scores, str | Path):
        if labels is not None or seed:
            raise InputError("labels and seed: a run folder has its own")
        return _weights_of_run(scores, options)
    if seed < 0:
        raise InputError(f"seed: {seed} is below 0")
    from atlantis_ds.config.loading import weights_section
    from atlantis_ds.weights.columns import scores_of_columns
    from atlantis_ds.weights.formulas import log_weights, stabilise

    section = weights_section(options)
    found = scores_of_columns(scores, labels, section)
    return stabilise(log_weights(found, section, seed), found.labels, section)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _weights_of_run(root: str | Path, options: Mapping[str, Any]) -> np.ndarray:
    from atlantis_ds.data.examples import load_examples
    from atlantis_ds.run import open_run
    from atlantis_ds.weights.arms import read_log_weights
    from atlantis_ds.weights.formulas import stabilise

    run = open_run(root, [f"weights.{key}={json.dumps(value, default=_plain)}" for key, value in options.items()])
    examples, section = load_examples(run.folder), run.recipe.weights
    return stabilise(read_log_weights(run, examples, section).values, examples.train.codes, section)


def diagnose(
    weights: str | Path | Sequence[float] | np.ndarray, labels: Sequence[str] | None = None, gold: Any = None
) -> dict[str, Any]:
    """Whether weights can be trusted.

    Args:
        weights: a run folder, for the diagnosis by ``merge``; or weights, float64 [n], at least 0 and not all 0; the
            diagnosis is of these weights divided by their mean.
        labels: str [n], the labels to train on, for the class shares; None for responses. Not with a run folder.
        gold: str or None [n], the true labels, or None where they are unknown; needs ``labels``.

    Returns:
        for a run folder the contents of ``diagnosis.json``; for weights the part that can be computed from them. See
        ``weights.diagnostics.diagnose`` for the keys; ``warnings`` are plain sentences.

    Raises:
        InputError: the run has no weights, or they do not belong to its scores; lengths differ; or weights are invalid.
    """
    if isinstance(weights, str | Path):
        from atlantis_ds.data.examples import load_examples
        from atlantis_ds.run import open_run
        from atlantis_ds.weights.page import read_diagnosis

        if labels is not None or gold is not None:
            raise InputError("labels and gold: a run folder has its own")
        folder = open_run(weights).folder
        return read_diagnosis(folder, load_examples(folder))[1]
    return _diagnosis_of_weights(weights, labels, gold)


def _diagnosis_of_weights(weights: Any, labels: Sequence[str] | None, gold: Any) -> dict[str, Any]:
    import numpy as np

    from atlantis_ds.data.rows import label_text
    from atlantis_ds.weights import diagnostics
    from atlantis_ds.weights.columns import no_gaps, texts_or_numbers
    from atlantis_ds.weights.facts import WeightFacts

    try:
        values = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 1 or not np.isfinite(values).all() or not (values >= 0).all() or not values.any():
        raise InputError("weights: they must be numbers [n], finite, at least 0 and not all 0")
    scaled = values / values.max()  # whose mean does not overflow
    if not math.isclose(scaled.mean() * values.max(), 1):
        values = scaled / scaled.mean()
    if gold is not None and labels is None:
        raise InputError("gold: give `labels`, too: both are needed to know which labels are right")
    found = {"labels": labels, "gold": gold}
    lists = {name: texts_or_numbers(name, given) for name, given in found.items() if given is not None}
    for name, given in lists.items():
        if len(given) != len(values):
            raise InputError(f"{name}: {len(given)} for {len(values)} weights")
    facts = WeightFacts()
    if "labels" in lists:
        known, *true = ([label_text(label) for label in given] for given in lists.values())
        names, codes = np.unique(no_gaps("labels", known), return_inverse=True)
        right = None
        if true:
            right = np.array([-1 if gold is None else int(label == gold) for label, gold in zip(known, true[0])])
        facts = WeightFacts(codes, names.tolist(), correct=right)
    with np.errstate(divide="ignore"):
        log_weight = np.maximum(np.log(values), -1e4)
    return diagnostics.diagnose(values, log_weight, facts)


def compare_runs(
    runs: str | Path | Mapping[str, str | Path | Sequence[str | Path]],
    *,
    peers: Sequence[str] | None = None,
    upper: str | None = None,
    metric: str = "macro_f1",
    negative_label: str | None = None,
    answer: str | None = None,
) -> dict[str, Any]:
    """Differences between arms with 95% intervals, as ``compare`` computes them.

    Args:
        runs: a run folder, for all its evaluated arms; the other arguments then come from its recipe. Or for each arm
            its predictions, one file per seed, in the same order for every arm: JSON Lines, JSON, CSV, TSV, Parquet or
            Arrow with ``id``, ``gold`` and ``predicted``, or folders ``eval/ARM`` of run folders. All must have the
            same test examples.
        peers: the arms to compare with; default: the first arm.
        upper: the arm trained on gold labels, which shows how much can be gained (``gap_closed``).
        metric: ``macro_f1`` (directions collapsed), or for responses ``exact_match`` or ``token_f1``.
        negative_label: the label that says "none of the others"; macro-F1 does not count it as a class.
        answer: for responses, a regular expression as ``evaluate.answer`` in a recipe: only the text that its group
            captures is compared.

    Returns:
        see ``evaluate.compare.comparison``; ``seconds`` is None for files.

    Raises:
        InputError: nothing is evaluated, or on other test examples than the run has now; an arm or metric is unknown;
            ``answer`` captures nothing; or a file is missing, broken, or has other test examples.
    """
    from atlantis_ds.config.loading import refuse_bad_answer
    from atlantis_ds.evaluate.compare import FIGURES, comparison, peers_of
    from atlantis_ds.evaluate.outcomes import apart_of, evaluated_arms, metric_of, read_arms
    from atlantis_ds.metrics import label_apart

    if isinstance(runs, str | Path):
        from atlantis_ds.data.examples import load_examples
        from atlantis_ds.evaluate.predict import gold_of_test
        from atlantis_ds.run import open_run

        run = open_run(runs)
        recipe, examples = run.recipe, load_examples(run.folder)
        of_recipe = (*peers_of(recipe), metric_of(recipe), apart_of(recipe, examples))
        ids, gold = examples.test.ids.to_pylist(), gold_of_test(examples)
        return comparison(gold, evaluated_arms(run, ids, gold), *of_recipe)
    if metric not in FIGURES:
        raise InputError(f"metric: {metric!r} is not one of {', '.join(FIGURES)}")
    chosen = [*runs][:1] if peers is None else [*peers]
    if unknown := [arm for arm in (*chosen, upper) if arm is not None and arm not in runs]:
        raise InputError(f"peers and upper: there is no arm {unknown[0]!r}; the arms are {', '.join(runs)}")
    if answer is not None:
        refuse_bad_answer(answer)
    gold, trained = read_arms(runs, metric, negative_label, answer)
    if negative_label is not None and negative_label not in gold:
        raise InputError(f"negative_label: no gold answer is {negative_label!r}; leave it out, or write it as they do")
    return comparison(gold, trained, chosen, upper, metric, label_apart(set(gold), negative_label))


def label_log_likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    labels: Sequence[str],
    *,
    eos: bool = False,
    dtype: str = "auto",
    tokens_per_batch: int = 4096,
) -> np.ndarray:
    """log p(label | prompt) of every label after every prompt, by the same function as in scoring, training and
    ranking.

    Prompt and label are tokenised separately. A newline is added after a causal prompt; the texts must not contain it.
    Fast ways are used if a check on a few of the prompts finds them correct for this model.

    Args:
        model: a transformers model in memory, causal or encoder-decoder, bare or wrapped by peft; it is not moved or
            changed. Or a folder or Hugging Face id, which is loaded onto the first GPU, or the CPU.
        tokenizer: its tokenizer; with a folder or id, None loads the model's own.
        prompts: n texts.
        labels: K different texts.
        eos: include the end-of-sequence token after a label, as ranking does.
        dtype: of a loaded model, as ``score.dtype`` in a recipe: ``auto``, ``float32`` or ``bfloat16``.
        tokens_per_batch: token budget of one batch, including padding.

    Returns:
        float64 [n, K], natural log, sums over a label's tokens; the LM head always computes in fp32.

    Raises:
        InputError: there is no prompt or label; one has no tokens or is too long; labels have the same tokens; a model
            or tokenizer cannot be loaded; or the model's scores change with the padding.
    """
    from atlantis_ds.lm.label_set import score_label_set

    if tokenizer is None and not isinstance(model, str | Path):
        raise InputError("tokenizer: a model in memory needs its tokenizer beside it")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype: {dtype!r} is none of auto, float32, bfloat16")
    if isinstance(model, str | Path):
        import torch

        from atlantis_ds.config.schema import Model
        from atlantis_ds.lm.load import dtype_on, load_scorer, load_tokenizer

        source = Model(model_name_or_path=str(model))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
        model = load_scorer(source, dtype_on(dtype, device), device)
    sums = score_label_set(model, tokenizer, prompts, labels, tokens_per_batch)
    return sums.sum(axis=2) if eos else sums[:, :, 0]


def weighted_dataset(run: str | Path, dataset: Dataset | None = None, *, messages: bool = False) -> Dataset:
    """A dataset with the weights of a run in a column ``weight``.

    Args:
        run: a run folder, after ``merge``.
        dataset: rows with a column ``id`` to join by, in any order; all other columns are kept. None: the run's own
            training examples.
        messages: for the run's own examples: one column ``messages`` instead of ``prompt`` and ``target``, with a user
            turn and an assistant turn, or with the turns of the chat.

    Returns:
        the rows of ``dataset`` in their order, with ``weight`` (float64, mean 1); without ``dataset``, the columns
        ``id``, ``prompt``, ``target`` (text, or for chats lists of {role, content} turns) and ``weight``.

    Raises:
        InputError: the run has no weights, or the ids of the dataset differ from those of the training examples.
    """
    from datasets import Dataset

    from atlantis_ds.run import open_run
    from atlantis_ds.weights.joined import weighted_table, weights_of_ids

    folder = open_run(run).folder
    if dataset is None:
        return Dataset(weighted_table(folder, messages))
    if messages or not isinstance(dataset, Dataset):
        raise InputError(
            "dataset: give a datasets.Dataset (Dataset.from_pandas makes one), and no `messages` beside it"
        )
    if "id" not in dataset.column_names or "weight" in dataset.column_names:
        raise InputError(f"dataset: it needs a column `id`, and no `weight`; it has {', '.join(dataset.column_names)}")
    return dataset.add_column("weight", weights_of_ids(folder, dataset["id"]))
