"""Relations: the official files, each kind of bad input with its line, rows with two entities, and hub data sets."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import shared_data

from atlantis_ds.config.schema import Recipe
from atlantis_ds.data.ingest import look_at_data
from atlantis_ds.data.prepare import prepare
from atlantis_ds.data.reading import read_split
from atlantis_ds.data.relation import SEMEVAL_LABELS, read_semeval, read_spert
from atlantis_ds.data.rows import Found
from atlantis_ds.errors import InputError
from atlantis_ds.run_folder import RunFolder

CONLL04_LABELS = {"Kill", "Live_In", "Located_In", "OrgBased_In", "Work_For"}


def recipe(**data) -> Recipe:
    model = {"model_name_or_path": "some/model"}
    return Recipe.model_validate({"name": "r", "data": data, "models": {"large": model, "small": model}})


def refuse(where: str, what: str) -> None:
    raise InputError(f"{where}: {what}")


def semeval(path: Path, problems=refuse) -> list[Found]:
    return list(read_semeval(path, problems))


def spert(path: Path, split: str = "train", negatives: int = 0, seed: int = 0) -> list[Found]:
    return list(read_spert(path, split, negatives, seed, refuse))


def refused(tmp_path: Path, **data) -> str:
    """What ``prepare`` says of bad input: one line."""
    with pytest.raises(InputError) as error:
        prepare(recipe(**data), RunFolder(tmp_path / "run"))
    assert "\n" not in str(error.value)
    return str(error.value)


def semeval_record(id: int, sentence: str = "a <e1>cat</e1> in a <e2>box</e2>", label: str = "Other") -> str:
    return f'{id}\t"{sentence}"\r\n{label}\r\nComment: x\r\n\r\n'


def assert_entities(found: Found, e1: str, e2: str) -> None:
    """Both entities are named, and marked where they stand in the sentence."""
    fields = found.fields
    assert (fields["e1"], fields["e2"]) == (e1, e2)
    assert fields["sentence"] == found.key == re.sub(r"\[E[12]\] | \[/E[12]\]", "", fields["marked_sentence"])
    for name, text in (("E1", e1), ("E2", e2)):
        marked = re.search(rf"\[{name}\] (.*) \[/{name}\]", fields["marked_sentence"])
        assert re.sub(r"\[E[12]\] | \[/E[12]\]", "", marked[1]) == text.strip() == text != ""


# --- SemEval


@pytest.mark.parametrize("name, count, most", [("TRAIN_FILE.TXT", 8000, 1410), ("TEST_FILE_FULL.TXT", 2717, 454)])
def test_semeval_real_file(name, count, most):
    path = shared_data(f"semeval2010_task8/{name}")
    examples = semeval(path)
    assert len(examples) == len({e.id for e in examples}) == count
    counts = Counter(e.target for e in examples)
    assert set(counts) <= set(SEMEVAL_LABELS) and len(SEMEVAL_LABELS) == 19
    assert counts["Other"] == most
    assert all(e.gold == e.target for e in examples)
    # Against the raw text, read in another way: the sentence and both entities.
    raw = dict(re.findall(r'^(\d+)\t"(.*)"\r?$', path.read_text(encoding="utf-8"), flags=re.M))
    assert len(raw) == count
    for e in examples:
        assert e.fields["sentence"] == re.sub(r"</?e[12]>", "", raw[e.id])
        assert_entities(e, *(re.search(rf"<{name}>(.*)</{name}>", raw[e.id])[1].strip() for name in ("e1", "e2")))


def test_semeval_test_labels_are_the_official_key():
    key = dict(
        line.split("\t")
        for line in shared_data("semeval2010_task8/test_answer_key.txt").read_text().split("\n")
        if line
    )
    examples = semeval(shared_data("semeval2010_task8/TEST_FILE_FULL.TXT"))
    assert {e.id: e.target for e in examples} == {id: label.strip() for id, label in key.items()}


@pytest.mark.parametrize(
    "text, line, words",
    [
        (semeval_record(1) + semeval_record(2, "a <e1>cat</e1> in a box"), 5, "<e2> is missing"),
        (semeval_record(1) + semeval_record(2, "a cat</e1> in a <e2>box</e2>"), 5, "<e1> is missing"),
        (semeval_record(1, "a <e1> </e1> in a <e2>box</e2>"), 1, "encloses no text"),
        (semeval_record(1, "a </e1>cat<e1> in a <e2>box</e2>"), 1, "encloses no text"),
        (semeval_record(1, "a <e1>cat</e1> <e1>in</e1> a <e2>box</e2>"), 1, "occurs twice"),
        (semeval_record(1) + semeval_record(2, label="Cause-Effect"), 6, "unknown label 'Cause-Effect'"),
        (semeval_record(1) + semeval_record(2) + semeval_record(1), 9, "'1' is a duplicate"),
        (semeval_record(1) + semeval_record(2, label=""), 6, "empty label"),
        (semeval_record(1) + '2\t"a <e1>cat</e1> in a <e2>box</e2>"', 6, "empty label"),
        (semeval_record(1) + "no tab here\r\nOther\r\n", 5, "expected `id TAB"),
        ('1\t"a <e1>cat</e1> in a <e2>box</e2>"\r\nOther\r\n' + semeval_record(2), 3, "expected a `Comment:`"),
    ],
)
def test_semeval_bad_input_names_the_line(tmp_path, text, line, words):
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode())
    said = refused(tmp_path, format="semeval2010_task8", train=str(path))
    assert said.startswith(f"{path}:{line}: ") and words in said
    if "duplicate" not in words:  # `check` sees it in the first rows, too
        with pytest.raises(InputError) as error:
            look_at_data(recipe(format="semeval2010_task8", train=str(path)))
        assert str(error.value) == said


def test_semeval_goes_on_behind_a_bad_record(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes((semeval_record(1, "bare") + semeval_record(2) + "no tab\r\n\r\n" + semeval_record(3)).encode())
    bad = []
    assert [e.id for e in semeval(path, lambda where, what: bad.append(where))] == ["2", "3"]
    assert bad == [f"{path}:1", f"{path}:9"]


@pytest.mark.parametrize("format", ["semeval2010_task8", "spert"])
def test_missing_file_and_bad_encoding(tmp_path, format):
    (tmp_path / "train.parquet").write_bytes(b"PAR1\x15\x94")
    said = refused(tmp_path, format=format, train=str(tmp_path / "train.parquet"))
    assert "train.parquet: not a text file; give its folder as data.hub_id" in said
    said = refused(tmp_path, format=format, train=str(tmp_path / "gone.txt"))
    assert said.startswith("data.train: ") and said.endswith("gone.txt: no such file")
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"fine\nfine\ncaf\xe9\n")
    assert refused(tmp_path, format=format, train=str(path)).startswith(f"{path}:3: not UTF-8")


# --- SpERT's JSON


@pytest.mark.parametrize("split, count, kill", [("train", 1283, 179), ("dev", 343, 42), ("test", 422, 47)])
def test_conll04_real_file(split, count, kill):
    path = shared_data(f"conll04/conll04_{split}.json")
    examples = spert(path, split)
    assert len(examples) == len({e.id for e in examples}) == count
    assert set(e.target for e in examples) == CONLL04_LABELS
    assert sum(e.target == "Kill" for e in examples) == kill
    by_id = {e.id: e for e in examples}
    for document in json.loads(path.read_text()):
        for k, relation in enumerate(document["relations"]):
            e = by_id[f"conll04-{split}-{document['orig_id']}-{k}"]
            assert e.key == " ".join(document["tokens"]) and e.target == e.gold == relation["type"]
            entities = [document["entities"][relation[end]] for end in ("head", "tail")]
            texts = [" ".join(document["tokens"][entity["start"] : entity["end"]]) for entity in entities]
            assert_entities(e, *texts)
            first = entities[0]["start"] <= entities[1]["start"]
            assert (e.fields["marked_sentence"].index("[E1]") < e.fields["marked_sentence"].index("[E2]")) == first


def pair(found: Found) -> tuple[str, ...]:
    """The sentence and where its two entities stand, whichever is first."""
    places = {}
    for name in ("E1", "E2"):
        others = re.sub(r"\[E[12]\] | \[/E[12]\]", lambda m, name=name: m[0] if name in m[0] else "", marked(found))
        places[name] = re.sub(r"(\[/?)E[12]", r"\1E", others)
    return found.key, *sorted(places.values())


def marked(found: Found) -> str:
    return found.fields["marked_sentence"]


def test_conll04_negatives_are_unrelated_pairs_and_seeded():
    path = shared_data("conll04/conll04_test.json")
    related = {pair(e) for e in spert(path, "test")}
    examples = spert(path, "test", negatives=2, seed=3)
    negatives = [e for e in examples if e.target == "None"]
    assert len(examples) - len(negatives) == 422 and len({e.id for e in examples}) == len(examples)
    assert 0 < max(Counter(e.key for e in negatives).values()) <= 2
    for e in negatives:
        assert len(set(pair(e))) == 3 and pair(e) not in related
    assert spert(path, "test", negatives=2, seed=3) == examples
    assert spert(path, "test", negatives=2, seed=4) != examples


def test_conll04_label_set_is_that_of_train_with_none_last(tmp_path):
    paths = {split: str(shared_data(f"conll04/conll04_{split}.json")) for split in ("train", "dev", "test")}
    made = prepare(recipe(format="spert", negatives=1, **paths), RunFolder(tmp_path / "r"))
    assert made.labels == [*sorted(CONLL04_LABELS), "None"]
    assert made.train.golds.null_count == 0


def spert_document(**changes) -> dict:
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
        ({"orig_id": 5}, "is a duplicate"),
    ],
)
def test_spert_bad_document_is_named(tmp_path, changes, words):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([spert_document(orig_id=5), spert_document(**changes)]))
    said = refused(tmp_path, format="spert", train=str(path), labels=["Live_In"])
    where = f"{path}: document 1 (orig_id {changes.get('orig_id', 77)}): "
    assert said.startswith(where) and words in said


def test_spert_json_nested_too_deep(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="nested too deep"):
        spert(tmp_path / "deep.json")


def test_spert_truncated_json_names_the_line(tmp_path):
    path = tmp_path / "train.json"
    whole = json.dumps([spert_document(), spert_document(orig_id=78)], indent=1)
    assert whole.split("\n")[4] == '   "lives",'
    path.write_text("\n".join(whole.split("\n")[:4]) + '\n   "liv')
    with pytest.raises(InputError) as error:
        spert(path)
    assert str(error.value).startswith(f"{path}:5: not valid JSON")
    path.write_text('{"tokens": []}')
    with pytest.raises(InputError, match=":1: expected a JSON list"):
        spert(path)


# --- rows with two entities

GOOD = {"id": 1, "sentence": "a <e1>cat</e1> in a <e2>box</e2>", "label": "in"}
TOKENS = {"id": 1, "tokens": ["a", "cat", "in", "a", "box"], "label": "in"}
FEWREL = {"id": 1, "tokens": ["a", "cat", "in", "a", "big", "box"], "relation": "in"}


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_rows(path: Path, split: str = "train") -> list[Found]:
    return list(read_split(recipe(task="relation", train=str(path), test=str(path)), split, refuse))


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {**TOKENS, "e1": [1, 2], "e2": [4, 5]},
        {"id": 1, "token": TOKENS["tokens"], "relation": "in", "e1": [1, 2], "e2": [4, 5]},
        {**TOKENS, "h": {"pos": [1, 2]}, "t": {"pos": [4, 5], "name": "box"}},
        {**TOKENS, "h": ["cat", "Q1", [[1]]], "t": ["box", "Q2", [[4], [0]]]},
        {"id": 1, "text": "a cat in a box", "e1": [2, 5], "e2": [11, 14], "label": "in"},
        {"id": 1, "sentence": "a cat in a box", "e1": [1, 6], "e2": [11, 14], "label": "in"},  # white space at the ends
        {"id": 1, "text": "a cat in a box", "h": {"pos": [2, 5]}, "t": {"pos": [11, 14]}, "relation": "in"},
        {"id": 1, "text": GOOD["sentence"], "label": "in"},
    ],
)
def test_rows_of_each_form_give_the_same_example(tmp_path, row):
    (found,) = read_rows(write_jsonl(tmp_path / "x.jsonl", [row]))
    assert_entities(found, "cat", "box")
    assert (found.id, found.key, found.target, found.gold) == (1, "a cat in a box", "in", None)
    assert marked(found) == "a [E1] cat [/E1] in a [E2] box [/E2]"


def test_entities_of_several_tokens_and_other_fields(tmp_path):
    row = {**FEWREL, "h": ["cat", "Q1", [[1]]], "t": ["big box", "Q2", [[4, 5]]], "gold": "on", "year": 1999}
    (found,) = read_rows(write_jsonl(tmp_path / "x.jsonl", [row]))
    assert_entities(found, "cat", "big box")
    assert (found.target, found.gold, found.fields["year"]) == ("in", "on", "1999")


def test_line_separators_inside_a_sentence_do_not_break_it(tmp_path):
    row = {**GOOD, "sentence": "a\u2028 <e1>cat</e1>\x85 in <e2>box</e2>"}
    path = tmp_path / "x.jsonl"
    path.write_bytes(("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\r\n").encode())
    assert read_rows(path)[0].key == "a\u2028 cat\x85 in box"


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"id": 2, "sentence": "a <e1>cat', "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "nested too deep"),
        ({**GOOD, "id": "\ud83d"}, "half of a surrogate pair (\\ud83d)"),
        ({**GOOD, "id": 2, "sentence": "\ud83d <e1>cat</e1> <e2>box</e2>"}, "half of a surrogate pair"),
        ({**GOOD, "id": None}, "`id` is missing"),
        ({**GOOD, "id": 1.5}, "`id` is missing or not a text or whole number"),
        ({**GOOD, "id": True}, "`id` is missing or not a text or whole number"),
        ({**GOOD, "id": 1}, "'1' is a duplicate in train"),
        ({**GOOD, "id": "1"}, "'1' is a duplicate in train"),
        ({**GOOD, "id": 2, "label": 0.5}, "not a text"),
        ({**GOOD, "id": 2, "label": ["in"]}, "not a text"),
        ({**GOOD, "id": 2, "label": "under"}, "unknown label 'under'"),
        ({**GOOD, "id": 2, "label": 3}, "unknown label '3'"),
        ({**GOOD, "id": 2, "gold": "under"}, "unknown gold label 'under'"),
        ({**GOOD, "id": 2, "sentence": "a <e1>cat</e1>"}, "<e2> is missing"),
        ({"id": 2, "label": "in"}, "`sentence` is missing"),
        ({"id": 2, "label": "in", "tokens": ["a", "b"], "e1": [0, 1], "e2": [1, 3]}, "[1, 3] is empty or outside"),
        ({"id": 2, "label": "in", "tokens": ["a", "b"], "e1": [0, 1], "e2": [-1, 1]}, "[-1, 1] is empty or outside"),
        ({"id": 2, "label": "in", "tokens": ["a", "b"], "e1": [0, 1]}, "a token span [start, end] is needed"),
        ({"id": 2, "label": "in", "tokens": ["a", "b"], "h": {"pos": None}, "t": 1}, "`h`: a token span [start, end]"),
        ({"id": 2, "label": "in", "tokens": ["a", ""], "e1": [0, 1], "e2": [1, 2]}, "token 1 is empty"),
        ({"id": 2, "label": "in", "text": "a b", "e1": [0, 1], "e2": [2, 4]}, "[2, 4] is empty or outside its 3 char"),
        ({"id": 2, "label": "in", "text": "a b", "e1": [0, 1], "e2": [1, 2]}, "encloses no text"),
        ({"id": 2, "label": "in", "text": "a b", "e1": [0, 1]}, "`e2`: a character span [start, end] is needed"),
    ],
)
def test_bad_row_names_the_line(tmp_path, row, words):
    path = write_jsonl(tmp_path / "train.jsonl", [GOOD, "", row])
    said = refused(tmp_path, task="relation", train=str(path), labels=["in", "on"])
    assert said.startswith(f"{path}:3: ") and words in said


# --- Hugging Face layouts


@pytest.fixture
def offline(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def write_hub(offline, folder: Path, rows: dict[str, list[dict]], features=None) -> str:
    for split, items in rows.items():
        offline.Dataset.from_list(items, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def read_hub(hub: str, split: str, **data) -> list[Found] | None:
    found = read_split(recipe(hub_id=hub, **data), split, refuse)
    return None if found is None else list(found)


def content(examples: list[Found]) -> list[tuple]:
    """All but where an example stands and its id."""
    return [(e.fields, e.key, e.target, e.gold) for e in examples]


def test_hub_semeval_equals_the_files(offline, tmp_path):
    path = shared_data("semeval2010_task8/TEST_FILE_FULL.TXT")
    raw = re.findall(r'^\d+\t(".*")\r?\n(\S+)', path.read_text(encoding="utf-8"), flags=re.M)[:40]
    features = offline.Features(
        {"sentence": offline.Value("string"), "relation": offline.ClassLabel(names=SEMEVAL_LABELS)}
    )
    rows = [{"sentence": sentence, "relation": SEMEVAL_LABELS.index(label)} for sentence, label in raw]
    hub = write_hub(offline, tmp_path / "hub", {"train": rows[:30], "test": rows[30:]}, features)
    read = [e for split in ("train", "test") for e in read_hub(hub, split, format="semeval2010_task8")]
    assert content(read) == content(semeval(path)[:40])
    assert len({e.id for e in read}) == 40 and read[0].id == "semeval-train-0" and read[30].id == "semeval-test-0"
    assert read_hub(hub, "dev", format="semeval2010_task8") is None


def test_hub_spert_equals_the_files(offline, tmp_path):
    path = shared_data("conll04/conll04_dev.json")
    documents = json.loads(path.read_text())
    hub = write_hub(offline, tmp_path / "hub", {"train": documents, "validation": documents, "test": documents})
    read, expected = read_hub(hub, "dev", format="spert", negatives=1), spert(path, "dev", 1, 0)
    assert content(read) == content(expected) and [e.id for e in read] == [e.id for e in expected]


def test_hub_bad_input_is_one_line(offline, tmp_path):
    rows = [{"sentence": "a <e1>b</e1> <e2>c</e2>", "relation": "Other"}, {"sentence": "bare", "relation": "Other"}]
    hub = write_hub(offline, tmp_path / "hub", {"train": rows, "test": rows[:1]})
    said = refused(tmp_path, hub_id=hub, format="semeval2010_task8")
    assert "[train] row 1: the mark <e1> is missing" in said
    assert "data.hub_id: nobody/none cannot be loaded" in refused(tmp_path, hub_id="nobody/none", format="spert")
