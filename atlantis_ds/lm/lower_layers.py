"""Adapters on the last layers only: the layers below them read each example once, not once an epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from atlantis_ds.lm.batch import Batch, collate, common_prefix, token_budget_batches
from atlantis_ds.lm.encode import Encoded


@dataclass(frozen=True)
class LowerLayers:
    """What the frozen lower layers of a causal model make of some examples."""

    states: torch.Tensor
    """[tokens of all examples, hidden size] in the model's dtype, on the CPU: what the first layer above them reads."""
    places: list[Encoded]
    """The examples, each token as its row of ``states``; what all prompts begin with has the same rows in all."""

    def below(self, batch: Batch, rows: Sequence[int], collated: Callable[..., Batch], config: Any) -> Batch:
        """``batch`` with hidden states in place of token ids.

        Args:
            rows: the batch's examples, as indices into ``places``.
            collated: what made the batch: ``collate`` or ``collate_to_train``.
            config: the model's.
        """
        inputs = dict(batch.inputs)
        del inputs["input_ids"]
        places = collated([self.places[row] for row in rows], config, 0).inputs["input_ids"]
        return replace(batch, inputs={**inputs, "inputs_embeds": self.states[places]})


@torch.no_grad()
def read_lower_layers(lm: Any, pairs: Sequence[Encoded], below: int, tokens_per_batch: int) -> LowerLayers:
    """Run the first ``below`` layers of a causal model on all examples.

    Args:
        lm: a transformers (or peft) model with whole weights, nothing trained in these layers.
        pairs: encoded examples.
        tokens_per_batch: token budget of one batch, padding included.
    """
    decoder, device = lm.get_decoder(), next(lm.parameters()).device
    layers, norm, training = decoder.layers, decoder.norm, lm.training
    states: list[torch.Tensor] = [torch.empty(0)] * len(pairs)
    lm.eval()
    decoder.layers, decoder.norm = layers[:below], torch.nn.Identity()
    try:
        for rows in token_budget_batches([len(pair) for pair in pairs], tokens_per_batch):
            batch = collate([pairs[row] for row in rows], lm.config, 0).to(device)
            for row, of_row in zip(rows, decoder(**batch.inputs, use_cache=False).last_hidden_state):
                states[row] = of_row[: len(pairs[row])].cpu().clone()
    finally:
        decoder.layers, decoder.norm = layers, norm
        lm.train(training)
    shared = common_prefix([pair.prompt for pair in pairs])
    places, start = [], 0
    for pair in pairs:
        own = [*range(shared), *range(start + shared, start + len(pair))]
        places.append(Encoded(own[: len(pair.prompt)], own[len(pair.prompt) :], 0))
        start += len(pair)
    return LowerLayers(torch.cat(states), places)


def skip_lower_layers(lm: Any, below: int) -> None:
    """From now on the model's first ``below`` layers hand on what they are given."""

    def hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    for layer in lm.get_decoder().layers[:below]:
        layer.forward = hand_on
