"""Memory for scoring, from a few sizes of a model, so that it works on a login node without torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlantis_ds.config.schema import Score
from atlantis_ds.lm.ways import CHUNK, TREE_TOKENS

GIB = 2**30
CHARACTERS_A_TOKEN = 3.5
"""Assumed, if no tokenizer is available."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model: number of weights, and widths."""

    parameters: int
    hidden: int
    inner: int
    """Width of the feed-forward layers."""
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any], parameters: int) -> Sizes:
        """From a transformers config as a dict, whatever names the model family uses."""
        config = config.get("text_config") or config
        hidden = _first(config, "hidden_size", "d_model", "n_embd")
        inner = _first(config, "intermediate_size", "d_ff", "decoder_ffn_dim", "ffn_dim", "n_inner") or 4 * hidden
        return cls(parameters, hidden, inner, _first(config, "vocab_size"))


def _first(config: dict[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def sizes_of_folder(path: Path) -> Sizes | None:
    """The sizes of a model folder, from its config and the headers of its safetensors files; None if they are missing.

    A broken file is not refused here: loading it later gives the error.
    """
    from safetensors import SafetensorError

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        parameters = sum(map(_numbers, path.glob("*.safetensors")))
        return Sizes.of(config, parameters) if parameters else None
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError):
        return None


def _numbers(file: Path) -> int:
    """Number of values in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


@dataclass(frozen=True)
class Scoring:
    """Bytes that a replica needs on each rank while scoring."""

    weights: int
    head: int
    """The fp32 copy of the LM head that a bf16 body needs."""
    batch: int
    """For one batch: feed-forward and hidden states, masks, and at most ``CHUNK`` logits."""
    trees: int
    """How often a prompt is read for all labels; 0 if only its own target is scored."""

    @property
    def total(self) -> int:
        return self.weights + self.head + self.batch

    def __str__(self) -> str:
        told = f"{self.total / GIB:.2f} GiB per rank (weights {self.weights / GIB:.2f}"
        told += f", fp32 head {self.head / GIB:.2f}" if self.head else ""
        told += f", batch {self.batch / GIB:.2f})"
        return told + (f"; labels in {self.trees} trees, each reads the prompt again" if self.trees > 1 else "")


def scoring_memory(sizes: Sizes, score: Score, prompt_tokens: int, label_tokens: int | None) -> Scoring:
    """The memory of a replica; an estimate, compared with real runs in ``tests/test_plan.py``.

    Args:
        prompt_tokens: tokens of the longest prompt.
        label_tokens: tokens of all labels together, if all are scored after each prompt; else None.
    """
    width = 2 if score.dtype == "bfloat16" else 4  # `auto` may be either, so use the larger
    tree = min(label_tokens or 0, TREE_TOKENS)
    row = prompt_tokens + tree
    tokens = max(score.tokens_per_batch, row)
    # Gate, up and their product in the feed-forward layer; the residual, its norm, queries, keys and values.
    states = width * tokens * (3 * sizes.inner + 4 * sizes.hidden)
    # The bool mask, and the mask that attention adds.
    mask = tokens * row * (1 + width) if label_tokens else 0
    positions = tokens * (tree / row if label_tokens else 1)
    logits = 3 * 4 * min(CHUNK, int(positions) * sizes.vocabulary)  # themselves, and two in the log-softmax
    return Scoring(
        width * sizes.parameters,
        4 * sizes.vocabulary * sizes.hidden if width == 2 else 0,
        max(states + mask, 4 * tokens * sizes.hidden + logits),
        math.ceil((label_tokens or 0) / TREE_TOKENS),
    )
