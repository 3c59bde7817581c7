"""Checkpoints to resume from (DeepSpeed's own), and models that plain transformers loads (safetensors)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.run_folder import move_folder, read_json, write_folder, write_json

COMPLETED = "COMPLETED"
"""Written into a checkpoint last: one without it is never picked up."""


def save_checkpoint(engine: Any, folder: Path, state: dict[str, Any], keep: int, ranks: Ranks) -> None:
    """Save model, optimizer and schedule of all ranks under ``folder/step-N``, then prune to ``keep`` checkpoints.

    It is written beside, renamed, and marked complete last.

    Args:
        state: what to find again: ``step`` (optimizer steps done), ``fingerprint`` and any JSON values.
    """
    name = f"step-{state['step']:08d}"
    temporary = f".{name}.tmp"
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / temporary, ignore_errors=True)
    ranks.barrier()
    lora = hasattr(engine.module, "peft_config")
    engine.save_checkpoint(str(folder), tag=temporary, save_latest=False, exclude_frozen_parameters=lora)
    ranks.barrier()
    if ranks.is_main:
        move_folder(folder / temporary, folder / name)
        write_json(folder / name / COMPLETED, {**state, "world_size": ranks.world_size})
        for old in complete_checkpoints(folder)[:-keep]:
            (old / COMPLETED).unlink()
            shutil.rmtree(old)
    ranks.barrier()


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(marker.parent for marker in folder.glob(f"step-*/{COMPLETED}"))


def resume(engine: Any, folder: Path, fingerprint: str, ranks: Ranks) -> dict[str, Any] | None:
    """Load the newest complete checkpoint into the engine.

    Returns:
        the state it was saved with, or None where there is none.

    Raises:
        InputError: it belongs to other data, settings or another number of ranks.
    """
    newest = ranks.broadcast(next((str(path) for path in reversed(complete_checkpoints(folder))), None))
    if newest is None:
        return None
    state: dict[str, Any] = read_json(Path(newest) / COMPLETED)
    if state["fingerprint"] != fingerprint:
        raise InputError(f"{newest}: made with other data or settings; choose another `name` or remove {folder}")
    if state["world_size"] != ranks.world_size:
        raise InputError(
            f"{newest}: saved by {state['world_size']} ranks, this job has {ranks.world_size}; "
            f"start it with {state['world_size']}, or remove {folder} to train again"
        )
    lora = hasattr(engine.module, "peft_config")
    loaded, _ = engine.load_checkpoint(str(folder), tag=Path(newest).name, load_module_strict=not lora)
    if loaded is None or engine.global_steps != state["step"]:
        raise RunError(f"{newest}: DeepSpeed did not load it; remove it to go on from an older one")
    return state


def save_model(engine: Any, tokenizer: Any, path: Path, ranks: Ranks) -> None:
    """Write the whole model (or the adapter) as safetensors, with tokenizer; all ranks must call it.

    Raises:
        RunError: a weight came out empty, as ZeRO-3 does to a careless save.
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
    if ranks.is_main:
        if empty := [name for name, weight in weights.items() if weight.numel() == 0]:
            raise RunError(f"{path}: weight {empty[0]} came out empty")

        def write(folder: Path) -> None:
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            if trained_only:  # a full model saves its own
                model.generation_config.save_pretrained(folder)

        write_folder(path, write)
    ranks.barrier()
