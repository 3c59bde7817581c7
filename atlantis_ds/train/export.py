"""A trained model as one folder that plain transformers loads: an adapter merged into its base model, or a copy."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

from atlantis_ds.config.schema import Model, Recipe
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.files import read_json, write_folder
from atlantis_ds.hub import said
from atlantis_ds.lm.load import load_model, load_tokenizer, model_identity, model_source
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.train.card import CARD, card_text
from atlantis_ds.train.checkpoint import complete_checkpoints
from atlantis_ds.train.engine import add_lora
from atlantis_ds.train.jobs import training_summary


def export(recipe: Recipe, folder: RunFolder, arm: str, out: Path, push_to: str | None = None) -> str | None:
    """Write the model of an arm that evaluation uses to ``out``: safetensors, tokenizer, configs, card.

    An adapter is merged on the CPU in the dtype of its evaluation, so that the predictions are the same (float32 if
    that is ``auto`` and there is no evaluation yet); the whole base model must fit into host memory. A full model is
    copied.

    Args:
        push_to: a repository of the hub (OWNER/NAME) to which ``out`` is uploaded; created as private if it does not
            exist.

    Returns:
        the repository's address.

    Raises:
        InputError: the arm is not trained, ``out`` exists already, or the hub refuses the repository.
        RunError: the upload failed; ``out`` is kept.
    """
    source = folder.model(arm) / recipe.evaluate.checkpoint
    if not (folder.model(arm) / "training.json").exists() or not source.is_dir():
        raise InputError(f"{source}: no trained model; run `train --arm {arm}` first")
    out = _new_folder(out)
    address = _make_repository(push_to) if push_to else None  # before the work, but after all other checks
    model = Model(model_name_or_path=str(source))
    merged = (source / "adapter_config.json").is_file()
    scores = folder.evaluation(arm) / "metrics.json"
    metrics = read_json(scores) if scores.exists() else None
    if metrics is not None and metrics["model"] != model_identity(model):
        metrics = None  # they belong to an earlier model
    card = card_text(training_summary(folder, arm), recipe.evaluate.checkpoint, metrics, merged)

    def write(target: Path) -> None:
        if merged:
            asked = recipe.evaluate.dtype
            lm = load_model(model, (metrics or {}).get("dtype", "float32") if asked == "auto" else asked)
            lm.save_pretrained(target)
            load_tokenizer(model).save_pretrained(target)
            # The adapter's folder has the generation config with which the model was trained and evaluated.
            shutil.copy(source / "generation_config.json", target)
        else:
            shutil.copytree(source, target, dirs_exist_ok=True)
        (target / CARD).write_text(card, encoding="utf-8")

    _write(out, write)
    if push_to:
        _push(out, push_to)
    return address


def export_unfinished(recipe: Recipe, folder: RunFolder, arm: str, out: Path) -> None:
    """Write the weights of an arm's newest checkpoint to ``out``, in fp32, with adapters merged, for further training.

    Raises:
        InputError: there is no such arm or checkpoint, it cannot be read, or ``out`` exists already.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    saved = complete_checkpoints(folder.checkpoints(arm))
    if arm not in recipe.arms or not saved:
        raise InputError(f"{folder.checkpoints(arm)}: there is no checkpoint of an arm")
    adapters = recipe.train.mode != "full"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            weights = get_fp32_state_dict_from_zero_checkpoint(
                str(saved[-1].parent), saved[-1].name, exclude_frozen_parameters=adapters
            )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{saved[-1]}: DeepSpeed cannot read its weights: {str(error).splitlines()[0]}") from None

    def write(target: Path) -> None:
        model = model_source(recipe, folder, "large")
        lm = load_model(model, "float32")
        if adapters:
            lm = add_lora(lm, recipe.train, model.revision)
        names = lm.load_state_dict(weights, strict=not adapters)
        if names.unexpected_keys or any("lora_" in name for name in names.missing_keys):
            raise InputError(f"{saved[-1]}: contains other weights than the model and train.mode of this recipe")
        if adapters:
            lm = lm.merge_and_unload()
        lm.save_pretrained(target)
        load_tokenizer(model).save_pretrained(target)

    _write(out, write)


def _make_repository(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().create_repo(name, private=True, exist_ok=True))
    except Exception as error:  # the errors of the hub's client and its HTTP library have no common base class
        raise InputError(f"--push-to {name}: {said(error)}") from None


def _push(out: Path, name: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=name, folder_path=out, commit_message=f"{out.name}, exported by atlantis_ds")
    except Exception as error:  # as above
        raise RunError(f"{name}: {said(error)}; {out} is complete: upload it with `hf upload {name} {out}`") from None


def _new_folder(out: Path) -> Path:
    out = out.expanduser().absolute()
    if out.exists():
        raise InputError(f"{out}: exists already; remove it or choose another folder")
    return out


def _write(out: Path, write: Callable[[Path], None]) -> None:
    out = _new_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_folder(out, write)
    finally:
        shutil.rmtree(out.with_name(f".{out.name}.tmp"), ignore_errors=True)
