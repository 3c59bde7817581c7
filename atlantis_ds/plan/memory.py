"""The memory of a training mode by component, in bytes for one GPU (or CPU rank) and one host.

The terms follow DeepSpeed 0.19 under a torch AdamW: what each ZeRO stage shards (Rajbhandari et al. 2020, arXiv
1910.02054, section 3), and what its code allocates in addition: flat copies in the optimizer step, the reduce bucket,
and the weights that stage 3 gathers and keeps because they are soon used again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atlantis_ds.config.schema import Train
from atlantis_ds.lm.size import Shape
from atlantis_ds.plan.scoring import GIB
from atlantis_ds.plan.trace import Activations
from atlantis_ds.train.deepspeed_config import accumulates_wide

HOST_OF_A_RANK = 3 * GIB
"""Assumed: a process with its libraries and CUDA context, before any model."""
RESERVED, FRAGMENTED = 1.5 * GIB, 0.05
"""Assumed: CUDA context, NCCL and workspaces; and the share of a GPU lost to fragmentation."""
NF4 = 0.516
"""Bytes per weight in 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, section 3)."""
OPTIMIZER_STATES = 8
"""Bytes per trained weight: both Adam moments in fp32."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; ``host`` is for one node, with all its ranks."""

    parameters: float
    gradients: float
    optimizer: float
    """fp32 master weights and both Adam moments."""
    bucket: float
    """DeepSpeed's gradient bucket, and 4-bit weights while they are unpacked."""
    gathered: float
    """Whole weights that ZeRO-3 keeps gathered."""
    late: float
    """Part of the gradients that is still counted with the activations at their peak."""
    reduce: float
    """Copies of the bucket while ranks reduce their gradients."""
    step: float
    """Temporary tensors of the optimizer step."""
    host: float

    @property
    def resident(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.bucket

    def peak(self, activations: float) -> float:
        """The maximum at any time: in the backward pass, in the gradient reduction, or in the optimizer step."""
        backward = max(0.0, self.gathered + activations - self.late)
        return self.resident + max(backward, self.gathered + self.reduce, self.step)


def training_memory(
    train: Train, shape: Shape, zero: dict[str, Any], ranks: int, accumulation: int, cpu: bool = False
) -> Memory:
    """Memory of one mode.

    Args:
        train: for mode and dtype.
        shape: the model, including adapters.
        zero: the section ``zero_optimization`` of a DeepSpeed config.
        ranks: data-parallel world size; up to 8 share a host.
        accumulation: micro-batches per optimizer step.
        cpu: ranks on the CPU (Gloo) instead of GPUs: buffers count only as far as they are used, the optimizer works
            tensor by tensor, and the reduction copies its input.
    """
    stage = int(zero.get("stage", 0))
    offload_optimizer = (zero.get("offload_optimizer") or {}).get("device", "none")
    offload_param = (zero.get("offload_param") or {}).get("device", "none")
    width = 4 if train.dtype == "float32" else 2
    here = min(ranks, 8)
    trained, share = shape.trainable, shape.trainable / ranks
    quantised = train.mode == "qlora"

    weights: float = width * shape.parameters
    if quantised:
        weights = width * (shape.parameters - shape.linear) + NF4 * shape.linear
    parameters = weights / ranks if stage == 3 else weights
    gradients = (4 if accumulates_wide(train, stage, accumulation) else width) * (share if stage >= 2 else trained)
    # DeepSpeed keeps a master copy at stages 1 to 3 even if the weights themselves are fp32.
    master = 4 if stage or width == 2 else 0
    optimizer = (OPTIMIZER_STATES + master) * (share if stage else trained)

    size = int(zero.get("reduce_bucket_size", 5e8))
    filled = width * min(size, trained)
    bucket = 0.0
    if stage >= 2 or (stage == 1 and zero.get("contiguous_gradients", True)):
        doubled = 2 if stage < 3 and zero.get("overlap_comm", False) else 1
        bucket = filled if cpu else doubled * width * size
    bucket += width * shape.largest_linear if quantised else 0
    live = int(zero.get("stage3_max_live_parameters", 1e9))
    gathered = width * min(shape.parameters, max(live, shape.largest)) if stage == 3 else 0.0
    # One micro-batch per step: the last gradient, and in ZeRO-3 on a CPU its place in the bucket, is counted with the
    # activations.
    late = width * shape.largest if (stage < 2 and accumulation == 1) or (stage == 3 and cpu) else 0.0
    reduce = filled * (2 if cpu else 1) if ranks > 1 and stage else 0.0

    # A flat fp32 gradient, and AdamW's temporaries for the second moment: one tensor with foreach, two without.
    stepped = min(share, float(zero.get("sub_group_size", 1e9))) if stage else trained
    flat = 4 * stepped if master else 0
    step = flat + (8 * (stepped if stage else shape.largest) if cpu else 4 * stepped)

    swapped = 0.0
    if offload_optimizer != "none":
        if offload_optimizer == "cpu":
            swapped += (optimizer + 4 * share) * here
        optimizer, step = 0.0, 4 * stepped if stage < 3 else 0.0
        gradients = gradients if stage < 3 else 0.0
    if offload_param != "none":
        swapped += parameters * here if offload_param == "cpu" else 0.0
        parameters = 0.0
    # Below stage 3, every rank first loads the whole model in host memory; to save, rank 0 gathers all trained weights.
    load = 0.0 if stage == 3 else (weights if not quantised else 0.0) * here
    host = HOST_OF_A_RANK * here + swapped + max(load, width * trained)
    return Memory(parameters, gradients, optimizer, bucket, gathered, late, reduce, step, host)


def usable(gpu_bytes: float) -> float:
    """Bytes of a GPU that tensors can use."""
    return (gpu_bytes - RESERVED) * (1 - FRAGMENTED)


def largest_micro_batch(memory: Memory, activations: Activations, room: float) -> int:
    """The largest micro-batch whose peak is within ``room`` bytes; 0 if not even one example fits."""
    if memory.peak(activations.bytes(1)) > room:
        return 0
    low, high = 1, 2
    while high <= 4096 and memory.peak(activations.bytes(high)) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory.peak(activations.bytes(middle)) <= room else (low, middle)
    return low
