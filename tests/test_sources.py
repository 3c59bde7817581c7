"""Rows of data files: each kind, the place of each row, and what a bad row or a bad file is called."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from atlantis_ds.data.sources import Row, expand, read_hub_rows, read_rows, read_text
from atlantis_ds.errors import InputError
from atlantis_ds.files import write_rows

ROWS = [{"text": "Ann's café 😀", "label": "2011-01-01"}, {"text": "two\nlines", "label": "NA"}]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(*files: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows, and the problems as (place without the folder, what)."""
    bad: list[tuple[str, str]] = []
    rows = list(read_rows(list(files), lambda where, what: bad.append((Path(where).name, what))))
    return rows, bad


def good(*files: Path) -> list[dict[str, Any]]:
    rows, bad = read(*files)
    assert not bad
    return [row.values for row in rows]


def one_problem(path: Path) -> tuple[str, str]:
    _, bad = read(path)
    assert len(bad) == 1, bad
    return bad[0]


def text_of(kind: str) -> str:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    match kind:
        case "jsonl" | "ndjson":
            return "\n\n".join(lines)
        case "json":
            return json.dumps(ROWS, indent=1)
    cells = [["text", "label"], *([f'"{row["text"]}"', row["label"]] for row in ROWS)]
    return "\r\n".join(("," if kind == "csv" else "\t").join(row) for row in cells)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_text_files(tmp_path, kind, packed, mark):
    path = write(tmp_path / f"rows.{kind}{packed}", mark + text_of(kind))
    rows, bad = read(path)
    places = [f"{path}:1", f"{path}:3"] if kind in ("jsonl", "ndjson") else [f"{path}: row 1", f"{path}: row 2"]
    assert rows == [Row(place, number, values) for number, (place, values) in enumerate(zip(places, ROWS))]
    assert not bad


def test_json_lines_named_json_and_upper_case(tmp_path):
    assert good(write(tmp_path / "rows.json", text_of("jsonl"))) == ROWS
    assert good(write(tmp_path / "ROWS.JSONL", text_of("jsonl"))) == ROWS


def test_json_values_stay_what_they_are(tmp_path):
    values = {
        "i": 3,
        "f": 2.0,
        "none": None,
        "list": [1, {"a": True}],
        "big": 10**30,
        "text": "1e5",
        "date": "2011-1-1",
    }
    assert good(write(tmp_path / "a.jsonl", json.dumps(values)), write(tmp_path / "b.json", json.dumps([values]))) == [
        values,
        values,
    ]
    (row, _) = good(tmp_path / "a.jsonl", tmp_path / "b.json")
    assert type(row["i"]) is int and type(row["f"]) is float


def test_csv_cells_are_texts_and_empty_ones_missing(tmp_path):
    path = write(tmp_path / "a.csv", 'text,n,x\nNone,007,\n\n"say ""hi"", twice",NA,""\n')
    assert good(path) == [
        {"text": "None", "n": "007", "x": None},
        {"text": 'say "hi", twice', "n": "NA", "x": None},
    ]
    long = "word " * 100_000
    assert good(write(tmp_path / "long.csv", f"text\n{long}\n")) == [{"text": long}]


def test_a_csv_column_without_a_name_gets_its_number(tmp_path):
    assert good(write(tmp_path / "pandas.csv", ",text,\n0,a,b\n")) == [{"column 1": "0", "text": "a", "column 3": "b"}]


def tables(folder: Path, table: pa.Table) -> list[Path]:
    """The same rows as Parquet, an Arrow file, an Arrow stream, and Feather."""
    pq.write_table(table, folder / "a.parquet")
    with pa.ipc.new_file(folder / "file.arrow", table.schema) as sink:
        sink.write_table(table)
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as sink:
        sink.write_table(table)
    pyarrow.feather.write_feather(table, folder / "a.feather")
    return [folder / name for name in ("a.parquet", "file.arrow", "stream.arrow", "a.feather")]


def test_parquet_and_arrow(tmp_path):
    columns = {
        "text": [f"t{n}" for n in range(1000)],
        "score": [float("nan"), None, *map(float, range(998))],
        "turns": [[{"role": "user", "content": str(n)}] for n in range(1000)],
        "n": list(range(1000)),
    }
    expected = [dict(zip(columns, cells)) for cells in zip(*columns.values())]
    expected[0]["score"] = None
    for path in tables(tmp_path, pa.table(columns)):
        rows, bad = read(path)
        assert [row.values for row in rows] == expected
        assert rows[700].where == f"{path}: row 701" and rows[700].number == 700
        assert not bad


def test_class_labels_become_names(tmp_path, offline):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features).to_parquet(tmp_path / "train.parquet")
    table = pq.read_table(tmp_path / "train.parquet")
    expected = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}, {"text": "c", "label": None}]
    for path in tables(tmp_path, table):
        assert good(path) == expected
    wrong = pa.table({"text": ["a"], "label": pa.array([2], pa.int64())}).replace_schema_metadata(table.schema.metadata)
    pq.write_table(wrong, tmp_path / "wrong.parquet")
    assert one_problem(tmp_path / "wrong.parquet") == (
        "wrong.parquet: row 1",
        "`label` 2 has no class name in the data set's features",
    )


def test_a_value_that_python_cannot_hold_is_one_bad_row(tmp_path):
    pq.write_table(pa.table({"at": pa.array([0, 2**40, 1], pa.timestamp("s"))}), tmp_path / "a.parquet")
    rows, bad = read(tmp_path / "a.parquet")
    assert [row.number for row in rows] == [0, 2]
    assert [where for where, _ in bad] == ["a.parquet: row 2"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": ', "not valid JSON at column 10: Expecting value"),
        ("[1, 2]", "expected a JSON object, not [1, 2]"),
        ('"text"', "expected a JSON object, not 'text'"),
        ('{"text": "a \\ud83d"}', "half of a surrogate pair (\\ud83d) in `text`; correct the text"),
        ('{"turns": [{"content": "\\uDE00"}]}', "half of a surrogate pair (\\ude00) in `turns`; correct the text"),
        ("[" * 100_000, "not valid JSON: nested too deep"),
        ('{"n": ' + "1" * 5000 + "}", "cannot be read: Exceeds the limit (4300 digits)"),
    ],
)
def test_bad_json_line(tmp_path, line, what):
    fine = json.dumps({"text": "😀 \\ud83d"})  # a whole pair, and a backslash that is no escape
    path = write(tmp_path / "a.jsonl", f"{fine}\r\n\n{line}\r\n{fine}\r\n")
    rows, bad = read(path)
    assert [(row.where, row.number) for row in rows] == [(f"{path}:1", 0), (f"{path}:4", 2)]
    assert [where for where, _ in bad] == ["a.jsonl:3"]
    assert bad[0][1].startswith(what)


def test_bad_rows_of_a_json_array(tmp_path):
    rows, bad = read(write(tmp_path / "a.json", '[{"a": "\\ud83d"}, 3, {"a": 1}]'))
    assert [(row.number, row.values) for row in rows] == [(2, {"a": 1})]
    assert [where for where, _ in bad] == ["a.json: row 1", "a.json: row 2"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("one", "1 cells, but the header has 2"),
        ("a,b,c", "3 cells, but the header has 2"),
        ('"a"b,c', "quotation marks or line ends are wrong at line 3: ',' expected after '\"'"),
        ("a\rb,c", "quotation marks or line ends are wrong at line 3: new-line character seen in unquoted field"),
    ],
)
def test_bad_csv_row(tmp_path, line, what):
    rows, bad = read(write(tmp_path / "a.csv", f"text,label\nx,y\n{line}\nz,w\n"))
    assert [(row.number, row.values["text"]) for row in rows] == [(0, "x"), (2, "z")]
    assert [where for where, _ in bad] == ["a.csv: row 2"]
    assert bad[0][1].startswith(what)


def test_what_is_written_as_csv_is_read_as_it_was(tmp_path):
    rows = [{"text": text, "n": "1"} for text in ("a\rb", "a\r\nb", "a\nb", 'say "a", b', " a ", "\r", "ä;😀\t")]
    write_rows(tmp_path / "a.csv", pa.Table.from_pylist(rows))
    assert good(tmp_path / "a.csv") == rows
    assert (tmp_path / "a.csv").read_bytes().startswith(b'text,n\n"a\rb",1\n')


def test_a_quote_mark_that_is_never_closed(tmp_path):
    where, what = one_problem(write(tmp_path / "a.csv", 'text,label\n"x,y\nz,w\n'))
    assert (where, what) == (
        "a.csv: row 1",
        "quotation marks or line ends are wrong at line 3: unexpected end of data",
    )


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv:1: two columns have the name `a`; rename one"),
        ("a.csv", ",column 1\n1,2\n", "a.csv:1: two columns have the name `column 1`; rename one"),
        ("a.csv", 'a,"b"c\n', "a.csv:1: the header cannot be read: "),
        (
            "a.csv",
            "text;label\na;b\n",
            "a.csv:1: one column, 'text;label': its cells are separated by semicolons, not co",
        ),
        (
            "a.csv",
            "text\tlabel\na\tb\n",
            "a.csv:1: one column, 'text\\tlabel': its cells are separated by tabs, not comm",
        ),
        (
            "a.tsv",
            "text,label\na,b\n",
            "a.tsv:1: one column, 'text,label': its cells are separated by commas, not tabs",
        ),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "a.jsonl:2: not UTF-8 (byte 0xe9); convert the file"),
        ("a.csv", b"a\nb\ncaf\xe9\n", "a.csv:3: not UTF-8 (byte 0xe9); convert the file"),
        ("a.json", '[{"a": 1},\n {"a": }]', "a.json:2: not valid JSON at column 8: Expecting value"),
        ("a.json", "\n" + "[" * 100_000, "a.json:2: not valid JSON: nested too deep"),
        ("a.json", '{\n"rows": []}', "a.json:1: an object over several lines; give a JSON array of objects"),
        ("a.parquet", "no Parquet", "a.parquet: cannot be read: "),
        ("a.parquet", "", "a.parquet: cannot be read: "),
        ("a.arrow", "no Arrow", "a.arrow: cannot be read: "),
        ("a.txt", "text", "a.txt: not a known kind of data file; known kinds are .jsonl, .ndjson, .json, .csv, .tsv"),
        ("a.parquet.gz", "", "a.parquet.gz: not a known kind of data file"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, what):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{tmp_path}/{what}")
    assert "\n" not in str(error.value)


def test_broken_in_the_middle(tmp_path):
    (tmp_path / "no.jsonl.gz").write_bytes(b"no gzip")
    whole = write(tmp_path / "half.jsonl.gz", '{"a": 1}\n').read_bytes()
    (tmp_path / "half.jsonl.gz").write_bytes(whole[:-9])
    pq.write_table(pa.table({"a": [f"{n}" for n in range(100_000)]}), tmp_path / "a.parquet", write_page_checksum=True)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.parquet").write_bytes(data)
    for name in ("no.jsonl.gz", "half.jsonl.gz", "a.parquet", "missing.jsonl", "missing.parquet"):
        what = "no such file" if name.startswith("missing") else "cannot be read"
        with pytest.raises(InputError, match=f"{name}: {what}"):
            read(tmp_path / name)
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), tmp_path / "two.parquet")
    with pytest.raises(InputError, match=r"two.parquet: two columns have the name `a`"):
        read(tmp_path / "two.parquet")


@pytest.mark.parametrize("content", ["", "\ufeff", "\n\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv.gz"])
def test_no_rows(tmp_path, name, content):
    assert good(write(tmp_path / name, content)) == []


def test_no_rows_below_a_header_or_schema(tmp_path):
    assert good(write(tmp_path / "a.csv", "text,label\r\n"), write(tmp_path / "a.json", "[]")) == []
    assert good(*tables(tmp_path, pa.table({"a": pa.array([], pa.string())}))) == []


def test_numbers_run_over_files(tmp_path):
    files = [write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": }\n'), write(tmp_path / "b.csv", "a\n2\n")]
    rows, _ = read(*files)
    assert [(row.where, row.number) for row in rows] == [(f"{files[0]}:1", 0), (f"{files[1]}: row 1", 2)]


def test_read_text(tmp_path):
    assert read_text(write(tmp_path / "a.txt", "\ufeffone\r\n\ufefftwo")) == "one\r\n\ufefftwo"
    with pytest.raises(InputError, match=r"b.txt:2: not UTF-8 \(byte 0xff\)"):
        read_text(write(tmp_path / "b.txt", b"a\n\xff"))


def test_rows_are_read_one_by_one(tmp_path):
    """The first rows come before the file is read to its broken end."""
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' * 100_000 + b"\xff\n")
    assert next(read_rows([path], lambda where, what: None)).values == {"a": 1}


def test_expand(tmp_path, monkeypatch):
    names = ["part-2.jsonl", "part-10.jsonl", "part-1.csv.gz", "x[1].csv", "notes.txt", "state.json", ".hidden.csv"]
    for name in names:
        write(tmp_path / name, "")
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))

    def found(paths: str | list[str]) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in expand(paths, "data.train")]

    assert found("~/notes.txt") == ["notes.txt"]
    assert found(f"{tmp_path}/part-*.jsonl") == ["part-10.jsonl", "part-2.jsonl"]
    assert found([f"{tmp_path}/part-2.jsonl", "~/part-*"]) == ["part-2.jsonl", "part-1.csv.gz", "part-10.jsonl"]
    assert found(f"{tmp_path}/x[1].csv") == ["x[1].csv"]
    assert found(str(tmp_path)) == ["part-1.csv.gz", "part-10.jsonl", "part-2.jsonl", "x[1].csv"]
    for path in ("~/none.csv", f"{tmp_path}/none-*.csv", "~nobody-here/a.csv", "", "~/folder.cs*"):
        with pytest.raises(InputError) as error:
            expand(["~/notes.txt", path], "data.train")
        assert str(error.value) == f"data.train: {path}: no such file"
    with pytest.raises(InputError, match=r"data.dev: ~/folder.csv: no data file in this folder; known kinds are"):
        expand("~/folder.csv", "data.dev")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """``datasets`` with a cache of its own and no network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()


def test_hub_rows(tmp_path, offline):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "score": Value("float32"), "label": ClassLabel(names=["no", "yes"])})
    columns = {"text": ["a", "b"], "score": [0.5, float("nan")], "label": [1, -1]}
    hub = tmp_path / "hub"
    hub.mkdir()
    for split in ("train", "test"):
        Dataset.from_dict(columns, features).to_parquet(hub / f"{split}-00000-of-00001.parquet")
    rows = read_hub_rows(str(hub), "train", lambda where, what: pytest.fail(what))
    assert rows is not None
    assert list(rows) == [
        Row(f"{hub}[train] row 0", 0, {"text": "a", "score": 0.5, "label": "yes"}),
        Row(f"{hub}[train] row 1", 1, {"text": "b", "score": None, "label": None}),
    ]
    assert read_hub_rows(str(hub), "dev", print) is None
    (hub / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match=r"data\.hub_id: .*hub has no split `test`; it has train"):
        read_hub_rows(str(hub), "test", print)


def test_hub_id_that_is_not_there(offline):
    with pytest.raises(InputError, match=r"data\.hub_id: nobody/none@v1 cannot be loaded \(.*\); check the id and the"):
        read_hub_rows("nobody/none@v1", "train", print)
