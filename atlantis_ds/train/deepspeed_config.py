"""The DeepSpeed config file, filled in from the recipe. Imports no torch, so that ``check`` can use it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from atlantis_ds.bundled import find
from atlantis_ds.config.schema import Train
from atlantis_ds.errors import InputError


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per rank and optimizer step; free places in them are filled with weight-0 examples."""
    return math.ceil(batch_size / (micro_batch_size * world_size))


def deepspeed_config(train: Train, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config file of a recipe with its ``auto`` values filled in.

    `train.deepspeed` is the name of a bundled file, or a path, which is relative to the working directory.

    Raises:
        InputError: the file is missing or broken, contradicts the recipe, combines options that cannot work together,
            or has an ``auto`` for which the recipe has no value.
    """
    path = find("ds_configs", train.deepspeed, "train.deepspeed")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"train.deepspeed: {path}: no such file; for a bundled file give only its name: zero3.json"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"train.deepspeed: {path}: not readable as JSON: {error}") from None
    micro = train.per_device_train_batch_size
    accumulation = accumulation_steps(train.train_batch_size, micro, world_size)
    known: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # Places, not examples: free ones are filled with weight-0 examples.
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": train.max_grad_norm,
        "bf16.enabled": train.dtype == "bfloat16",
        "zero_optimization.offload_optimizer.nvme_path": os.environ.get("TMPDIR", tempfile.gettempdir()),
        "zero_optimization.offload_param.nvme_path": os.environ.get("TMPDIR", tempfile.gettempdir()),
    }
    for forbidden in ("optimizer", "scheduler", "fp16"):
        if forbidden in config:
            raise InputError(f"train.deepspeed: {path}: remove `{forbidden}`; the recipe sets it")
    if config.get("checkpoint", {}).get("writer", {}).get("decoupled"):
        raise InputError(
            f"train.deepspeed: {path}: `checkpoint.writer.decoupled` writes while training continues, and a "
            "checkpoint would be marked as complete too early; remove it"
        )
    # Always set: without it, DeepSpeed would train plain bf16 weights, which hardly change at small learning rates.
    config.setdefault("bf16", {}).setdefault("enabled", "auto")
    filled = _fill(config, known, path, "")
    if reason := refusal(train, filled):
        raise InputError(f"train.deepspeed: {path}: {reason}")
    if accumulates_wide(train, zero_stage(filled), accumulation):
        filled.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return filled


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config; 0 if it names none."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def accumulates_wide(train: Train, stage: int, accumulation: int) -> bool:
    """Whether the gradients of a step's micro-batches are accumulated in fp32 if the weights are bf16.

    In bf16 the error of the sum is 0.4 to 0.9% for 4 to 64 of them. DeepSpeed accepts fp32 at stages 2 and 3; at stage
    0 it refuses it, and at stage 1 it would use another kind of optimizer, whose checkpoints cannot be loaded with
    another number of ranks.
    """
    return train.dtype == "bfloat16" and stage >= 2 and accumulation > 1


def offload_device(config: dict[str, Any], part: str) -> str:
    """Where a DeepSpeed config keeps ``optimizer`` or ``param``: ``none`` (the GPU), ``cpu`` or ``nvme``."""
    section = config.get("zero_optimization", {}).get(f"offload_{part}") or {}
    return str(section.get("device", "none"))


def refusal(train: Train, config: dict[str, Any]) -> str | None:
    """Why a mode cannot work with a DeepSpeed config, and the closest config that works; None if it can."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    optimizer, param = offload_device(config, "optimizer"), offload_device(config, "param")
    if stage not in (0, 1, 2, 3):
        return f"ZeRO stage {stage!r} does not exist; use 0, 1, 2 or 3"
    if param != "none" and stage != 3:
        return f"parameters can be offloaded only under ZeRO-3, not under ZeRO-{stage}; use zero3_offload.json"
    if optimizer != "none" and stage == 0:
        return "ZeRO-0 cannot offload the optimizer; use zero2_offload.json"
    if optimizer == "nvme" and stage != 3:
        return f"ZeRO-{stage} can offload only to the CPU; use zero2_offload.json (or zero3_nvme.json)"
    if train.torch_compile and stage == 3:
        return "torch.compile does not see the hooks in which ZeRO-3 gathers weights; use zero2.json, or turn it off"
    if train.mode == "qlora" and param != "none":
        return (
            "4-bit weights cannot be offloaded; use zero2_offload.json (optimizer on the CPU), "
            "or train.mode: lora with this file"
        )
    if train.mode == "qlora" and stage == 3 and train.bnb_4bit_quant_storage is None:
        return (
            "4-bit weights under ZeRO-3 are loaded whole on every GPU before they are sharded; use zero2.json or "
            "train.mode: lora, or allow this with train.bnb_4bit_quant_storage: " + train.dtype
        )
    return None


def _fill(config: dict[str, Any], known: dict[str, Any], path: Path, prefix: str) -> dict[str, Any]:
    filled = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            value = _fill(value, known, path, f"{key}.")
        elif value == "auto":
            if key not in known:
                raise InputError(f"train.deepspeed: {path}: `{key}: auto` cannot be filled from the recipe")
            value = known[key]
        elif key in known and value != known[key]:
            raise InputError(
                f'train.deepspeed: {path}: `{key}` is {value}, but the recipe gives {known[key]}; write "auto"'
            )
        filled[name] = value
    return filled
