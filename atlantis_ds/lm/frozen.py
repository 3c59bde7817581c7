"""Frozen models for scoring: a replica on each rank where it fits, sharded over the ranks by ZeRO-3 where not."""

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
"""A replica takes this many times its weights: activations and the logits of label positions come on top."""


CopyOf = Callable[[Model], Path | None]
"""Says where this node has a copy of a model's weights; see ``node_copy``."""


class Frozen:
    """One base model in memory at a time, for the passes that score with it or with adapters on it.

    Two passes in a row over one base load it once: an adapter is put on it for its own pass, and taken off after.
    Every rank makes the same calls, but for ``load`` of a replica, which ranks without work leave out.
    """

    def __init__(self, settings: Score, ranks: Ranks, copy_of: CopyOf = lambda base: None) -> None:
        self.settings, self.ranks, self.copy_of = settings, ranks, copy_of
        self.dtype = dtype_on(settings.dtype, ranks.device)
        self._base: Model | None = None
        self._copy: Path | None = None
        self._sharded = False
        self._lm: Any = None

    def choose(self, model: Model, name: str) -> bool:
        """Whether ``model`` is sharded over the ranks; rank 0 says so and why. Frees any other base."""
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
        return need > free, f"it takes {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free for each"

    def load(self, model: Model) -> Any:
        """The model that ``choose`` was asked about, for ``score_pairs``; what was returned before is used up."""
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
        """Give the memory back."""
        if self._sharded and self._lm is not None:
            self._lm.destroy()
        self._lm = None
        if not keep_base:
            self._base = None
        give_memory_back(self.ranks.device)


def replica_bytes(model: Model, dtype: str) -> int:
    """Memory of one replica for scoring: weights in ``dtype``, the LM head in fp32 beside, room for a batch."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = load_config(model)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        lm = loader.from_config(config, trust_remote_code=model.trust_remote_code)
    head = 4 * lm.get_output_embeddings().weight.numel() if dtype != "float32" else 0
    return int(ROOM * lm.num_parameters() * DTYPES[dtype].itemsize) + head


def free_bytes(ranks: Ranks) -> int:
    """Memory that every rank may fill: its share of its host's, and on GPUs no more than is free there.

    The host counts on GPUs too: a replica goes through its memory. The same value on all ranks.
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
    """Bytes that this process's control group, a job's memory limit, leaves it; 2**63 where there is no limit."""
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
    """The room of a control group and of each above it; a limit holds for all below."""
    found = [2**63]
    for folder in [root / path.lstrip("/"), *(root / path.lstrip("/")).parents]:
        if not folder.is_relative_to(root):
            break
        with contextlib.suppress(OSError, ValueError):  # no file, or "max"
            found.append(max(0, int((folder / limit).read_text()) - int((folder / used).read_text())))
    return found


def load_sharded_scorer(model: Model, dtype: str, copy: Path | None = None) -> Any:
    """Load a frozen model sharded over all ranks; the scores are those of ``load_scorer``.

    Every rank must call it, and run the same number of forwards afterwards. With a bf16 body each rank holds a whole
    head of its own.

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
