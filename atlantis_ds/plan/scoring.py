"""Memory of scoring: from a few sizes of a model, so that a login node can tell without torch."""

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
"""Assumed, where no tokenizer is at hand."""


@dataclass(frozen=True)
class Sizes:
    """Of a model: weights in all, and widths."""

    parameters: int
    hidden: int
    inner: int
    """Of the feed-forward layers."""
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any], parameters: int) -> Sizes:
        """From a transformers config as a dict, whatever the family calls its widths."""
        config = config.get("text_config") or config
        hidden = _first(config, "hidden_size", "d_model", "n_embd")
        inner = _first(config, "intermediate_size", "d_ff", "decoder_ffn_dim", "ffn_dim", "n_inner") or 4 * hidden
        return cls(parameters, hidden, inner, _first(config, "vocab_size"))


def _first(config: dict[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def sizes_of_folder(path: Path) -> Sizes | None:
    """The sizes of a model folder, from its config and the headers of its safetensors files; None without these.

    Nor is a broken one refused here: whoever loads it says what is wrong with it.
    """
    from safetensors import SafetensorError

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        parameters = sum(map(_numbers, path.glob("*.safetensors")))
        return Sizes.of(config, parameters) if parameters else None
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError):
        return None


def _numbers(file: Path) -> int:
    """How many numbers a safetensors file holds."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


@dataclass(frozen=True)
class Scoring:
    """Bytes that a replica takes on each rank while it scores."""

    weights: int
    head: int
    """The fp32 copy of the LM head that a bf16 body needs."""
    batch: int
    """Of one batch: feed-forward and hidden states, masks, and at most ``CHUNK`` logits."""
    trees: int
    """Times a prompt is read for all labels; 0 where its own target alone is scored."""

    @property
    def total(self) -> int:
        return self.weights + self.head + self.batch

    def __str__(self) -> str:
        told = f"{self.total / GIB:.2f} GiB a rank (weights {self.weights / GIB:.2f}"
        told += f", fp32 head {self.head / GIB:.2f}" if self.head else ""
        told += f", a batch {self.batch / GIB:.2f})"
        return told + (f"; labels in {self.trees} trees, each reads the prompt again" if self.trees > 1 else "")


def scoring_memory(sizes: Sizes, score: Score, prompt_tokens: int, label_tokens: int | None) -> Scoring:
    """What a replica takes; an estimate, held against real runs by ``tests/test_plan.py``.

    Args:
        prompt_tokens: of the longest example.
        label_tokens: of all labels together, where all are scored behind each prompt; None where they are not.
    """
    width = 2 if score.dtype == "bfloat16" else 4  # `auto` may be either: the larger
    tree = min(label_tokens or 0, TREE_TOKENS)
    row = prompt_tokens + tree
    tokens = max(score.tokens_per_batch, row)
    # Gate, up and their product in the feed-forward layer; the residual, its norm, queries, keys and values.
    states = width * tokens * (3 * sizes.inner + 4 * sizes.hidden)
    # A mask of who sees whom, and as attention adds it.
    mask = tokens * row * (1 + width) if label_tokens else 0
    positions = tokens * (tree / row if label_tokens else 1)
    logits = 3 * 4 * min(CHUNK, int(positions) * sizes.vocabulary)  # themselves, and two in the log-softmax
    return Scoring(
        width * sizes.parameters,
        4 * sizes.vocabulary * sizes.hidden if width == 2 else 0,
        max(states + mask, 4 * tokens * sizes.hidden + logits),
        math.ceil((label_tokens or 0) / TREE_TOKENS),
    )
