"""Greedy generation in batches, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from atlantis_ds.lm.batch import padded_prompts, token_budget_batches
from atlantis_ds.lm.load import takes_hidden_states_of_any_type
from atlantis_ds.lm.ways import FAST, Ways


@torch.inference_mode()
def generate_greedy(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    end_tokens: Collection[int],
    pad_token_id: int,
    tokens_per_batch: int,
    max_new_tokens: int,
    advance: Callable[[int], None],
    ways: Ways = FAST,
) -> list[list[int]]:
    """The model's continuation of each prompt, always with the most likely next token.

    The checkpoint's own generation config (beams, penalties, forced tokens, minimum lengths) is not used, because
    models were neither trained nor scored with it.

    Args:
        lm: a causal or encoder-decoder LM of transformers, or wrapped by peft, in eval mode.
        prompts: token ids; for an encoder-decoder those of the encoder.
        end_tokens: tokens that end a response.
        pad_token_id: any token id; the content of the padding has no effect.
        tokens_per_batch: budget of (prompt + new tokens) in one batch, including padding.
        max_new_tokens: the maximum number of new tokens; a causal model also stops at the end of its positions.
        advance: called with the number of examples after each batch.
        ways: whether prompts of different lengths may share a batch.

    Returns:
        for each prompt, in order, the new tokens up to the first end token, without it.
    """
    limit = None if lm.config.is_encoder_decoder else getattr(lm.config, "max_position_embeddings", None)
    room = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids)) for ids in prompts]
    groups = [(tokens, 0 if ways.padded else len(ids)) for tokens, ids in zip(room, prompts)]
    found: list[list[int]] = [[] for _ in prompts]
    # Prompts that end near the limit get their own batch: the length of a response must not depend on its neighbours.
    for group in sorted(set(groups), reverse=True):
        same = [row for row, other in enumerate(groups) if other == group]
        most = room[same[0]]
        if most < 1:
            advance(len(same))
            continue
        with _plain_greedy(lm, end_tokens, pad_token_id, most) as config:
            for batch in token_budget_batches([len(prompts[row]) + most for row in same], tokens_per_batch):
                rows = [same[index] for index in batch]
                for row, new in zip(rows, _new_tokens(lm, [prompts[row] for row in rows], config)):
                    end = next((at for at, token in enumerate(new) if token in end_tokens), len(new))
                    found[row] = new[:end]
                advance(len(rows))
    return found


def _new_tokens(lm: Any, prompts: Sequence[Sequence[int]], config: Any) -> list[list[int]]:
    inputs = padded_prompts(prompts, lm.config, config.pad_token_id)
    output = lm.generate(**{name: tensor.to(lm.device) for name, tensor in inputs.items()}, generation_config=config)
    width = 1 if lm.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    new: list[list[int]] = output[:, width:].tolist()  # the output of an encoder-decoder begins with its start token
    return new


@contextmanager
def _plain_greedy(lm: Any, end_tokens: Collection[int], pad_token_id: int, max_new_tokens: int) -> Iterator[Any]:
    """Sets a config for greedy generation on ``lm`` for a while; its head then accepts hidden states of any dtype."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_tokens) or None,
        pad_token_id=pad_token_id,
        decoder_start_token_id=getattr(lm.config, "decoder_start_token_id", None),
    )
    # For unset values, `generate` uses the model's own config, so that must be empty, too.
    kept, lm.generation_config = lm.generation_config, config
    try:
        with takes_hidden_states_of_any_type(lm):
            yield config
    finally:
        lm.generation_config = kept
