"""The size of a model, and the cost of a pass through it."""

from __future__ import annotations

import math
import re
import resource
from dataclasses import dataclass
from typing import Any

import torch

PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L4": 121e12, "4090": 165e12}
"""Dense bf16 FLOP/s of GPUs (from data sheets), by a word in their names."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in numbers of weights."""

    parameters: int
    trainable: int
    largest: int
    """The largest trainable tensor."""
    body: int
    """Weights that each prompt token is multiplied with: all except embeddings, head and decoder."""
    decoder: int
    """The same for label tokens of an encoder-decoder; 0 for a causal LM, where they go through the body."""
    head: int
    """LM head: only for label positions."""
    linear: int
    """Weights that 4-bit loading quantises: all linear layers except the head."""
    largest_linear: int


def model_shape(lm: Any) -> Shape:
    """Count the weights of a model, without running it."""
    head = lm.get_output_embeddings().weight
    embeddings = {id(m.weight) for m in lm.modules() if isinstance(m, torch.nn.Embedding)} | {id(head)}
    linears = [m.weight for m in lm.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head]
    trainable = [numbers(p) for p in lm.parameters() if p.requires_grad]
    body = sum(numbers(p) for p in lm.parameters() if id(p) not in embeddings)
    decoder = 0
    if lm.config.is_encoder_decoder:
        stack = (lm.get_base_model() if hasattr(lm, "peft_config") else lm).get_decoder()
        decoder = sum(numbers(p) for p in stack.parameters() if id(p) not in embeddings)
    frozen_linears = [numbers(w) for w in linears if not hasattr(lm, "peft_config") or not w.requires_grad]
    return Shape(
        parameters=sum(numbers(p) for p in lm.parameters()),
        trainable=sum(trainable),
        largest=max(trainable),
        body=body - decoder,
        decoder=decoder,
        head=numbers(head),
        linear=sum(frozen_linears),
        largest_linear=max(frozen_linears, default=0),
    )


def numbers(parameter: torch.Tensor) -> int:
    """Number of weights in a parameter; if it is sharded by ZeRO-3 or packed into 4 bits, its full number."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


def forward_flops(shape: Shape, prompt_tokens: float, label_tokens: float) -> float:
    """Floating-point operations of one forward pass over one example: 2 per weight and token.

    Attention scores are left out: a few percent at a few hundred tokens. Only label positions reach the head.
    """
    body = shape.body * (prompt_tokens + (0 if shape.decoder else label_tokens))
    return 2 * (body + (shape.decoder + shape.head) * label_tokens)


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a GPU; None for a CPU, or if the kind of GPU is unknown."""
    if device.type != "cuda":
        return None
    words = re.split(r"\W", torch.cuda.get_device_name(device))
    return next((PEAKS[word] for word in words if word in PEAKS), None)


def peak_gib(device: torch.device) -> float:
    """Peak memory of this rank so far: torch's memory on its GPU, or the whole process on CPUs; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB
