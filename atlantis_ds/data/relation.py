"""Relations between two entities: the official SemEval files, SpERT's JSON, and rows with marks or spans.

Each reader yields the label of each example and the fields of its prompt, including entity marks.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atlantis_ds.data.rows import BadRow, Found, Problems, label_text, whole_text
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
NO_RELATION = "None"
"""Label of negatives drawn from SpERT files."""

TEMPLATE = "Classify the semantic relation between the entities {e1} and {e2} in this sentence: {marked_sentence}"

Span = tuple[int, int]
"""Character span of a sentence, end exclusive."""


def relation_fields(sentence: str, e1: Span, e2: Span) -> dict[str, str]:
    """The fields of a relation prompt."""
    return {
        "sentence": sentence,
        "marked_sentence": marked_sentence(sentence, e1, e2),
        "e1": sentence[slice(*e1)],
        "e2": sentence[slice(*e2)],
    }


def marked_sentence(sentence: str, e1: Span, e2: Span) -> str:
    """The sentence with its entities as ``[E1] … [/E1]`` and ``[E2] … [/E2]`` (also if one is inside the other)."""
    marks: list[tuple[tuple[int, int, int], str]] = []
    for name, (start, end) in (("E1", e1), ("E2", e2)):
        # At the same position, closing marks come first, inner before outer; then opening marks, outer before inner.
        marks.append(((start, 1, -end), f"[{name}] "))
        marks.append(((end, 0, -start), f" [/{name}]"))
    pieces, done = [], 0
    for (position, _, _), mark in sorted(marks):
        pieces += [sentence[done:position], mark]
        done = position
    return "".join(pieces) + sentence[done:]


def read_semeval(path: Path, problems: Problems) -> Iterator[Found]:
    """Read a SemEval-2010 task 8 file with directed labels (TRAIN_FILE.TXT, TEST_FILE_FULL.TXT).

    A record is ``id TAB "sentence"``, a label line, an optional ``Comment:`` line and a blank line.
    """
    lines = _read_text(path).split("\n")
    at = 0
    while at < len(lines):
        line = lines[at].rstrip("\r")
        if not line.strip():
            at += 1
            continue
        number = at + 1  # line number for error messages; advances with the record
        where = f"{path}:{number}"
        try:
            id, tab, marked = line.partition("\t")
            if not tab or not id.strip():
                raise BadRow('expected `id TAB "sentence"`')
            sentence, e1, e2 = parse_marked(_unquote(marked))
            number += 1
            label = label_text(lines[at + 1].strip() if at + 1 < len(lines) else "")
            if label is None:
                raise BadRow("empty label")
            number += 1
            comment = lines[at + 2].strip() if at + 2 < len(lines) else ""
            if comment and not comment.startswith("Comment"):
                raise BadRow("expected a `Comment:` line or a blank line after the label")
        except BadRow as problem:
            problems(f"{path}:{number}", str(problem))
            while at < len(lines) and lines[at].strip():
                at += 1
            if at + 1 < len(lines) and lines[at + 1].startswith(
                "Comment"
            ):  # belongs to this record, after an empty label
                at += 2
            continue
        # A problem with the label is found later; its line is the next one.
        yield Found(
            where, id.strip(), relation_fields(sentence, e1, e2), sentence, label, label, label_at=f"{path}:{at + 2}"
        )
        at += 3 if comment else 2


def read_spert(path: Path, split: str, negatives: int, seed: int, problems: Problems) -> Iterator[Found]:
    """Read a file in SpERT's JSON, such as CoNLL04: one example per relation, tokens joined by single spaces.

    Args:
        negatives: most entity pairs per sentence to add with label ``None``: a seeded draw from the ordered pairs
            without a relation in either direction.

    Yields:
        examples with ids ``conll04-SPLIT-ORIGID-K``, K is the relation's index, or ``nJ`` for the J-th negative. Seeded
        draws depend on the id, so the prefix is kept as in the studies.

    Raises:
        InputError: the file is not a JSON list.
    """
    try:
        documents = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{path}:1: not valid JSON: nested too deep") from None
    if not isinstance(documents, list):
        raise InputError(f"{path}:1: expected a JSON list of documents")
    for index, document in enumerate(documents):
        origin = document.get("orig_id", index) if isinstance(document, dict) else index
        where = f"{path}: document {index} (orig_id {origin})"
        try:
            yield from spert_examples(document, where, f"conll04-{split}-{origin}", negatives, seed)
        except BadRow as problem:
            problems(where, str(problem))


def spert_examples(document: Any, where: str, id: str, negatives: int, seed: int) -> list[Found]:
    """The examples of one document: one per relation, then the negatives. Raises BadRow with what is wrong."""
    if not isinstance(document, dict):
        raise BadRow("expected an object with `tokens`, `entities` and `relations`")
    sentence, offsets = _join(document.get("tokens"))
    spans: list[Span] = []
    for entity in _objects(document, "entities"):
        spans.append(_of_tokens([entity.get("start"), entity.get("end")], offsets, f"entity {len(spans)}"))
    found: list[Found] = []
    related: set[tuple[int, int]] = set()

    def add(name: str, head: int, tail: int, label: str | None) -> None:
        if label is None:
            raise BadRow("empty label")
        fields = relation_fields(sentence, spans[head], spans[tail])
        found.append(Found(where, f"{id}-{name}", fields, sentence, label, label))

    for k, relation in enumerate(_objects(document, "relations")):
        head, tail = (_entity(relation.get(end), len(spans), f"relation {k}") for end in ("head", "tail"))
        add(str(k), head, tail, label_text(relation.get("type")))
        related |= {(head, tail), (tail, head)}
    places = range(len(spans))
    free = [(a, b) for a in places for b in places if a != b and (a, b) not in related] if negatives else []
    drawn = random.Random(f"{seed}:negatives:{id}").sample(free, min(negatives, len(free)))
    for j, (a, b) in enumerate(drawn):
        add(f"n{j}", a, b, NO_RELATION)
    return found


def semeval_row(values: dict[str, Any]) -> tuple[dict[str, str], str, str]:
    """Fields, sentence and label of a row from a data set like SemEvalWorkshop/sem_eval_2010_task_8."""
    sentence, e1, e2 = parse_marked(_unquote(_text(values, "sentence")))
    label = label_text(values.get("relation"))
    if label is None:
        raise BadRow("empty label")
    return relation_fields(sentence, e1, e2), sentence, label


def row_fields(values: dict[str, Any]) -> tuple[dict[str, str], str]:
    """Fields and sentence of a row with two entities, in one of these forms:

    - ``sentence`` (or ``text``) with ``<e1>…</e1>`` and ``<e2>…</e2>``
    - ``tokens`` (or ``token``), a list of texts, with ``e1`` and ``e2`` as token spans [start, end], end exclusive
    - ``sentence`` (or ``text``) with ``e1`` and ``e2`` as character spans
    - either, with ``h`` and ``t`` instead of ``e1`` and ``e2``: a span, {"pos": span}, or [name, id, [[index, …]]]

    Raises:
        BadRow: what is wrong.
    """
    first, second = ("h", "t") if "h" in values and "t" in values and values.get("e1") is None else ("e1", "e2")
    tokens = values.get("tokens", values.get("token"))
    if tokens is not None:
        sentence, offsets = _join(tokens)
        e1, e2 = (_of_tokens(_span(values.get(name)), offsets, f"`{name}`") for name in (first, second))
        return relation_fields(sentence, e1, e2), sentence
    key = "sentence" if values.get("sentence") is not None else "text"
    if values.get(first) is None and values.get(second) is None:
        sentence, e1, e2 = parse_marked(_text(values, key if values.get(key) is not None else "sentence"))
        return relation_fields(sentence, e1, e2), sentence
    sentence = _text(values, key)
    e1, e2 = (_of_characters(_span(values.get(name)), sentence, f"`{name}`") for name in (first, second))
    return relation_fields(sentence, e1, e2), sentence


def parse_marked(marked: str) -> tuple[str, Span, Span]:
    """Remove the marks from ``… <e1>…</e1> … <e2>…</e2> …``.

    Returns:
        the plain sentence and the two character spans in it, without white space at their ends.

    Raises:
        BadRow: a mark is missing, duplicated, out of order, or encloses no text.
    """
    plain: list[str] = []
    at: dict[str, int] = {}
    length = 0
    for piece in re.split(r"(</?e[12]>)", marked.strip()):
        if not re.fullmatch(r"</?e[12]>", piece):
            plain.append(piece)
            length += len(piece)
        elif piece in at:
            raise BadRow(f"the mark {piece} occurs twice in the sentence")
        else:
            at[piece] = length
    for mark in ("<e1>", "</e1>", "<e2>", "</e2>"):
        if mark not in at:
            raise BadRow(f"the mark {mark} is missing; both entities are needed as <e1>…</e1> and <e2>…</e2>")
    sentence = "".join(plain)
    return sentence, _trim(sentence, at["<e1>"], at["</e1>"], "e1"), _trim(sentence, at["<e2>"], at["</e2>"], "e2")


def _read_text(path: Path) -> str:
    from atlantis_ds.data.sources import BINARY, read_text

    if path.suffix.lower() in BINARY:
        raise InputError(f"{path}: not a text file; give its folder as data.hub_id")
    return read_text(path)


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"`{key}` is missing or not a text")
    return whole_text(value)


def _objects(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = document.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow(f"`{key}` is missing or not a list of objects")
    return value


def _entity(index: Any, count: int, what: str) -> int:
    if type(index) is not int or not 0 <= index < count:
        raise BadRow(f"{what}: {index!r} is not one of its {count} entities")
    return index


def _join(tokens: Any) -> tuple[str, list[Span]]:
    """Tokens joined by single spaces, and the character span of each."""
    if not isinstance(tokens, list) or not tokens:
        raise BadRow("`tokens` is missing or not a list of texts")
    offsets, start = [], 0
    for index, token in enumerate(tokens):
        if not isinstance(token, str) or not token.strip():
            raise BadRow(f"token {index} is empty or not a text")
        whole_text(token)
        offsets.append((start, start + len(token)))
        start += len(token) + 1
    return " ".join(tokens), offsets


def _span(value: Any) -> Any:
    """[start, end] of an entity, in any of the forms that ``row_fields`` accepts."""
    if isinstance(value, dict):
        return value.get("pos")
    if isinstance(value, list) and len(value) == 3 and isinstance(value[2], list) and value[2]:
        places = value[2][0]  # FewRel: the token indices of the first mention
        return [places[0], places[-1] + 1] if isinstance(places, list) and places else None
    return value


def _of_tokens(span: Any, offsets: list[Span], what: str) -> Span:
    """Character span of a token span [start, end], end exclusive."""
    if not isinstance(span, list) or len(span) != 2 or not all(type(value) is int for value in span):
        raise BadRow(f"{what}: a token span [start, end] is needed, not {span!r}")
    if not 0 <= span[0] < span[1] <= len(offsets):
        raise BadRow(f"{what}: the span {span} is empty or outside its {len(offsets)} tokens")
    return offsets[span[0]][0], offsets[span[1] - 1][1]


def _of_characters(span: Any, sentence: str, what: str) -> Span:
    if not isinstance(span, list) or len(span) != 2 or not all(type(value) is int for value in span):
        raise BadRow(f"{what}: a character span [start, end] is needed, not {span!r}")
    if not 0 <= span[0] < span[1] <= len(sentence):
        raise BadRow(f"{what}: the span {span} is empty or outside its {len(sentence)} characters")
    return _trim(sentence, span[0], span[1], what.strip("`"))


def _trim(sentence: str, start: int, end: int, name: str) -> Span:
    text = sentence[start:end] if start < end else ""
    if not text.strip():
        raise BadRow(f"<{name}>…</{name}> encloses no text")
    return start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())


def _unquote(sentence: str) -> str:
    sentence = sentence.strip()
    return sentence[1:-1] if len(sentence) > 1 and sentence[0] == sentence[-1] == '"' else sentence
