"""Metrics of predicted labels: macro-F1, the official SemEval-2010 Task 8 score, and figures per label.

Labels are strings as in the data; if a task has directions, they are the suffix ``(e1,e2)`` or ``(e2,e1)``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from atlantis_ds.data.relation import SEMEVAL_LABELS
from atlantis_ds.errors import InputError
from atlantis_ds.files import write_atomic

UNMAPPED = ""
"""The prediction for a generated text that maps to no label. It counts as wrong, never as ``Other``."""

OTHER = "Other"

_DIRECTION = re.compile(r"\((?:e1,e2|e2,e1)\)$")


def relation_of(label: str) -> str:
    """Drop the direction: ``Cause-Effect(e2,e1)`` becomes ``Cause-Effect``; other labels stay as they are."""
    return _DIRECTION.sub("", label)


def has_official(labels: Collection[str], negative: str = OTHER) -> bool:
    """Whether a label set is SemEval's, from any source: all or some of its nine directed relations, and a negative."""
    relations = set(labels) - {negative}
    return bool(relations) and relations <= set(SEMEVAL_LABELS) - {OTHER}


def label_apart(labels: Collection[str], negative: str | None) -> str | None:
    """The label that macro-F1 leaves out of its mean: the recipe's ``data.negative_label``.

    With SemEval's relations, ``Other`` counts as a class, named or not, so that the figures of all recipes on these
    data are comparable; the official score leaves it out.
    """
    return None if negative == OTHER and has_official(labels) else negative


def macro_f1(gold: Sequence[str], predicted: Sequence[str], apart: str | None = None) -> float:
    """Macro-F1 with directions collapsed, as a fraction 0..1.

    This is ``sklearn.metrics.f1_score(gold, predicted, average="macro", labels=L, zero_division=0)`` on the labels
    without direction, where L is the set of relations that occur in ``gold``. A relation in L that is never predicted
    correctly has F1 0. A prediction outside L (``UNMAPPED``, or a relation that does not occur in gold) is a miss of
    its gold relation and adds no term. For a task without directions it is plain macro-F1 over the gold labels.

    Args:
        apart: a label that does not count as a class, from `label_apart`. It is not in L, so it has no term in the
            mean; but if another label is predicted instead of it, or it instead of another label, this is an error of
            the other label. If gold contains nothing else, the result is 0.

    Raises:
        InputError: the lengths differ, or there are no examples.
    """
    from sklearn.metrics import f1_score

    _check_lengths(gold, predicted)
    gold, predicted = [relation_of(label) for label in gold], [relation_of(label) for label in predicted]
    classes = sorted(set(gold) - {apart})
    return float(f1_score(gold, predicted, average="macro", labels=classes, zero_division=0)) if classes else 0.0


def official(gold: Mapping[str, str], predicted: Mapping[str, str], negative: str = OTHER) -> float:
    """The official score of SemEval-2010 Task 8, in percent 0..100.

    It is the last line that the task's scorer prints: "(9+1)-way evaluation with directionality taken into account:
    macro-averaged F1" (Hendrickx et al. 2010), the mean F1 over the relations that occur in ``gold``, without
    ``negative``; see `official_by_relation` for the counts.

    Args:
        gold: id -> directed label.
        predicted: id -> directed label. Ids that are absent, or ``UNMAPPED``, are skipped examples.
        negative: the label that says that none of the relations applies.

    Raises:
        InputError: ``predicted`` has an id that gold lacks, or gold has no relation except ``negative``.
    """
    rows = official_by_relation(gold, predicted)
    f1 = [row["f1"] for relation, row in rows.items() if relation != negative]
    if not f1:
        raise InputError(f"the official score needs a gold relation other than `{negative}`; use a larger test set")
    return sum(f1) / len(f1)


def official_by_relation(gold: Mapping[str, str], predicted: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The lines "Results for the individual relations" of the scorer's official section.

    A prediction is correct if both relation and direction are correct. The precision of a relation divides by its
    predictions in either direction, so that the right relation in the wrong direction lowers precision and recall. The
    recall divides by its gold examples, including skipped ones; a skipped example affects no precision. 0/0 counts as
    0.

    Returns:
        for each relation in gold (sorted, ``Other`` among them): ``correct``, ``predicted`` and ``support`` (counts),
        ``precision``, ``recall`` and ``f1`` (percent).
    """
    if foreign := predicted.keys() - gold.keys():
        raise InputError(f"prediction for an id that the gold labels lack: {min(foreign)!r} ({len(foreign)} such ids)")
    support = Counter(relation_of(label) for label in gold.values())
    proposed = Counter(relation_of(label) for label in predicted.values())
    correct = Counter(relation_of(label) for id, label in predicted.items() if label == gold[id])
    rows = {}
    for relation in sorted(support):
        precision = 100 * correct[relation] / proposed[relation] if proposed[relation] else 0.0
        recall = 100 * correct[relation] / support[relation]
        f1 = 2 * precision * recall / (precision + recall) if correct[relation] else 0.0
        rows[relation] = {
            "correct": correct[relation],
            "predicted": proposed[relation],
            "support": support[relation],
            "precision": precision,
            "recall": recall,
            "f1": f1,
        }
    return rows


def per_label(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures for each full (directed) label that occurs in ``gold`` or ``predicted``, sorted, without ``UNMAPPED``.

    Returns:
        label -> ``precision``, ``recall``, ``f1`` (fractions 0..1, 0/0 counts as 0), ``support`` (gold examples) and
        ``predicted`` (predictions).
    """
    from sklearn.metrics import precision_recall_fscore_support

    _check_lengths(gold, predicted)
    labels = sorted((set(gold) | set(predicted)) - {UNMAPPED})
    times = Counter(predicted)
    columns = precision_recall_fscore_support(gold, predicted, labels=labels, zero_division=0)
    return {
        label: {
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "support": int(support),
            "predicted": times[label],
        }
        for label, precision, recall, f1, support in zip(labels, *columns, strict=True)
    }


def metrics(
    labels: Collection[str],
    ids: Sequence[str],
    gold: Sequence[str],
    predicted: Sequence[str],
    negative: str | None = None,
) -> dict[str, Any]:
    """All figures of one arm on a label set, ready for ``metrics.json``; for responses see `answers`.

    Args:
        labels: the label set.
        ids, gold, predicted: one entry per example.
        negative: the recipe's ``data.negative_label``; see `label_apart`.

    Returns:
        ``macro_f1`` and ``accuracy`` (fractions 0..1, accuracy on the full directed label), ``official`` (percent
        0..100; None if the label set is not SemEval's, or if gold contains only the negative label),
        ``per_label``, ``n`` and ``unmapped`` (numbers of examples).

    Raises:
        InputError: lengths differ, there are no examples, an id is duplicated, or a gold label is empty.
    """
    _check_lengths(ids, gold)
    _check_lengths(gold, predicted)
    keys, answers = dict(zip(ids, gold, strict=True)), dict(zip(ids, predicted, strict=True))
    if len(keys) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"example id {twice!r} occurs more than once; the ids of the test examples must be unique")
    if UNMAPPED in gold:
        raise InputError(f"example {ids[list(gold).index(UNMAPPED)]!r} has an empty gold label")
    none_holds = OTHER if negative is None else negative
    scored = has_official(labels, none_holds) and any(label != none_holds for label in gold)
    return {
        "macro_f1": macro_f1(gold, predicted, label_apart(labels, negative)),
        "official": official(keys, answers, none_holds) if scored else None,
        "accuracy": sum(a == b for a, b in zip(gold, predicted, strict=True)) / len(gold),
        "per_label": per_label(gold, predicted),
        "n": len(gold),
        "unmapped": sum(label == UNMAPPED for label in predicted),
    }


def read_answers(path: Path, labels: Collection[str] = SEMEVAL_LABELS) -> dict[str, str]:
    """Read a file in the scorer's format: one ``id TAB label`` per line, LF or CRLF; ``_Other`` is read as ``Other``.

    Raises:
        InputError: the file cannot be read; or, with file and line, a line that is not ``id TAB label``, a label that
            is not in ``labels``, or a duplicate id.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    answers: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        id, tab, label = line.partition("\t")
        label = OTHER if label == f"_{OTHER}" else label
        if not tab or not id or id != id.strip():
            raise InputError(f"{path}:{number}: not `id TAB label`: {line!r}")
        if label not in labels:
            raise InputError(f"{path}:{number}: unknown label {label!r}; write it as in {next(iter(labels))!r}")
        if id in answers:
            raise InputError(f"{path}:{number}: id {id!r} is a duplicate")
        answers[id] = label
    return answers


def can_hold_answers(texts: Sequence[str]) -> bool:
    """Whether ids and labels fit the scorer's format: none contains a tab or line break."""
    return not any("\t" in text or len(text.splitlines()) > 1 for text in texts)


def write_answers(path: Path, ids: Sequence[str], predicted: Sequence[str]) -> None:
    """Write predictions in the scorer's format; ``UNMAPPED`` predictions are left out, and the scorer counts them as
    skipped.

    Args:
        ids, predicted: one entry per example; `can_hold_answers` must be true for all.
    """
    lines = [f"{id}\t{label}\n" for id, label in zip(ids, predicted, strict=True) if label != UNMAPPED]

    def write(temporary: Path) -> None:
        temporary.write_bytes("".join(lines).encode())

    write_atomic(path, write)


def _check_lengths(first: Sequence[str], second: Sequence[str]) -> None:
    if len(first) != len(second):
        raise InputError(f"one entry per example is needed, but the lists have {len(first)} and {len(second)} entries")
    if not first:
        raise InputError("there are no examples to evaluate; is the test set empty?")
