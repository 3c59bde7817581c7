"""How large a model is, and what a pass through it costs."""

from __future__ import annotations

import math
import re
import resource
from dataclasses import dataclass
from typing import Any

import torch

PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L4": 121e12, "4090": 165e12}
"""Dense bf16 FLOP/s of GPUs (the makers' data sheets), by a word of their names."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in numbers of weights."""

    parameters: int
    trainable: int
    largest: int
    """The largest trainable tensor."""
    body: int
    """Weights that every token of the prompt is multiplied with: all but embeddings, head and decoder."""
    decoder: int
    """The same for label tokens of an encoder-decoder; 0 in a causal LM, where they go through the body."""
    head: int
    """LM head: label positions only."""
    linear: int
    """Weights that 4-bit loading quantises: all linear layers but the head."""
    largest_linear: int


def model_shape(lm: Any) -> Shape:
    """Count the weights of a model; nothing of it is computed."""
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
    """How many weights a parameter stands for: of one that ZeRO-3 shards, or that is packed into 4 bits, in all."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


def forward_flops(shape: Shape, prompt_tokens: float, label_tokens: float) -> float:
    """Floating-point operations of one forward pass over one example: 2 a weight and token.

    Attention scores are left out: a few percent at a few hundred tokens. Only label positions reach the head.
    """
    body = shape.body * (prompt_tokens + (0 if shape.decoder else label_tokens))
    return 2 * (body + (shape.decoder + shape.head) * label_tokens)


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s that a GPU can do at most; None of a CPU, or where its kind is not known."""
    if device.type != "cuda":
        return None
    words = re.split(r"\W", torch.cuda.get_device_name(device))
    return next((PEAKS[word] for word in words if word in PEAKS), None)


def peak_gib(device: torch.device) -> float:
    """The most memory this rank has held so far: torch's on its GPU, or the whole process on CPUs; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # it counts in KiB
