"""The examples as token ids: encoded once for each tokenizer, in parallel, and memory-mapped by every stage and rank.

A file has the tokens of ``ROWS`` examples. The files are divided among the ranks, and each rank divides its files among
several processes if it has the cores; existing files are not computed again.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from atlantis_ds.cluster.preemption import leave_if_asked
from atlantis_ds.config.schema import Model
from atlantis_ds.data.examples import ROWS, Examples, Split, map_table, write_arrow
from atlantis_ds.errors import InputError
from atlantis_ds.files import fingerprint
from atlantis_ds.lm.encode import Encoded, Encoder
from atlantis_ds.lm.load import load_config, load_tokenizer, tokenizer_hash
from atlantis_ds.progress import Steps
from atlantis_ds.run import Run

VERSION = 3
"""Must be raised if the same examples and tokenizer give different tokens than before."""
SCHEMA = pa.schema(
    [
        pa.field("ids", pa.list_(pa.int32())),  # prompt and target
        pa.field("prompt", pa.int32()),  # tokens of the prompt
        pa.field("eos", pa.int32()),
        pa.field("targets", pa.int32()),  # target tokens, including those that end a target
        pa.field("spans", pa.list_(pa.int32())),  # see Encoded.spans: start, end, start, end
    ]
)
ROWS_AT_ONCE = 256
"""Rows to encode at once: a tokenizer needs about 200 bytes per token until they are done."""


class Tokens:
    """The token ids of one split under one tokenizer; row i is example i."""

    def __init__(self, parts: Sequence[Path]) -> None:
        tables = [map_table(path)[0] for path in parts]
        self._parts = [_Part.of(table) for table in tables]
        none = np.empty(0, dtype=np.int32)
        self.lengths = np.concatenate([none, *(np.diff(part.offsets) for part in self._parts)])
        """int32 [n]: tokens that a model reads for each example."""
        self.targets = np.concatenate([none, *(table["targets"].to_numpy() for table in tables)])
        """int32 [n]: target tokens of each example, including the one that ends it."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Encoded:
        part, at = self._parts[row // ROWS], row % ROWS
        ids = part.ids[part.offsets[at] : part.offsets[at + 1]].tolist()
        spans = part.spans[part.span_offsets[at] : part.span_offsets[at + 1]].reshape(-1, 2).tolist()
        prompt = int(part.prompt[at])
        return Encoded(ids[:prompt], ids[prompt:], int(part.eos[at]), tuple(map(tuple, spans)))


@dataclass(frozen=True)
class _Part:
    ids: np.ndarray
    offsets: np.ndarray
    prompt: np.ndarray
    eos: np.ndarray
    spans: np.ndarray
    span_offsets: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> _Part:
        ids, spans = (table[name].chunk(0) for name in ("ids", "spans"))
        return cls(
            ids.values.to_numpy(),
            ids.offsets.to_numpy(),
            table["prompt"].to_numpy(),
            table["eos"].to_numpy(),
            spans.values.to_numpy(),
            spans.offsets.to_numpy(),
        )


@dataclass(frozen=True)
class _Task:
    """Everything that a process needs to encode a part of a split."""

    examples: Path
    column: str
    model: Model
    labels: list[str] | None
    chat: bool
    as_turn: bool
    on_too_long: str


def encode_split(
    run: Run, examples: Examples, name: str, model: Model, column: str = "target", as_turn: bool = False
) -> Tokens:
    """The tokens of one split for a model's tokenizer; encodes what is missing. Every rank must call it.

    Args:
        name: train, dev or test.
        column: ``target``, or ``gold`` if every example has one.
        as_turn: see ``Encoder``.

    Raises:
        InputError: examples are longer than the model's context, or cannot be encoded.
        Preempted: the job was asked to stop; encoded files are kept.
    """
    split: Split = getattr(examples, name)
    task = _task(run, examples, name, model, column, as_turn)
    parts = _parts(run, split, name, run.ranks.broadcast(_key(split, task) if run.ranks.is_main else None))
    missing = run.ranks.broadcast(
        [part for part, path in enumerate(parts) if not path.exists()] if run.ranks.is_main else None
    )
    if missing:
        _encode_parts(run, task, parts, missing, f"encode {name}")
    return Tokens(parts)


def prepared_tokens(run: Run, examples: Examples, name: str, model: Model) -> Tokens | None:
    """The tokens that ``encode_split`` has written for a split; None if incomplete. For a single rank."""
    split: Split = getattr(examples, name)
    parts = _parts(run, split, name, _key(split, _task(run, examples, name, model, "target", False)))
    return Tokens(parts) if all(path.exists() for path in parts) else None


def _task(run: Run, examples: Examples, name: str, model: Model, column: str, as_turn: bool) -> _Task:
    on_too_long = run.recipe.data.on_too_long
    return _Task(run.folder.split(name), column, model, examples.labels, examples.chat, as_turn, on_too_long)


def _parts(run: Run, split: Split, name: str, key: str) -> list[Path]:
    return [run.folder.tokens / key / f"{name}-{part:05d}.arrow" for part in range(-(-len(split) // ROWS))]


def _key(split: Split, task: _Task) -> str:
    config = load_config(task.model)
    limit = None if task.on_too_long != "truncate_prompt" else getattr(config, "max_position_embeddings", None)
    return fingerprint(
        [
            VERSION,
            split.gold_digest if task.column == "gold" else split.digest,
            tokenizer_hash(task.model),
            bool(config.is_encoder_decoder),
            task.labels,
            task.chat,
            task.as_turn,
            limit,
        ]
    )


def _encode_parts(run: Run, task: _Task, parts: list[Path], missing: list[int], title: str) -> None:
    ranks = run.ranks
    mine = missing[ranks.rank :: ranks.world_size]
    long: list[str] = []
    hosts = ranks.gather(socket.gethostname())
    cores = len(os.sched_getaffinity(0)) // hosts.count(socket.gethostname())
    with Steps(title, len(mine), "files", ranks.is_main and len(missing) > 1, every=max(1, len(mine) // 10)) as steps:
        for found in _encoded(task, [(part, parts[part]) for part in mine], cores):
            long += found
            steps.advance()
    everywhere = [text for texts in ranks.gather(long) for text in texts]
    if everywhere:
        more = f" (and {len(everywhere) - 1} more)" if len(everywhere) > 1 else ""
        raise InputError(f"{everywhere[0]}{more}; set data.on_too_long to leave them out or to cut their prompts")
    leave_if_asked(run.folder, ranks, f"after: {title}")


def _encoded(task: _Task, todo: list[tuple[int, Path]], processes: int) -> Iterator[list[str]]:
    """Write parts, in several processes if there is enough to do; returns for each part what was too long in it."""
    write = functools.partial(write_part, task)
    if processes < 2 or len(todo) < 2 * processes:
        yield from map(write, todo)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(write, todo)


@functools.lru_cache(1)
def _encoder(model: Model, labels: tuple[str, ...] | None, chat: bool, as_turn: bool, truncate: bool) -> Encoder:
    return Encoder(load_tokenizer(model), load_config(model), labels, chat, as_turn, truncate)


def write_part(task: _Task, part: tuple[int, Path]) -> list[str]:
    """Encode one part of a split and write it; if an example is too long, return which, and write nothing."""
    number, path = part
    labels = None if task.labels is None else tuple(task.labels)
    encoder = _encoder(task.model, labels, task.chat, task.as_turn, task.on_too_long == "truncate_prompt")
    table = map_table(task.examples)[0].slice(number * ROWS, ROWS)
    long: list[str] = []
    batches = []
    for first in range(0, len(table), ROWS_AT_ONCE):
        rows = table.slice(first, ROWS_AT_ONCE)
        pairs = list(encoder.pairs(rows["prompt"].to_pylist(), rows[task.column].to_pylist()))
        for id, pair in zip(rows["id"].to_pylist(), pairs):
            encoder.refuse_foreign_tokens(pair, id)
        long += [
            f"example {rows['id'][row].as_py()}: {encoder.max_tokens + over} tokens, but the model reads at most "
            f"{encoder.max_tokens}"
            for row, pair in enumerate(pairs)
            if encoder.max_tokens is not None and (over := encoder.excess(pair))
        ]
        batches.append(_batch(pairs))
    if not long:
        whole = pa.Table.from_batches(batches).combine_chunks()  # ``_Part`` reads one batch per file
        write_arrow(path, SCHEMA, iter(whole.to_batches()), {"rows": len(whole)})
    return long


def _batch(pairs: list[Encoded]) -> pa.RecordBatch:
    columns = [
        pa.array([[*pair.prompt, *pair.label] for pair in pairs], SCHEMA.field("ids").type),
        pa.array([len(pair.prompt) for pair in pairs], pa.int32()),
        pa.array([pair.eos for pair in pairs], pa.int32()),
        pa.array([sum(end - start for start, end in pair.turns) for pair in pairs], pa.int32()),
        pa.array([[place for span in pair.spans for place in span] for pair in pairs], SCHEMA.field("spans").type),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def too_long(model: Model, labels: list[str] | None, chat: bool) -> Any:
    """A function that returns which prompts and targets are longer than the model's context: bool [n]."""
    encoder = _encoder(model, None if labels is None else tuple(labels), chat, False, False)

    def judge(prompts: Sequence[str], targets: Sequence[str]) -> np.ndarray:
        return np.array([encoder.excess(pair) > 0 for pair in encoder.pairs(prompts, targets)], dtype=bool)

    return judge
