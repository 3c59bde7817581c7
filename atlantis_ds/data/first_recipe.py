"""``atlantis-ds init``: writes a commented recipe for a data file, which ``check`` accepts."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from pathlib import Path

from atlantis_ds.config.describe import SCHEMA_FILE
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.data.guess import Guess
from atlantis_ds.data.ingest import look_at_data
from atlantis_ds.errors import InputError
from atlantis_ds.files import write_text

MODEL = "Qwen/Qwen2.5-1.5B"
"""The model of a first recipe: large enough to be useful, small enough for LoRA on one 24 GB GPU."""


def write_first_recipe(out: Path, data: Path, test: Path | None, model: str, found: Guess) -> None:
    """Write a recipe for ``data`` with the columns in ``found``.

    Raises:
        InputError: ``out`` exists already, or the data cannot be read with this recipe.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; name another file with --out")
    text = recipe_text(out, data, test, model, found)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "recipe.yaml"
        draft.write_text(text, encoding="utf-8")
        try:
            look_at_data(load_recipe(draft))
        except InputError as error:
            raise InputError(str(error).removeprefix(f"{draft}: ")) from None
    write_text(out, text)


def recipe_text(out: Path, data: Path, test: Path | None, model: str, found: Guess) -> str:
    """The recipe, with comments that say what can be changed."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", out.stem).lstrip("._-") or "run"
    groups = "group" in found.columns
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# Written by `atlantis-ds init {shlex.quote(str(data))}`.",
        f"# `atlantis-ds check {shlex.quote(str(out))}` checks it.",
        f"name: {_text(name)} # the run folder is runs/{name}",
        "seed: 1",
        "data:",
        f"  format: {found.format}" if found.format else f"  task: {found.task}",
        f"  train: {_text(str(data))}",
        _test_line(test),
    ]
    if found.columns:
        columns = ", ".join(f"{key}: {_text(column)}" for key, column in found.columns.items())
        lines.append(f"  columns: {{{columns}}}")
    if found.template:
        options = "{options} and " if found.task != "response" else ""
        lines += [
            "prompt:",
            f"  template: {json.dumps(found.template, ensure_ascii=False)} # {options}any column in {{}}",
        ]
    lines += [
        "models:",
        f"  large: {{model_name_or_path: {_text(model)}}} # the model to train",
        f"  small: {{model_name_or_path: {_text(model)}}} # the reference starts from it; a smaller one is cheaper",
        _reference_line(groups),
        _weights_line(found.task),
        "train:",
        "  mode: lora # or full, qlora; `atlantis-ds plan` says what fits in memory",
        "  deepspeed: zero0.json",
        "  learning_rate: 1e-4 # for mode: full, use about 1e-5",
        "  num_train_epochs: 3",
        "  train_batch_size: 16",
        "  per_device_train_batch_size: 4",
        "arms: # what to train and compare; `compare` trains each with several seeds",
        "  sft: {weights: {formula: uniform}}",
        "  atlantis: {}",
    ]
    if "gold" in found.columns:
        lines.append("  # gold: {gold: true, weights: {formula: uniform}} # shows what right labels would give")
    return "\n".join(lines) + "\n"


def _test_line(test: Path | None) -> str:
    if test is not None:
        return f"  test: {_text(str(test))}"
    return "  # test: FILE # with gold labels; without it, nothing is evaluated or compared"


def _reference_line(groups: bool) -> str:
    if groups:
        return (
            "  reference: {folds: 4, folds_by: group} # each example is scored by a model that saw nothing of its group"
        )
    return "  reference: {folds: 4, rounds: 2} # each example is scored by a model not trained on it"


def _weights_line(task: str) -> str:
    if task == "response":
        return "weights: {formula: reference, power: 2, clip: [0, 1.6]} # docs/results.md"
    return "weights: {formula: posterior, power: 4} # docs/results.md; weights are 1 if no noise is found"


def _text(text: str) -> str:
    """A text in YAML, in quotes if necessary."""
    plain = re.fullmatch(r"[A-Za-z_./~][\w./~-]*", text) and text.lower() not in (
        "true",
        "false",
        "null",
        "~",
        "yes",
        "no",
    )
    return text if plain else json.dumps(text, ensure_ascii=False)
