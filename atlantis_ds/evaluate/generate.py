"""Greedy generation in batches, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from atlantis_ds.lm.batch import token_budget_batches


@torch.inference_mode()
def generate_greedy(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    end_tokens: Collection[int],
    pad_token_id: int,
    tokens_per_batch: int,
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> list[list[int]]:
    """What the model goes on with after each prompt, always taking its likeliest next token.

    Nothing that the checkpoint's own generation config says (beams, penalties, forced tokens, least lengths) has a
    part in it: models were neither trained nor scored with that.

    Args:
        lm: a causal or encoder-decoder LM of transformers, or wrapped by peft, in eval mode.
        prompts: token ids; for an encoder-decoder those of the encoder.
        end_tokens: where the model ends a response.
        pad_token_id: any token id; what stands in the padding changes nothing.
        tokens_per_batch: budget of (prompt + new tokens) in one batch, padding included.
        max_new_tokens: where to stop at the latest; before that a causal model stops at the end of its positions.
        advance: called with the number of examples after each batch.

    Returns:
        for each prompt, in the order given, the new tokens up to the first end token, without it.
    """
    limit = None if lm.config.is_encoder_decoder else getattr(lm.config, "max_position_embeddings", None)
    room = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids)) for ids in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    # Prompts that end near the limit go apart: how much another gets to say must not depend on its neighbours.
    for most in sorted(set(room), reverse=True):
        same = [row for row, tokens in enumerate(room) if tokens == most]
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
    width = max(map(len, prompts))
    padding = [[0] * (width - len(ids)) for ids in prompts]
    ones = [[1] * len(ids) for ids in prompts]
    pads = [[config.pad_token_id] * len(zeros) for zeros in padding]
    right = lm.config.is_encoder_decoder
    # A causal model goes on from the last column, so its padding stands on the left. An encoder counts its positions
    # from the first column, whatever the mask says.
    ids = [[*own, *pad] if right else [*pad, *own] for own, pad in zip(prompts, pads)]
    mask = [[*own, *zeros] if right else [*zeros, *own] for own, zeros in zip(ones, padding)]
    output = lm.generate(
        input_ids=torch.tensor(ids, device=lm.device),
        attention_mask=torch.tensor(mask, device=lm.device),
        generation_config=config,
    )
    new: list[list[int]] = output[:, 1 if right else width :].tolist()  # an encoder-decoder's begins with its start
    return new


@contextmanager
def _plain_greedy(lm: Any, end_tokens: Collection[int], pad_token_id: int, max_new_tokens: int) -> Iterator[Any]:
    """A config of greedy generation, in force for ``lm`` meanwhile; and its head takes hidden states of any type."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_tokens) or None,
        pad_token_id=pad_token_id,
        decoder_start_token_id=getattr(lm.config, "decoder_start_token_id", None),
    )
    # What a config leaves open, `generate` takes from the model's own one: so that must say nothing either.
    kept, lm.generation_config = lm.generation_config, config
    # A scorer has its head in fp32 behind a body that may be bf16.
    head = lm.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda head, args: (args[0].to(head.weight.dtype),))
    try:
        yield config
    finally:
        handle.remove()
        lm.generation_config = kept
