"""Log-likelihoods of a label set for prompts and a model in memory, without a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from atlantis_ds.errors import InputError
from atlantis_ds.lm.check import check_scoring, sample_rows
from atlantis_ds.lm.encode import Encoded, Encoder
from atlantis_ds.lm.likelihood import score_choices
from atlantis_ds.lm.load import wide_head


def score_label_set(
    lm: Any, tokenizer: Any, prompts: Sequence[str], labels: Sequence[str], tokens_per_batch: int
) -> np.ndarray:
    """log p of every label after every prompt, with the functions and the check of ``score``.

    Args:
        lm: a transformers model, bare or wrapped by peft; its mode is restored.
        tokenizer: its tokenizer, in a fast version.
        prompts: n texts.
        labels: K different texts.
        tokens_per_batch: token budget of one batch, including padding.

    Returns:
        float64 [n, K, 2]: label tokens, end-of-sequence token.

    Raises:
        InputError: there is no prompt or label, one is not a text, has no tokens or is too long, or the model's scores
            depend on padding.
    """
    prompts, labels = _texts("prompts", prompts), _texts("labels", labels)
    if not (prompts and labels):
        raise InputError("prompts and labels: give at least one of each")
    if len(set(labels)) < len(labels):
        raise InputError(f"labels: {next(label for label in labels if labels.count(label) > 1)!r} is a duplicate")
    encoder = Encoder(tokenizer, lm.config, labels)
    label_set, end = encoder.label_set or [], tokenizer.eos_token_id
    ids = encoder.prompt_ids(prompts)
    longest = max(label_set, key=len)
    pairs = [Encoded(prompt, longest, end) for prompt in ids]
    for row, pair in enumerate(pairs):
        encoder.refuse_foreign_tokens(pair, str(row))
        if over := encoder.excess(pair):
            raise InputError(
                f"prompt {row}: with the longest label, it is {over} tokens longer than the model's context"
            )
    samples = [pairs[row] for row in sample_rows(np.array([len(pair) for pair in pairs]))]
    with _scoring(lm):
        ways = check_scoring(lm, samples, label_set, end, prefix=True)
        return np.asarray(score_choices(lm, ids, label_set, end, tokens_per_batch, ways=ways).numpy())


def _texts(name: str, values: Sequence[str]) -> list[str]:
    texts = list(values)
    if isinstance(values, str) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}: give a list of texts")
    return texts


@contextmanager
def _scoring(lm: Any) -> Iterator[None]:
    """Puts a model into eval mode with fp32 logits, as from ``load_scorer``, and restores it at the end."""
    head, modes = lm.get_output_embeddings(), [(module, module.training) for module in lm.modules()]
    narrow = head.weight.dtype != torch.float32
    lm.eval()
    if narrow:
        lm.set_output_embeddings(wide_head(head, head.weight.device))
    try:
        yield
    finally:
        if narrow:
            lm.set_output_embeddings(head)
        for module, training in modes:
            module.training = training
