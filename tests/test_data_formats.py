"""The readers: real files, each kind of bad input with its line, and Hugging Face layouts from a local folder."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from atlantis_ds.data.formats import CONLL04_LABELS, SEMEVAL_LABELS, read_conll04, read_jsonl, read_semeval
from atlantis_ds.data.hub import read_hub
from atlantis_ds.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SEMEVAL = SHARED / "semeval2010_task8"
CONLL04 = SHARED / "conll04"


def real(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"real data is not on this machine: {path.name}")
    return path


def semeval_record(id: int, sentence: str = "a <e1>cat</e1> in a <e2>box</e2>", label: str = "Other") -> str:
    return f'{id}\t"{sentence}"\r\n{label}\r\nComment: x\r\n\r\n'


# --- SemEval


@pytest.mark.parametrize(
    "name, split, count, most", [("TRAIN_FILE.TXT", "train", 8000, 1410), ("TEST_FILE_FULL.TXT", "test", 2717, 454)]
)
def test_semeval_real_file(name, split, count, most):
    path = real(SEMEVAL / name)
    examples = read_semeval(path, split)
    assert len(examples) == len({e.id for e in examples}) == count
    counts = Counter(e.label for e in examples)
    assert set(counts) <= set(SEMEVAL_LABELS) and len(SEMEVAL_LABELS) == 19
    assert counts["Other"] == most
    assert all(e.gold == e.label and e.split == split for e in examples)
    # Against the raw text, read in another way: the sentence and both entities.
    raw = dict(re.findall(r'^(\d+)\t"(.*)"\r?$', path.read_text(encoding="utf-8"), flags=re.M))
    assert len(raw) == count
    for e in examples:
        assert e.sentence == re.sub(r"</?e[12]>", "", raw[e.id])
        for name, span in (("e1", e.e1), ("e2", e.e2)):
            marked = re.search(rf"<{name}>(.*)</{name}>", raw[e.id])
            assert e.sentence[slice(*span)] == marked[1].strip() != ""


def test_semeval_test_labels_are_the_official_key():
    key = dict(line.split("\t") for line in real(SEMEVAL / "test_answer_key.txt").read_text().split("\n") if line)
    examples = read_semeval(SEMEVAL / "TEST_FILE_FULL.TXT", "test")
    assert {e.id: e.label for e in examples} == {id: label.strip() for id, label in key.items()}


@pytest.mark.parametrize(
    "text, line, words",
    [
        (semeval_record(1) + semeval_record(2, "a <e1>cat</e1> in a box"), 5, "<e2> is missing"),
        (semeval_record(1) + semeval_record(2, "a cat</e1> in a <e2>box</e2>"), 5, "<e1> is missing"),
        (semeval_record(1, "a <e1> </e1> in a <e2>box</e2>"), 1, "encloses no text"),
        (semeval_record(1, "a </e1>cat<e1> in a <e2>box</e2>"), 1, "encloses no text"),
        (semeval_record(1, "a <e1>cat</e1> <e1>in</e1> a <e2>box</e2>"), 1, "stands twice"),
        (semeval_record(1) + semeval_record(2, label="Cause-Effect"), 6, "unknown label 'Cause-Effect'"),
        (semeval_record(1) + semeval_record(2) + semeval_record(1), 9, "'1' stands twice"),
        (semeval_record(1) + semeval_record(2, label=""), 6, "empty label"),
        (semeval_record(1) + '2\t"a <e1>cat</e1> in a <e2>box</e2>"', 6, "empty label"),
        (semeval_record(1) + "no tab here\r\nOther\r\n", 5, "expected `id TAB"),
        ('1\t"a <e1>cat</e1> in a <e2>box</e2>"\r\nOther\r\n' + semeval_record(2), 3, "expected a `Comment:`"),
    ],
)
def test_semeval_bad_input_names_the_line(tmp_path, text, line, words):
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode())
    with pytest.raises(InputError) as error:
        read_semeval(path, "train")
    assert str(error.value).startswith(f"{path}:{line}: ") and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_semeval, read_conll04, read_jsonl])
def test_missing_file_and_bad_encoding(tmp_path, read):
    (tmp_path / "train.parquet").write_bytes(b"PAR1\x15\x94")
    with pytest.raises(InputError, match=r"train\.parquet: a Parquet file; .* data\.hub_id"):
        read(tmp_path / "train.parquet", "train")
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        read(tmp_path / "gone.txt", "train")
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"fine\nfine\ncaf\xe9\n")
    with pytest.raises(InputError) as error:
        read(path, "train")
    assert str(error.value).startswith(f"{path}:3: not UTF-8")


# --- CoNLL04


@pytest.mark.parametrize("split, count, kill", [("train", 1283, 179), ("dev", 343, 42), ("test", 422, 47)])
def test_conll04_real_file(split, count, kill):
    path = real(CONLL04 / f"conll04_{split}.json")
    examples = read_conll04(path, split)
    assert len(examples) == len({e.id for e in examples}) == count
    assert set(e.label for e in examples) == set(CONLL04_LABELS)
    assert sum(e.label == "Kill" for e in examples) == kill
    by_id = {e.id: e for e in examples}
    for document in json.loads(path.read_text()):
        for k, relation in enumerate(document["relations"]):
            e = by_id[f"conll04-{split}-{document['orig_id']}-{k}"]
            assert e.sentence == " ".join(document["tokens"]) and e.label == relation["type"]
            for span, end in ((e.e1, relation["head"]), (e.e2, relation["tail"])):
                entity = document["entities"][end]
                assert e.sentence[slice(*span)] == " ".join(document["tokens"][entity["start"] : entity["end"]])


def test_conll04_negatives_are_unrelated_pairs_and_seeded():
    path = real(CONLL04 / "conll04_test.json")
    related = {(e.sentence, *sorted([e.e1, e.e2])) for e in read_conll04(path, "test")}
    examples = read_conll04(path, "test", negatives=2, seed=3)
    negatives = [e for e in examples if e.label == "None"]
    assert len(examples) - len(negatives) == 422 and len({e.id for e in examples}) == len(examples)
    assert 0 < max(Counter(e.sentence for e in negatives).values()) <= 2
    for e in negatives:
        assert e.e1 != e.e2 and (e.sentence, *sorted([e.e1, e.e2])) not in related
    assert read_conll04(path, "test", negatives=2, seed=3) == examples
    assert read_conll04(path, "test", negatives=2, seed=4) != examples


def conll04_document(**changes) -> dict:
    entities = [{"type": "Peop", "start": 0, "end": 1}, {"type": "Loc", "start": 3, "end": 5}]
    document = {"tokens": ["Ann", "lives", "in", "New", "York"], "entities": entities, "orig_id": 77}
    return {**document, "relations": [{"type": "Live_In", "head": 0, "tail": 1}], **changes}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"entities": [{"start": 0, "end": 1}, {"start": 3, "end": 6}]}, r"entity 1: the span [3, 6] is empty or outs"),
        ({"entities": [{"start": 0, "end": 0}, {"start": 3, "end": 5}]}, r"entity 0: the span [0, 0] is empty or outs"),
        ({"relations": [{"type": "Live_In", "head": 0, "tail": 2}]}, "relation 0: 2 is not one of its 2 entities"),
        ({"relations": [{"type": "Live_in", "head": 0, "tail": 1}]}, "unknown label 'Live_in'"),
        ({"relations": [{"type": "", "head": 0, "tail": 1}]}, "empty label"),
        ({"relations": None}, "`relations` is missing"),
        ({"tokens": []}, "`tokens` is missing"),
        ({"orig_id": 5}, "stands twice"),
    ],
)
def test_conll04_bad_document_is_named(tmp_path, changes, words):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([conll04_document(orig_id=5), conll04_document(**changes)]))
    with pytest.raises(InputError) as error:
        read_conll04(path, "train")
    where = f"{path}: document 1 (orig_id {changes.get('orig_id', 77)}): "
    assert str(error.value).startswith(where) and words in str(error.value)


def test_conll04_json_nested_too_deep(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="nested too deep"):
        read_conll04(tmp_path / "deep.json", "train")


def test_conll04_truncated_json_names_the_line(tmp_path):
    path = tmp_path / "train.json"
    whole = json.dumps([conll04_document(), conll04_document(orig_id=78)], indent=1)
    assert whole.split("\n")[4] == '   "lives",'
    path.write_text("\n".join(whole.split("\n")[:4]) + '\n   "liv')
    with pytest.raises(InputError) as error:
        read_conll04(path, "train")
    assert str(error.value).startswith(f"{path}:5: not valid JSON")
    path.write_text('{"tokens": []}')
    with pytest.raises(InputError, match=":1: expected a JSON list"):
        read_conll04(path, "train")


# --- JSON lines

GOOD = {"id": 1, "sentence": "a <e1>cat</e1> in a <e2>box</e2>", "label": "in"}


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_jsonl_marks_and_tokens_give_the_same_example(tmp_path):
    tokens = {
        "id": "1",
        "tokens": ["a", "cat", "in", "a", "box"],
        "e1": [1, 2],
        "e2": [4, 5],
        "label": "in",
        "gold": "on",
    }
    marked, tokenised = (read_jsonl(write_jsonl(tmp_path / "x.jsonl", [row]), "dev")[0] for row in (GOOD, tokens))
    assert (marked.id, marked.sentence, marked.e1, marked.e2) == ("1", "a cat in a box", (2, 5), (11, 14))
    assert (tokenised.id, tokenised.sentence, tokenised.e1, tokenised.e2) == ("1", "a cat in a box", (2, 5), (11, 14))
    assert (marked.gold, tokenised.gold, marked.split) == (None, "on", "dev")


def test_jsonl_line_separators_inside_a_sentence_do_not_break_it(tmp_path):
    row = {**GOOD, "sentence": "a\u2028 <e1>cat</e1>\x85 in <e2>box</e2>"}
    path = tmp_path / "x.jsonl"
    path.write_bytes(("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\r\n").encode())
    assert read_jsonl(path, "train")[0].sentence == "a\u2028 cat\x85 in box"


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"id": 2, "sentence": "a <e1>cat', "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "nested too deep"),
        ({**GOOD, "id": "\ud83d"}, "half of a surrogate pair (\\ud83d)"),
        ({**GOOD, "id": 2, "sentence": "\ud83d <e1>cat</e1> <e2>box</e2>"}, "half of a surrogate pair"),
        ({**GOOD, "id": None}, "`id` is missing"),
        ({**GOOD, "id": 1}, "'1' stands twice"),
        ({**GOOD, "id": 2, "label": None}, "empty label"),
        ({**GOOD, "id": 2, "label": " "}, "empty label"),
        ({**GOOD, "id": 2, "label": 3}, "not a text"),
        ({**GOOD, "id": 2, "label": "under"}, "unknown label 'under'"),
        ({**GOOD, "id": 2, "gold": "under"}, "unknown gold label 'under'"),
        ({**GOOD, "id": 2, "sentence": "a <e1>cat</e1>"}, "<e2> is missing"),
        ({"id": 2, "label": "in"}, "`sentence` is missing"),
        ({"id": 2, "label": "in", "tokens": ["a", "b"], "e1": [0, 1], "e2": [1, 3]}, "[1, 3] is empty or outside"),
        ({"id": 2, "label": "in", "tokens": ["a", "b"], "e1": [0, 1], "e2": [-1, 1]}, "[-1, 1] is empty or outside"),
        ({"id": 2, "label": "in", "tokens": ["a", "b"], "e1": [0, 1]}, "a token span [start, end] is needed"),
        ({"id": 2, "label": "in", "tokens": ["a", ""], "e1": [0, 1], "e2": [1, 2]}, "token 1 is empty"),
    ],
)
def test_jsonl_bad_row_names_the_line(tmp_path, row, words):
    path = write_jsonl(tmp_path / "train.jsonl", [GOOD, "", row])
    with pytest.raises(InputError) as error:
        read_jsonl(path, "train", ["in", "on"])
    assert str(error.value).startswith(f"{path}:3: ") and words in str(error.value)


# --- Hugging Face layouts


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def write_hub(offline, folder: Path, rows: dict[str, list[dict]], features=None) -> str:
    for split, items in rows.items():
        offline.Dataset.from_list(items, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_hub_semeval_equals_the_files(offline, tmp_path):
    path = real(SEMEVAL / "TEST_FILE_FULL.TXT")
    raw = re.findall(r'^\d+\t(".*")\r?\n(\S+)', path.read_text(encoding="utf-8"), flags=re.M)[:40]
    features = offline.Features(
        {"sentence": offline.Value("string"), "relation": offline.ClassLabel(names=SEMEVAL_LABELS)}
    )
    rows = [{"sentence": sentence, "relation": SEMEVAL_LABELS.index(label)} for sentence, label in raw]
    hub = write_hub(offline, tmp_path / "hub", {"train": rows[:30], "test": rows[30:]}, features)
    read = read_hub(hub, "semeval2010_task8", "train") + read_hub(hub, "semeval2010_task8", "test")
    expected = read_semeval(path, "test")[:40]
    assert [(e.sentence, e.e1, e.e2, e.label) for e in read] == [(e.sentence, e.e1, e.e2, e.label) for e in expected]
    assert len({e.id for e in read}) == 40
    assert read_hub(hub, "semeval2010_task8", "dev") is None


def test_hub_conll04_equals_the_files(offline, tmp_path):
    path = real(CONLL04 / "conll04_dev.json")
    documents = json.loads(path.read_text())
    hub = write_hub(offline, tmp_path / "hub", {"train": documents, "validation": documents, "test": documents})
    assert read_hub(hub, "conll04", "dev", negatives=1, seed=5) == read_conll04(path, "dev", 1, 5)


def test_hub_bad_input_is_one_line(offline, tmp_path):
    rows = [{"sentence": "a <e1>b</e1> <e2>c</e2>", "relation": "Other"}, {"sentence": "bare", "relation": "Other"}]
    hub = write_hub(offline, tmp_path / "hub", {"train": rows})
    with pytest.raises(InputError, match=r"\[train\] row 1: the mark <e1> is missing"):
        read_hub(hub, "semeval2010_task8", "train")
    with pytest.raises(InputError, match="no split `test`; it has train"):
        read_hub(hub, "semeval2010_task8", "test")
    with pytest.raises(InputError) as error:
        read_hub("nobody/no-such-dataset", "conll04", "train")
    assert "data.hub_id: nobody/no-such-dataset cannot be loaded" in str(error.value)
    assert "\n" not in str(error.value)
