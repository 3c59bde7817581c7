"""Frozen models for scoring: a replica on each rank if it fits, otherwise sharded over the ranks by ZeRO-3."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.schema import Model, Score
from atlantis_ds.hub import adapter_base
from atlantis_ds.lm.load import (
    DTYPES,
    dtype_on,
    give_memory_back,
    load_config,
    load_model,
    load_scorer,
    sharded_at_load,
    start_deepspeed,
    wide_head,
)
from atlantis_ds.progress import console

ROOM = 1.25
"""A replica needs this many times the memory of its weights, plus activations and logits of label positions."""


CopyOf = Callable[[Model], Path | None]
"""Returns the folder of this node's copy of a model's weights; see ``node_copy``."""


class Frozen:
    """One base model in memory at a time, for the passes that score with it or with its adapters.

    Two consecutive passes with the same base load it once: an adapter is added for its own pass and removed after it.
    Every rank makes the same calls, except ``load`` of a replica, which ranks without work skip.
    """

    def __init__(self, settings: Score, ranks: Ranks, copy_of: CopyOf = lambda base: None) -> None:
        self.settings, self.ranks, self.copy_of = settings, ranks, copy_of
        self.dtype = dtype_on(settings.dtype, ranks.device)
        self._base: Model | None = None
        self._copy: Path | None = None
        self._sharded = False
        self._lm: Any = None

    def choose(self, model: Model, name: str) -> bool:
        """Whether ``model`` is sharded over the ranks; rank 0 prints this and the reason. Frees any other base."""
        base = adapter_base(model) or model
        if base != self._base:
            self.free()
            self._base = base
            self._copy = self.copy_of(base)
            self._sharded, why = self._needs_sharding(base)
            if self.ranks.is_main:
                how = "sharded over the ranks by ZeRO-3" if self._sharded else "a replica on each rank"
                console.print(f"score {name}: {how} ({why})")
        return self._sharded

    def _needs_sharding(self, base: Model) -> tuple[bool, str]:
        if self.settings.sharding != "auto":
            return self.settings.sharding == "zero3", f"score.sharding: {self.settings.sharding}"
        if self.ranks.world_size == 1:
            return False, "one rank"
        need, free = replica_bytes(base, self.dtype), free_bytes(self.ranks)
        return need > free, f"it needs {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free for each"

    def load(self, model: Model) -> Any:
        """The model passed to ``choose``, for ``score_pairs``; a model returned earlier must not be used any more."""
        if self._sharded:
            self.free(keep_base=True)
            self._lm = load_sharded_scorer(model, self.dtype, self._copy)
            return self._lm
        from peft import PeftModel

        if isinstance(self._lm, PeftModel):
            self._lm = self._lm.unload()
        if self._lm is None:
            base = adapter_base(model) or model
            self._lm = load_scorer(base, self.dtype, self.ranks.device, self._copy)
        if adapter_base(model):
            path, device = str(model.model_name_or_path), str(self.ranks.device)
            self._lm = PeftModel.from_pretrained(self._lm, path, torch_device=device).eval()
        return self._lm

    def free(self, keep_base: bool = False) -> None:
        """Free the memory."""
        if self._sharded and self._lm is not None:
            self._lm.destroy()
        self._lm = None
        if not keep_base:
            self._base = None
        give_memory_back(self.ranks.device)


def replica_bytes(model: Model, dtype: str) -> int:
    """Memory of one replica for scoring: weights in ``dtype``, plus the LM head in fp32 and one batch."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = load_config(model)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        lm = loader.from_config(config, trust_remote_code=model.trust_remote_code)
    head = 4 * lm.get_output_embeddings().weight.numel() if dtype != "float32" else 0
    return int(ROOM * lm.num_parameters() * DTYPES[dtype].itemsize) + head


def free_bytes(ranks: Ranks) -> int:
    """Memory that every rank can use: its share of the host's memory, and on GPUs at most what is free there.

    Host memory also counts on GPUs, because a replica is loaded through it. The same value on all ranks.
    """
    import psutil  # type: ignore[import-untyped]

    found = ranks.gather(
        (
            socket.gethostname(),
            min(psutil.virtual_memory().available, cgroup_room()),
            torch.cuda.mem_get_info(ranks.device)[0] if ranks.device.type == "cuda" else None,
        )
    )
    hosts = [host for host, _, _ in found]
    shares = [available // hosts.count(host) for host, available, _ in found]
    return min([*shares, *(device for _, _, device in found if device is not None)])


def cgroup_room(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes left by the memory limit of this process's control group; 2**63 if there is no limit."""
    room = 2**63
    with contextlib.suppress(OSError, ValueError):
        for line in of.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                room = min(room, *_rooms(root, path, "memory.max", "memory.current"))
            elif "memory" in controllers.split(","):
                room = min(room, *_rooms(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes"))
    return room


def _rooms(root: Path, path: str, limit: str, used: str) -> list[int]:
    """The memory left in a control group and each of its parents; a limit applies to all groups below it."""
    found = [2**63]
    for folder in [root / path.lstrip("/"), *(root / path.lstrip("/")).parents]:
        if not folder.is_relative_to(root):
            break
        with contextlib.suppress(OSError, ValueError):  # no file, or "max"
            found.append(max(0, int((folder / limit).read_text()) - int((folder / used).read_text())))
    return found


def load_sharded_scorer(model: Model, dtype: str, copy: Path | None = None) -> Any:
    """Load a frozen model sharded over all ranks; the scores are those of ``load_scorer``.

    Every rank must call it, and then run the same number of forward passes. With a bf16 body, each rank has its own
    whole head.

    Returns:
        a DeepSpeed engine, for ``score_pairs``.
    """
    deepspeed = start_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3},
    }
    base = adapter_base(model)
    with sharded_at_load(config):
        lm = load_model(base or model, dtype, copy=copy)
    if base is not None:
        from peft import PeftModel

        lm = PeftModel.from_pretrained(lm, str(model.model_name_or_path))
    lm.eval().requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=lm, config=config)
    head = lm.get_output_embeddings()
    if dtype != "float32":
        with deepspeed.zero.GatheredParameters(list(head.parameters())):
            wide = wide_head(head, engine.device)
        lm.set_output_embeddings(wide.to(engine.device))
    return engine
