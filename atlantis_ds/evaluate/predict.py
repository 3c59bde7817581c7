"""Predicts a label, or generates a response, for every test example; distributed over ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds.config.schema import Evaluate, Model
from atlantis_ds.data.examples import Examples, load_examples
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.evaluate.answers import response_metrics
from atlantis_ds.evaluate.generate import generate_greedy
from atlantis_ds.evaluate.report import write_evaluation
from atlantis_ds.files import fingerprint, finished, read_json
from atlantis_ds.lm.check import check_generation, check_scoring, sample_rows
from atlantis_ds.lm.encode import Encoded, Encoder, last_turn
from atlantis_ds.lm.likelihood import score_choices, score_pairs
from atlantis_ds.lm.load import dtype_on, give_memory_back, load_config, load_scorer, load_tokenizer, model_identity
from atlantis_ds.lm.staging import node_copy
from atlantis_ds.lm.tokens import Tokens, encode_split
from atlantis_ds.lm.ways import Ways
from atlantis_ds.metrics import UNMAPPED, metrics
from atlantis_ds.progress import Steps
from atlantis_ds.run import Run

Advance = Callable[[int], None]
VERSION = 2
"""Must be raised if the same model and examples give different predictions or figures than before."""
LOGGED = ("macro_f1", "official", "accuracy", "perplexity", "exact_match", "token_f1", "n")
BLOCK = 8192
"""Number of examples whose tokens are in memory at one time."""


def evaluate(run: Run, arm: str) -> dict[str, Any]:
    """Write ``eval/ARM/``: predictions and metrics; for label sets a confusion matrix and the official scorer's file.

    Returns:
        the contents of ``metrics.json``.

    Raises:
        InputError: the arm is not trained yet, or the run has no test examples.
    """
    recipe, folder, ranks = run.recipe, run.folder, run.ranks
    examples = load_examples(folder)
    if not len(examples.test):
        raise InputError("data.test: the recipe names no test examples, so nothing can be evaluated")
    model = trained_model(run, arm)
    info, mark = ranks.broadcast(_inputs(run, model, examples.fingerprint) if ranks.is_main else None)
    results = folder.evaluation(arm)
    if ranks.broadcast(finished(results / "metrics.json", mark)):
        run.say(f"evaluate {arm}: already finished")
        found: dict[str, Any] = read_json(results / "metrics.json")
        return found

    tokens = encode_split(run, examples, "test", model)
    encoder = Encoder(load_tokenizer(model), load_config(model), examples.labels, examples.chat)
    samples = [tokens[row] for row in sample_rows(tokens.lengths)]
    generates = examples.labels is None or recipe.evaluate.method == "generate"
    lm, ways = load_checked(run, model, encoder, samples, generates)
    run.say(f"evaluate {arm}: {ways}")
    mine = np.arange(len(examples.test))[ranks.rank :: ranks.world_size]
    with Steps(f"evaluate {arm}", len(mine), "examples", ranks.is_main, every=max(1, len(mine) // 5)) as steps:
        blocks = [
            _predict(lm, encoder, examples, tokens, mine[start : start + BLOCK], recipe.evaluate, ways, steps.advance)
            for start in range(0, len(mine), BLOCK)
        ]
    del lm
    give_memory_back(ranks.device)
    parts = ranks.gather((mine, pa.concat_tables(blocks) if blocks else None))
    figures: dict[str, Any] = {}
    if ranks.is_main:
        order = np.argsort(np.concatenate([rows for rows, _ in parts]), kind="stable")
        table = pa.concat_tables([table for _, table in parts if table is not None]).take(pa.array(order))
        speed = round(steps.rate * ranks.world_size, 2)
        dtype = dtype_on(recipe.evaluate.dtype, ranks.device)
        about = {"fingerprint": mark, "arm": arm, "examples_per_s": speed, "dtype": dtype, **info}
        figures = _write(run, examples, table, results, about)
    shared: dict[str, Any] = ranks.broadcast(figures)
    return shared


def trained_model(run: Run, arm: str) -> Model:
    """The model of an arm that ``evaluate.checkpoint`` names. Raises InputError: the arm is not trained."""
    path = run.folder.model(arm) / run.recipe.evaluate.checkpoint
    trained = (run.folder.model(arm) / "training.json").exists()
    if trained and not path.is_dir() and path.name == "best":
        raise InputError(f"evaluate.checkpoint: best: {arm} was trained without a dev loss, so it has no `best` model")
    if not trained or not path.is_dir():
        stage = f"train --arm {arm}" if arm in run.recipe.arms else "compare"
        raise InputError(f"{path}: no trained model; run `{stage}` first")
    return Model(model_name_or_path=str(path))


def load_checked(run: Run, model: Model, encoder: Encoder, samples: list[Encoded], generates: bool) -> tuple[Any, Ways]:
    """The model in eval mode on this rank's device, and the fast ways that agree with the plain way.

    Args:
        encoder: its label set, if any, is what will be ranked.
        samples: a few of the examples; see `sample_rows`.
        generates: whether text will be generated.
    """
    device = run.ranks.device
    lm = load_scorer(model, dtype_on(run.recipe.evaluate.dtype, device), device, node_copy(run, model))
    ways = check_scoring(lm, samples, encoder.label_set, samples[0].eos, prefix=True)
    if generates:
        ways = check_generation(lm, [pair.prompt for pair in samples], samples[0].eos, ways)
    return lm, ways


def finished_evaluation(run: Run, arm: str) -> dict[str, Any] | None:
    """The contents of the arm's ``metrics.json``, if its model was evaluated with this recipe; else None."""
    folder = run.folder
    path, results = folder.model(arm) / run.recipe.evaluate.checkpoint, folder.evaluation(arm) / "metrics.json"
    if not (results.exists() and path.is_dir() and (folder.model(arm) / "training.json").exists()):
        return None
    examples = read_json(folder.examples_info)["fingerprint"]
    mark = _inputs(run, Model(model_name_or_path=str(path)), examples)[1]
    return read_json(results) if finished(results, mark) else None


def gold_of_test(examples: Examples) -> list[str]:
    """The right answer of each test example: its gold label or response, else its target; for a chat the last turn."""
    gold: list[str] = pc.coalesce(examples.test.golds, examples.test.targets).to_pylist()
    return [last_turn(text) for text in gold] if examples.chat else gold


def _inputs(run: Run, model: Model, examples: str) -> tuple[dict[str, Any], str]:
    """The inputs of an evaluation and their fingerprint, with ``examples``, the fingerprint of the examples."""
    info = {"model": model_identity(model), "settings": run.recipe.evaluate.model_dump()}
    return info, fingerprint([VERSION, info, examples])


def _predict(
    lm: Any,
    encoder: Encoder,
    examples: Examples,
    tokens: Tokens,
    rows: np.ndarray,
    options: Evaluate,
    ways: Ways,
    advance: Advance,
) -> pa.Table:
    """One row per example: ``predicted``; for responses also ``log_likelihood`` and ``tokens`` of the target."""
    if examples.labels is None:
        return _responses(lm, encoder, examples, tokens, rows, options, ways, advance)
    prompts = [tokens[row].prompt for row in rows.tolist()]
    predict = rank_labels if options.method == "rank" else generate_labels
    labels = predict(lm, encoder, prompts, examples.labels, options, ways, advance)
    return pa.table({"predicted": pa.array(labels, pa.string())})


def _responses(
    lm: Any,
    encoder: Encoder,
    examples: Examples,
    tokens: Tokens,
    rows: np.ndarray,
    options: Evaluate,
    ways: Ways,
    advance: Advance,
) -> pa.Table:
    pairs = [tokens[row] for row in rows.tolist()]
    pad = encoder.tokenizer.eos_token_id
    sums = score_pairs(lm, pairs, pad, options.tokens_per_batch, ways=ways).sum(dim=1)
    prompts = [pair.prompt for pair in pairs]
    if examples.chat:  # everything before the last turn, even if several turns are learned
        test = examples.test
        prompts = [encoder.last_prompt(test.prompts[row].as_py(), test.targets[row].as_py()) for row in rows.tolist()]
    predicted = generated_texts(lm, encoder, prompts, {pair.eos for pair in pairs}, options, ways, advance)
    return pa.table(
        {
            "predicted": pa.array([text.strip() for text in predicted], pa.string()),
            "log_likelihood": pa.array(sums.tolist(), pa.float64()),
            "tokens": pa.array(tokens.targets[rows], pa.int64()),
        }
    )


def _write(run: Run, examples: Examples, table: pa.Table, results: Path, about: dict[str, Any]) -> dict[str, Any]:
    ids, gold = examples.test.ids.to_pylist(), gold_of_test(examples)
    columns: dict[str, Any] = {"id": ids, "gold": gold, **table.to_pydict()}
    predicted = columns["predicted"]
    if examples.labels is not None:
        figures = metrics(examples.labels, ids, gold, predicted, run.recipe.data.negative_label)
    else:
        likelihoods = columns["log_likelihood"], columns["tokens"]
        figures, of_each = response_metrics(ids, gold, predicted, *likelihoods, run.recipe.evaluate.answer)
        columns |= of_each
    written = write_evaluation(results, figures, columns, about, examples.labels is not None)
    confusion = results / "confusion.png"
    picture = {"picture": str(confusion)} if confusion.exists() else {}
    run.log(event="evaluation", arm=results.name, **{k: figures.get(k) for k in LOGGED if k in figures}, **picture)
    return written


def rank_labels(
    lm: Any,
    encoder: Encoder,
    prompts: list[list[int]],
    labels: list[str],
    options: Evaluate,
    ways: Ways,
    advance: Advance,
) -> list[str]:
    """The label with the greatest log-likelihood, including the end-of-sequence token, for each prompt."""
    sums = label_sums(lm, encoder, prompts, options, ways, advance)
    return [labels[index] for index in sums.argmax(axis=1)]


def label_sums(
    lm: Any, encoder: Encoder, prompts: list[list[int]], options: Evaluate, ways: Ways, advance: Advance
) -> np.ndarray:
    """Log-likelihood of each label of the set, with the end-of-sequence token, after each prompt: float64 [n, K].

    Raises:
        RunError: one is not finite.
    """
    assert encoder.label_set is not None
    sums = score_choices(
        lm,
        prompts,
        encoder.label_set,
        encoder.tokenizer.eos_token_id,
        options.tokens_per_batch,
        lambda count, _: advance(count),
        ways=ways,
    )
    found: np.ndarray = sums.sum(dim=2).numpy()
    if len(bad := found[~np.isfinite(found)]):
        raise RunError(f"the log-likelihood of a label is {bad[0]}; the model diverged during training")
    return found


def generate_labels(
    lm: Any,
    encoder: Encoder,
    prompts: list[list[int]],
    labels: list[str],
    options: Evaluate,
    ways: Ways,
    advance: Advance,
) -> list[str]:
    """Greedy generation; text that is not a label, ignoring case and white space, gives ``UNMAPPED``."""
    known = {_normal(label): label for label in labels}
    texts = generated_texts(lm, encoder, prompts, set(), options, ways, advance)
    return [known.get(_normal(text), UNMAPPED) for text in texts]


def generated_texts(
    lm: Any,
    encoder: Encoder,
    prompts: list[list[int]],
    ends: Collection[int],
    options: Evaluate,
    ways: Ways,
    advance: Advance,
) -> list[str]:
    """What the model writes after each prompt, greedily, up to the tokenizer's end token or one of ``ends``."""
    end = encoder.tokenizer.eos_token_id
    budget = options.tokens_per_batch, options.max_new_tokens
    new = generate_greedy(lm, prompts, {end, *ends}, end, *budget, advance, ways)
    texts: list[str] = encoder.tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def _normal(text: str) -> str:
    return "".join(text.split()).casefold()
