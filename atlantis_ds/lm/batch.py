"""Turns encoded examples into batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch

from atlantis_ds.lm.encode import Encoded

NEAR, ENOUGH = 0.9, 0.25
"""A batch that fills this share of its token budget gets no example shorter than this share of its longest example: a
smaller batch is just as fast, but padding is not."""

PACKED_SHARE, PACKED_TOKENS = 0.9, 4096
"""A micro-batch is packed into one row if that needs at most this share of its padded tokens, and this many tokens."""

Item = TypeVar("Item")
Made = TypeVar("Made")

ROW_MULTIPLE = 32
"""A packed row is filled up to a multiple of this many tokens: kernels support few shapes, and whole tiles."""

COMMON, FILLING = -1, -2
"""In a packed row, the owners of the common prefix and of the filling."""


@dataclass(frozen=True)
class Batch:
    """One forward pass over B examples with N label positions in all (label tokens and end tokens).

    ``weight`` is part of the batch, so that no collator or column filter can lose it.
    """

    inputs: dict[str, Any]
    """Inputs of the model's forward pass: int64 [B, T], and a cache for tokens before them, if any."""
    positions: torch.Tensor
    """int64 [N]: index into the flattened [B * T] hidden states of the position that predicts each target (fewer than N
    with ``shared``)."""
    targets: torch.Tensor
    """int64 [N]: token ids to predict."""
    example: torch.Tensor
    """int64 [N]: the batch row to which each target belongs."""
    is_eos: torch.Tensor
    """int64 [N]: 1 if the target is a token that ends a label, a response or a turn."""
    weight: torch.Tensor
    """float64 [B]: importance weights; 0 for padding examples."""
    shared: torch.Tensor | None = None
    """int64 [N]: which of ``positions`` predicts each target, if several targets share one; else each has its own."""
    owner: torch.Tensor | None = None
    """int64 [T], for a packed row: the example of each position, ``COMMON`` or ``FILLING``. ``packed_mask`` computes
    the mask from it, on the model's device."""
    chunked: bool = True
    """Whether many logits may be computed in chunks; not for a model that changes them after its head."""

    @property
    def size(self) -> int:
        return len(self.weight)

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In pinned memory, from which a GPU copies while the program continues."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, torch.Tensor) else value

        own = {field.name: changed(getattr(self, field.name)) for field in fields(self)}
        return replace(self, **own | {"inputs": {name: changed(value) for name, value in self.inputs.items()}})


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Generator[Made, None, None]:
    """``make`` of each item in turn; the next one is made in another thread while the current one is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for item in items:
            made, coming = coming, thread.submit(make, item)
            if made is not None:
                yield made.result()
        if coming is not None:
            yield coming.result()


def token_budget_batches(lengths: Sequence[int], budget: int, prefix: int = 0) -> list[list[int]]:
    """Divide examples, longest first, into batches of at most ``budget`` tokens including padding, with little padding.

    Longest first, so that an out-of-memory error occurs at once, and the estimated remaining time is an upper bound.

    Args:
        lengths: tokens of each example.
        budget: limit of (examples in the batch) x (its longest example); a longer example is a batch of its own.
        prefix: common first tokens of all examples, which are in memory but not read again.

    Returns:
        lists of indices into ``lengths``; every index occurs once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        tokens = len(batches[-1]) * longest if batches else 0
        far = lengths[index] - prefix < NEAR * (longest - prefix)
        if not batches or tokens + longest > budget or (far and tokens >= ENOUGH * budget):
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def collate(
    examples: Sequence[Encoded], config: Any, pad_token_id: int, weights: Sequence[float] | None = None
) -> Batch:
    """Build the tensors of one batch; the model's config decides between causal and encoder-decoder.

    Causal inputs are padded on the right and need no attention mask, because no position sees a later one.
    """
    if config.is_encoder_decoder:
        decoder = [[config.decoder_start_token_id, *pair.label] for pair in examples]
        encoder = [pair.prompt for pair in examples]
        width = max(map(len, decoder))
        inputs = {
            "input_ids": _pad(encoder, pad_token_id),
            "attention_mask": _pad([[1] * len(ids) for ids in encoder], 0),
            "decoder_input_ids": _pad(decoder, pad_token_id),
        }
        starts = [row * width for row in range(len(examples))]
    else:
        sequences = [pair.prompt + pair.label for pair in examples]
        width = max(map(len, sequences))
        inputs = {"input_ids": _pad(sequences, pad_token_id)}
        starts = [row * width + len(pair.prompt) - 1 for row, pair in enumerate(examples)]
    return _batch(inputs, starts, examples, weights)


def _batch(
    inputs: dict[str, Any], starts: list[int], examples: Sequence[Encoded], weights: Sequence[float] | None
) -> Batch:
    """A batch in which position ``starts[i]`` predicts the first label token of example i."""
    turns = [(row, start, end) for row, pair in enumerate(examples) for start, end in pair.turns]
    targets = [[*pair.label, pair.eos] for pair in examples]
    return Batch(
        inputs=inputs,
        positions=_flat([range(starts[row] + start, starts[row] + end) for row, start, end in turns]),
        targets=_flat([targets[row][start:end] for row, start, end in turns]),
        example=_flat([[row] * (end - start) for row, start, end in turns]),
        is_eos=_flat([[0] * (end - start - 1) + [1] for _, start, end in turns]),
        weight=torch.tensor([1.0] * len(targets) if weights is None else list(weights), dtype=torch.float64),
    )


def padded_prompts(prompts: Sequence[Sequence[int]], config: Any, pad_token_id: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, int64 [B, T], of prompts to continue.

    A causal model continues from the last column, so its padding is on the left. An encoder counts its positions from
    the first column, whatever the mask says, so its padding is on the right.
    """
    width = max(map(len, prompts))
    padding = [[0] * (width - len(ids)) for ids in prompts]
    pads = [[pad_token_id] * len(zeros) for zeros in padding]
    ones = [[1] * len(ids) for ids in prompts]
    right = config.is_encoder_decoder
    ids = [[*own, *pad] if right else [*pad, *own] for own, pad in zip(prompts, pads)]
    mask = [[*own, *zeros] if right else [*zeros, *own] for own, zeros in zip(ones, padding)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Number of common first tokens of all prompts, leaving each prompt at least one token of its own."""
    shortest = min(map(len, prompts)) - 1
    first, last = min(map(list, prompts)), max(map(list, prompts))  # a common prefix of these two is common to all
    return next((at for at in range(shortest) if first[at] != last[at]), shortest)


def collate_to_train(
    examples: Sequence[Encoded],
    config: Any,
    pad_token_id: int,
    weights: Sequence[float] | None = None,
    packed: Literal["never", "less", "always"] = "less",
) -> Batch:
    """The batch of ``collate``, with causal examples in one row without padding if that has fewer tokens.

    The common prefix of all prompts comes first, once. Each example after it sees only that prefix and itself, and
    counts its positions from the end of the prefix: log-likelihoods and gradients are those of the padded batch.

    Args:
        packed: ``never`` for models that cannot use such a row (see ``ways``), ``always`` to test this.
    """
    if config.is_encoder_decoder or packed == "never":
        return collate(examples, config, pad_token_id, weights)
    padded = len(examples) * max(map(len, examples))
    flash = is_flash(config)
    prefix = 0 if flash else common_prefix([pair.prompt for pair in examples])
    width = prefix + sum(len(pair) - prefix for pair in examples)
    width += 0 if flash else -width % ROW_MULTIPLE
    # In one row, attention compares every position with every other, which does not pay off for a few tokens, except
    # for kernels that know where each example begins.
    if packed == "less" and width > min(PACKED_SHARE * padded, width if flash else PACKED_TOKENS):
        return collate(examples, config, pad_token_id, weights)
    ids, position_ids, owner, starts = list(examples[0].prompt[:prefix]), list(range(prefix)), [COMMON] * prefix, []
    for row, pair in enumerate(examples):
        own = [*pair.prompt[prefix:], *pair.label]
        starts.append(len(ids) + len(pair.prompt) - prefix - 1)
        ids += own
        position_ids += range(prefix, prefix + len(own))
        owner += [row] * len(own)
    filling = width - len(ids)
    ids, position_ids = ids + [pad_token_id] * filling, position_ids + [0] * filling
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([position_ids])}
    if flash:
        return _batch(inputs | _where_examples_begin(examples), starts, examples, weights)
    return replace(_batch(inputs, starts, examples, weights), owner=torch.tensor(owner + [FILLING] * filling))


def is_flash(config: Any) -> bool:
    """Whether a model uses FlashAttention, which takes the start of each example in a row instead of a mask."""
    return "flash_attention" in str(getattr(config, "_attn_implementation", None))


def _where_examples_begin(examples: Sequence[Encoded]) -> dict[str, Any]:
    """FlashAttention's arguments for a packed row: cumulative lengths, int32 [B + 1], and the longest."""
    ends = torch.tensor([0, *map(len, examples)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(map(len, examples))
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def packed_mask(owner: torch.Tensor, config: Any) -> Any:
    """The attention mask of a packed row: a position sees the common prefix, and its own example up to itself.

    Args:
        owner: ``Batch.owner``, on the model's device.

    Returns:
        the mask for the model's attention: [1, 1, T, T], or for ``flex_attention`` a BlockMask.
    """
    if getattr(config, "_attn_implementation", None) == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def sees_one(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return ((owner[query] == owner[key]) | (owner[key] == COMMON)) & (query >= key)

        return create_block_mask(sees_one, 1, None, len(owner), len(owner), device=str(owner.device))
    sees = ((owner[:, None] == owner) | (owner == COMMON)).tril()
    return attention_mask(sees[None, None], config)


@dataclass(frozen=True)
class LabelTree:
    """The labels of a set as a tree of tokens: common beginnings of labels occur only once."""

    tokens: list[int]
    """Token id of each of M nodes; a node comes after its parent."""
    depths: list[int]
    """0 for a label's first token."""
    sees: torch.Tensor
    """bool [M, M]: a node sees its ancestors and itself."""
    paths: list[list[int]]
    """For each label, the nodes of its tokens."""


def label_tree(labels: Sequence[Sequence[int]]) -> LabelTree:
    """The tree of ``labels``: token ids of each, without the end-of-sequence token."""
    nodes: dict[tuple[int, ...], int] = {}
    paths = [[nodes.setdefault(tuple(label[: at + 1]), len(nodes)) for at in range(len(label))] for label in labels]
    sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
    for path in paths:
        for at, node in enumerate(path):
            sees[node, path[: at + 1]] = True
    return LabelTree([beginning[-1] for beginning in nodes], [len(beginning) - 1 for beginning in nodes], sees, paths)


def attention_mask(sees: torch.Tensor, config: Any) -> torch.Tensor:
    """A bool mask in the form that the model's attention expects: eager attention adds it, the others interpret it."""
    if getattr(config, "_attn_implementation", None) != "eager":
        return sees
    return torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, torch.finfo(torch.float32).min)


def collate_choices(prompts: Sequence[Sequence[int]], tree: LabelTree, eos: int, config: Any) -> Batch:
    """One batch of causal prompts, each followed by the tree of all labels: a prompt is read once, not once per label.

    A token of the tree sees the prompt, the earlier tokens of its label, and itself, and counts its position along its
    label: a label's log-likelihood is that of the plain pair.

    Args:
        prompts: token ids of B prompts.
        tree: the tree of K labels, from ``label_tree``.
        eos: the end-of-sequence token.
        config: the model's config.

    Returns:
        a batch of B * K examples: the K labels of the first prompt, then those of the second, and so on.
    """
    width = max(map(len, prompts)) + len(tree.tokens)
    ids = torch.full((len(prompts), width), eos)
    position_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    # Every position sees itself, including padding: a row that sees nothing would be NaN.
    sees = torch.eye(width, dtype=torch.bool).repeat(len(prompts), 1, 1)
    positions: list[range] = []
    for row, prompt in enumerate(prompts):
        end = len(prompt)
        stop = end + len(tree.tokens)
        ids[row, :stop] = torch.tensor([*prompt, *tree.tokens])
        position_ids[row, :stop] = torch.tensor([*range(end), *(end + depth for depth in tree.depths)])
        sees[row, :end, :end] = torch.ones(end, end, dtype=torch.bool).tril()
        sees[row, end:stop, :end] = True
        sees[row, end:stop, end:stop] = tree.sees
        positions.append(range(row * width + end - 1, row * width + stop))
    # A prompt's last token predicts the first token of every label; a tree node predicts the next tokens of its labels.
    ends = range(0, len(positions) * len(positions[0]), len(positions[0]))
    shared = [[end, *(end + 1 + node for node in path)] for end in ends for path in tree.paths]
    targets = [[*(tree.tokens[node] for node in path), eos] for path in tree.paths] * len(prompts)
    return Batch(
        inputs={
            "input_ids": ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask(sees[:, None], config),
        },
        positions=_flat(positions),
        targets=_flat(targets),
        example=_flat([[row] * len(target) for row, target in enumerate(targets)]),
        is_eos=_flat([[0] * (len(target) - 1) + [1] for target in targets]),
        weight=torch.ones(len(targets), dtype=torch.float64),
        shared=_flat(shared),
    )


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)


def _flat(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.int64)
