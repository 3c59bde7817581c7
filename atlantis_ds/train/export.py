"""A trained model as one folder that plain transformers loads: an adapter merged into its base model, or a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

from atlantis_ds.errors import InputError
from atlantis_ds.lm.load import load_model, load_tokenizer, model_identity
from atlantis_ds.recipe import Model, Recipe
from atlantis_ds.run_folder import RunFolder, read_json, write_folder
from atlantis_ds.train.card import CARD, card_text
from atlantis_ds.train.jobs import training_summary


def export(recipe: Recipe, folder: RunFolder, arm: str, out: Path) -> None:
    """Write the model of an arm, the one that evaluation takes, to ``out``: safetensors, tokenizer, configs, card.

    An adapter is merged on the CPU in ``evaluate.dtype``, as evaluation does it, so that the predictions are the same;
    the whole base model has to fit into host memory. A full model is copied as it is.

    Raises:
        InputError: the arm is not trained, or ``out`` is already there.
    """
    out = out.expanduser().absolute()
    if out.exists():
        raise InputError(f"{out}: already there; remove it or choose another folder")
    source = folder.model(arm) / recipe.evaluate.checkpoint
    if not (folder.model(arm) / "training.json").exists() or not source.is_dir():
        raise InputError(f"{source}: no trained model; run `train --arm {arm}` first")
    model = Model(model_name_or_path=str(source))
    merged = (source / "adapter_config.json").is_file()
    scores = folder.evaluation(arm) / "metrics.json"
    metrics = read_json(scores) if scores.exists() else None
    if metrics is not None and metrics["model"] != model_identity(model):
        metrics = None  # of a model that stood here before
    card = card_text(training_summary(folder, arm), recipe.evaluate.checkpoint, metrics, merged)

    def write(target: Path) -> None:
        if merged:
            lm = load_model(model, recipe.evaluate.dtype)
            lm.save_pretrained(target)
            load_tokenizer(model).save_pretrained(target)
            # The adapter's folder holds the generation config that the model was trained and evaluated with.
            shutil.copy(source / "generation_config.json", target)
        else:
            shutil.copytree(source, target, dirs_exist_ok=True)
        (target / CARD).write_text(card, encoding="utf-8")

    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_folder(out, write)
    finally:
        shutil.rmtree(out.with_name(f".{out.name}.tmp"), ignore_errors=True)
