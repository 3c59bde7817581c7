"""The DeepSpeed config file, filled in from the recipe. Imports no torch, so that ``check`` can use it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from atlantis_ds.errors import InputError
from atlantis_ds.recipe import Train


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches a rank runs for one optimizer step; free places in them are filled with weight-0 examples."""
    return math.ceil(batch_size / (micro_batch_size * world_size))


def deepspeed_config(train: Train, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config file of a recipe with its ``auto`` values filled in.

    Raises:
        InputError: the file is missing or broken, contradicts the recipe, or holds an ``auto`` that the recipe
            has no value for.
    """
    path = Path(train.deepspeed)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"train.deepspeed: {path}: no such file") from None
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
    }
    for forbidden in ("optimizer", "scheduler", "fp16"):
        if forbidden in config:
            raise InputError(f"train.deepspeed: {path}: remove `{forbidden}`; the recipe decides it")
    # Always said: without it DeepSpeed would train bare bf16 weights, which hardly move at small learning rates.
    config.setdefault("bf16", {}).setdefault("enabled", "auto")
    return _fill(config, known, path, "")


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
