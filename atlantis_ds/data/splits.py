"""Splits and folds in which no sentence stands on both sides, and seeded draws.

Every draw orders the rows by a hash of the seed and the row's own name: the same on every machine and Python version,
whatever the order of the file, and a larger draw holds the smaller one.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import replace

from atlantis_ds.data.table import Example, sentence_key
from atlantis_ds.errors import InputError


def draw_order(seed: int, purpose: str, name: str) -> int:
    """A number that depends on its arguments alone; sorting by it is a seeded random order."""
    return int.from_bytes(hashlib.sha256(f"{seed}\t{purpose}\t{name}".encode()).digest()[:8])


def fold_of(example: Example, folds: int, seed: int) -> int:
    """The fold of an example, in ``range(folds)``; examples with the same sentence share a fold."""
    return draw_order(seed, "fold", sentence_key(example.sentence)) % folds


def assign_splits(
    train: list[Example], dev: list[Example] | None, test: list[Example], dev_size: int, seed: int
) -> tuple[list[Example], list[Example], dict[str, int]]:
    """Take shared sentences out of train and dev, and cut dev from train where there is no dev of its own.

    Rows of train and dev whose sentence is in test are dropped, then rows of train whose sentence is in dev. With
    ``dev`` None, whole sentences worth ``dev_size`` rows go from train to dev (a row or two fewer where sentences
    with several rows do not add up to it).

    Returns:
        train, dev, and how many rows were dropped, by reason.

    Raises:
        InputError: ``dev_size`` rows cannot be cut from train.
    """
    test_sentences = {sentence_key(e.sentence) for e in test}
    kept = [e for e in train if sentence_key(e.sentence) not in test_sentences]
    dropped = {"train_in_test": len(train) - len(kept)}
    if dev is None:
        kept, dev = _cut_dev(kept, dev_size, seed)
        return kept, dev, {**dropped, "dev_in_test": 0, "train_in_dev": 0}
    kept_dev = [e for e in dev if sentence_key(e.sentence) not in test_sentences]
    dev_sentences = {sentence_key(e.sentence) for e in kept_dev}
    kept_train = [e for e in kept if sentence_key(e.sentence) not in dev_sentences]
    dropped |= {"dev_in_test": len(dev) - len(kept_dev), "train_in_dev": len(kept) - len(kept_train)}
    return kept_train, kept_dev, dropped


def subset(examples: list[Example], size: int | None, seed: int, key: str, left_out: int = 0) -> list[Example]:
    """A seeded draw of ``size`` examples in their old order; all of them with None.

    Raises:
        InputError: there are fewer than ``size``; ``key`` is the recipe's name for the size, ``left_out`` the number of
            rows that ``assign_splits`` dropped.
    """
    if size is None:
        return list(examples)
    if size > len(examples):
        more = f" ({left_out} more have a sentence that stands in another split, too)" if left_out else ""
        raise InputError(f"data.{key}: {size} examples asked for, but there are {len(examples)}{more}")
    drawn = {e.id for e in sorted(examples, key=lambda e: draw_order(seed, key, e.id))[:size]}
    return [e for e in examples if e.id in drawn]


def _cut_dev(train: list[Example], dev_size: int, seed: int) -> tuple[list[Example], list[Example]]:
    if dev_size and dev_size >= len(train):
        raise InputError(f"data.dev_size: {dev_size} examples are to be cut from train, which has {len(train)}")
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in train:
        groups[sentence_key(example.sentence)].append(example)
    chosen: set[str] = set()
    room = dev_size
    for key in sorted(groups, key=lambda key: draw_order(seed, "dev", key)):
        if len(groups[key]) <= room:
            chosen |= {example.id for example in groups[key]}
            room -= len(groups[key])
        if not room:
            break
    if dev_size and not chosen:
        raise InputError(f"data.dev_size: every sentence of train has more than {dev_size} examples; ask for more")
    dev = [replace(example, split="dev") for example in train if example.id in chosen]
    return [example for example in train if example.id not in chosen], dev
