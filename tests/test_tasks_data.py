"""Users' own files through ``prepare`` and ``check``: every form of labels, ids, files, rows and chats."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import launch, refuse, succeed

from atlantis_ds import stages
from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.schema import Recipe
from atlantis_ds.data.examples import SPLITS, Examples, Split
from atlantis_ds.data.ingest import look_at_data
from atlantis_ds.data.prepare import examples_fingerprint, prepare
from atlantis_ds.data.reading import split_turns
from atlantis_ds.data.rows import BadRow
from atlantis_ds.errors import InputError
from atlantis_ds.evaluate.new_rows import _table, predict_file
from atlantis_ds.files import FORMATS, write_rows
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder

LABELLED = [{"text": f"text {i}", "label": "yes" if i % 2 else "no"} for i in range(6)]

EMPTY_LABEL = (
    "empty label: there is neither a label (or response) nor a gold one; -1 is no label, unless data.labels lists it "
    "as a class"
)


def write(path: Path, rows: list[dict[str, Any]] | list[str]) -> str:
    """Rows as the suffix says; texts are lines of JSON."""
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        header = list(rows[0])
        lines = [header, *([row.get(key, "") for key in header] for row in rows)]
        file = io.StringIO()
        csv.writer(file, delimiter="," if name.endswith(".csv") else "\t").writerows(lines)
        text = file.getvalue()
    elif name.endswith(".json"):
        text = json.dumps(rows)
    elif name.endswith((".parquet", ".arrow")):
        table = pa.Table.from_pylist(rows)
        if name.endswith(".parquet"):
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(path, table.schema) as sink:
                sink.write_table(table)
        return str(path)
    else:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def recipe(data: dict[str, Any], prompt: dict[str, Any] | None = None, seed: int = 0) -> Recipe:
    model = {"model_name_or_path": "some/model"}
    models = {"large": model, "small": model}
    return Recipe.model_validate({"name": "r", "seed": seed, "data": data, "prompt": prompt or {}, "models": models})


def made(tmp_path: Path, data: dict[str, Any], prompt: dict[str, Any] | None = None, name: str = "run") -> Examples:
    """``check``, then ``prepare``."""
    look_at_data(recipe(data, prompt))
    return prepare(recipe(data, prompt), RunFolder(tmp_path / name))


def refused(tmp_path: Path, data: dict[str, Any], prompt: dict[str, Any] | None = None, check: bool = True) -> str:
    """What ``prepare`` says, in one line; ``check`` says the same, or with ``check=False`` nothing."""
    with pytest.raises(InputError) as error:
        prepare(recipe(data, prompt), RunFolder(tmp_path / "refused"))
    said = str(error.value)
    assert "\n" not in said and not (tmp_path / "refused").exists()
    if check:
        with pytest.raises(InputError) as error:
            look_at_data(recipe(data, prompt))
        assert str(error.value) == said
    else:
        look_at_data(recipe(data, prompt))
    return said


def rows_of(split: Split, *columns: str) -> list[Any]:
    lists = [split.table[column].to_pylist() for column in columns]
    return lists[0] if len(lists) == 1 else list(zip(*lists))


# --- labels


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow", "csv"])
@pytest.mark.parametrize(
    "values, labels",
    [
        ([10, 9, 0, 9], ["0", "9", "10"]),
        ([True, False, True, True], ["false", "true"]),
        (["b", "A", "é", "b"], ["A", "b", "é"]),
        ([" b", "a ", "b", "b"], ["a", "b"]),
        (["²", "1", "--1", "1"], ["--1", "1", "²"]),
        (["2011-01-01", "2011-01-02", "NA", "None"], ["2011-01-01", "2011-01-02", "NA", "None"]),
    ],
)
def test_labels_of_each_type(tmp_path, values, labels, suffix):
    rows = [{"text": f"text {i}", "label": value} for i, value in enumerate(values)]
    found = made(tmp_path, {"train": write(tmp_path / f"train.{suffix}", rows)})
    as_text = [str(value).strip() for value in values]
    if suffix != "csv":  # a CSV cell is the text it is
        as_text = [text.lower() if isinstance(value, bool) else text for text, value in zip(as_text, values)]
        assert found.labels == labels
    assert found.train.targets.to_pylist() == as_text
    assert [found.labels[code] for code in found.train.codes] == as_text
    assert found.task == "classification" and not len(found.dev) and not len(found.test)


def test_whole_numbers_as_floats_where_a_column_has_gaps(tmp_path):
    table = pa.table({"text": ["a", "b", "c"], "label": pa.array([1.0, float("nan"), 0.0])})
    pq.write_table(table, tmp_path / "train.parquet")
    found = made(tmp_path, {"train": str(tmp_path / "train.parquet")})
    assert found.labels == ["0", "1"] and found.info["unlabelled"] == 1


def test_class_labels_are_their_names(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, 0]}, features=features)
    (tmp_path / "hub").mkdir()
    rows.to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    test = datasets.Dataset.from_dict({"text": ["d"], "label": [0]}, features=features)
    test.to_parquet(tmp_path / "hub" / "test-00000-of-00001.parquet")
    from_file = made(tmp_path, {"train": str(tmp_path / "hub" / "train-00000-of-00001.parquet")}, name="file")
    from_hub = made(tmp_path, {"hub_id": str(tmp_path / "hub"), "task": "classification"}, name="hub")
    for found in (from_file, from_hub):
        assert found.labels == ["negative", "positive"] and found.info["unlabelled"] == 1
        assert rows_of(found.train, "id", "target") == [("0", "positive"), ("2", "negative")]
    assert from_hub.test.targets.to_pylist() == ["negative"]


@pytest.mark.parametrize("nothing", [None, "", "  ", -1, "-1"])
def test_abstentions_are_left_out_and_counted(tmp_path, nothing):
    rows = [*LABELLED, {"text": "unsure", "label": nothing}, {"text": "late", "label": "yes"}]
    found = made(tmp_path, {"train": write(tmp_path / "train.jsonl", rows)})
    assert found.info["unlabelled"] == 1 and found.labels == ["no", "yes"]
    assert found.train.ids.to_pylist() == ["0", "1", "2", "3", "4", "5", "7"], "an id is the number of the row"


def test_minus_one_is_a_label_where_the_recipe_says_so(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2 * 2 - 1} for i in range(4)]
    data = {"train": write(tmp_path / "train.jsonl", rows)}
    assert made(tmp_path, {**data, "labels": ["-1", "1"]}).train.codes.tolist() == [0, 1, 0, 1]
    assert made(tmp_path, data, name="weak").info["unlabelled"] == 2


def test_train_without_any_label(tmp_path):
    rows = [{"text": "a", "label": None}, {"text": "b", "label": -1}]
    said = refused(tmp_path, {"train": write(tmp_path / "train.jsonl", rows)}, check=False)
    assert said == f"data.train: {tmp_path}/train.jsonl: contains no example (2 rows have no label)"


def test_an_empty_label_outside_train_is_a_bad_row(tmp_path):
    data = {"train": write(tmp_path / "train.jsonl", LABELLED)}
    test = [{"text": "a", "label": "yes"}, {"text": "b", "label": None, "gold": -1}]
    said = refused(tmp_path, {**data, "test": write(tmp_path / "test.jsonl", test)})
    assert said == f"{tmp_path}/test.jsonl:2: {EMPTY_LABEL}"


def test_test_rows_with_gold_alone(tmp_path):
    train = [{"text": f"text {i}", "weak": "ab"[i % 2], "gold": "a"} for i in range(4)]
    test = [{"text": "new", "gold": "b"}, {"text": "newer", "gold": "a"}]
    columns = {"label": "weak", "gold": "gold"}
    paths = {"train": write(tmp_path / "train.jsonl", train), "test": write(tmp_path / "test.csv", test)}
    found = made(tmp_path, {**paths, "columns": columns})
    assert rows_of(found.test, "target", "gold") == [("b", "b"), ("a", "a")]
    assert found.train.correct.tolist() == [1, 0, 1, 0] and found.train.codes.tolist() == [0, 1, 0, 1]
    default = {**paths, "train": write(tmp_path / "label.jsonl", [*LABELLED, {"text": "c", "label": "b", "gold": "a"}])}
    assert rows_of(made(tmp_path, default, name="default").test, "target") == ["b", "a"]


def test_gold_labels_that_no_rule_emits(tmp_path):
    train = [{"text": f"text {i}", "label": "b", "gold": "cab"[i]} for i in range(3)]
    test = [{"text": "new", "gold": "c"}]
    data = {"train": write(tmp_path / "train.jsonl", train), "test": write(tmp_path / "test.jsonl", test)}
    found = made(tmp_path, data)
    assert found.labels == ["a", "b", "c"]
    assert found.train.codes.tolist() == [1, 1, 1] and found.train.gold_codes.tolist() == [2, 0, 1]
    assert found.info["label_counts"]["train"] == {"a": 0, "b": 3, "c": 0}


def test_gold_labels_that_come_later(tmp_path):
    """They are for figures and diagnostics: nothing that was scored or trained depends on them."""
    folder, paths = (
        RunFolder(tmp_path / "run"),
        {"test": write(tmp_path / "test.jsonl", [{"text": "n", "label": "no"}])},
    )
    without = prepare(recipe({**paths, "train": write(tmp_path / "a.jsonl", LABELLED)}), folder)
    assert without.train.golds.null_count == 6 and set(without.train.gold_codes) == {-1}
    rows = [{**row, "gold": "yes" if i < 4 else None} for i, row in enumerate(LABELLED)]
    known = prepare(recipe({**paths, "train": write(tmp_path / "b.jsonl", rows)}), folder)
    assert known.train_fingerprint == without.train_fingerprint and known.fingerprint != without.fingerprint
    assert known.train.digest == without.train.digest and known.train.gold_digest != without.train.gold_digest
    assert known.train.correct.tolist() == [0, 1, 0, 1, -1, -1]
    other = [{**row, "label": "yes"} for row in rows]
    with pytest.raises(InputError, match="choose another `name`"):
        prepare(recipe({**paths, "train": write(tmp_path / "c.jsonl", other), "labels": ["no", "yes"]}), folder)


def test_more_labels_than_max_labels(tmp_path):
    rows = [{"text": f"text {i}", "label": f"a whole sentence of its own, number {i}" + "." * 100} for i in range(21)]
    data = {"train": write(tmp_path / "train.jsonl", rows), "max_labels": 20}
    said = refused(tmp_path, data, check=False)
    assert said.startswith("data.labels: more than 20 different labels in train, such as 'a whole sentence of its own")
    assert said.endswith("raise data.max_labels, or set data.task: response if the targets are free text")
    assert len(said) < 250
    assert len(made(tmp_path, {**data, "max_labels": 21}).labels) == 21
    named = {**data, "labels": [row["label"] for row in rows]}
    assert len(made(tmp_path, named, name="named").labels) == 21


def test_a_single_label_is_noted(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": f"text {i}", "label": "yes"} for i in range(3)])
    made(tmp_path, {"train": str(tmp_path / "train.jsonl")})
    assert "every row has the label 'yes'" in RunFolder(tmp_path / "run").examples_info.read_text()


@pytest.mark.ranks
def test_labels_that_differ_in_case_or_spaces_alone_are_noted(tmp_path):
    labels = ["Sports", "sports", "Live in", "LiveIn", "politics"]
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    write(tmp_path / "train.jsonl", rows)
    path = tmp_path / "recipe.yaml"
    tree = recipe({"train": str(tmp_path / "train.jsonl")}).model_dump(exclude_unset=True)
    path.write_text(json.dumps({**tree, "runs_dir": str(tmp_path)}))
    said = " ".join(succeed("local", 1, "prepare", path).split())
    assert "the labels 'Sports', 'sports' differ only in case or spaces; are they the same label?" in said
    assert "the labels 'Live in', 'LiveIn' differ only in case or spaces" in said and said.count("differ only in") == 2


def test_an_unknown_label_among_many_does_not_print_all(tmp_path):
    labels = [f"label {i:02}" for i in range(40)]
    train = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    data = {"train": write(tmp_path / "train.jsonl", train)}
    for label, words in (
        ("label 077", "unknown label 'label 077'; it is not one of the 40 labels; similar: label 07, "),
        ("xyz", "unknown label 'xyz'; it is not one of the 40 labels"),
    ):
        test = write(tmp_path / "test.jsonl", [{"text": "new", "label": label}])
        said = refused(tmp_path, {**data, "test": test}, check=False)
        assert said.startswith(f"{test}:1: {words}") and len(said.removeprefix(test)) < 120
    refused(tmp_path, {**data, "test": test, "labels": labels})  # `check` sees it where the set is given


# --- ids


def test_rows_without_id_get_their_row_number(tmp_path):
    found = made(tmp_path, {"train": write(tmp_path / "train.csv", LABELLED), "train_size": 3})
    ids = found.train.ids.to_pylist()
    assert found.info["whole_ids"] and len(ids) == 3 and set(ids) < {"0", "1", "2", "3", "4", "5"}
    assert found.train.prompts.to_pylist() == [f"Which label fits: no, yes?\ntext {id}" for id in ids]


def test_row_numbers_run_over_files_and_count_bad_rows(tmp_path):
    lines = [json.dumps(row) for row in LABELLED]
    first = write(tmp_path / "a.jsonl", [lines[0], "{broken", "", lines[1]])
    second = write(tmp_path / "b.jsonl", lines[2:])
    found = made(tmp_path, {"train": second}, name="second")
    assert found.train.ids.to_pylist() == ["0", "1", "2", "3"]
    data = {"train": [first, second], "on_bad_row": "drop"}
    found = prepare(recipe(data), RunFolder(tmp_path / "run"))
    assert found.train.ids.to_pylist() == ["0", "2", "3", "4", "5", "6"]
    assert [prompt[-6:] for prompt in found.train.prompts.to_pylist()] == [row["text"] for row in LABELLED]


@pytest.mark.parametrize(
    "ids, whole",
    [
        ([3, 1, -7], True),
        ([2**40, 0, 5], True),
        (["3", "1", "7"], False),
        ([3, "a", 7], False),
        ([10**30, 1, 2], False),
    ],
)
def test_whole_ids_are_told_from_texts(tmp_path, ids, whole):
    rows = [{**row, "key": id} for row, id in zip(LABELLED, ids)]
    found = made(tmp_path, {"train": write(tmp_path / "train.jsonl", rows), "columns": {"id": "key"}})
    assert found.train.ids.to_pylist() == [str(id) for id in ids] and found.info["whole_ids"] is whole
    if whole:  # as `merge` writes them
        assert found.train.ids.cast(pa.int64()).to_pylist() == ids


def test_the_same_id_in_two_splits(tmp_path):
    test = [{"id": 0, "text": "new", "label": "no"}, {"id": 1, "text": "newer", "label": "yes"}]
    train = [{"id": i, **row} for i, row in enumerate(LABELLED)]
    data = {"train": write(tmp_path / "train.jsonl", train), "test": write(tmp_path / "test.jsonl", test)}
    found = made(tmp_path, data)
    assert found.train.ids.to_pylist()[:2] == found.test.ids.to_pylist() == ["0", "1"]
    twice = write(tmp_path / "twice.jsonl", [*train, {"id": "3", "text": "late", "label": "no"}])
    said = refused(tmp_path, {**data, "train": twice}, check=False)
    assert said == f"{twice}:7: the id '3' is a duplicate in train"


def test_a_row_number_that_is_also_the_id_of_another_row(tmp_path):
    """Scores are joined by id: of two examples with one id, the second would get the score of the first."""
    bare, named = LABELLED[:3], [{"id": i + 2, **row} for i, row in enumerate(LABELLED[3:])]
    files = [write(tmp_path / "bare.csv", bare), write(tmp_path / "named.csv", named)]
    said = refused(tmp_path, {"train": files}, check=False)
    assert said == (
        "data.train: the id '2' is a duplicate: 3 of 6 rows have no id and get their row number; give all rows an id, "
        "or none"
    )
    other = write(tmp_path / "other.csv", [{"id": f"n{i}", **row} for i, row in enumerate(LABELLED[3:])])
    assert made(tmp_path, {"train": [files[0], other]}).train.ids.to_pylist() == ["0", "1", "2", "n0", "n1", "n2"]


# --- files


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "jsonl.gz", "csv.gz", "parquet", "arrow"])
def test_each_kind_of_file_gives_the_same_examples(tmp_path, suffix):
    rows = [
        {"text": "Ann's “café” 😀, 日本", "label": "yes", "source": "r1"},
        {"text": "b\tc", "label": "no", "source": "r2"},
    ]
    columns = {"columns": {"group": "source"}}
    expected = made(tmp_path, {"train": write(tmp_path / "rows.jsonl", rows), **columns}, name="expected")
    found = made(tmp_path, {"train": write(tmp_path / f"train.{suffix}", rows), **columns})
    assert found.train == expected.train and found.train_fingerprint == expected.train_fingerprint
    assert found.train.prompts.to_pylist()[0].endswith("\nAnn's “café” 😀, 日本")
    assert found.train.groups.to_pylist() == ["r1", "r2"]


def test_several_files_and_patterns(tmp_path):
    parts = [write(tmp_path / f"part-{i}.jsonl", LABELLED[2 * i : 2 * i + 2]) for i in range(3)]
    one = made(tmp_path, {"train": write(tmp_path / "all.jsonl", LABELLED)}, name="one")
    for name, paths in (("list", parts), ("pattern", f"{tmp_path}/part-*.jsonl")):
        found = made(tmp_path, {"train": paths}, name=name)
        assert found.train == one.train
    mixed = [parts[0], write(tmp_path / "rest.csv", LABELLED[2:])]
    assert made(tmp_path, {"train": mixed}, name="mixed").train == one.train
    assert refused(tmp_path, {"train": f"{tmp_path}/none-*.csv"}) == f"data.train: {tmp_path}/none-*.csv: no such file"
    for path in parts:
        Path(path).write_text("")
    assert refused(tmp_path, {"train": parts}, check=False) == f"data.train: {', '.join(parts)}: contains no example"


def test_files_of_the_same_content_are_another_list(tmp_path):
    parts = [write(tmp_path / f"part-{i}.jsonl", LABELLED[3 * i : 3 * i + 3]) for i in range(2)]
    first = examples_fingerprint(recipe({"train": parts}))
    assert examples_fingerprint(recipe({"train": f"{tmp_path}/part-?.jsonl"})) == first
    assert examples_fingerprint(recipe({"train": parts[::-1]})) != first


def test_an_index_column_as_pandas_writes_it(tmp_path):
    (tmp_path / "train.csv").write_text(",text,label\n0,one,yes\n1,two,no\n")
    (tmp_path / "test.csv").write_text(",text,label\n0,two,no\n")
    found = made(tmp_path, {"train": str(tmp_path / "train.csv"), "test": str(tmp_path / "test.csv")})
    assert found.train.ids.to_pylist() == ["0"] and found.info["dropped"]["train_in_test"] == 1


def test_columns_outside_the_prompt_make_no_text_new(tmp_path):
    train = [{**row, "source": f"rule {i}"} for i, row in enumerate(LABELLED)]
    test = [{"text": "Text 0", "label": "no", "annotator": 7}]
    data = {"train": write(tmp_path / "train.jsonl", train), "test": write(tmp_path / "test.jsonl", test)}
    assert made(tmp_path, data).info["dropped"]["train_in_test"] == 1
    both = [{**row, "title": f"title {i}"} for i, row in enumerate(LABELLED)]
    again = [{**both[0], "title": "another"}, both[1]]
    data = {"train": write(tmp_path / "both.jsonl", both), "test": write(tmp_path / "again.jsonl", again)}
    two = made(tmp_path, data, {"template": "{title}\n{text}"}, name="two")
    assert two.info["dropped"]["train_in_test"] == 1 and "1" not in two.train.ids.to_pylist()


def test_groups(tmp_path):
    groups = ["rule 1", None, "", 7, ["a", "b"], []]
    rows = [{**row, "group": group} for row, group in zip(LABELLED, groups)]
    found = made(tmp_path, {"train": write(tmp_path / "train.jsonl", rows)})
    assert found.train.groups.to_pylist() == ["rule 1", None, None, "7", "a; b", None]


def test_a_group_counts_once_and_null_is_none(tmp_path):
    """Votes of rules, padded to one length: null is no rule that labelled all the rest."""
    groups = [[None, "a"], [None, None], ["a", "a"], ["", "b"], [math.nan], math.nan]
    rows = [{**row, "group": group} for row, group in zip(LABELLED, groups)]
    found = made(tmp_path, {"train": write(tmp_path / "train.jsonl", rows)}).train
    assert found.groups.to_pylist() == ["a", None, "a", "b", None, None]
    rows, groups, names = found.memberships
    assert (rows.tolist(), groups.tolist(), names) == ([0, 1, 2, 3, 4, 5], [0, -1, 0, 1, -1, -1], ["a", "b"])


# --- columns


@pytest.mark.parametrize("column", ["id", "label", "group"])
def test_a_named_column_that_is_not_there(tmp_path, column):
    train = write(tmp_path / "train.csv", LABELLED)
    said = refused(tmp_path, {"train": train, "columns": {column: "weak"}})
    assert said == f"{train}: row 1: data.columns.{column}: no column 'weak'; the row has text, label"


def test_gold_may_be_missing_in_train_but_not_in_test(tmp_path):
    data = {"train": write(tmp_path / "train.csv", LABELLED), "columns": {"gold": "true"}}
    test = write(tmp_path / "test.csv", [{"text": "new", "label": "no"}])
    said = refused(tmp_path, {**data, "test": test})
    assert said == f"{test}: row 1: data.columns.gold: no column 'true'; the row has text, label"
    good = write(tmp_path / "good.csv", [{"text": "new", "true": "no"}])
    assert made(tmp_path, {**data, "test": good}).test.golds.to_pylist() == ["no"]


@pytest.mark.parametrize("task", ["classification", "relation"])
def test_no_label_column(tmp_path, task):
    train = write(tmp_path / "train.jsonl", [{"text": "<e1>a</e1> <e2>b</e2>", "class": "yes"}])
    said = refused(tmp_path, {"train": train, "task": task})
    assert said == f"{train}:1: data.columns.label: no column 'label'; the row has text, class"


def test_no_response_column(tmp_path):
    train = write(tmp_path / "train.jsonl", [{"question": "a", "reply": "b"}] * 3)
    said = refused(tmp_path, {"train": train, "task": "response"})
    assert said.startswith(f"{train}:1: no column for the response; set it with data.columns.response")
    said = refused(tmp_path, {"train": train, "columns": {"response": "said"}})
    assert said == f"{train}:1: data.columns.response: no column 'said'; the row has question, reply"
    said = refused(tmp_path, {"train": train, "columns": {"messages": "chat"}})
    assert said == f"{train}:1: data.columns.messages: no column 'chat'; the row has question, reply"


def test_templates_that_do_not_fit_are_one_line(tmp_path):
    rows = [{"title": f"title {i}", "body": "text", "label": "ab"[i % 2]} for i in range(30)]
    data = {"train": write(tmp_path / "train.jsonl", rows)}
    said = refused(tmp_path, data)
    assert (
        said == f"{data['train']}:1: prompt.template is needed: which of the columns title, body belong in the prompt?"
    )
    said = refused(tmp_path, data, {"template": "{text}"})
    assert said == f"{data['train']}:1: prompt.template has an unknown field {{text}}; known: body, options, title"
    said = refused(tmp_path, {**data, "on_bad_row": "drop"}, {"template": "{text}"})
    assert "unknown field" in said
    found = made(tmp_path, data, {"template": "{title}: {body}. One of {options}"})
    assert found.train.prompts.to_pylist()[1] == "title 1: text. One of a, b"


def test_a_row_with_nothing_for_the_prompt(tmp_path):
    rows = [{"text": "a", "label": "x", "note": "n"}, {"text": " ", "label": "y", "note": "n"}, {"label": "y"}]
    train = write(tmp_path / "train.jsonl", rows)
    with pytest.raises(InputError) as error:
        prepare(recipe({"train": train}), RunFolder(tmp_path / "run"))
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{train}:2: the prompt is empty: there is no text in text (2 rows cannot be read: 2 x ")
    assert lines[1:] == [f"  {train}:3: the prompt is empty: there is no text in text"]
    with pytest.raises(InputError, match=r"train\.jsonl:2: the prompt is empty"):
        look_at_data(recipe({"train": train}))


@pytest.mark.parametrize(
    "task, row, prompt",
    [
        ("relation", {"sentence": "<e1>a</e1> b <e2>c</e2>"}, "Classify the semantic relation between the entities a "),
        ("classification", {"question": "why", "topic": "t"}, "Which label fits: x?\nwhy"),
        ("classification", {"body": "why"}, "Which label fits: x?\nwhy"),
        ("response", {"prompt": "why\n", "completion": "so"}, "why"),
        ("response", {"question": "why", "topic": "t", "answer": "so"}, "why"),
        ("response", {"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2"),
        ("response", {"instruction": "Sing.", "input": "", "output": "La"}, "Sing."),
        ("response", {"instruction": "Sing.", "output": "La"}, "Sing."),
    ],
)
def test_prompts_by_default(tmp_path, task, row, prompt):
    row = row if task == "response" else {**row, "label": "x"}
    found = made(tmp_path, {"task": task, "train": write(tmp_path / "train.jsonl", [row])})
    assert found.train.prompts.to_pylist()[0].startswith(prompt)
    if task != "relation":
        assert found.train.prompts.to_pylist() == [prompt]


# --- rows with two entities


@pytest.mark.parametrize(
    "row",
    [
        {"sentence": "The <e1>storm</e1> caused <e2>damage</e2>.", "label": "Cause"},
        {"text": "The storm caused damage.", "e1": [4, 9], "e2": [17, 23], "label": "Cause"},
        {"tokens": ["The", "storm", "caused", "damage", "."], "e1": [1, 2], "e2": [3, 4], "label": "Cause"},
        {
            "token": ["The", "storm", "caused", "damage", "."],
            "h": {"pos": [1, 2]},
            "t": {"pos": [3, 4]},
            "label": "Cause",
        },
        {"tokens": ["The", "storm", "caused", "damage", "."], "h": [1, 2], "t": [3, 4], "relation": "Cause"},
        {
            "tokens": ["The", "storm", "caused", "damage", "."],
            "h": ["s", "", [[1]]],
            "t": ["", "", [[3]]],
            "label": "Cause",
        },
    ],
)
def test_relations_from_rows(tmp_path, row):
    data = {"task": "relation", "train": write(tmp_path / "train.jsonl", [{**row, "year": 1999}])}
    found = made(tmp_path, data, {"template": "{e1} and {e2} in {year}: {marked_sentence}"})
    (prompt,) = found.train.prompts.to_pylist()
    assert prompt.replace(" .", ".") == "storm and damage in 1999: The [E1] storm [/E1] caused [E2] damage [/E2]."
    assert found.labels == ["Cause"]
    said = refused(tmp_path, {**data, "train": write(tmp_path / "bad.jsonl", [{"text": "bare", "label": "Cause"}])})
    assert "bad.jsonl:1: the mark <e1> is missing" in said


# --- responses and chats


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"prompt": "2+2?", "completion": " 4 \n"}, {}),
        ({"question": "2+2?", "answer": " 4 \n"}, {}),
        ({"instruction": "2+2?", "input": "", "output": " 4 \n"}, {}),
        ({"text": "2+2?", "label": "math", "reply": " 4 \n"}, {"response": "reply"}),
    ],
)
def test_responses(tmp_path, row, columns):
    rows = [{**row, "id": i} for i in range(2)]
    found = made(tmp_path, {"task": "response", "train": write(tmp_path / "train.jsonl", rows), "columns": columns})
    assert rows_of(found.train, "prompt", "target") == [("2+2?", " 4 \n")] * 2
    assert found.labels is None and not found.chat and found.info["label_counts"] is None


def test_response_rows_without_a_response(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": None}, {"question": "d", "answer": ["e"]}]
    train = write(tmp_path / "train.jsonl", rows[:2])
    data = {"task": "response", "train": train, "test": write(tmp_path / "t.jsonl", [{"question": "x", "gold": "y"}])}
    found = made(tmp_path, data)
    assert found.info["unlabelled"] == 1 and found.train.targets.to_pylist() == ["b"]
    assert found.test.targets.to_pylist() == found.test.golds.to_pylist() == ["y"]
    named = made(tmp_path, {**data, "columns": {"response": "answer"}}, name="named")
    assert named.test == found.test
    none = write(tmp_path / "none.jsonl", [{"question": "x", "answer": None}])
    said = refused(tmp_path, {**data, "test": none})
    assert said == f"{none}:1: {EMPTY_LABEL}"
    said = refused(tmp_path, {**data, "train": write(tmp_path / "bad.jsonl", rows)})
    assert said == f"{tmp_path}/bad.jsonl:3: `answer` is empty or not a text"


def test_response_noise_is_another_questions_answer(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(40)]
    rows[0]["gold"] = "one"
    data = {"task": "response", "train": write(tmp_path / "train.jsonl", rows), "dev_size": 8, "noise": {"rate": 0.25}}
    found = made(tmp_path, data)
    own = {row["question"]: row.get("gold", row["answer"]) for row in rows}
    answers = {row["answer"] for row in rows}
    wrong = 0
    for prompt, target, gold in rows_of(found.train, "prompt", "target", "gold"):
        assert gold == own[prompt] and target in answers
        wrong += target != rows[int(prompt.split()[0])]["answer"]
    assert wrong == found.info["noise"]["rows_changed"] == 8 and len(found.train) == 32
    assert found.dev.golds.null_count == 8 and all(
        target == own[q] for q, target in rows_of(found.dev, "prompt", "target")
    )
    assert made(tmp_path, data, name="again").train == found.train


def test_label_noise_keeps_gold(tmp_path):
    data = {"train": write(tmp_path / "train.jsonl", LABELLED * 5), "test": write(tmp_path / "t.jsonl", [LABELLED[0]])}
    clean = made(tmp_path, data, name="clean").train
    assert clean.golds.null_count == len(clean) == 25, "without noise an unknown gold label stays unknown"
    found = made(tmp_path, {**data, "noise": {"rate": 0.2}})
    assert (found.train.correct == 0).sum() == 5 and (found.train.correct == 1).sum() == 20
    assert found.train.golds.to_pylist() == clean.targets.to_pylist() and found.train.ids == clean.ids


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "Thanks"},
]


def test_split_turns():
    before, learned = map(json.loads, split_turns(TURNS, "last"))
    assert (before, learned) == (TURNS[:4], TURNS[4:5])
    before, learned = map(json.loads, split_turns(TURNS, "all"))
    assert (before, learned) == (TURNS[:2], TURNS[2:5])
    extra = [{**turn, "tool_calls": None, "weight": 1} for turn in TURNS]
    assert split_turns(extra, "all") == split_turns(TURNS, "all")
    short = TURNS[1:3]
    assert split_turns(short, "last") == split_turns(short, "all")


@pytest.mark.parametrize(
    "turns, words",
    [
        (None, "not a list of {role, content} turns"),
        ("hello", "not a list of {role, content} turns"),
        ({"role": "user", "content": "a"}, "not a list of {role, content} turns"),
        (["hello"], "not a list of {role, content} turns"),
        ([{"role": "user"}], "not a list of {role, content} turns"),
        ([{"role": "user", "content": None}], "not a list of {role, content} turns"),
        ([{"from": "human", "value": "a"}], "not a list of {role, content} turns"),
        ([], "no assistant turn to learn"),
        (TURNS[:2], "no assistant turn to learn"),
        (TURNS[2:3], "the chat begins with an assistant turn"),
        ([TURNS[1], {"role": "assistant", "content": " \n"}], "an assistant turn is empty"),
        ([{"role": "user", "content": "\ud83d"}, TURNS[2]], "half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("train_on", ["last", "all"])
def test_split_turns_refuses(turns, words, train_on):
    with pytest.raises(BadRow) as error:
        split_turns(turns, train_on)
    assert words in str(error.value)


def test_split_turns_judges_what_is_learned_alone():
    greeting = [TURNS[2], *TURNS[3:5]]
    assert json.loads(split_turns(greeting, "last")[1]) == TURNS[4:5]
    with pytest.raises(BadRow, match="begins with an assistant turn"):
        split_turns(greeting, "all")
    silent = [TURNS[1], {"role": "assistant", "content": ""}, *TURNS[3:5]]
    assert json.loads(split_turns(silent, "last")[1]) == TURNS[4:5]
    with pytest.raises(BadRow, match="an assistant turn is empty"):
        split_turns(silent, "all")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_chats(tmp_path, suffix):
    rows = [{"messages": TURNS, "source": "a"}, {"messages": TURNS[1:3], "source": "b"}]
    data = {"task": "response", "train": write(tmp_path / f"train.{suffix}", rows), "train_on": "all"}
    found = made(tmp_path, data)
    assert found.chat and found.labels is None
    assert json.loads(found.train.prompts.to_pylist()[0]) == TURNS[:2]
    assert json.loads(found.train.targets.to_pylist()[0]) == TURNS[2:5]
    named = [{"talk": row["messages"], "gold": "eight"} for row in rows]
    named_data = {"train": write(tmp_path / f"named.{suffix}", named), "columns": {"messages": "talk"}}
    found = made(tmp_path, named_data, name="named")  # `train_on: last`
    assert found.chat and found.task == "response" and json.loads(found.train.prompts.to_pylist()[0]) == TURNS[:4]
    assert json.loads(found.train.golds.to_pylist()[0]) == [{"role": "assistant", "content": "eight"}]


def test_chat_noise_exchanges_the_learned_turns(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}]}
        for i in range(10)
    ]
    data = {"task": "response", "train": write(tmp_path / "train.jsonl", rows), "noise": {"rate": 0.4}}
    found = made(tmp_path, data)
    said = [json.loads(target)[0]["content"] for target in found.train.targets.to_pylist()]
    assert [json.loads(gold)[0]["content"] for gold in found.train.golds.to_pylist()] == [f"a {i}" for i in range(10)]
    assert sum(text != f"a {i}" for i, text in enumerate(said)) == 4


@pytest.mark.parametrize("template", ["{messages}", "{text}", "Question: {prompt}"])
def test_a_chat_with_a_template_is_refused(tmp_path, template):
    data = {"task": "response", "train": write(tmp_path / "train.jsonl", [{"messages": TURNS}] * 3)}
    said = refused(tmp_path, data, {"template": template})
    assert said == (
        f"{data['train']}:1: prompt.template: the tokenizer's own chat template formats a chat; remove the key"
    )


def test_chats_and_single_prompts_are_not_mixed(tmp_path):
    chats = write(tmp_path / "chats.jsonl", [{"messages": TURNS}])
    single = write(tmp_path / "single.jsonl", [{"prompt": "a", "completion": "b"}])
    for train, test in ((chats, single), (single, chats)):
        said = refused(tmp_path, {"task": "response", "train": train, "test": test})
        assert said == "data.test: one split has chats and another has single prompts; use one kind in all splits"
    said = refused(tmp_path, {"task": "response", "train": [chats, single]})
    assert said.startswith(f"{single}:1: the row has prompt, but the rows before it have messages")


# --- bad rows

BAD = ["{broken", '{"text": "no label", "label": 0.5}', '{"text": "", "label": "yes"}', "[1]"]


@pytest.mark.ranks
def test_bad_rows_are_dropped_where_the_recipe_says_so(tmp_path):
    lines = [json.dumps(row) for row in LABELLED]
    test = write(tmp_path / "test.jsonl", ['{"text": "new", "label": "no"}', '{"text": "other", "label": "maybe"}'])
    train = write(tmp_path / "train.jsonl", [*lines[:3], *BAD, *lines[3:]])
    path = tmp_path / "recipe.yaml"
    tree = recipe({"train": train, "test": test}).model_dump(exclude_unset=True)
    path.write_text(json.dumps({**tree, "runs_dir": str(tmp_path)}))
    refuse(launch("local", 1, "prepare", path), "train.jsonl:4: not valid JSON", "4 rows cannot be read", "on_bad_row")
    said = " ".join(succeed("local", 1, "prepare", path, "--set", "data.on_bad_row=drop").split())
    assert "left out 4 rows of train that cannot be read: 1 x not valid JSON at column" in said
    assert "left out 1 rows of test that cannot be read: 1 x unknown label" in said
    info = json.loads((tmp_path / "r" / "examples" / "examples.json").read_text())
    assert info["counts"] == {"train": 6, "dev": 0, "test": 1}
    assert {split: sum(kinds.values()) for split, kinds in info["bad_rows"].items()} == {"train": 4, "test": 1}


def test_only_bad_rows(tmp_path):
    train = write(tmp_path / "train.jsonl", ["{broken", "[1]"])
    said = refused(tmp_path, {"train": train, "on_bad_row": "drop"}, check=False)
    assert said == f"data.train: {train}: contains no example (2 rows cannot be read)"


def test_more_than_ten_bad_rows(tmp_path):
    lines = [json.dumps(row) for row in LABELLED]
    wrong = [json.dumps({"text": f"text {i}", "label": i + 0.5}) for i in range(12)]
    train = write(tmp_path / "train.jsonl", [*wrong, *lines, "{", "{", *(f'{{"text": {i}' for i in range(3))])
    with pytest.raises(InputError) as error:
        prepare(recipe({"train": train}), RunFolder(tmp_path / "run"))
    first, *more = str(error.value).splitlines()
    assert first.startswith(
        f"{train}:1: the label is not a text or whole number: 0.5 (17 rows cannot be read: 12 x the"
    )
    assert "5 x not valid JSON at column" in first and first.endswith("leave them out with data.on_bad_row: drop)")
    assert len(more) == 10 and more[8] == f"  {train}:10: the label is not a text or whole number: 9.5"
    assert more[9] == "  and 7 more"
    with pytest.raises(InputError) as error:
        look_at_data(recipe({"train": train}))
    assert str(error.value) == f"{train}:1: the label is not a text or whole number: 0.5"


# --- rows to predict


def test_rows_of_any_values_are_written(tmp_path):
    """They are written after hours of prediction."""
    rows = [
        {"id": 1, "mixed": 1, "meta": {}, "hash": 5, "huge": 10**30, "turns": [{"role": "user"}]},
        {"id": 2, "mixed": "a", "hash": 2**64 - 1, "huge": 1, "none": None},
    ]
    table = _table(rows)
    for suffix in FORMATS:
        write_rows(tmp_path / f"out{suffix}", table)
    read = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == read
    assert [row["id"] for row in read] == [1, 2] and [row["hash"] for row in read] == [5, 2**64 - 1]
    assert [row["mixed"] for row in read] == ["1", '"a"'] and [row["meta"] for row in read] == ["{}", None]
    assert [row["huge"] for row in read] == [str(10**30), "1"] and read[0]["turns"] == [{"role": "user"}]


@pytest.mark.parametrize("arm", ["new", "my-seed-arm", "sft-seed3", "sft"])
def test_arms_that_predict(tmp_path, arm):
    """An arm that was added after `prepare` is not in the recipe that the run folder has."""
    arms = {"sft": {"weights": {"formula": "uniform"}}, "my-seed-arm": {}}
    of_run = recipe({"train": "train.csv"}).model_copy(update={"arms": arms})
    run = Run(of_run, RunFolder(tmp_path), Ranks.alone())
    for name in ("new", "reference-0-of-2"):
        (tmp_path / "model" / name).mkdir(parents=True)
        (tmp_path / "model" / name / "training.json").write_text("{}")
    (tmp_path / "train.csv").write_text("text,label\none,a\ntwo,b\n")
    prepare(recipe({"train": str(tmp_path / "train.csv")}), run.folder)
    for other in ("reference-0-of-2", "sftseed3", "old"):
        with pytest.raises(InputError, match=f"--arm {other}: no arm of this run"):
            predict_file(run, other, "rows.csv", tmp_path / "out.csv")
    with pytest.raises(InputError, match="no trained model; run"):
        predict_file(run, arm, "rows.csv", tmp_path / "out.csv")


# --- check


def test_check_needs_no_test_file_and_no_hub(tmp_path):
    look_at_data(recipe({"train": write(tmp_path / "train.jsonl", LABELLED)}))
    look_at_data(recipe({"hub_id": "nobody/none", "task": "classification"}))
    look_at_data(recipe({"format": "grammar"}))
    with pytest.raises(InputError, match=r"data\.hub_id: "):
        look_at_data(recipe({"hub_id": str(tmp_path / "none"), "task": "classification"}))


def test_check_reads_the_first_rows_alone(tmp_path):
    lines = [json.dumps(row) for row in LABELLED]
    look_at_data(recipe({"train": write(tmp_path / "train.jsonl", [*lines, "{broken"])}))
    with pytest.raises(InputError, match=r"train\.jsonl:2: not valid JSON"):
        look_at_data(recipe({"train": write(tmp_path / "train.jsonl", [lines[0], "{broken"])}))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_check_reads_every_split(tmp_path, split):
    data = {"train": write(tmp_path / "train.jsonl", LABELLED), "labels": ["no", "yes"]}
    bad = write(tmp_path / "bad.jsonl", [{"text": "new", "label": "maybe"}])
    said = refused(tmp_path, {**data, split: bad})
    assert said == f"{bad}:1: unknown label 'maybe'; the label set is no, yes"


@pytest.mark.ranks
def test_check_by_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    tree = recipe({"train": write(tmp_path / "train.csv", LABELLED)}).model_dump(exclude_unset=True)
    path.write_text(json.dumps({**tree, "runs_dir": str(tmp_path)}))
    done = launch("local", 1, "check", path, env={"HF_HUB_OFFLINE": "0"})  # it asks no network all the same
    assert done.code == 0 and "some/model is not in the hub's cache" in done.out, done.out
    refuse(launch("local", 1, "check", path, "--set", "data.columns.label=weak"), "train.csv: row 1", "'weak'")
    assert not (tmp_path / "r").exists()


# --- streaming


@pytest.mark.parametrize(
    "more",
    [
        {"dev_size": 7, "train_size": 30, "noise": {"rate": 0.3}},
        {"task": "response", "columns": {"response": "said"}, "noise": {"rate": 0.3}},
        {"columns": {"gold": "true"}},
    ],
)
def test_several_record_batches_hold_what_one_holds(tmp_path, monkeypatch, more):
    rows = [
        {
            "text": f"text {i // 2}",
            "label": "abc"[i % 3],
            "said": f"so {i}",
            "true": "abc"[i % 2],
            "group": f"rule {i % 4}",
        }
        for i in range(60)
    ]
    data = {
        "train": write(tmp_path / "train.jsonl", rows[:50]),
        "test": write(tmp_path / "test.jsonl", rows[45:]),
        **more,
    }
    one = made(tmp_path, data, name="one")
    for size in (1, 7, 16):
        monkeypatch.setattr("atlantis_ds.data.prepare.ROWS", size)
        monkeypatch.setattr("atlantis_ds.data.examples.ROWS", size)
        several = made(tmp_path, data, name=f"of-{size}")
        assert several.labels == one.labels and several.info["dropped"] == one.info["dropped"]
        for split in SPLITS:
            found, expected = getattr(several, split), getattr(one, split)
            assert found.table.equals(expected.table) and len(found) == len(expected)
            assert max(map(len, found.table.to_batches()), default=0) <= size
            sizes = [len(batch) for batch in found.table.to_batches()]
            assert all(length == size for length in sizes[:-1]), "only the last batch is short"
            np.testing.assert_array_equal(found.codes, expected.codes)
            np.testing.assert_array_equal(found.folds(3), expected.folds(3))


@pytest.mark.parametrize(
    "labels,scope,said",
    [
        ("abcdef", "per_label", "no label has two training examples: all weights will be 1"),
        ("aabbcd", "per_label", "2 of 4 labels have only one training example; with per_label, its weight is 1"),
        ("aabbcd", "global", None),
        ("aabb", "per_label", None),
    ],
)
def test_weights_that_are_equal_by_construction_are_said_before_any_training(tmp_path, labels, scope, said, capsys):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    tree = recipe({"train": write(tmp_path / "train.jsonl", rows)}).model_dump(exclude_unset=True)
    settings = Recipe.model_validate({**tree, "weights": {"scope": scope}})
    folder = RunFolder(tmp_path / "run")
    stages._say_equal_by_construction(Run(settings, folder, Ranks.alone()), prepare(settings, folder))
    printed = " ".join(capsys.readouterr().out.split())
    assert said in printed if said else "per_label" not in printed
