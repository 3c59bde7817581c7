"""The only function that computes label log-likelihoods, used by scoring, training and ranking."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from atlantis_ds.lm.batch import (
    Batch,
    ahead,
    collate,
    collate_choices,
    common_prefix,
    label_tree,
    packed_mask,
    token_budget_batches,
)
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.lm.ways import CHUNK, FAST, TREE_TOKENS, Ways


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

    Only the hidden states that predict a label token reach the LM head: with a vocabulary of 152k, the full logits
    would dominate the memory. Log-softmax is in fp32.

    Args:
        model: a causal or encoder-decoder LM of transformers, bare, wrapped by peft, or a DeepSpeed engine.
        batch: from ``collate``, on the model's device.

    Returns:
        float64 [N], in the order of ``batch.targets``.
    """
    config = module_of(model).config
    inputs = batch.inputs
    if batch.owner is not None:
        inputs = {**inputs, "attention_mask": packed_mask(batch.owner, config)}
    if batch.chunked and len(batch.positions) * config.get_text_config().vocab_size > CHUNK:
        with _tokens_in_chunks(model, batch) as tokens:
            model(**inputs, use_cache=False)
        return tokens[0].double()
    with _label_positions_only(model, batch.positions):
        logits = model(**inputs, use_cache=False).logits
    if batch.shared is not None:
        return logits.float().log_softmax(dim=-1)[batch.shared, batch.targets].double()
    return -F.cross_entropy(logits.float(), batch.targets, reduction="none").double()


@contextmanager
def _tokens_in_chunks(model: Any, batch: Batch) -> Iterator[list[torch.Tensor]]:
    """Makes the LM head compute log-likelihoods directly, in chunks of positions.

    All chunks are computed inside one call of the head: under ZeRO-3 its weights are gathered only once, and ranks with
    different numbers of chunks do not wait for each other. The output of the model's forward pass is not used; a list
    receives the values, float32 [N]. A soft cap on the logits (Gemma) is applied here.
    """
    lm = module_of(model)
    head, config = lm.get_output_embeddings(), lm.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    forward, found = head.forward, []
    rows = max(1, CHUNK // config.vocab_size)

    def chunk(hidden: torch.Tensor, shared: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        logits = forward(hidden)
        logits = (cap * torch.tanh(logits / cap) if cap else logits).float()
        if shared is not None:
            return logits.log_softmax(dim=-1)[shared, targets]
        return -F.cross_entropy(logits, targets, reduction="none")

    def instead(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.flatten(0, -2)[batch.positions].to(head.weight.dtype)
        pieces = []
        order = torch.arange(len(batch.targets), device=hidden.device)
        for start in range(0, len(hidden), rows):
            shared, here = None, order[start : start + rows]
            if batch.shared is not None:
                here = order[(batch.shared >= start) & (batch.shared < start + rows)]
                shared = batch.shared[here] - start
            arguments = hidden[start : start + rows], shared, batch.targets[here]
            kept = torch.is_grad_enabled()
            values = checkpoint(chunk, *arguments, use_reentrant=False) if kept else chunk(*arguments)
            pieces.append((here, values))
        places = torch.cat([here for here, _ in pieces])
        values = torch.cat([values for _, values in pieces])
        found.append(values if batch.shared is None else values[places.argsort()])
        # The model continues with a tensor like the head's output, one column wide.
        return found[0].to(hidden.dtype)[None, :, None]

    head.forward = instead
    if cap:
        config.final_logit_softcapping = None
    try:
        yield found
    finally:
        del head.forward
        if cap:
            config.final_logit_softcapping = cap


def sum_over_labels(tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum float64 [N], one value per label token, to [B, 2]: the label's own tokens, and its end-of-sequence token."""
    sums = torch.zeros(2 * batch.size, dtype=torch.float64, device=tokens.device)
    return sums.index_add(0, 2 * batch.example + batch.is_eos, tokens).view(-1, 2)


@contextmanager
def _label_positions_only(model: Any, positions: torch.Tensor) -> Iterator[None]:
    head = module_of(model).get_output_embeddings()

    def gather(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0].flatten(0, -2)[positions].to(head.weight.dtype),)

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


MIN_PREFIX = 8
"""Fewest common tokens at the beginning of prompts for which a separate forward pass pays off."""

Progress = Callable[[int, int], None]
"""Called with (examples, tokens) after each batch."""


@torch.inference_mode()
def score_pairs(
    model: Any,
    pairs: Sequence[Encoded],
    pad_token_id: int,
    tokens_per_batch: int,
    progress: Progress | None = None,
    agree: Callable[[int], int] | None = None,
    ways: Ways = FAST,
) -> torch.Tensor:
    """Label log-likelihoods of many (prompt, label) pairs under a frozen model.

    Args:
        model: as in ``token_log_likelihoods``, in eval mode.
        pairs: encoded examples.
        pad_token_id: any token id; the content of the padding has no effect.
        tokens_per_batch: token budget of one batch, including padding.
        progress: see ``Progress``.
        agree: for a model sharded over ranks, which needs the same number of forward passes on all of them: takes this
            rank's number and returns the largest.
        ways: the fast ways that are correct for the model.

    Returns:
        float64 [n, 2] on the CPU, in the order of ``pairs``: label tokens, end-of-sequence token.
    """
    lm, device = module_of(model), next(model.parameters()).device
    prefix = None if agree or not ways.prefix else read_prefix(lm, [pair.prompt for pair in pairs])
    own = [replace(pair, prompt=pair.prompt[prefix.tokens :]) for pair in pairs] if prefix else pairs

    def make(rows: list[int]) -> Batch:
        return replace(collate([own[row] for row in rows], lm.config, pad_token_id), chunked=ways.chunked)

    def forward(batch: Batch) -> torch.Tensor:
        batch = batch.to(device)
        return label_log_likelihoods(model, prefix.before(batch) if prefix else batch)

    lengths = [len(pair) for pair in pairs]
    return _in_batches(lengths, tokens_per_batch, prefix.tokens if prefix else 0, make, forward, progress, agree)


@torch.inference_mode()
def score_choices(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    eos: int,
    tokens_per_batch: int,
    progress: Progress | None = None,
    agree: Callable[[int], int] | None = None,
    ways: Ways = FAST,
) -> torch.Tensor:
    """Label log-likelihoods of every label after every prompt; each prompt is read once for all labels.

    Args:
        model: as in ``token_log_likelihoods``, in eval mode.
        prompts: token ids of n prompts.
        labels: token ids of K labels, without the end-of-sequence token.
        eos: the end-of-sequence token.
        tokens_per_batch, progress, agree, ways: as in ``score_pairs``; a prompt counts with all labels after it.

    Returns:
        float64 [n, K, 2] on the CPU, in the order of the arguments: label tokens, end-of-sequence token.
    """
    lm, device = module_of(model), next(model.parameters()).device
    if not (ways.tree or lm.config.is_encoder_decoder):
        return _score_each(model, prompts, labels, eos, tokens_per_batch, progress, agree, ways)
    if len(parts := cut_labels(labels)) > 1:
        told = _Shares(progress, len(parts))
        some = [score_choices(model, prompts, part, eos, tokens_per_batch, told, agree, ways) for part in parts]
        return torch.cat(some, dim=1)
    prefix = None if agree or not ways.prefix else read_prefix(lm, prompts)
    own = [prompt[prefix.tokens :] for prompt in prompts] if prefix else prompts
    tree = label_tree(labels)

    def make(rows: list[int]) -> Batch:
        if not lm.config.is_encoder_decoder:
            batch = collate_choices([own[row] for row in rows], tree, eos, lm.config)
        else:
            pairs = [Encoded(list(prompts[row]), list(label), eos) for row in rows for label in labels]
            batch = collate(pairs, lm.config, eos)
        return replace(batch, chunked=ways.chunked)

    def forward(batch: Batch) -> torch.Tensor:
        batch = batch.to(device)
        if lm.config.is_encoder_decoder:
            batch = _encode_once(lm, batch, len(labels))
        return label_log_likelihoods(model, prefix.before(batch) if prefix else batch).view(-1, len(labels), 2)

    behind = sum(map(len, labels)) if lm.config.is_encoder_decoder else len(tree.tokens)
    lengths = [len(prompt) + behind for prompt in prompts]
    scores = _in_batches(lengths, tokens_per_batch, prefix.tokens if prefix else 0, make, forward, progress, agree)
    return scores.reshape(len(prompts), len(labels), 2)


def cut_labels(labels: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Labels in groups of at most ``TREE_TOKENS`` tokens, in their order; a longer label is a group of its own."""
    parts: list[list[Sequence[int]]] = [[]]
    tokens = 0
    for label in labels:
        if parts[-1] and tokens + len(label) > TREE_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(label)
        tokens += len(label)
    return parts


class _Shares:
    """Progress over several trees: an example is counted in equal shares, one for each tree."""

    def __init__(self, progress: Progress | None, trees: int) -> None:
        self.progress, self.trees, self.done = progress, trees, 0

    def __call__(self, examples: int, tokens: int) -> None:
        before, self.done = self.done // self.trees, self.done + examples
        if self.progress:
            self.progress(self.done // self.trees - before, tokens)


def _score_each(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    eos: int,
    tokens_per_batch: int,
    progress: Progress | None,
    agree: Callable[[int], int] | None,
    ways: Ways,
) -> torch.Tensor:
    """``score_choices`` pair by pair, for models that cannot use a tree."""
    pairs = [Encoded(list(prompt), list(label), eos) for prompt in prompts for label in labels]
    scores = score_pairs(model, pairs, eos, tokens_per_batch, _Shares(progress, len(labels)), agree, ways)
    return scores.reshape(len(prompts), len(labels), 2)


@dataclass(frozen=True)
class Prefix:
    """The keys and values of the common prefix of all prompts of a causal model, read once for all of them."""

    tokens: int
    cache: Any
    """A transformers cache for one sequence."""

    def before(self, batch: Batch) -> Batch:
        """The batch, encoded without the prefix, as if it followed the prefix."""
        size, width = batch.inputs["input_ids"].shape
        cache = copy.deepcopy(self.cache)  # a forward pass appends to it
        cache.batch_repeat_interleave(size)
        positions = torch.arange(width, device=batch.targets.device).expand(size, -1)
        inputs = {"position_ids": positions, **batch.inputs, "past_key_values": cache}
        inputs["position_ids"] = inputs["position_ids"] + self.tokens
        if "attention_mask" in inputs:  # from collate_choices: which position sees which
            mask = inputs["attention_mask"]
            seen = mask.new_full((size, 1, width, self.tokens), mask.dtype == torch.bool)  # or nothing to add
            inputs["attention_mask"] = torch.cat([seen, inputs["attention_mask"]], dim=-1)
        return replace(batch, inputs=inputs)


def read_prefix(lm: Any, prompts: Sequence[Sequence[int]]) -> Prefix | None:
    """The common prefix of all prompts, or None if it is too short. Each prompt keeps at least one token of its own."""
    if not prompts or lm.config.is_encoder_decoder:
        return None
    tokens = common_prefix(prompts)
    if tokens < MIN_PREFIX:
        return None
    ids = torch.tensor([prompts[0][:tokens]], device=next(lm.parameters()).device)
    return Prefix(tokens, lm.get_decoder()(input_ids=ids, use_cache=True).past_key_values)


def _in_batches(
    lengths: Sequence[int],
    tokens_per_batch: int,
    prefix: int,
    make: Callable[[list[int]], Batch],
    forward: Callable[[Batch], torch.Tensor],
    progress: Progress | None,
    agree: Callable[[int], int] | None,
) -> torch.Tensor:
    """``forward`` over batches of rows with a token budget; its values [rows, ...] in the order of the rows."""
    if not lengths:
        return torch.empty(0, 2, dtype=torch.float64)
    batches = token_budget_batches(lengths, tokens_per_batch, prefix)
    forwards = (
        agree(len(batches)) if agree else 0
    )  # before the first: during a forward pass, ranks exchange only model weights
    order: list[int] = []
    values: list[torch.Tensor] = []
    for rows, batch in zip(batches, ahead(make, batches), strict=True):
        values.append(forward(batch).cpu())
        order += rows
        if progress:
            progress(len(rows), sum(lengths[row] for row in rows))
    for _ in range(len(batches), forwards):
        forward(batch)
    return torch.cat(values)[torch.tensor(order).argsort()]


def _encode_once(lm: Any, batch: Batch, times: int) -> Batch:
    """A batch in which each prompt is repeated ``times`` times, with the encoder run once per prompt."""
    inputs = dict(batch.inputs)
    first = slice(None, None, times)
    prompts, mask = inputs.pop("input_ids")[first], inputs["attention_mask"][first]
    states = lm.get_encoder()(input_ids=prompts, attention_mask=mask)
    states.last_hidden_state = states.last_hidden_state.repeat_interleave(times, dim=0)
    return replace(batch, inputs={**inputs, "encoder_outputs": states})


def module_of(model: Any) -> Any:
    """The transformers (or peft) model of a DeepSpeed engine, or the model itself."""
    return getattr(model, "module", model)
