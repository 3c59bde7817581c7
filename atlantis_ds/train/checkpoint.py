"""Checkpoints to resume from (DeepSpeed's own), and models that plain transformers loads (safetensors)."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.files import move_folder, read_json, write_folder, write_json

COMPLETED = "COMPLETED"
"""Written last into a checkpoint: one without it is never used."""


def save_checkpoint(engine: Any, folder: Path, state: dict[str, Any], keep: int, ranks: Ranks) -> None:
    """Save model, optimizer and schedule of all ranks under ``folder/step-N``, then prune to ``keep`` checkpoints.

    It is written under a temporary name, renamed, and then marked as complete.

    Args:
        state: values to restore: ``step`` (optimizer steps done), ``fingerprint`` and any JSON values.
    """
    name = f"step-{state['step']:08d}"
    temporary = f".{name}.tmp"
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / temporary, ignore_errors=True)
    ranks.barrier()
    lora = hasattr(engine.module, "peft_config")
    try:
        engine.save_checkpoint(
            str(folder),
            tag=temporary,
            # Without it, the conversion for another number of ranks refuses checkpoints of stages 1 and 2.
            client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}},
            save_latest=False,
            exclude_frozen_parameters=lora,
        )
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder / temporary, ignore_errors=True)
        raise RunError(f"{folder / name}: cannot be written: {str(error).splitlines()[0]}") from None
    moments = adam_moments(engine, ranks)
    ranks.barrier()
    if ranks.is_main:
        move_folder(folder / temporary, folder / name)
        found = {"world_size": ranks.world_size, "moments": moments, "files": _sizes(folder / name)}
        write_json(folder / name / COMPLETED, {**state, **found})
        for old in complete_checkpoints(folder)[:-keep]:
            (old / COMPLETED).unlink()
            shutil.rmtree(old)
    ranks.barrier()


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(marker.parent for marker in folder.glob(f"step-*/{COMPLETED}"))


def resume(engine: Any, folder: Path, fingerprint: str, ranks: Ranks) -> dict[str, Any] | None:
    """Load the newest complete checkpoint into the engine, saved by any number of ranks.

    Returns:
        the state with which it was saved, or None if there is no checkpoint.

    Raises:
        InputError: it belongs to other data or settings, or DeepSpeed cannot convert it to this number of ranks.
        RunError: weights, optimizer or position could not be restored.
    """
    newest = ranks.broadcast(next((str(path) for path in reversed(complete_checkpoints(folder))), None))
    state: dict[str, Any] = read_json(Path(newest) / COMPLETED) if newest else {}
    if state and state["fingerprint"] != fingerprint:
        raise InputError(f"{newest}: made with other data or settings; choose another `name` or remove {folder}")
    if ranks.is_main:
        _remove_unfinished(folder)
    if not state:
        return None
    # Rank 0 checks for all: if one rank failed alone during loading, the others would wait for it.
    sizes = ranks.broadcast(_sizes(Path(newest)) if ranks.is_main else None)
    if damaged := sorted(name for name, size in state["files"].items() if sizes.get(name) != size):
        raise RunError(
            f"{newest}: {damaged[0]} has {sizes.get(damaged[0], 0)} bytes of {state['files'][damaged[0]]}; "
            "remove this checkpoint to resume from an older one"
        )
    tag = Path(newest).name
    other_ranks = state["world_size"] != ranks.world_size and engine.zero_optimization_stage() > 0
    if other_ranks:
        tag = _convert(Path(newest), state["world_size"], ranks)
    # DeepSpeed reads this from its own config, and only when it loads.
    engine._config.load_universal_checkpoint = other_ranks
    try:
        strict = not hasattr(engine.module, "peft_config")
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AssertionError, UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RunError(f"{newest}: cannot be read ({reason}); remove it to resume from an older one") from None
    engine._config.load_universal_checkpoint = False
    # Some conversions silently left the optimizer empty (DeepSpeed#6691).
    whole = zip(adam_moments(engine, ranks), state["moments"], strict=True)
    if (
        loaded is None
        or engine.global_steps != state["step"]
        or not all(math.isclose(found, saved, rel_tol=1e-4) for found, saved in whole)
    ):
        raise RunError(f"{newest}: DeepSpeed did not load all of it; remove it to resume from an older one")
    if ranks.is_main:  # all ranks have loaded: they have exchanged the moments
        _remove_unfinished(folder)
    return state


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of each file in a checkpoint, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETED)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _remove_unfinished(folder: Path) -> None:
    """Remove what a dead job has left: incomplete, partly pruned and converted checkpoints."""
    for path in folder.glob("*"):
        if path.is_dir() and (path.name.startswith(".") or not (path / COMPLETED).exists()):
            shutil.rmtree(path)


def _convert(checkpoint: Path, saved_by: int, ranks: Ranks) -> str:
    """Rank 0 converts a checkpoint to DeepSpeed's universal format, next to it; returns the tag."""
    target = checkpoint.with_name(f".{checkpoint.name}.universal")
    words = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(checkpoint)]
    failure = None
    if ranks.is_main:
        done = subprocess.run([sys.executable, *words, "--output_folder", str(target)], capture_output=True, text=True)
        if done.returncode:
            failure = done.stderr.strip().splitlines()[-1:]
            shutil.rmtree(target, ignore_errors=True)
    if (failure := ranks.broadcast(failure)) is not None:
        folder = checkpoint.parent
        raise InputError(
            f"{checkpoint}: saved by {saved_by} ranks, this job has {ranks.world_size}, and DeepSpeed cannot convert "
            f"it ({''.join(failure)}); start the job with {saved_by} ranks. Or restart from its weights only, with a "
            f"new optimizer and schedule: `atlantis-ds export RECIPE OUT --arm {folder.name} --unfinished`, "
            f"`rm -r {folder}`, and `train` with `--set models.large.model_name_or_path=OUT`"
        )
    return target.name


def adam_moments(engine: Any, ranks: Ranks) -> list[float]:
    """Sums of Adam's first (absolute) and second moments over all weights and ranks, however they are sharded."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = list(optimizer.state.values())
    names = ("exp_avg", "exp_avg_sq") if not any("state1" in state for state in states) else ("state1", "state2")
    totals = [
        sum(float(state[key].double().abs().sum()) for state in states if key in state)
        for key in names  # torch's and DeepSpeed's, or those of bitsandbytes, which counts its quantised codes
    ]
    return ranks.sum(*totals) if engine.zero_optimization_stage() > 0 else totals


def save_model(engine: Any, tokenizer: Any, path: Path, ranks: Ranks) -> None:
    """Write the whole model (or the adapter) as safetensors, with tokenizer; all ranks must call it.

    Raises:
        RunError: a weight is empty, as can happen when saving under ZeRO-3.
    """
    import deepspeed

    model = engine.module
    trained_only = hasattr(model, "peft_config")
    weights = {}
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if ranks.is_main:
                weights[name] = parameter.detach().cpu().clone()
    if not trained_only:  # persistent buffers, such as BART's final_logits_bias: an adapter leaves them in the base
        kept = model.state_dict().keys()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
        weights |= {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if lost := sorted(kept - shared - buffers.keys()):
            raise RunError(f"{path}: {lost[0]} is part of the model's state, but would not be saved")
    if ranks.is_main:
        if empty := [name for name, weight in weights.items() if weight.numel() == 0]:
            raise RunError(f"{path}: weight {empty[0]} is empty")

        def write(folder: Path) -> None:
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            if trained_only:  # a full model saves its own
                model.generation_config.save_pretrained(folder)

        write_folder(path, write)
    ranks.barrier()
