"""Splits and folds in which no text is on both sides, and seeded draws; all computed on columns.

Every draw orders the rows by a hash of the seed and the row's own name: it is the same on every machine and Python
version, does not depend on the order of the file, and a larger draw contains the smaller one.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from atlantis_ds.errors import InputError


def draw_order(seed: int, purpose: str, name: str) -> int:
    """A number below 2**64 that depends only on its arguments; sorting by it gives a seeded random order."""
    return int.from_bytes(hashlib.sha256(f"{seed}\t{purpose}\t{name}".encode()).digest()[:8])


def draws(seed: int, purpose: str, names: Iterable[str]) -> np.ndarray:
    """``draw_order`` of each name, uint64 [n]."""
    return np.fromiter((draw_order(seed, purpose, name) for name in names), dtype=np.uint64)


def text_key(text: str) -> str:
    """A text that is equal for texts that differ only in case, white space or spacing around punctuation.

    It defines "the same text" for splits and folds: tokenised and plain forms of a sentence are equal.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.split()))


def key_hash(key: str) -> int:
    """The first 64 bits of a hash of ``text_key``, so that columns of numbers represent the texts."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def keep_apart(
    train: np.ndarray, dev: np.ndarray | None, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, dict[str, int]]:
    """Which rows of train and dev stay if no text may be in two splits; test keeps all rows.

    Rows of train and dev whose text is in test are dropped, then rows of train whose text is in dev.

    Args:
        train, dev, test: ``key_hash`` of each row, uint64; ``dev`` is None if it will be cut from train.

    Returns:
        bool masks for train and dev, and how many rows were dropped, by reason.
    """
    train_in_test = np.isin(train, test)
    kept = ~train_in_test
    dropped = {"train_in_test": int(train_in_test.sum()), "dev_in_test": 0, "train_in_dev": 0}
    if dev is None:
        return kept, None, dropped
    kept_dev = ~np.isin(dev, test)
    train_in_dev = kept & np.isin(train, dev[kept_dev])
    dropped |= {"dev_in_test": int((~kept_dev).sum()), "train_in_dev": int(train_in_dev.sum())}
    return kept & ~train_in_dev, kept_dev, dropped


def cut_dev(keys: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    """Rows of train that become dev: whole texts with ``size`` rows in total, or slightly fewer if they do not add up.

    Args:
        keys: ``key_hash`` of each row, uint64 [n].
        order: draw of each row's text, uint64 [n]; equal for equal texts.

    Returns:
        bool [n].

    Raises:
        InputError: ``size`` rows cannot be taken.
    """
    chosen = np.zeros(len(keys), dtype=bool)
    if not size:
        return chosen
    if size >= len(keys):
        raise InputError(f"data.dev_size: {size} examples should be taken from train, which has only {len(keys)}")
    _, first, text, rows = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    room, texts = size, []
    for number in np.argsort(order[first], kind="stable").tolist():
        if rows[number] <= room:
            texts.append(number)
            room -= int(rows[number])
        if not room:
            break
    if not texts:
        raise InputError(f"data.dev_size: every text in train has more than {size} examples; increase the size")
    return np.isin(text, texts)


SEEN_ELSEWHERE = 1 / 3
"""A group is scored by the other folds if these have at least this share of its label's examples."""


def group_folds(
    texts: np.ndarray, groups: np.ndarray, labels: np.ndarray | None, ordinary: np.ndarray, folds: int
) -> np.ndarray:
    """Folds of about equal size in which no group and no text is on both sides.

    Groups that share a text stay together. In order of size, each group goes to the emptiest fold. Rows without a group
    keep their ordinary folds.

    A label that is rare in the other folds, such as a label from only one rule, would always be contradicted, right or
    wrong. So if the other folds have less than ``SEEN_ELSEWHERE`` of its examples, the examples in this fold get
    ordinary folds.

    Args:
        texts: uint64 [n], equal for equal texts.
        groups: int [n]; -1 for no group.
        labels: int [n], or None for responses.
        ordinary: int [n]: folds by text only.

    Returns:
        int64 [n].
    """
    part = _connected(texts, groups)
    size = np.bincount(part)
    grouped = np.zeros(len(size), dtype=bool)
    grouped[part[groups >= 0]] = True
    filled = np.bincount(ordinary[~grouped[part]], minlength=folds)
    first = np.full(len(size), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(first, part, texts)  # a draw, so that ties in size have a seeded order
    fold_of_part = np.empty(len(size), dtype=np.int64)
    order = np.lexsort((first, -size))
    for number in order[grouped[order]].tolist():
        fold_of_part[number] = filled.argmin()
        filled[fold_of_part[number]] += size[number]
    found = np.where(grouped[part], fold_of_part[part], ordinary)
    if labels is None:
        return found
    here = np.zeros((folds, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(here, (found, labels), 1)
    alone = here > (1 - SEEN_ELSEWHERE) * here.sum(axis=0)
    loose = np.zeros(len(size), dtype=bool)
    loose[part[alone[found, labels]]] = True
    return np.where(loose[part], ordinary, found)


def _connected(texts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """int64 [n]: rows with equal text or group, directly or through other rows, have the same number."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, text = np.unique(texts, return_inverse=True)
    known = groups >= 0
    nodes = int(text.max()) + 1
    edges = (np.ones(int(known.sum())), (text[known], nodes + groups[known]))
    whole = nodes + int(groups.max()) + 1
    _, number = connected_components(coo_array(edges, shape=(whole, whole)), directed=False)
    return np.unique(number[text], return_inverse=True)[1]


def subset(order: np.ndarray, size: int | None, key: str, left_out: int = 0) -> np.ndarray:
    """A seeded draw of ``size`` of n rows, in their original order, int64; None means all rows.

    Args:
        order: draw of each row, uint64 [n].

    Raises:
        InputError: there are fewer than ``size``; ``key`` is the name of the size in the recipe, ``left_out`` the
            number of rows that ``keep_apart`` dropped.
    """
    if size is None:
        return np.arange(len(order))
    if size > len(order):
        more = f" ({left_out} more have a text that is also in another split)" if left_out else ""
        raise InputError(f"data.{key}: {size} examples requested, but there are only {len(order)}{more}")
    return np.sort(np.argsort(order, kind="stable")[:size])
