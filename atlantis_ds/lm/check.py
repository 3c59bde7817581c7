"""Checks which fast ways are correct for a model, on a few of the run's own examples, against plain forward passes.

The plain way is padded pairs without our own mask: no position of a causal model sees a later one. The fast ways depend
on a mask and positions that we supply: examples packed into one row, the labels of a set as a tree, the common prefix
of all prompts read once. Not every model handles these correctly: some add a mask that means "may see", some ignore it,
a sliding window or a recurrent layer sees past it. None of them raises an error, so each model is checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from atlantis_ds.errors import InputError
from atlantis_ds.lm import likelihood
from atlantis_ds.lm.batch import (
    collate,
    collate_choices,
    collate_to_train,
    common_prefix,
    label_tree,
    padded_prompts,
)
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.lm.likelihood import MIN_PREFIX, Prefix, module_of, read_prefix, token_log_likelihoods
from atlantis_ds.lm.load import takes_hidden_states_of_any_type
from atlantis_ds.lm.ways import FAST, PLAIN, Ways

SAMPLES = 3
"""Number of examples in a check: the longest, and others spread over the data."""
LABELS = 8
"""Number of labels in a check, including the longest."""
ROUNDING = {torch.float32: 5e-4, torch.bfloat16: 0.01}
"""Nats per token (root mean square over a target) that always count as rounding. The real effect of rounding is also
measured, by changing only the padding: in bf16 up to 0.25 was observed (SmolLM2-135M), and 1 to 44 with a mask that the
model handles wrongly."""
NOISES = 4
"""A fast way may differ by this many times the effect of other padding."""
REFUSED = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""Nats per token by which padding may change an example."""
PADDED = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Nats by which padding may change the most likely next token of a prompt, for generation in batches."""
Scores = list[torch.Tensor]
"""For each of several examples, log p of its target tokens: float64."""


def sample_rows(lengths: np.ndarray) -> list[int]:
    """Rows to check a model on: the longest example, and others spread over the data.

    Args:
        lengths: int [n], n at least 1: tokens of each example.
    """
    spread = np.linspace(0, len(lengths) - 1, SAMPLES, dtype=int).tolist()
    return list(dict.fromkeys([int(lengths.argmax()), *spread]))[:SAMPLES]


def sample_labels(labels: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Labels to check a model on: the longest and the first few; all labels of a small set."""
    if not labels:
        return []
    longest = max(range(len(labels)), key=lambda at: len(labels[at]))
    return [labels[at] for at in dict.fromkeys([longest, *range(min(LABELS, len(labels)))])][:LABELS]


@torch.no_grad()
def check_packed(model: Any, pairs: Sequence[Encoded], pad_token_id: int) -> Ways:
    """Whether training may pack examples into one row.

    Args:
        model: as in ``token_log_likelihoods``, in eval mode. If it is sharded over ranks, all ranks must call this,
            with the same pairs.
        pairs: a few examples, see ``sample_rows``.

    Raises:
        InputError: an example's log-likelihood depends on the other examples in the batch.
    """
    check = _Check(model, pairs, pad_token_id)
    if check.config.is_encoder_decoder or len(pairs) < 2 or not check.finite:
        return check.chunked
    packed = collate_to_train(check.pairs, check.config, pad_token_id, packed="always").to(check.device)
    found = check.ways(check.plain, packed=lambda: check.score(packed))
    return check.chunked.and_found("packed", found)


@torch.no_grad()
def check_scoring(
    model: Any, pairs: Sequence[Encoded], labels: Sequence[Sequence[int]] | None, pad_token_id: int, prefix: bool
) -> Ways:
    """Which fast ways scoring and ranking may take; arguments as in ``check_packed``.

    Args:
        labels: token ids of the label set, if all labels are scored after each prompt.
        prefix: whether a common prefix would be read once; not for a model sharded over ranks.
    """
    check = _Check(model, pairs, pad_token_id)
    ways, pairs = check.chunked, check.pairs
    if check.config.is_encoder_decoder or not check.finite:
        return ways
    chosen = sample_labels(labels or [])
    tree = label_tree(chosen)
    every = [replace(pair, label=list(label), spans=()) for pair in pairs for label in chosen]
    plain = check.plain if labels is None else check.one_by_one(every)

    def score(before: Prefix | None) -> Scores:
        prompts = [pair.prompt[before.tokens if before else 0 :] for pair in pairs]
        if labels is None:
            batch = check.collate([replace(pair, prompt=prompt) for pair, prompt in zip(pairs, prompts)])
        else:
            batch = collate_choices(prompts, tree, pairs[0].eos, check.config).to(check.device)
        return check.score(before.before(batch) if before else batch)

    if labels is not None:
        ways = ways.and_found("tree", check.ways(plain, tree=lambda: score(None)))
    if not (prefix and ways.tree and len(pairs) > 1 and common_prefix([p.prompt for p in pairs]) >= MIN_PREFIX):
        return replace(ways, prefix=False)
    read = [pair.prompt for pair in pairs]
    return ways.and_found("prefix", check.ways(plain, prefix=lambda: score(read_prefix(check.lm, read))))


@torch.no_grad()
def check_generation(lm: Any, prompts: Sequence[Sequence[int]], pad_token_id: int, ways: Ways = FAST) -> Ways:
    """``ways``, plus the result for padded prompts: the next token's log-probabilities, against each prompt alone."""

    def next_token(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        batch = {name: tensor.to(lm.device) for name, tensor in padded_prompts(rows, lm.config, pad_token_id).items()}
        if lm.config.is_encoder_decoder:
            start = torch.full((len(rows), 1), lm.config.decoder_start_token_id, device=lm.device)
            return lm(**batch, decoder_input_ids=start).logits[:, -1].float().log_softmax(dim=-1)
        batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        accepts = "position_ids" in inspect.signature(lm.forward).parameters
        batch = batch if accepts else {name: batch[name] for name in ("input_ids", "attention_mask")}
        return lm(**batch).logits[:, -1].float().log_softmax(dim=-1)

    tolerance = PADDED.get(next(lm.parameters()).dtype, PADDED[torch.bfloat16])
    with takes_hidden_states_of_any_type(lm):
        likely = [next_token([prompt])[0] for prompt in prompts]
        best = [int(row.argmax()) for row in likely]
        try:
            together = next_token(prompts)
            most = max(abs(float(row[at] - alone[at])) for row, alone, at in zip(together, likely, best))
            padded, said = most <= tolerance, f"off by {most:.2g} nats"
        except Exception as error:
            padded, said = False, _named(error)
    return replace(ways, padded=padded, differences={**ways.differences, "padded": said})


class _Check:
    """A few examples under one model, each alone, with which the other ways are compared."""

    def __init__(self, model: Any, pairs: Sequence[Encoded], pad_token_id: int) -> None:
        self.model, self.lm, self.pad = model, module_of(model), pad_token_id
        # Longest first, as in training: a short example far from a shared prefix reveals the edge of a window.
        self.pairs = sorted(pairs, key=len, reverse=True)
        self.config = self.lm.config
        self.device = next(model.parameters()).device
        dtype = next(self.lm.parameters()).dtype
        self.rounding = ROUNDING.get(dtype, ROUNDING[torch.bfloat16])
        self.chunked = PLAIN
        self.plain = self.one_by_one(self.pairs)
        self.finite = all(bool(tokens.isfinite().all()) for tokens in self.plain)
        if not (self.finite and pairs):
            return  # these allow no conclusion; training and merging have their own checks
        beside = self.score(self.collate(self.pairs))
        noise = _most_a_token(beside, self.plain)
        if not noise <= REFUSED.get(dtype, REFUSED[torch.bfloat16]):
            raise InputError(
                f"model {self.config.model_type}: the log-likelihood of an example changes by "
                f"{_most(beside, self.plain):.3g} nats with the other examples in its batch, so no score or gradient "
                "of this model can be trusted"
            )
        self.rounding = max(self.rounding, NOISES * noise)
        self.chunked = FAST
        self.chunked = self.ways(self.plain, chunked=self.in_chunks)

    def collate(self, pairs: Sequence[Encoded]) -> Any:
        return collate(pairs, self.config, self.pad).to(self.device)

    def score(self, batch: Any) -> Scores:
        tokens = token_log_likelihoods(self.model, replace(batch, chunked=self.chunked.chunked))
        return [tokens[batch.example == example] for example in range(batch.size)]

    def one_by_one(self, pairs: Sequence[Encoded]) -> Scores:
        return [self.score(self.collate([pair]))[0] for pair in pairs]

    def in_chunks(self) -> Scores:
        """The examples with two positions per chunk."""
        kept = likelihood.CHUNK
        likelihood.CHUNK = 2 * self.config.get_text_config().vocab_size
        try:
            return self.one_by_one(self.pairs)
        finally:
            likelihood.CHUNK = kept

    def ways(self, plain: Scores, **tried: Callable[[], Scores]) -> Ways:
        """Each way that was tried, and whether it agrees with the plain way up to rounding."""
        taken: dict[str, bool] = {}
        said: dict[str, str] = {}
        for way, run in tried.items():
            try:
                found = run()
                taken[way] = _most_a_token(found, plain) <= self.rounding
                said[way] = f"off by {_most(found, plain):.2g} nats"
            except Exception as error:  # a model's own code may raise anything: a way that fails is not used
                taken[way], said[way] = False, _named(error)
        return Ways(**taken, differences=said)


def _most(found: Scores, plain: Scores) -> float:
    """The largest difference of an example's log-likelihood, in nats."""
    return float(torch.stack([(one - other).sum().abs() for one, other in zip(found, plain, strict=True)]).max())


def _most_a_token(found: Scores, plain: Scores) -> float:
    """The largest root mean square difference over the target tokens of an example, in nats."""
    each = [(one - other).square().mean().sqrt() for one, other in zip(found, plain, strict=True)]
    return float(torch.stack(each).max())  # NaN if any is NaN


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.80}"
