"""The stage ``prepare``: from the recipe's data section to one Arrow file of examples per split, in the run folder.

It works as a stream. A first pass reads each split into a temporary file and keeps a few numbers per example, from
which it computes splits, folds, draws and noise. A second pass writes the rows that remain.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds import __version__
from atlantis_ds.config.schema import Recipe
from atlantis_ds.data.examples import ROWS, SCHEMA, SPLITS, Examples, Split, load_examples, write_arrow
from atlantis_ds.data.ingest import READ, Read, equal_but_for_case, ingest, is_chat, label_set, refuse_two_kinds
from atlantis_ds.data.noise import noisy_labels, noisy_responses
from atlantis_ds.data.sources import expand
from atlantis_ds.data.splits import cut_dev, draws, keep_apart, subset
from atlantis_ds.demo.grammar import GRAMMAR_VERSION
from atlantis_ds.errors import InputError
from atlantis_ds.files import file_hash, fingerprint, finished, read_json, write_json
from atlantis_ds.run_folder import RunFolder

VERSION = 3
"""Must be raised if the same recipe and files give different examples than before."""


Judge = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""Returns which prompts and targets are longer than a model's context: bool [n]."""
Judges = Callable[[list[str] | None, bool], Judge]
"""Creates a ``Judge`` for a label set, and for chats or texts."""


def examples_fingerprint(recipe: Recipe) -> str:
    """Fingerprint of the data section, the prompt, the seed and the content of the input files (not their paths).

    Raises:
        InputError: a file does not exist ("data.train: <path>: no such file").
    """
    data = recipe.data
    sources: dict[str, Any] = {}
    for split in SPLITS:
        if paths := getattr(data, split):
            sources[split] = [_hash(f"data.{split}", path) for path in expand(paths, f"data.{split}")]
    if data.hub_id:  # a local folder by its files, a dataset id by its name and revision
        folder = Path(data.hub_id)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        sources["hub"] = [[str(p.relative_to(folder)), _hash("data.hub_id", p)] for p in files] or data.hub_id
    if data.format == "grammar":
        sources["grammar"] = GRAMMAR_VERSION
    section = data.model_dump(mode="json", exclude={*SPLITS, "hub_id"})
    made_from = {"version": VERSION, "data": section, "seed": recipe.seed, "sources": sources}
    if data.on_too_long == "drop":  # the models decide what is too long
        made_from["models"] = recipe.models.model_dump(mode="json", exclude={"stage"})
    return fingerprint({**made_from, "prompt": recipe.prompt.model_dump()})


def prepare(recipe: Recipe, folder: RunFolder, judges: Sequence[Judges] = ()) -> Examples:
    """Read, split, subset and add noise, once: if the run folder already has these examples, load them.

    Examples that differ only in the test split or in gold labels replace those in the run folder: scores and trained
    models stay valid.

    Args:
        judges: for each model that will read the examples, a function that says which of them are too long; these are
            left out.

    Raises:
        InputError: bad input (file and line), sizes larger than the data, or a run folder with other training or dev
            examples.
    """
    expected = examples_fingerprint(recipe)
    if finished(folder.examples_info, expected):
        with contextlib.suppress(InputError):  # a file is missing or broken: all are written again
            return load_examples(folder)
    place = folder.examples / ".reading"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        return _prepare(recipe, folder, place, expected, judges)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # bad input leaves no empty folders behind; other folders stay
            folder.examples.rmdir()
            folder.root.rmdir()


def _prepare(recipe: Recipe, folder: RunFolder, place: Path, expected: str, judges: Sequence[Judges]) -> Examples:
    labels = label_set(recipe)
    train, dev, test = (ingest(recipe, split, labels, place) for split in SPLITS)
    assert train is not None
    given = {split: read for split, read in zip(SPLITS, (train, dev, test)) if read is not None}
    refuse_two_kinds({split: read.template for split, read in given.items()})
    rows, dropped = _split_rows(recipe, train, dev, test)
    sources = {"train": train, "dev": train if dev is None else dev, "test": test}
    _leave_out_too_long(sources, rows, dropped, [judge(labels, is_chat(train.template)) for judge in judges])
    _refuse_empty(sources, rows, dropped)
    targets, changed = _targets(recipe, train, rows["train"], labels)
    written = {}
    for split, source in sources.items():
        noisy = targets if split == "train" else None
        written[split] = _Written(folder.split(split).with_name(f".{split}.new.arrow"))
        batches = _final_batches(recipe, source, rows[split], noisy, written[split])
        write_arrow(written[split].path, SCHEMA, batches, {"fingerprint": expected})
    train_fingerprint = _put_in_place(recipe, folder, labels, written)
    info = {
        "fingerprint": expected,
        "train_fingerprint": train_fingerprint,
        "digests": {split: [file.digest, file.gold_digest] for split, file in written.items()},
        "task": recipe.task,
        "chat": is_chat(train.template),
        "template": train.template,
        "labels": labels,
        "whole_ids": train.whole_ids,
        "counts": {split: len(rows[split]) for split in SPLITS},
        "label_counts": {split: written[split].label_counts(labels) for split in SPLITS} if labels else None,
        "dropped": dropped,
        "unlabelled": train.unlabelled,
        "bad_rows": {split: dict(read.bad.kinds) for split, read in given.items() if read.bad.count},
        "noise": {"kind": recipe.data.noise.kind, "rate": recipe.data.noise.rate, "rows_changed": changed},
        "dev_from_train": dev is None,
        "notes": _notes(labels),
        "versions": {"atlantis_ds": __version__, "pyarrow": pa.__version__, "python": platform.python_version()},
    }
    write_json(folder.examples_info, info)  # last: the stage is finished when this file exists
    return load_examples(folder)


def _leave_out_too_long(
    sources: dict[str, Read | None], rows: dict[str, np.ndarray], dropped: dict[str, int], judges: Sequence[Judge]
) -> None:
    """Remove from ``rows`` what is too long for any of the models, and count it in ``dropped``."""
    for split, source in sources.items():
        if judges and source is not None:
            long = _too_long(source, rows[split], judges)
            dropped[f"{split}_too_long"] = int(long.sum())
            rows[split] = rows[split][~long]


def _refuse_empty(sources: dict[str, Read | None], rows: dict[str, np.ndarray], dropped: dict[str, int]) -> None:
    for split in ("train", "test"):
        source = sources[split]
        if source is not None and not len(rows[split]):
            reasons = {**dropped, "without_a_label": source.unlabelled}
            why = ", ".join(f"{count} x {reason.replace('_', ' ')}" for reason, count in reasons.items() if count)
            raise InputError(f"data.{split}: no example is left in {split} (left out: {why})")


def _put_in_place(recipe: Recipe, folder: RunFolder, labels: list[str] | None, written: dict[str, _Written]) -> str:
    """Move the new files to their places in the run folder; returns the fingerprint of train and dev.

    Raises:
        InputError: the run folder has other training or dev examples.
    """
    train_fingerprint = fingerprint([recipe.seed, labels, written["train"].digest, written["dev"].digest])
    if _train_fingerprint_in(folder.examples_info) not in (None, train_fingerprint):
        for file in written.values():
            file.path.unlink()
        raise InputError(
            f"{folder.root}: has training or dev examples from other data, another prompt or another seed than this "
            "recipe; choose another `name`, or remove the folder"
        )
    folder.examples_info.unlink(missing_ok=True)  # from here on, the old examples are no longer valid
    for split, file in written.items():
        file.path.replace(folder.split(split))
    return train_fingerprint


def refuse_other_data(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse to use old examples after the data of a recipe have changed.

    Nothing is checked if the data files are not available: the stages after ``prepare`` do not read them.

    Raises:
        InputError: the examples of the run folder were made from other files, another ``data`` or ``prompt`` section,
            or another seed.
    """
    made = read_json(folder.examples_info)["fingerprint"]
    try:
        expected = examples_fingerprint(recipe)
    except InputError:
        return
    if made != expected:
        raise InputError(
            f"{folder.examples_info}: made from other data files, another `data` or `prompt` section or another `seed` "
            "than this recipe's; run `prepare` with it, or choose another `name`"
        )


def _split_rows(
    recipe: Recipe, train: Read, dev: Read | None, test: Read | None
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Row numbers of each split in the data as read, int64, with no text in two splits; and the rows dropped for this.

    If there are no dev files, the dev rows are rows of train.
    """
    data, seed = recipe.data, recipe.seed
    none = np.empty(0, dtype=np.uint64)
    kept, kept_dev, dropped = keep_apart(
        train.keys, None if dev is None else dev.keys, none if test is None else test.keys
    )
    train_rows = np.flatnonzero(kept)
    left_out = dropped["train_in_test"] + dropped["train_in_dev"]
    if dev is None:
        order = draws(seed, "dev", train.texts("key"))[train_rows] if data.dev_size else none
        is_dev = cut_dev(train.keys[train_rows], order, data.dev_size)
        dev_rows, train_rows = train_rows[is_dev], train_rows[~is_dev]
    else:
        assert kept_dev is not None
        dev_rows = np.flatnonzero(kept_dev)
        dev_rows = _drawn(dev, dev_rows, data.dev_size or None, seed, "dev_size", dropped["dev_in_test"])
    rows = {"train": _drawn(train, train_rows, data.train_size, seed, "train_size", left_out), "dev": dev_rows}
    test_rows = np.arange(0 if test is None else len(test))
    return {
        **rows,
        "test": test_rows if test is None else _drawn(test, test_rows, data.test_size, seed, "test_size"),
    }, dropped


def _drawn(read: Read, rows: np.ndarray, size: int | None, seed: int, key: str, left_out: int = 0) -> np.ndarray:
    if size is None:
        return rows
    return rows[subset(draws(seed, key, read.texts("id"))[rows], size, key, left_out)]


def _too_long(source: Read, rows: np.ndarray, judges: Sequence[Judge]) -> np.ndarray:
    """Which of the chosen rows are too long for any of the models, bool [n]."""
    texts = source.table.select(["prompt", "target"]).to_batches()
    long = [np.any([judge(*(c.to_pylist() for c in batch.columns)) for judge in judges], axis=0) for batch in texts]
    return np.concatenate(long)[rows] if long else np.zeros(0, dtype=bool)


@dataclass(frozen=True)
class _Targets:
    """Targets of the training examples after noise."""

    codes: np.ndarray | None
    """int32 [n], indices into the label set; None if nothing was changed."""
    source: np.ndarray | None
    """For responses: the row, in the data as read, whose response each example gets."""
    labels: list[str]

    def of(self, part: slice, read: pa.ChunkedArray) -> list[str] | None:
        """The new targets of some examples, from the targets as read; None if none was changed."""
        if self.codes is not None:
            return [self.labels[code] for code in self.codes[part]]
        return None if self.source is None else [read[int(row)].as_py() for row in self.source[part]]


def _targets(recipe: Recipe, train: Read, rows: np.ndarray, labels: list[str] | None) -> tuple[_Targets, int]:
    noise = recipe.data.noise
    if noise.kind == "confusion" or noise.rate:
        noise_order = draws(recipe.seed, "noise", train.texts("id"))[rows]
    else:
        return _Targets(None, None, labels or []), 0
    if labels is None:
        own = train.table["target"]
        source = rows[noisy_responses(noise_order, lambda row: own[int(rows[row])].as_py(), noise)]
        return _Targets(None, source, []), int((source != rows).sum())
    whole = Split(train.table, labels, "", "")
    codes, gold = whole.codes[rows], whole.gold_codes[rows]
    noisy = noisy_labels(
        codes, gold, noise_order, lambda row: whole.ids[int(rows[row])].as_py(), noise, labels, recipe.seed
    )
    return _Targets(noisy if noise.rate else None, None, labels), int((noisy != codes).sum())


@dataclass
class _Written:
    """A split while it is written: digests of its content, and counts of its labels."""

    path: Path
    digest: str = ""
    gold_digest: str = ""
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def label_counts(self, labels: list[str]) -> dict[str, int]:
        return {label: self.counts[label] for label in labels}


def _final_batches(
    recipe: Recipe, source: Read | None, rows: np.ndarray, targets: _Targets | None, written: _Written
) -> Iterator[pa.RecordBatch]:
    """The chosen rows of the data as read, with their targets after noise, as record batches of ``SCHEMA``."""
    digest, gold_digest = hashlib.sha256(), hashlib.sha256()
    pending: list[pa.RecordBatch] = []
    done = first = 0
    for batch in source.table.to_batches() if source is not None else ():
        here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(batch))] - first
        first += len(batch)
        if not len(here):
            continue
        taken = batch.take(pa.array(here))
        id, prompt, target, gold, group, key = (taken.column(name) for name in READ.names)
        part = slice(done, done + len(here))
        done = part.stop
        if targets is not None and source is not None and (noisy := targets.of(part, source.table["target"])):
            gold, target = pc.coalesce(gold, target), pa.array(noisy, pa.string())
        for label in target.to_pylist() if recipe.task != "response" else ():
            written.counts[label] += 1
        fold = pa.array(draws(recipe.seed, "fold", key.to_pylist()), pa.uint64())
        made = pa.record_batch([id, prompt, target, gold, group, fold], schema=SCHEMA)
        common = json.dumps([id.to_pylist(), prompt.to_pylist()]).encode()
        digest.update(common + json.dumps([target.to_pylist(), fold.to_pylist()]).encode())
        gold_digest.update(common + json.dumps(gold.to_pylist()).encode())
        pending.append(made)
        if sum(map(len, pending)) >= ROWS:
            yield from _cut(pending)
    if pending:
        yield from _cut(pending, rest=True)
    written.digest, written.gold_digest = digest.hexdigest()[:16], gold_digest.hexdigest()[:16]


def _cut(pending: list[pa.RecordBatch], rest: bool = False) -> Iterator[pa.RecordBatch]:
    """Batches of ``ROWS`` rows from the pending rows; the remainder stays pending, or is included with ``rest``."""
    table = pa.Table.from_batches(pending).combine_chunks()
    whole = len(table) if rest else len(table) // ROWS * ROWS
    pending[:] = table.slice(whole).to_batches()
    yield from table.slice(0, whole).to_batches(max_chunksize=ROWS)


def _notes(labels: list[str] | None) -> list[str]:
    notes = [
        f"the labels {', '.join(map(repr, same))} differ only in case or spaces; are they the same label?"
        for same in equal_but_for_case(labels or [])
    ]
    if labels and len(labels) == 1:
        notes.append(f"every row has the label {labels[0]!r:.60}: there is nothing to learn; check the label column")
    return notes


def _train_fingerprint_in(path: Path) -> str | None:
    """The contents of ``examples.json``; None if it is missing or unreadable (it is then written again)."""
    try:
        return str(read_json(path).get("train_fingerprint", ""))  # from an older version: treated as other examples
    except (InputError, OSError, AttributeError):
        return None


def _hash(key: str, path: Path) -> str:
    try:
        return file_hash(path)
    except FileNotFoundError:
        raise InputError(f"{key}: {path}: no such file") from None
    except OSError as error:
        raise InputError(f"{key}: {path}: cannot be read ({error.strerror})") from None
