"""``atlantis-ds predict``: labels or responses from a trained arm for rows without labels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from atlantis_ds.data.examples import Examples, load_examples
from atlantis_ds.data.ingest import is_chat
from atlantis_ds.data.prompts import render_prompt, template_for
from atlantis_ds.data.reading import read_new_rows
from atlantis_ds.data.rows import BadRow, Found
from atlantis_ds.errors import InputError
from atlantis_ds.evaluate.predict import generated_texts, label_sums, load_checked, trained_model
from atlantis_ds.files import refuse_unknown_format, write_rows
from atlantis_ds.lm.check import sample_rows
from atlantis_ds.lm.encode import Encoded, Encoder
from atlantis_ds.lm.load import give_memory_back, load_config, load_tokenizer
from atlantis_ds.progress import Steps
from atlantis_ds.run import Run


def predict_file(run: Run, arm: str, source: str, out: Path) -> None:
    """Write ``out``: the rows of ``source`` with the predictions of the model of ``arm``; divided among the ranks.

    Labels are ranked by log-likelihood, as in `evaluate`: ``predicted`` is the most likely label, ``probability`` its
    share among all labels of the set, and ``p(LABEL)`` the share of each. Responses are generated greedily.

    Args:
        source: a data file, or several as in ``data.train``; rows need no label.
        out: JSON Lines, CSV or Parquet by its suffix.

    Raises:
        InputError: the arm is unknown or not trained, or a row cannot be read or is longer than the model's context.
    """
    refuse_unknown_format(out)
    # An arm may have been added, trained and evaluated since `prepare` kept the recipe.
    trained = {path.parent.name for path in run.folder.root.glob("model/*/training.json")}
    named = {arm, arm.rpartition("-seed")[0]} & run.recipe.arms.keys()
    if not named and (arm not in trained or arm.startswith("reference")):
        raise InputError(
            f"--arm {arm}: no arm of this run; take {', '.join(run.recipe.arms)}, or ARM-seedS of `compare`"
        )
    examples = load_examples(run.folder)
    model = trained_model(run, arm)
    truncate = run.recipe.data.on_too_long == "truncate_prompt"
    encoder = Encoder(load_tokenizer(model), load_config(model), examples.labels, examples.chat, truncate=truncate)
    rows, pairs = _encoded(run, examples, encoder, source)
    samples = [pairs[row] for row in sample_rows(np.array([len(pair) for pair in pairs]))]
    lm, ways = load_checked(run, model, encoder, samples, generates=examples.labels is None)
    mine = range(run.ranks.rank, len(pairs), run.ranks.world_size)
    prompts = [pairs[row].prompt for row in mine]
    options = run.recipe.evaluate
    with Steps(f"predict {arm}", len(mine), "rows", run.ranks.is_main, every=max(1, len(mine) // 5)) as steps:
        if examples.labels is not None:
            # With fewer rows than ranks, this rank may have none.
            sums = label_sums(lm, encoder, prompts, options, ways, steps.advance) if prompts else None
            said = [] if sums is None else _probable(sums, examples.labels)
        else:
            ends = {pairs[row].eos for row in mine}
            texts = generated_texts(lm, encoder, prompts, ends, options, ways, steps.advance)
            said = [{"predicted": text.strip()} for text in texts]
    del lm
    give_memory_back(run.ranks.device)
    parts = run.ranks.gather((list(mine), said))
    if run.ranks.is_main:
        found = {row: answer for numbers, answers in parts for row, answer in zip(numbers, answers)}
        write_rows(out, _table([{**values, **found[row]} for row, values in enumerate(rows)]))


def _probable(sums: np.ndarray, labels: list[str]) -> list[dict[str, Any]]:
    """For each row of log-likelihoods [n, K]: the most likely label, its probability, and all probabilities
    (softmax)."""
    shares = np.exp(sums - sums.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return [
        {"predicted": labels[best], "probability": share[best]}
        | {f"p({label})": one for label, one in zip(labels, share)}
        for best, share in zip(shares.argmax(axis=1).tolist(), shares.tolist())
    ]


def _encoded(run: Run, examples: Examples, encoder: Encoder, source: str) -> tuple[list[dict[str, Any]], list[Encoded]]:
    """The rows as in the file, and the tokens of their prompts (with a label if there is a set)."""
    rows, pairs, template = [], [], examples.info.get("template")
    added = {"predicted", "probability", *(f"p({label})" for label in examples.labels or ())}
    for row, found in read_new_rows(run.recipe, source):
        if clash := [name for name in row.values if name in added]:
            raise InputError(f"{row.where}: the column {clash[0]!r} exists already; rename it")
        if (found.fields.keys() == {"messages"}) != examples.chat:
            raise InputError(f"{row.where}: {'a chat' if examples.chat else 'a single prompt'} is needed, as in train")
        try:
            template = template or template_for(run.recipe.task, run.recipe.prompt, found.fields)
            pair = _pair(run, examples, encoder, template, found)
        except BadRow as problem:
            raise InputError(f"{row.where}: {problem}") from None
        if excess := encoder.excess(pair):
            raise InputError(
                f"{row.where}: {excess} tokens longer than the model's context; shorten the text, or train with "
                "data.on_too_long: truncate_prompt"
            )
        rows.append(row.values)
        pairs.append(pair)
    if not rows:
        raise InputError(f"{source}: no rows")
    return rows, pairs


def _pair(run: Run, examples: Examples, encoder: Encoder, template: str, found: Found) -> Encoded:
    end = encoder.tokenizer.eos_token_id
    if is_chat(template):
        return Encoded(encoder.last_prompt(found.fields["messages"], "[null]"), [end], end)
    if missing := set(re.findall(r"\{(\w+)\}", template)) - {"options", *found.fields}:
        raise BadRow(f"the prompt needs the column {min(missing)!r}; the row has {', '.join(found.fields)}")
    prompt = render_prompt(template, found.fields, run.recipe.prompt, examples.labels)
    if examples.labels is None:
        return Encoded(encoder.prompt_ids([prompt])[0], [end], end)
    return next(encoder.pairs([prompt], [examples.labels[0]]))


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows as columns; null if a row lacks it. A column that has no type in Arrow or Parquet is JSON text, such as
    one with values of several types."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    for kind in (None, pa.uint64()):  # Arrow does not choose the latter by itself; hashes may need it
        try:
            column = pa.array(values, kind)
        except (pa.ArrowException, OverflowError):
            continue
        if "struct<>" not in str(column.type):  # Parquet has no empty structs
            return column
    return pa.array([None if value is None else json.dumps(value, default=str) for value in values])
