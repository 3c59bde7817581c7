"""The dev split during training: its loss and its labels, on all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.lm.batch import Batch, ahead, collate, token_budget_batches
from atlantis_ds.lm.likelihood import label_log_likelihoods, score_choices
from atlantis_ds.lm.tokens import Tokens
from atlantis_ds.lm.ways import Ways


def mean_loss(engine: Any, pairs: Tokens, pad_token_id: int, tokens_per_batch: int, ways: Ways, ranks: Ranks) -> float:
    """Mean of -log p(y|x) over all pairs, sharded over ranks; every rank runs the same number of forward passes."""
    batches = token_budget_batches(pairs.lengths.tolist(), tokens_per_batch)
    mine = range(ranks.rank, ranks.rank + len(batches), ranks.world_size)  # dummy batches after the last one

    def make(number: int) -> Batch:
        rows = batches[min(number, len(batches) - 1)]
        batch = collate([pairs[row] for row in rows], engine.module.config, pad_token_id)
        return replace(batch, chunked=ways.chunked)

    engine.eval()
    local = 0.0
    for number, batch in zip(mine, ahead(make, mine), strict=True):
        with torch.no_grad():
            log_likelihood = float(label_log_likelihoods(engine, batch.to(ranks.device)).sum())
        local -= log_likelihood if number < len(batches) else 0.0
    engine.train()
    return ranks.sum(local)[0] / len(pairs)


def likeliest_labels(
    engine: Any,
    dev: Tokens,
    label_ids: list[list[int]],
    pad_token_id: int,
    tokens_per_batch: int,
    ways: Ways,
    ranks: Ranks,
) -> list[int]:
    """The index of the label with the greatest log-likelihood for every row; ranks share the rows."""
    mine = range(ranks.rank, len(dev), ranks.world_size) or range(1)  # no rank may skip a forward pass under ZeRO-3
    engine.eval()
    sums = score_choices(
        engine,
        [dev[row].prompt for row in mine],
        label_ids,
        pad_token_id,
        tokens_per_batch,
        agree=lambda forwards: max(ranks.gather(forwards)),
        ways=ways,
    )
    engine.train()
    best = sums.sum(dim=2).argmax(dim=1).tolist()
    chosen = dict(pair for part in ranks.gather(list(zip(mine, best))) for pair in part)
    return [chosen[row] for row in range(len(dev))]
