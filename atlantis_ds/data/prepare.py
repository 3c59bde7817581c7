"""The stage ``prepare``: from the recipe's data section to one Arrow file of examples a split, in the run folder.

It streams. A first pass reads each split into a temporary file and keeps a few numbers an example; splits, folds, draws
and noise are made of those; a second pass writes the rows that stay.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import platform
import re
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
from atlantis_ds.config.schema import Data, Recipe
from atlantis_ds.data.examples import ROWS, SCHEMA, SPLITS, Examples, Split, load_examples, map_table, write_arrow
from atlantis_ds.data.noise import noisy_labels, noisy_responses
from atlantis_ds.data.prompts import render_prompt, template_for
from atlantis_ds.data.reading import first_examples, read_split
from atlantis_ds.data.relation import NO_RELATION, SEMEVAL_LABELS
from atlantis_ds.data.rows import BadRow, BadRows, Found
from atlantis_ds.data.sources import expand
from atlantis_ds.data.splits import cut_dev, draws, keep_apart, key_hash, subset, text_key
from atlantis_ds.demo.grammar import GRAMMAR_VERSION
from atlantis_ds.errors import InputError
from atlantis_ds.files import file_hash, fingerprint, finished, read_json, write_json
from atlantis_ds.run_folder import RunFolder, missing_folder

VERSION = 2
"""Goes up where the same recipe and files give other examples than before."""
READ = pa.schema([(name, pa.string()) for name in ("id", "prompt", "target", "gold", "group", "key")])


Judge = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""Says of prompts and targets which are longer than a model reads: bool [n]."""
Judges = Callable[[list[str] | None, bool], Judge]
"""Makes a ``Judge`` for a label set, and for chats or texts."""


@dataclass
class Read:
    """One split as it was read: the texts in a temporary file, numbers here."""

    table: pa.Table
    """``READ``, memory-mapped."""
    keys: np.ndarray
    """uint64 [n], see ``splits.key_hash``."""
    template: str | None
    whole_ids: bool
    """Whether every id is a whole number."""
    unlabelled: int
    """Training rows left out because they have no label."""
    bad: BadRows

    def __len__(self) -> int:
        return len(self.keys)

    def texts(self, column: str) -> Iterator[str]:
        for batch in self.table.select([column]).to_batches():
            yield from batch[0].to_pylist()


def examples_fingerprint(recipe: Recipe) -> str:
    """Fingerprint of the data section, the prompt, the seed and the content of the input files (not where they lie).

    Raises:
        InputError: a file is not there ("data.train: <path>: no such file").
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
    if data.on_too_long == "drop":  # what is too long is for the models to say
        made_from["models"] = recipe.models.model_dump(mode="json")
    return fingerprint({**made_from, "prompt": recipe.prompt.model_dump()})


def prepare(recipe: Recipe, folder: RunFolder, judges: Sequence[Judges] = ()) -> Examples:
    """Read, split, subset and add noise, once: where the run folder holds these examples already, load them.

    Examples that differ in the test split or in gold labels alone take the place of those in the run folder: what was
    scored and trained stays valid.

    Args:
        judges: for each model that is to read the examples, what says which of them are too long for it; these are
            left out.

    Raises:
        InputError: bad input (file and line), sizes that the data cannot fill, or a run folder with other training or
            dev examples.
    """
    expected = examples_fingerprint(recipe)
    if finished(folder.examples_info, expected):
        with contextlib.suppress(InputError):  # a file is missing or broken: all are written anew
            return load_examples(folder)
    place = folder.examples / ".reading"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        return _prepare(recipe, folder, place, expected, judges)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # bad input leaves no empty folders behind; others stay
            folder.examples.rmdir()
            folder.root.rmdir()


def _prepare(recipe: Recipe, folder: RunFolder, place: Path, expected: str, judges: Sequence[Judges]) -> Examples:
    labels = label_set(recipe)
    train, dev, test = (_read(recipe, split, labels, place) for split in SPLITS)
    assert train is not None
    _refuse_two_kinds({split: read.template for split, read in zip(SPLITS, (train, dev, test)) if read is not None})
    rows, dropped = _split_rows(recipe, train, dev, test)
    sources = {"train": train, "dev": train if dev is None else dev, "test": test}
    if judges:
        for split, source in sources.items():
            if source is not None:
                long = _too_long(source, rows[split], [judge(labels, is_chat(train.template)) for judge in judges])
                dropped[f"{split}_too_long"] = int(long.sum())
                rows[split] = rows[split][~long]
    for split, source in sources.items():
        if not len(rows[split]) and (split == "train" or (split == "test" and source is not None)):
            reasons = {**dropped, "without_a_label": source.unlabelled if source is not None else 0}
            why = ", ".join(f"{count} x {reason.replace('_', ' ')}" for reason, count in reasons.items() if count)
            raise InputError(f"data.{split}: no example is left in {split} (left out: {why})")
    targets, changed = _targets(recipe, train, rows["train"], labels)

    written = {}
    for split, source in sources.items():
        noisy = targets if split == "train" else None
        path = folder.split(split).with_name(f".{split}.new.arrow")
        written[split] = _Written(path)
        batches = _final_batches(recipe, source, rows[split], noisy, written[split])
        write_arrow(path, SCHEMA, batches, {"fingerprint": expected})
    made_of = [recipe.seed, labels, written["train"].digest, written["dev"].digest]
    train_fingerprint = fingerprint(made_of)
    if _train_fingerprint_in(folder.examples_info) not in (None, train_fingerprint):
        for file in written.values():
            file.path.unlink()
        raise InputError(
            f"{folder.root}: holds training or dev examples of other data, another prompt or another seed than this "
            "recipe; choose another `name`, or remove the folder"
        )
    folder.examples_info.unlink(missing_ok=True)  # from here on the old examples are none any more
    for split, file in written.items():
        file.path.replace(folder.split(split))
    info = {
        "fingerprint": expected,
        "train_fingerprint": train_fingerprint,
        "digests": {split: [file.digest, file.gold_digest] for split, file in written.items()},
        "task": recipe.task,
        "chat": is_chat(train.template),
        "labels": labels,
        "whole_ids": train.whole_ids,
        "counts": {split: len(rows[split]) for split in SPLITS},
        "label_counts": {split: written[split].label_counts(labels) for split in SPLITS} if labels else None,
        "dropped": dropped,
        "unlabelled": train.unlabelled,
        "bad_rows": {s: dict(r.bad.kinds) for s, r in zip(SPLITS, (train, dev, test)) if r is not None and r.bad.count},
        "noise": {"kind": recipe.data.noise.kind, "rate": recipe.data.noise.rate, "rows_changed": changed},
        "notes": _notes(labels),
        "versions": {"atlantis_ds": __version__, "pyarrow": pa.__version__, "python": platform.python_version()},
    }
    write_json(folder.examples_info, info)  # last: the stage is finished when it stands
    return load_examples(folder)


def refuse_other_data(recipe: Recipe, folder: RunFolder) -> None:
    """Whoever changes the data of a recipe gets new examples, or is told: no stage goes on with the old ones.

    Nothing is checked where the data files are not at hand: the stages behind ``prepare`` do not read them.

    Raises:
        InputError: the examples of the run folder are of other files, another ``data`` or ``prompt`` section or another
            seed.
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


def look_at_data(recipe: Recipe) -> None:
    """Read the first rows of each split and fill in the template: what ``check`` does on a login node.

    Of a data set of the hub nothing is fetched; a local folder must be there.

    Raises:
        InputError: a file is missing, a column is not there, or a row is bad; an unknown label, where the set is given.
    """
    if recipe.data.hub_id and (problem := missing_folder(recipe.data.hub_id)):
        raise InputError(f"data.hub_id: {problem}")
    labels = known_labels(recipe.data)
    files = recipe.data.format != "grammar" and not recipe.data.hub_id
    templates: dict[str, str | None] = {}
    for split in SPLITS if files else ():
        for found in first_examples(recipe, split):
            try:
                _target(found, split, labels)
                templates[split] = templates.get(split) or _template(recipe, found)
                _key(templates[split] or "", found)
            except BadRow as problem:
                if recipe.data.on_bad_row == "refuse":
                    raise InputError(f"{problem.at or found.where}: {problem}") from None
    _refuse_two_kinds(templates)


def label_set(recipe: Recipe) -> list[str] | None:
    """The label set of a recipe: its own, the format's, or all labels of train; None for responses.

    Raises:
        InputError: a label is doubled or empty, or there are more than ``data.max_labels``.
    """
    data = recipe.data
    if recipe.task == "response":
        return None
    if (known := known_labels(data)) is not None:
        return known
    found: set[str] = set()
    for example in read_split(recipe, "train", lambda where, what: None) or ():
        found |= {label for label in (example.target, example.gold) if label is not None}
        if len(found) > data.max_labels:
            raise InputError(
                f"data.labels: more than {data.max_labels} different labels in train, such as "
                f"{example.target or example.gold!r:.60}; raise data.max_labels, or set data.task: response where the "
                "targets are free text"
            )
    whole = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in found)
    labels = sorted(found, key=lambda label: (int(label) if whole else 0, label))
    if data.negatives and NO_RELATION in labels:  # last, where the drawn pairs put it
        labels.remove(NO_RELATION)
        labels.append(NO_RELATION)
    if data.negative_label is not None and data.negative_label not in labels:
        raise InputError(
            f"data.negative_label: {data.negative_label!r} is no label of train ({', '.join(labels[:10])})"
        )
    return labels


def known_labels(data: Data) -> list[str] | None:
    """The label set that the recipe or its format names; None where the data have to tell."""
    if data.labels is None:
        return list(SEMEVAL_LABELS) if data.format in ("semeval2010_task8", "grammar") else None
    if not data.labels or len(set(data.labels)) < len(data.labels) or not all(map(str.strip, data.labels)):
        raise InputError("data.labels: give at least one label, each once and none empty")
    return data.labels


def _read(recipe: Recipe, split: str, labels: list[str] | None, place: Path) -> Read | None:
    """One whole split, not empty but for dev; None where there is none."""
    bad = BadRows(recipe.data.on_bad_row == "drop")
    source = read_split(recipe, split, bad)
    if source is None:
        if split == "test" and recipe.data.hub_id is None:
            return None  # only weights are wanted
        if split != "train":
            return None
        raise InputError("data.train: no training examples")
    read = Read(pa.table([]), np.empty(0, np.uint64), None, True, 0, bad)
    keys: list[np.ndarray] = []
    path = place / f"{split}.arrow"
    write_arrow(path, READ, _read_batches(recipe, split, source, labels, read, keys), {})
    bad.refuse()
    read.table = map_table(path)[0]
    read.keys = np.concatenate([read.keys, *keys])
    if not len(read) and split != "dev":
        paths = recipe.data.hub_id or getattr(recipe.data, split)
        where = paths if isinstance(paths, str) else ", ".join(paths)
        why = [(read.unlabelled, "have no label"), (bad.count, "cannot be read")]
        also = " and ".join(f"{count} rows {what}" for count, what in why if count)
        raise InputError(f"data.{split}: {where}: holds no example" + (f" ({also})" if also else ""))
    return read


def _read_batches(
    recipe: Recipe, split: str, source: Iterator[Found], labels: list[str] | None, read: Read, keys: list[np.ndarray]
) -> Iterator[pa.RecordBatch]:
    """The rows of a split as record batches of ``READ``; fills in ``read`` and ``keys`` on the way."""
    seen: set[int] = set()
    rows: list[tuple[str | None, ...]] = []

    def batch() -> pa.RecordBatch:
        keys.append(np.array([key_hash(str(row[5])) for row in rows], dtype=np.uint64))
        made = pa.record_batch([pa.array(column, pa.string()) for column in zip(*rows)], schema=READ)
        rows.clear()
        return made

    for found in source:
        try:
            target = _target(found, split, labels)
            if target is None:
                read.unlabelled += 1
                continue
            read.template = read.template or _template(recipe, found)
            key = _key(read.template, found)
            prompt = render_prompt(read.template, found.fields, recipe.prompt, labels)
            id = str(found.number if found.id is None else found.id)
            if hash(id) in seen:
                raise BadRow(f"the id {id!r} comes twice in {split}")
            if found.id is not None:
                seen.add(hash(id))
            read.whole_ids &= not isinstance(found.id, str) and len(id) < 19  # an int64 surely
        except BadRow as problem:
            read.bad(problem.at or found.where, str(problem))
            continue
        rows.append((id, prompt, target, found.gold, found.group, text_key(key)))
        if len(rows) == ROWS:
            yield batch()
    if rows:
        yield batch()


def _template(recipe: Recipe, found: Found) -> str:
    """The template of a split, by the columns of its first row; one that does not fit them is no fault of the row."""
    if "messages" in found.fields and recipe.task == "response":
        if recipe.prompt.template is not None:
            raise InputError(
                f"{found.where}: prompt.template: a chat is written by the tokenizer's own chat template; remove it"
            )
        return "{messages}"
    try:
        return template_for(recipe.task, recipe.prompt, found.fields)
    except BadRow as problem:
        raise InputError(f"{found.where}: {problem}") from None


def _key(template: str, found: Found) -> str:
    """What makes the example the same as another one. Raises BadRow: the prompt would hold nothing of the row."""
    names = set(re.findall(r"\{(\w+)\}", template))
    named = [text for name, text in found.fields.items() if name in names]
    if not named:
        raise BadRow(
            f"the row has {', '.join(found.fields) or 'no text'}, but the rows before it {', '.join(sorted(names))}; "
            "rows of two kinds do not go into one data set"
        )
    if not any(map(str.strip, named)):
        raise BadRow(f"the prompt is empty: nothing stands in {', '.join(sorted(names - {'options'}))}")
    return found.key if found.key is not None else "\t".join(named)


def _refuse_two_kinds(templates: dict[str, str | None]) -> None:
    """Chats in one split and single prompts in another have no model's reading in common."""
    for split, template in templates.items():
        if template is not None and is_chat(template) != is_chat(templates.get("train")):
            raise InputError(f"data.{split}: chats in one split and single prompts in another; give one kind")


def is_chat(template: str | None) -> bool:
    """Whether prompts are chats: their template is the turns themselves."""
    return template == "{messages}"


def _target(found: Found, split: str, labels: list[str] | None) -> str | None:
    """The target of an example; None for a training row without one. Outside train gold takes its place."""
    target = found.target if split == "train" or found.target is not None else found.gold
    if target is None and split != "train":
        raise BadRow("empty label: neither a label (or response) nor a gold one")
    if labels is not None:
        for label, kind in ((target, "label"), (found.gold, "gold label")):
            if label is not None and label not in labels:
                raise BadRow(f"unknown {kind} {label!r}; {_known(label, labels)}", found.label_at)
    return target


def _known(label: str, labels: list[str]) -> str:
    if len(labels) <= 20:
        return f"the label set is {', '.join(labels)}"
    close = difflib.get_close_matches(label, labels, n=3)
    return f"it is none of the {len(labels)} labels" + (f"; close to it: {', '.join(close)}" if close else "")


def _split_rows(
    recipe: Recipe, train: Read, dev: Read | None, test: Read | None
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Row numbers of each split in what was read, int64, no text in two of them; and the rows dropped for it.

    Where there is no dev of its own, its rows are rows of train.
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
    """int32 [n] into the label set; None where nothing was changed."""
    source: np.ndarray | None
    """For responses: the row, of what was read, whose response each example gets."""
    labels: list[str]

    def of(self, part: slice, read: pa.ChunkedArray) -> list[str] | None:
        """The new targets of some of the examples, from the targets as they were read; None where none was changed."""
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
    """A split as it is being written: digests of its content, and its labels counted."""

    path: Path
    digest: str = ""
    gold_digest: str = ""
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def label_counts(self, labels: list[str]) -> dict[str, int]:
        return {label: self.counts[label] for label in labels}


def _final_batches(
    recipe: Recipe, source: Read | None, rows: np.ndarray, targets: _Targets | None, written: _Written
) -> Iterator[pa.RecordBatch]:
    """The chosen rows of what was read, with their targets after noise, as record batches of ``SCHEMA``."""
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
    """Batches of ``ROWS`` rows from the pending ones, which keep what is left; all of it with ``rest``."""
    table = pa.Table.from_batches(pending).combine_chunks()
    whole = len(table) if rest else len(table) // ROWS * ROWS
    pending[:] = table.slice(whole).to_batches()
    yield from table.slice(0, whole).to_batches(max_chunksize=ROWS)


def equal_but_for_case(labels: list[str]) -> list[list[str]]:
    """Groups of labels that differ in case or white space alone."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups["".join(label.split()).casefold()].append(label)
    return [same for same in groups.values() if len(same) > 1]


def _notes(labels: list[str] | None) -> list[str]:
    return [
        f"the labels {', '.join(map(repr, same))} differ in case or spaces alone; are they one label?"
        for same in equal_but_for_case(labels or [])
    ]


def _train_fingerprint_in(path: Path) -> str | None:
    """What ``examples.json`` says; None where it is missing or unreadable (it is then written anew)."""
    try:
        return str(read_json(path).get("train_fingerprint", ""))  # an older version's: other examples
    except (InputError, OSError, AttributeError):
        return None


def _hash(key: str, path: Path) -> str:
    try:
        return file_hash(path)
    except FileNotFoundError:
        raise InputError(f"{key}: {path}: no such file") from None
    except OSError as error:
        raise InputError(f"{key}: {path}: cannot be read ({error.strerror})") from None
