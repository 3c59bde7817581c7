"""One reader for each file format. Bad input ends in one line that names the file, the line and what is wrong."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from atlantis_ds.data.table import Example
from atlantis_ds.errors import InputError

SEMEVAL_RELATIONS = [
    "Cause-Effect",
    "Component-Whole",
    "Content-Container",
    "Entity-Destination",
    "Entity-Origin",
    "Instrument-Agency",
    "Member-Collection",
    "Message-Topic",
    "Product-Producer",
]
SEMEVAL_LABELS = [*(f"{name}({way})" for name in SEMEVAL_RELATIONS for way in ("e1,e2", "e2,e1")), "Other"]
CONLL04_LABELS = ["Kill", "Live_In", "Located_In", "OrgBased_In", "Work_For"]
NO_RELATION = "None"


def read_semeval(path: str | Path, split: str, labels: list[str] | None = None) -> list[Example]:
    """Read a SemEval-2010 task 8 file with directed labels (TRAIN_FILE.TXT, TEST_FILE_FULL.TXT).

    A record is ``id TAB "sentence"``, a label line, an optional ``Comment:`` line and a blank line.

    Args:
        labels: the label set; the 19 official labels without it.

    Raises:
        InputError: "path:line: what is wrong".
    """
    lines = _read_text(path).split("\n")
    known = SEMEVAL_LABELS if labels is None else labels
    examples: list[Example] = []
    seen: set[str] = set()
    at = 0
    while at < len(lines):
        line = lines[at].rstrip("\r")
        if not line.strip():
            at += 1
            continue
        number = at + 1  # of the line that an error is about; moves on with the record
        try:
            id, tab, marked = line.partition("\t")
            if not tab or not id.strip():
                raise ValueError('expected `id TAB "sentence"`')
            id = _unique(id.strip(), seen)
            sentence, e1, e2 = parse_marked(_unquote(marked))
            number += 1
            label = _known(lines[at + 1].strip() if at + 1 < len(lines) else "", known)
            number += 1
            comment = lines[at + 2].strip() if at + 2 < len(lines) else ""
            if comment and not comment.startswith("Comment"):
                raise ValueError("expected a `Comment:` line or a blank line after the label")
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        examples.append(Example(id, sentence, e1, e2, label, label, split))
        at += 3 if comment else 2
    return examples


def read_conll04(
    path: str | Path, split: str, negatives: int = 0, seed: int = 0, labels: list[str] | None = None
) -> list[Example]:
    """Read a CoNLL04 file in SpERT's JSON: one example a relation, tokens joined by single spaces.

    Args:
        negatives: entity pairs a sentence (at most) to add with label ``None``: a seeded draw among the ordered
            pairs with no relation either way.
        labels: the label set; the five relations (and ``None`` with ``negatives``) without it.

    Returns:
        examples with ids ``conll04-SPLIT-ORIGID-K``, K the relation's index, or ``nJ`` for the J-th negative.

    Raises:
        InputError: "path:line: what" for broken JSON, "path: document INDEX (orig_id ID): what" for its content.
    """
    try:
        documents = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{path}:1: not valid JSON: nested too deep") from None
    if not isinstance(documents, list):
        raise InputError(f"{path}:1: expected a JSON list of documents")
    examples: list[Example] = []
    seen: set[str] = set()
    for index, document in enumerate(documents):
        origin = document.get("orig_id", index) if isinstance(document, dict) else index
        try:
            for example in conll04_examples(document, f"conll04-{split}-{origin}", split, negatives, seed, labels):
                _unique(example.id, seen)
                examples.append(example)
        except ValueError as error:
            raise InputError(f"{path}: document {index} (orig_id {origin}): {error}") from None
    return examples


def read_jsonl(path: str | Path, split: str, labels: list[str] | None = None) -> list[Example]:
    """Read JSON lines: ``{id, sentence, label}`` or ``{id, tokens, e1, e2, label}``, with an optional ``gold``.

    ``sentence`` marks its entities as ``<e1>…</e1>`` and ``<e2>…</e2>``; with ``tokens`` (a list of strings) ``e1``
    and ``e2`` are token spans [start, end], end exclusive.

    Args:
        labels: the label set; None takes every label.

    Raises:
        InputError: "path:line: what is wrong".
    """
    examples: list[Example] = []
    seen: set[str] = set()
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from None
            except RecursionError:
                raise ValueError("not valid JSON: nested too deep") from None
            example = jsonl_example(row, split, labels)
            _unique(example.id, seen)
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        examples.append(example)
    return examples


def parse_marked(marked: str) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """Take the marks out of ``… <e1>…</e1> … <e2>…</e2> …``.

    Returns:
        the plain sentence and the two character spans in it, white space at their ends left out.

    Raises:
        ValueError: a mark is missing, doubled, out of order, or encloses no text.
    """
    plain: list[str] = []
    at: dict[str, int] = {}
    length = 0
    for piece in re.split(r"(</?e[12]>)", marked.strip()):
        if not re.fullmatch(r"</?e[12]>", piece):
            plain.append(piece)
            length += len(piece)
        elif piece in at:
            raise ValueError(f"the mark {piece} stands twice in the sentence")
        else:
            at[piece] = length
    for mark in ("<e1>", "</e1>", "<e2>", "</e2>"):
        if mark not in at:
            raise ValueError(f"the mark {mark} is missing; both entities are needed as <e1>…</e1> and <e2>…</e2>")
    sentence = "".join(plain)
    return sentence, _trim(sentence, at["<e1>"], at["</e1>"], "e1"), _trim(sentence, at["<e2>"], at["</e2>"], "e2")


def semeval_row(row: Any, id: str, split: str, names: list[str] | None, labels: list[str] | None) -> Example:
    """One row of a dataset like SemEvalWorkshop/sem_eval_2010_task_8: ``sentence`` with marks, ``relation``.

    ``names`` are the class names of an integer ``relation``. Raises ValueError with what is wrong.
    """
    relation = row.get("relation")
    if type(relation) is int:
        if names is None or not 0 <= relation < len(names):
            raise ValueError(f"`relation` {relation} has no class name in the dataset's features")
        relation = names[relation]
    sentence, e1, e2 = parse_marked(_unquote(_text(row, "sentence")))
    label = _known(relation, SEMEVAL_LABELS if labels is None else labels)
    return Example(id, sentence, e1, e2, label, label, split)


def conll04_examples(
    document: Any, id: str, split: str, negatives: int, seed: int, labels: list[str] | None
) -> list[Example]:
    """The examples of one document: one a relation, then the negatives. Raises ValueError with what is wrong."""
    if not isinstance(document, dict):
        raise ValueError("expected an object with `tokens`, `entities` and `relations`")
    known = labels if labels is not None else CONLL04_LABELS + ([NO_RELATION] if negatives else [])
    sentence, offsets = _join(document.get("tokens"))
    spans: list[tuple[int, int]] = []
    for entity in _objects(document, "entities"):
        spans.append(_characters([entity.get("start"), entity.get("end")], offsets, f"entity {len(spans)}"))
    examples: list[Example] = []
    related: set[tuple[int, int]] = set()
    for k, relation in enumerate(_objects(document, "relations")):
        head, tail = (_entity(relation.get(end), len(spans), f"relation {k}") for end in ("head", "tail"))
        label = _known(relation.get("type"), known)
        examples.append(Example(f"{id}-{k}", sentence, spans[head], spans[tail], label, label, split))
        related |= {(head, tail), (tail, head)}
    places = range(len(spans))
    free = [(a, b) for a in places for b in places if a != b and (a, b) not in related] if negatives else []
    drawn = random.Random(f"{seed}:negatives:{id}").sample(free, min(negatives, len(free)))
    for j, (a, b) in enumerate(drawn):
        label = _known(NO_RELATION, known)
        examples.append(Example(f"{id}-n{j}", sentence, spans[a], spans[b], label, label, split))
    return examples


def jsonl_example(row: Any, split: str, labels: list[str] | None) -> Example:
    """One row of the JSON lines format. Raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object with `id`, `sentence` or `tokens`, and `label`")
    id = row.get("id")
    if type(id) not in (int, str) or not str(id).strip():
        raise ValueError("`id` is missing or not a text or whole number")
    if "tokens" in row:
        sentence, offsets = _join(row["tokens"])
        e1, e2 = (_characters(row.get(name), offsets, f"`{name}`") for name in ("e1", "e2"))
    else:
        sentence, e1, e2 = parse_marked(_text(row, "sentence"))
    label = _known(row.get("label"), labels)
    gold = None if row.get("gold") is None else _known(row["gold"], labels, "gold label")
    return Example(str(id), sentence, e1, e2, label, gold, split)


def _read_text(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if data.startswith(b"PAR1"):
            raise InputError(f"{path}: a Parquet file; give the folder that holds it as data.hub_id") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file") from None


def _whole(text: str) -> str:
    """JSON may cut an emoji in two, as tweets do; such a text can be written nowhere."""
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"half of a surrogate pair ({ascii(half[0])[1:-1]}) in {text[:40]!a}; mend the text")
    return text


def _unique(id: str, seen: set[str]) -> str:
    if _whole(id) in seen:
        raise ValueError(f"the id {id!r} stands twice in this file")
    seen.add(id)
    return id


def _known(label: Any, labels: list[str] | None, kind: str = "label") -> str:
    if label is None or (isinstance(label, str) and not label.strip()):
        raise ValueError(f"empty {kind}")
    if not isinstance(label, str):
        raise ValueError(f"the {kind} is not a text: {label!r}")
    if labels is not None and label.strip() not in labels:
        raise ValueError(f"unknown {kind} {label!r}; the label set is {', '.join(labels)}")
    return _whole(label.strip())


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{key}` is missing or not a text")
    return _whole(value)


def _objects(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = document.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"`{key}` is missing or not a list of objects")
    return value


def _entity(index: Any, count: int, what: str) -> int:
    if type(index) is not int or not 0 <= index < count:
        raise ValueError(f"{what}: {index!r} is not one of its {count} entities")
    return index


def _join(tokens: Any) -> tuple[str, list[tuple[int, int]]]:
    """Tokens joined by single spaces, and the character span of each."""
    if not isinstance(tokens, list) or not tokens:
        raise ValueError("`tokens` is missing or not a list of texts")
    offsets, start = [], 0
    for index, token in enumerate(tokens):
        if not isinstance(token, str) or not token.strip():
            raise ValueError(f"token {index} is empty or not a text")
        _whole(token)
        offsets.append((start, start + len(token)))
        start += len(token) + 1
    return " ".join(tokens), offsets


def _characters(span: Any, offsets: list[tuple[int, int]], what: str) -> tuple[int, int]:
    """Character span of a token span [start, end], end exclusive."""
    if not isinstance(span, list) or len(span) != 2 or not all(type(value) is int for value in span):
        raise ValueError(f"{what}: a token span [start, end] is needed, not {span!r}")
    if not 0 <= span[0] < span[1] <= len(offsets):
        raise ValueError(f"{what}: the span {span} is empty or outside its {len(offsets)} tokens")
    return offsets[span[0]][0], offsets[span[1] - 1][1]


def _trim(sentence: str, start: int, end: int, name: str) -> tuple[int, int]:
    text = sentence[start:end] if start < end else ""
    if not text.strip():
        raise ValueError(f"<{name}>…</{name}> encloses no text")
    return start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())


def _unquote(sentence: str) -> str:
    sentence = sentence.strip()
    return sentence[1:-1] if len(sentence) > 1 and sentence[0] == sentence[-1] == '"' else sentence
