"""The one function that computes label log-likelihoods: for scoring, training and ranking alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from atlantis_ds.lm.batch import Batch, collate, collate_choices, token_budget_batches
from atlantis_ds.lm.encode import Encoded


def label_log_likelihoods(model: Any, batch: Batch) -> torch.Tensor:
    """log p(y|x) of each example of a batch, differentiable.

    Args:
        model, batch: as in ``token_log_likelihoods``.

    Returns:
        float64 [B, 2]: the sum over the label's own tokens, and the end-of-sequence token after them.
    """
    return sum_over_labels(token_log_likelihoods(model, batch), batch)


def token_log_likelihoods(model: Any, batch: Batch) -> torch.Tensor:
    """log p of each label token of a batch, given the prompt and the label tokens before it; differentiable.

    Only the hidden states that predict a label token reach the LM head: with a vocabulary of 152k the full logits
    would be the memory peak. Log-softmax is in fp32.

    Args:
        model: a causal or encoder-decoder LM of transformers, bare, wrapped by peft, or a DeepSpeed engine.
        batch: from ``collate``, on the model's device.

    Returns:
        float64 [N], in the order of ``batch.targets``.
    """
    with _label_positions_only(model, batch.positions):
        logits = model(**batch.inputs, use_cache=False).logits
    return -F.cross_entropy(logits.float(), batch.targets, reduction="none").double()


def sum_over_labels(tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum float64 [N], one value a label token, to [B, 2]: the label's own tokens, and its end-of-sequence token."""
    sums = torch.zeros(2 * batch.size, dtype=torch.float64, device=tokens.device)
    return sums.index_add(0, 2 * batch.example + batch.is_eos, tokens).view(-1, 2)


@contextmanager
def _label_positions_only(model: Any, positions: torch.Tensor) -> Iterator[None]:
    head = getattr(model, "module", model).get_output_embeddings()

    def gather(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0].flatten(0, -2)[positions].to(head.weight.dtype),)

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def score_pairs(
    model: Any,
    pairs: Sequence[Encoded],
    pad_token_id: int,
    tokens_per_batch: int,
    progress: Callable[[int, int], None] | None = None,
    forwards: int = 0,
) -> torch.Tensor:
    """Label log-likelihoods of many (prompt, label) pairs under a frozen model.

    Args:
        model: as in ``label_log_likelihoods``, in eval mode.
        pairs: encoded examples.
        pad_token_id: any token id; what stands in the padding changes nothing.
        tokens_per_batch: token budget of one batch, padding included.
        progress: called with (examples, tokens) after each batch.
        forwards: run at least so many; a model sharded over ranks needs the same number on every rank.

    Returns:
        float64 [n, 2] on the CPU, in the order of ``pairs``: label tokens, end-of-sequence token.
    """
    result = torch.empty(len(pairs), 2, dtype=torch.float64)
    config = getattr(model, "module", model).config
    device = next(model.parameters()).device
    lengths = [len(pair) for pair in pairs]
    batches = token_budget_batches(lengths, tokens_per_batch)
    for rows in batches:
        batch = collate([pairs[row] for row in rows], config, pad_token_id).to(device)
        result[rows] = label_log_likelihoods(model, batch).cpu()
        if progress:
            progress(len(rows), sum(lengths[row] for row in rows))
    for _ in range(len(batches), forwards):
        label_log_likelihoods(model, batch)
    return result


@torch.inference_mode()
def score_choices(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    eos: int,
    tokens_per_batch: int,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Label log-likelihoods of every label behind every prompt.

    A causal model reads each prompt once for all labels. An encoder-decoder reads it once a label.

    Args:
        model: as in ``label_log_likelihoods``, in eval mode.
        prompts: token ids of n prompts.
        labels: token ids of K labels, without the end-of-sequence token.
        eos: the end-of-sequence token.
        tokens_per_batch: token budget of one batch, padding included.
        progress: called with the number of prompts after each batch.

    Returns:
        float64 [n, K, 2] on the CPU, in the order of the arguments: label tokens, end-of-sequence token.
    """
    config = getattr(model, "module", model).config
    device = next(model.parameters()).device
    result = torch.empty(len(prompts), len(labels), 2, dtype=torch.float64)
    lengths = [len(prompt) + sum(map(len, labels)) for prompt in prompts]
    for rows in token_budget_batches(lengths, tokens_per_batch):
        if config.is_encoder_decoder:
            pairs = [Encoded(list(prompts[row]), list(label), eos) for row in rows for label in labels]
            sums = score_pairs(model, pairs, eos, tokens_per_batch)
        else:
            batch = collate_choices([prompts[row] for row in rows], labels, eos).to(device)
            sums = label_log_likelihoods(model, batch).cpu()
        result[rows] = sums.view(len(rows), len(labels), 2)
        if progress:
            progress(len(rows))
    return result
