"""The stage ``prepare``: from the recipe's data section to one table of examples in the run folder."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds import __version__
from atlantis_ds.config.schema import Data, Recipe
from atlantis_ds.data.formats import (
    CONLL04_LABELS,
    NO_RELATION,
    SEMEVAL_LABELS,
    read_conll04,
    read_jsonl,
    read_semeval,
)
from atlantis_ds.data.hub import read_hub
from atlantis_ds.data.noise import add_noise
from atlantis_ds.data.splits import assign_splits, subset
from atlantis_ds.data.table import Example, from_table, to_table
from atlantis_ds.demo.grammar import DEV_SIZE, GRAMMAR_VERSION, TEST_SIZE, TRAIN_SIZE, grammar_corpus
from atlantis_ds.errors import InputError
from atlantis_ds.files import (
    file_hash,
    fingerprint,
    finished,
    read_json,
    read_table,
    table_info,
    write_json,
    write_table,
)
from atlantis_ds.run_folder import RunFolder

FILES = ("train", "dev", "test")


@dataclass(frozen=True)
class Examples:
    """The prepared examples of a run; ``task`` is the recipe's data.format."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: list[str]
    fingerprint: str
    task: str
    train_fingerprint: str
    """Of what is scored and trained on: the seed, the label set, the training and dev examples; not of test."""
    dropped: dict[str, int]
    """Rows left out because their sentence stands in another split, too: ``train_in_test`` and so on."""


def examples_fingerprint(recipe: Recipe) -> str:
    """Fingerprint of the data section, the seed and the content of the input files (not of where they lie).

    Raises:
        InputError: a file is not there ("data.train: <path>: no such file").
    """
    data = recipe.data
    sources: dict[str, Any] = {}
    for key in FILES:
        if path := getattr(data, key):
            sources[key] = _hash(f"data.{key}", Path(path))
    if data.hub_id:  # a local folder by its files, a dataset id by its name and revision
        folder = Path(data.hub_id)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        sources["hub"] = [[str(p.relative_to(folder)), _hash("data.hub_id", p)] for p in files] or data.hub_id
    if data.format == "grammar":
        sources["grammar"] = GRAMMAR_VERSION
    section = data.model_dump(mode="json", exclude={*FILES, "hub_id"})
    return fingerprint({"data": section, "seed": recipe.seed, "sources": sources})


def prepare(recipe: Recipe, folder: RunFolder) -> Examples:
    """Read, split, subset and add noise, once: where the run folder holds these examples already, load them.

    Examples that differ in the test split alone take the place of those in the run folder: what was scored and trained
    stays valid, and only the evaluation has to be done again.

    Raises:
        InputError: bad input (file and line), sizes that the data cannot fill, or a run folder with other training or
            dev examples.
    """
    expected = examples_fingerprint(recipe)
    if finished(folder.examples, expected) and finished(folder.examples_info, expected):
        return load_examples(folder)
    labels, splits, dropped = _read_splits(recipe)
    data = recipe.data
    left_out = dropped["train_in_test"] + dropped["train_in_dev"]
    train = subset(splits["train"], data.train_size, recipe.seed, "train_size", left_out)
    dev = splits["dev"]
    test = subset(splits["test"], data.test_size, recipe.seed, "test_size")
    for split, rows in (("train", train), ("test", test)):
        if not rows:
            raise InputError(f"data.{split}: no example is left in {split} (dropped as shared: {dropped})")
    noisy = add_noise(train, data.noise, labels, recipe.seed)
    changed = sum(old.label != new.label for old, new in zip(train, noisy))
    train_fingerprint = _train_fingerprint(recipe.seed, labels, noisy + dev)
    for path in (folder.examples, folder.examples_info):
        if _train_fingerprint_in(path) not in (None, train_fingerprint):
            raise InputError(
                f"{folder.root}: holds training or dev examples of other data or another seed than this recipe; "
                "choose another `name`, or remove the folder"
            )
    examples = Examples(noisy, dev, test, labels, expected, data.format, train_fingerprint, dropped)

    versions = {"atlantis_ds": __version__, "pyarrow": pa.__version__, "python": platform.python_version()}
    by_split = {"train": noisy, "dev": dev, "test": test}
    marks = {"fingerprint": expected, "train_fingerprint": train_fingerprint}
    write_table(folder.examples, to_table(noisy + dev + test), {**marks, "versions": versions})
    info = {
        **marks,
        "task": data.format,
        "labels": labels,
        "counts": {split: len(rows) for split, rows in by_split.items()},
        "label_counts": {split: _label_counts(rows, labels) for split, rows in by_split.items()},
        "dropped": dropped,
        "noise": {"kind": data.noise.kind, "rate": data.noise.rate, "rows_changed": changed},
        "versions": versions,
    }
    write_json(folder.examples_info, info)  # last: the stage is finished when it stands
    return examples


def load_examples(folder: RunFolder) -> Examples:
    """The examples that ``prepare`` wrote.

    Raises:
        InputError: a file is missing or broken, the two do not belong together, or an id stands twice.
    """
    table, info = _read_written(folder)
    examples = from_table(table)
    by_split = {split: [e for e in examples if e.split == split] for split in FILES}
    _refuse_shared_ids(by_split)
    return Examples(
        **by_split,
        labels=info["labels"],
        fingerprint=info["fingerprint"],
        task=info["task"],
        train_fingerprint=info["train_fingerprint"],
        dropped=info["dropped"],
    )


def refuse_other_data(recipe: Recipe, folder: RunFolder) -> None:
    """Whoever changes the data of a recipe gets new examples, or is told: no stage goes on with the old ones.

    Nothing is checked where the data files are not at hand: the stages behind ``prepare`` do not read them.

    Raises:
        InputError: the examples of the run folder are of other files, another ``data`` section or another seed.
    """
    made = read_json(folder.examples_info)["fingerprint"]
    try:
        expected = examples_fingerprint(recipe)
    except InputError:
        return
    if made != expected:
        raise InputError(
            f"{folder.examples_info}: made from other data files, another `data` section or another `seed` than this "
            "recipe's; run `prepare` with it, or choose another `name`"
        )


@dataclass(frozen=True)
class TrainLabels:
    """What merging needs to know of the n training examples: no sentence, and no Python object an example."""

    ids: pa.ChunkedArray
    """string [n]."""
    labels: np.ndarray
    """int32 [n], into ``names``."""
    gold: np.ndarray
    """int32 [n], into ``names``; -1 where the gold label is not known."""
    names: list[str]
    """The label set in its order; gold labels outside of it come after."""
    label_set: list[str]
    train_fingerprint: str
    """See ``Examples``."""


def load_train_labels(folder: RunFolder) -> TrainLabels:
    """The labels of the training examples that ``prepare`` wrote, in their order.

    Raises:
        InputError: a file is missing or broken, or the two do not belong together.
    """
    columns = ["id", "label", "gold", "split"]
    table, info = _read_written(folder, columns, columns[1:])
    table = table.filter(pc.equal(table["split"].cast(pa.string()), "train"))
    named = [pc.unique(table[column].cast(pa.string())).drop_null().to_pylist() for column in ("label", "gold")]
    names = list(dict.fromkeys([*info["labels"], *(name for names in named for name in names)]))

    def numbers(column: str) -> np.ndarray:
        found = pc.index_in(table[column].cast(pa.string()), pa.array(names, pa.string()))
        return np.asarray(found.fill_null(-1).to_numpy(), dtype=np.int32)

    return TrainLabels(
        ids=table["id"],
        labels=numbers("label"),
        gold=numbers("gold"),
        names=names,
        label_set=info["labels"],
        train_fingerprint=info["train_fingerprint"],
    )


def _read_written(
    folder: RunFolder, columns: list[str] | None = None, dictionaries: list[str] | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """The table of examples, and ``examples.json``, which is written last."""
    info = read_json(folder.examples_info)
    table, table_meta = read_table(folder.examples, columns, dictionaries)
    if not isinstance(info, dict) or not {"train_fingerprint", "labels", "task"} <= info.keys():
        raise InputError(f"{folder.examples_info}: not written by this version; remove examples/ and run prepare again")
    if table_meta.get("fingerprint") != info["fingerprint"]:
        raise InputError(
            f"{folder.examples}: does not belong to {folder.examples_info.name}; remove both and run prepare again"
        )
    return table, info


def _read_splits(recipe: Recipe) -> tuple[list[str], dict[str, list[Example]], dict[str, int]]:
    """The label set; train and test whole, dev in its final size, no sentence in two of them; the rows dropped."""
    data, seed = recipe.data, recipe.seed
    labels = _label_set(data, seed)
    train: list[Example] | None
    dev: list[Example] | None
    test: list[Example] | None
    if data.format == "grammar":
        corpus = grammar_corpus(
            data.train_size or TRAIN_SIZE, data.dev_size or DEV_SIZE, data.test_size or TEST_SIZE, seed
        )
        if missing := sorted({e.label for e in corpus} - set(labels)):
            raise InputError(f"data.labels: the grammar also makes the label {missing[0]!r}; leave `labels` out")
        train, dev, test = ([e for e in corpus if e.split == split] for split in FILES)
    else:
        train, test = _read(data, "train", labels, seed), _read(data, "test", labels, seed)
        dev = _read(data, "dev", labels, seed)
    assert train is not None and test is not None
    _refuse_shared_ids({"train": train, "dev": dev or [], "test": test})
    kept_train, kept_dev, dropped = assign_splits(train, dev, test, data.dev_size, seed)
    if dev is not None:  # a dev split of its own, not one cut to size from train
        kept_dev = subset(kept_dev, data.dev_size or None, seed, "dev_size", dropped["dev_in_test"])
    return labels, {"train": kept_train, "dev": kept_dev, "test": test}, dropped


def _read(data: Data, split: str, labels: list[str] | None, seed: int) -> list[Example] | None:
    """One whole split, not empty but for dev; None where there is no such file or (dev only) hub split."""
    path = getattr(data, split)
    if data.hub_id:
        rows = read_hub(data.hub_id, data.format, split, data.negatives, seed, labels)
    elif path is None:
        return None
    elif data.format == "semeval2010_task8":
        rows = read_semeval(path, split, labels)
    elif data.format == "conll04":
        rows = read_conll04(path, split, data.negatives, seed, labels)
    else:
        rows = read_jsonl(path, split, labels)
    if not rows and split != "dev":
        raise InputError(f"data.{split}: {data.hub_id or path}: holds no example")
    return rows


def _label_set(data: Data, seed: int) -> list[str]:
    if data.labels is not None:
        doubled = [label for label, count in Counter(data.labels).items() if count > 1]
        if not data.labels or doubled or not all(label.strip() for label in data.labels):
            raise InputError("data.labels: give at least one label, each once and none empty")
        return data.labels
    if data.format in ("semeval2010_task8", "grammar"):
        return list(SEMEVAL_LABELS)
    if data.format == "conll04":
        return CONLL04_LABELS + ([NO_RELATION] if data.negatives else [])
    # Read a second time with this set, so that a foreign label is refused with its line.
    return sorted({example.label for example in _read(data, "train", None, seed) or []})


def _label_counts(examples: list[Example], labels: list[str]) -> dict[str, int]:
    counts = Counter(example.label for example in examples)
    return {label: counts[label] for label in labels}


def _refuse_shared_ids(by_split: dict[str, list[Example]]) -> None:
    split_of: dict[str, str] = {}
    for split, examples in by_split.items():
        for example in examples:
            if example.id in split_of:
                raise InputError(f"the id {example.id!r} stands in {split_of[example.id]} and in {split}; rename one")
            split_of[example.id] = split


def _train_fingerprint(seed: int, labels: list[str], examples: list[Example]) -> str:
    """Of the content, not of the recipe's section: which rows are left may hang on the test sentences."""
    digest = hashlib.sha256(fingerprint([seed, labels]).encode())
    for e in examples:
        digest.update(fingerprint([e.id, e.sentence, e.e1, e.e2, e.label, e.gold, e.split]).encode())
    return digest.hexdigest()[:16]


def _train_fingerprint_in(path: Path) -> str | None:
    """What a file of ``prepare`` says; None where it is missing or unreadable (it is then written anew)."""
    try:
        info = read_json(path) if path.suffix == ".json" else table_info(path)
    except (InputError, OSError, pa.ArrowException):
        return None
    return info.get("train_fingerprint", "")  # an older version's: other examples, for all that can be told


def _hash(key: str, path: Path) -> str:
    try:
        return file_hash(path)
    except FileNotFoundError:
        raise InputError(f"{key}: {path}: no such file") from None
    except OSError as error:
        raise InputError(f"{key}: {path}: cannot be read ({error.strerror})") from None
