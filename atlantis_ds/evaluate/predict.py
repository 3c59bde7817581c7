"""Predict a label for every test example, sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.schema import Evaluate, Model, Recipe
from atlantis_ds.data.prepare import load_examples
from atlantis_ds.data.table import Example
from atlantis_ds.errors import InputError
from atlantis_ds.evaluate.metrics import UNMAPPED
from atlantis_ds.evaluate.report import write_evaluation
from atlantis_ds.files import fingerprint, finished, read_json
from atlantis_ds.lm.batch import token_budget_batches
from atlantis_ds.lm.encode import Encoder
from atlantis_ds.lm.likelihood import score_choices
from atlantis_ds.lm.load import load_config, load_scorer, load_tokenizer, model_identity
from atlantis_ds.progress import Steps, console
from atlantis_ds.run_folder import RunFolder

Advance = Callable[[int], None]


def evaluate(recipe: Recipe, folder: RunFolder, arm: str, ranks: Ranks) -> dict[str, Any]:
    """Write ``eval/ARM/``: predictions, metrics, confusion matrix, and a file for the official scorer.

    Returns:
        what stands in ``metrics.json``.

    Raises:
        InputError: the arm is not trained yet.
    """
    examples = load_examples(folder)
    path = folder.model(arm) / recipe.evaluate.checkpoint
    if not (folder.model(arm) / "training.json").exists() or not path.is_dir():
        raise InputError(f"{path}: no trained model; run `train --arm {arm}` first")
    model = Model(model_name_or_path=str(path))
    info, mark = ranks.broadcast(_inputs(recipe, model, examples.fingerprint) if ranks.is_main else None)
    results = folder.evaluation(arm)
    if ranks.broadcast(finished(results / "metrics.json", mark)):
        if ranks.is_main:
            console.print(f"evaluate {arm}: already finished")
        metrics: dict[str, Any] = read_json(results / "metrics.json")
        return metrics

    encoder = Encoder(load_tokenizer(model), load_config(model), recipe.prompt, examples.labels)
    lm = load_scorer(model, recipe.evaluate.dtype, ranks.device)
    mine = examples.test[ranks.rank :: ranks.world_size]
    predict = rank_labels if recipe.evaluate.method == "rank" else generate_labels
    with Steps(f"evaluate {arm}", len(mine), "examples", ranks.is_main, every=max(1, len(mine) // 5)) as steps:
        labels = predict(lm, encoder, mine, recipe.evaluate, steps.advance)
    parts = ranks.gather(list(zip((example.id for example in mine), labels)))
    predicted = dict(pair for part in parts for pair in part)
    metrics = {}
    if ranks.is_main:
        speed = round(steps.rate * ranks.world_size, 2)
        metrics = write_evaluation(
            results,
            examples.task,
            [example.id for example in examples.test],
            [example.gold or example.label for example in examples.test],
            [predicted[example.id] for example in examples.test],
            {
                "fingerprint": mark,
                "arm": arm,
                "examples_per_s": speed,
                **info,
            },
        )
    shared: dict[str, Any] = ranks.broadcast(metrics)
    return shared


def finished_evaluation(recipe: Recipe, folder: RunFolder, arm: str) -> dict[str, Any] | None:
    """What stands in ``metrics.json`` of the arm, where its model was evaluated as this recipe says; else None."""
    path, results = folder.model(arm) / recipe.evaluate.checkpoint, folder.evaluation(arm) / "metrics.json"
    if not (results.exists() and path.is_dir() and (folder.model(arm) / "training.json").exists()):
        return None
    examples = read_json(folder.examples_info)["fingerprint"]
    mark = _inputs(recipe, Model(model_name_or_path=str(path)), examples)[1]
    return read_json(results) if finished(results, mark) else None


def _inputs(recipe: Recipe, model: Model, examples: str) -> tuple[dict[str, Any], str]:
    """What an evaluation is made from, and the fingerprint of it all, with ``examples``, the fingerprint of those."""
    info = {"model": model_identity(model), "settings": recipe.evaluate.model_dump()}
    return info, fingerprint([info, recipe.prompt.model_dump(), examples])


def rank_labels(
    lm: Any, encoder: Encoder, examples: Sequence[Example], options: Evaluate, advance: Advance
) -> list[str]:
    """The label with the greatest log-likelihood, end-of-sequence token included, for each example."""
    sums = score_choices(
        lm,
        [encoder.prompt_ids(example) for example in examples],
        [encoder.label_ids(label) for label in encoder.labels],
        encoder.tokenizer.eos_token_id,
        options.tokens_per_batch,
        lambda count, _: advance(count),
    )
    return [encoder.labels[index] for index in sums.sum(dim=2).argmax(dim=1)]


@torch.inference_mode()
def generate_labels(
    lm: Any, encoder: Encoder, examples: Sequence[Example], options: Evaluate, advance: Advance
) -> list[str]:
    """Greedy generation; text that is not a label, up to case and white space, gives ``UNMAPPED``."""
    known = {_normal(label): label for label in encoder.labels}
    prompts = [encoder.prompt_ids(example) for example in examples]
    end = encoder.tokenizer.eos_token_id
    predicted = [UNMAPPED] * len(examples)
    for rows in token_budget_batches([len(ids) + options.max_new_tokens for ids in prompts], options.tokens_per_batch):
        width = max(len(prompts[row]) for row in rows)
        # Padded on the left, so that all continuations start at the same place.
        ids = torch.tensor([[end] * (width - len(prompts[row])) + prompts[row] for row in rows], device=lm.device)
        mask = torch.tensor([[0] * (width - len(prompts[r])) + [1] * len(prompts[r]) for r in rows], device=lm.device)
        output = lm.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        new = output if encoder.is_encoder_decoder else output[:, width:]
        for row, text in zip(rows, encoder.tokenizer.batch_decode(new, skip_special_tokens=True)):
            predicted[row] = known.get(_normal(text), UNMAPPED)
        advance(len(rows))
    return predicted


def _normal(text: str) -> str:
    return "".join(text.split()).casefold()
