"""The built-in demo corpus: a relation corpus from a small grammar, so that a first run needs no files.

Nine directed relations and Other, with the names of SemEval-2010 task 8. It is designed to be learnable but not
trivial: relations share templates and nouns, so some sentences fit several labels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from atlantis_ds.data.relation import relation_fields
from atlantis_ds.data.splits import text_key
from atlantis_ds.demo.grammar_words import (
    ADJECTIVES,
    CLOSINGS,
    DETERMINERS,
    OPENINGS,
    ROLES,
    SOMEBODY,
    TAILS,
    TEMPLATES,
)

GRAMMAR_VERSION = 1
"""Raise this with any change to the words or the sampling: it is part of the examples' fingerprint."""

TRAIN_SIZE, DEV_SIZE, TEST_SIZE = 2400, 200, 600


@dataclass(frozen=True, slots=True)
class Row:
    """One sentence of the corpus, with the fields of a relation prompt."""

    id: str
    split: str
    sentence: str
    fields: dict[str, str]
    label: str


def grammar_corpus(train: int, dev: int, test: int, seed: int) -> Iterator[Row]:
    """A corpus of ``train + dev + test`` distinct sentences, in that order.

    The same seed and sizes give the same corpus on every machine. Ids are ``grammar-SPLIT-INDEX``.
    """
    stream = _sentences(f"{seed}:corpus")
    for split, size in (("train", train), ("dev", dev), ("test", test)):
        for index in range(size):
            sentence, e1, e2, label = next(stream)
            yield Row(f"grammar-{split}-{index:05d}", split, sentence, relation_fields(sentence, e1, e2), label)


def unlabelled_text(sentences: int, seed: int) -> list[str]:
    """Distinct plain sentences of the same grammar from another random stream, to pretrain the demo's models on."""
    stream = _sentences(f"{seed}:text")
    return [next(stream)[0] for _ in range(sentences)]


def _sentences(seed: str) -> Iterator[tuple[str, tuple[int, int], tuple[int, int], str]]:
    """Endless stream of (sentence, e1, e2, label), without duplicate sentences (ignoring case and spacing)."""
    rng = random.Random(seed)
    seen: set[str] = set()
    relations = [*ROLES, "Other"]
    shares = [
        1.0,
        0.9,
        0.8,
        0.9,
        0.9,
        0.7,
        0.8,
        0.8,
        1.0,
        1.5,
    ]  # slightly uneven, with Other the largest, as in SemEval
    while True:
        relation = rng.choices(relations, shares)[0]
        sentence, e1, e2, label = _sentence(relation, rng)
        key = text_key(sentence)
        if key not in seen:
            seen.add(key)
            yield sentence, e1, e2, label


def _sentence(relation: str, rng: random.Random) -> tuple[str, tuple[int, int], tuple[int, int], str]:
    nouns = _nouns(relation, rng)
    words: list[str] = []
    places: dict[str, int] = {}  # role -> index of its noun in words
    if rng.random() < 0.35:
        words += [*rng.choice(OPENINGS).split()]
        words[-1] += ","
    for word in rng.choice(TEMPLATES[relation]).split():
        if word in ("A", "B"):
            words.append(rng.choice(DETERMINERS))
            if rng.random() < 0.45:
                words.append(rng.choice(ADJECTIVES))
            places[word] = len(words)
            words.append(nouns[word])
        elif word == "somebody":
            words += rng.choice(SOMEBODY).split()
        else:
            words.append(word)
    if rng.random() < 0.6:
        words += rng.choice(CLOSINGS).split()
    if rng.random() < 0.2 and len(words) <= 18:  # no sentence over 25 words
        words[-1] += ","
        words += rng.choice(TAILS).split()
    words[-1] += "."
    words[0] = words[0][0].upper() + words[0][1:]
    first, second = sorted(places, key=lambda role: places[role])
    spans = []
    for role in (first, second):
        start = sum(len(word) + 1 for word in words[: places[role]])
        spans.append((start, start + len(nouns[role])))
    label = relation if relation == "Other" else f"{relation}({'e1,e2' if first == 'A' else 'e2,e1'})"
    return " ".join(words), spans[0], spans[1], label


def _nouns(relation: str, rng: random.Random) -> dict[str, str]:
    """One noun for each role; for Other both from any role of any relation. Never the same noun twice."""
    while True:
        if relation == "Other":
            pools = [rng.choice(rng.choice(list(ROLES.values()))).split() for _ in range(2)]
        else:
            pools = [role.split() for role in ROLES[relation]]
        first, second = (rng.choice(pool) for pool in pools)
        if first != second:
            return {"A": first, "B": second}
