"""Corrections of ``label_errors.csv`` become training data that is read as before, but for what was corrected."""

from __future__ import annotations

import csv
import datetime
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import succeed

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.data.examples import load_examples
from atlantis_ds.data.prepare import prepare
from atlantis_ds.data.reading import read_split
from atlantis_ds.data.rows import Found
from atlantis_ds.errors import InputError
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights import page
from atlantis_ds.weights.corrections import Relabelled, relabel

Rows = list[dict[str, Any]]
LABELS = ["animal", "place", "thing"]


def write_recipe(folder: Path, name: str, data: dict[str, Any]) -> Path:
    model = {"model_name_or_path": "some/model"}
    tree = {"name": name, "runs_dir": str(folder), "data": data, "models": {"large": model, "small": model}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def prepared(folder: Path, data: dict[str, Any], name: str = "first") -> Run:
    run = Run(load_recipe(write_recipe(folder, name, data)), RunFolder(folder / name), Ranks.alone())
    prepare(run.recipe, run.folder)
    return run


def listed(run: Run) -> Rows:
    """What ``diagnose`` writes of a run without scores."""
    examples = load_examples(run.folder)
    rows = page.Listing(examples, np.ones(len(examples.train)), None).entries(np.arange(len(examples.train)))
    return [{**row, "corrected": ""} for row in rows]


def save(path: Path, rows: Rows, encoding: str = "utf-8", ends: str = "\n") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator=ends)
        writer.writeheader()
        writer.writerows(rows)
    return path


def questions(folder: Path, n: int = 30) -> dict[str, Any]:
    """Rows without ids, one of them without a label, with commas, quotes and line breaks."""
    rows = [
        {"text": f'What, said "{at}"\nof {at}, is it?', "label": LABELS[at % 3], "rule": f"r{at % 4}", "gold": ""}
        for at in range(n)
    ]
    rows[7]["label"] = ""
    for split, some in (("train", rows), ("test", [{**row, "text": f"{row['text']} Now?"} for row in rows[:6]])):
        save(folder / f"{split}.csv", [row for row in some if split == "train" or row["label"]])
    files = {split: str(folder / f"{split}.csv") for split in ("train", "test")}
    return {**files, "dev_size": 4, "columns": {"group": "rule"}}


def columns_of(run: Run, split: str) -> dict[str, tuple[Any, ...]]:
    """id -> (prompt, target, gold, group, fold)."""
    table = getattr(load_examples(run.folder), split).table.to_pylist()
    return {row.pop("id"): tuple(row.values()) for row in table}


def test_only_what_was_corrected_changes(tmp_path: Path) -> None:
    data = questions(tmp_path)
    run = prepared(tmp_path, data)
    rows = listed(run)
    rows[2]["corrected"], rows[3]["corrected"] = "thing" if rows[2]["target"] != "thing" else "place", "DROP"
    rows[4]["corrected"] = f" {rows[4]['target']} "  # looked at, and right
    changed, dropped, seen = rows[2], rows[3], rows[4]
    # A spreadsheet's file: sorted, some rows deleted, a byte order mark, other line ends.
    file = save(tmp_path / "mine.csv", [seen, *reversed(rows[:4])], "utf-8-sig", "\r\n")
    before = (tmp_path / "train.csv").read_bytes()
    done = relabel(run, file, tmp_path / "new.jsonl")
    assert done == Relabelled({"train": tmp_path / "new.jsonl"}, 1, 1, len(rows) - 2, None)
    assert (tmp_path / "train.csv").read_bytes() == before

    new = prepared(tmp_path, {**data, "train": str(tmp_path / "new.jsonl")}, "second")
    expected = columns_of(run, "train")
    prompt, _, *others = expected[changed["id"]]
    expected[changed["id"]] = (prompt, changed["corrected"], *others)
    del expected[dropped["id"]]
    assert columns_of(new, "train") == expected
    assert all(columns_of(new, split) == columns_of(run, split) for split in ("dev", "test"))
    assert sum(1 for _ in (tmp_path / "new.jsonl").open()) == 29, "the row without a label is there, too"


def jsonl(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def relations(folder: Path) -> tuple[dict[str, Any], str, str]:
    rows = [
        {"id": at, "tokens": ["The", "storm", "caused", f"damage{at}"], "e1": [1, 2], "e2": [3, 4], "relation": label}
        for at, label in enumerate(["cause", "part", "cause"])
    ]
    return {"task": "relation", "train": jsonl(folder / "train.jsonl", rows)}, "1", "cause"


def responses(folder: Path) -> tuple[dict[str, Any], str, str]:
    rows = [{"id": f"q{at}", "question": f"{at}+1?", "answer": f"{at + 2}"} for at in range(3)]
    columns = {"response": "answer"}
    return (
        {"train": [jsonl(folder / "a.jsonl", rows[:1]), jsonl(folder / "b.jsonl", rows[1:])], "columns": columns},
        "q1",
        "2",
    )


def chats(folder: Path) -> tuple[dict[str, Any], str, str]:
    def chat(*words: str) -> dict[str, Any]:
        return {"messages": [{"role": ["user", "assistant"][at % 2], "content": each} for at, each in enumerate(words)]}

    train = jsonl(folder / "train.jsonl", [chat("Hi", "Ho"), chat("a", "b", "c", "d", "bye"), chat("Hey", "Hm")])
    return {"task": "response", "train": train}, "1", "assistant: e"


def dates(folder: Path) -> tuple[dict[str, Any], str, str]:
    days = [datetime.date(2024, 1, day) for day in (1, 2, 3)]
    table = {"day": days, "price": [1.5, None, 2.0], "tags": [[days[0]], [], None], "label": ["up", "down", "up"]}
    pq.write_table(pa.table(table), folder / "train.parquet")
    return {"train": str(folder / "train.parquet"), "task": "classification"}, "2", "down"


def semeval(folder: Path) -> tuple[dict[str, Any], str, str]:
    records = [
        f'{at}\t"The <e1>storm</e1> in {at} caused <e2>damage</e2>."\r\n{label}\r\nComment: {at}\r\n\r\n'
        for at, label in enumerate(["Cause-Effect(e1,e2)", "Other", "Message-Topic(e2,e1)"], start=8)
    ]
    (folder / "TRAIN_FILE.TXT").write_text("".join(records), newline="")
    return {"format": "semeval2010_task8", "train": str(folder / "TRAIN_FILE.TXT")}, "9", "Cause-Effect(e2,e1)"


def spert(folder: Path) -> tuple[dict[str, Any], str, str]:
    entities = [{"start": at, "end": at + 1, "type": "x"} for at in range(3)]
    kinds = [["Kill", "Live_In"], ["Kill"]]
    documents = [
        {
            "tokens": ["Ann", "Bob", f"Rome{origin}"],
            "entities": entities,
            "relations": [{"type": kind, "head": 0, "tail": 1 + at} for at, kind in enumerate(types)],
            "orig_id": origin,
        }
        for origin, types in enumerate(kinds, start=40)
    ]
    (folder / "train.json").write_text(json.dumps(documents))
    return {"format": "spert", "train": str(folder / "train.json"), "negatives": 2}, "conll04-train-41-0", "Live_In"


def hub(folder: Path) -> tuple[dict[str, Any], str, str]:
    (folder / "set").mkdir()
    rows = [{"text": f"text {at}", "label": LABELS[at % 3]} for at in range(4)]
    jsonl(folder / "set" / "train.jsonl", rows)
    jsonl(folder / "set" / "test.jsonl", [{**row, "text": f"more {row['text']}"} for row in rows])
    return {"hub_id": str(folder / "set"), "task": "classification"}, "2", "animal"


KINDS = [relations, responses, chats, dates, semeval, spert, hub]
PROMPTS = {responses: "{question}", dates: "{day} {price} {tags}"}


def found(recipe: Any, split: str = "train") -> dict[str, Found]:
    def fail(where: str, what: str) -> None:
        raise AssertionError(f"{where}: {what}")

    return {str(each.number if each.id is None else each.id): each for each in read_split(recipe, split, fail) or ()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_read_as_before(kind: Callable[[Path], tuple[dict[str, Any], str, str]], tmp_path: Path) -> None:
    data, id, right = kind(tmp_path)
    path = write_recipe(tmp_path, "first", data)
    tree = yaml.safe_load(path.read_text())
    if kind in PROMPTS:
        tree["prompt"] = {"template": PROMPTS[kind]}
    path.write_text(yaml.safe_dump(tree))
    run = Run(load_recipe(path), RunFolder(tmp_path / "first"), Ranks.alone())
    prepare(run.recipe, run.folder)
    rows = listed(run)
    next(row for row in rows if row["id"] == id)["corrected"] = right
    drop = next(row for row in rows if row["id"] != id) if kind is not spert else None
    if drop:
        drop["corrected"] = "DROP"
    done = relabel(run, save(tmp_path / "mine.csv", rows), None)
    assert (done.changed, done.dropped, done.kept) == (1, drop is not None, len(rows) - 1 - (drop is not None))
    assert done.files["train"].parent == run.folder.root / "diagnosis"

    settings = [f"data.{split}={file}" for split, file in done.files.items()]
    new = load_recipe(path, [*settings, "data.hub_id=null"])
    old, now = found(run.recipe), found(new)
    assert drop is None or old.pop(drop["id"]) is not None
    assert now.keys() == old.keys()
    for each in old:
        for read in (old[each], now[each]):
            read.fields.pop("relation", None)  # the label's own column
        assert (now[each].fields, now[each].key, now[each].group) == (old[each].fields, old[each].key, old[each].group)
        assert each == id or now[each].target == old[each].target
    target = now[id].target
    assert target == (json.dumps([{"role": "assistant", "content": "e"}]) if kind is chats else right)
    if kind is hub:
        assert [each.target for each in found(new, "test").values()] == ["animal", "place", "thing", "animal"]


def edit(**cells: str) -> Callable[[Rows], Rows]:
    def change(rows: Rows) -> Rows:
        rows[2] |= {**dict.fromkeys(["corrected"], "place"), **cells}
        return rows

    return change


BAD = {
    "unknown label 'plaice'; the label set is animal, place, thing (or DROP)": edit(corrected="plaice"),
    "id 'nobody' is not a training example": edit(id="nobody"),
    "is also in FILE:2": lambda rows: [*rows[:2], rows[0]],
    "the target of '5' is 'thing' in this run, not 'animal'": edit(target="animal"),
    "the prompt of '5' is '\"5\" of 5,' in this run, not 'another'": edit(prompt="another"),
    "needs the column `corrected`, once": lambda rows: [
        {key: row[key] for key in row if key != "corrected"} for row in rows
    ],
    "contains no correction": lambda rows: rows,
    "drops all training examples": lambda rows: [{**row, "corrected": "DROP"} for row in rows],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_files_are_refused_by_line_and_nothing_is_written(words: str, tmp_path: Path) -> None:
    run = prepared(tmp_path, questions(tmp_path))
    rows = [row for row in listed(run) if row["id"] != "5"]
    rows.insert(2, next(row for row in listed(run) if row["id"] == "5"))
    file = save(tmp_path / "mine.csv", BAD[words](rows))
    with pytest.raises(InputError) as error:
        relabel(run, file, tmp_path / "new.jsonl")
    assert words.replace("FILE", str(file)) in str(error.value) and "\n" not in str(error.value)
    if "'5'" in words or "plaice" in words or "FILE" in words:
        # Each prompt takes two lines; the head is the first.
        assert str(error.value).startswith(f"{file}:6: ")
    assert not (tmp_path / "new.jsonl").exists() and not list(tmp_path.glob(".*"))


def test_a_file_that_is_no_csv_with_commas_is_refused(tmp_path: Path) -> None:
    run = prepared(tmp_path, questions(tmp_path))
    file = tmp_path / "mine.csv"
    for text, words in (
        ("id;prompt;target;corrected\n1;a;b;c\n", "CSV with commas"),
        ("id,prompt,target,corrected\n1,a,thing\n", "mine.csv:2: 3 cells, but the header has 4"),
        ('id,prompt,target,corrected\n1,"a"b,c,d\n', "mine.csv:2: cannot be read as CSV"),
        ("", "mine.csv:1: needs the column `id`"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            relabel(run, file, None)
    with pytest.raises(InputError, match="no such file"):
        relabel(run, tmp_path / "nothing.csv", None)


def test_data_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    data = questions(tmp_path)
    noisy = prepared(tmp_path, {**data, "noise": {"kind": "uniform", "rate": 0.2}}, "noisy")
    with pytest.raises(InputError, match=r"data\.noise: its wrong labels are only in the run"):
        relabel(noisy, tmp_path / "any.csv", None)
    run = prepared(tmp_path, data)
    rows = listed(run)
    rows[0]["corrected"] = "DROP"
    file = save(tmp_path / "mine.csv", rows)
    with pytest.raises(InputError, match=r"must end in \.jsonl"):
        relabel(run, file, tmp_path / "new.csv")
    with (tmp_path / "train.csv").open("a") as end:
        end.write("one more,thing,r1,\n")
    with pytest.raises(InputError, match="made from other data files"):
        relabel(run, file, None)
    drop = prepared(tmp_path, spert(tmp_path)[0], "spert")
    for id, right in (("conll04-train-41-0", "DROP"), ("conll04-train-41-n0", "Kill")):
        rows = [{**row, "corrected": right if row["id"] == id else ""} for row in listed(drop)]
        with pytest.raises(InputError, match=rf"{id}: .*arms\.NAME\.drop_ids"):
            relabel(drop, save(tmp_path / "mine.csv", rows), None)
    assert not list(drop.folder.root.glob("diagnosis/*"))


def test_a_training_file_is_never_written_over(tmp_path: Path) -> None:
    data, id, right = relations(tmp_path)
    run = prepared(tmp_path, data)
    rows = [{**row, "corrected": right if row["id"] == id else ""} for row in listed(run)]
    with pytest.raises(InputError, match="one of the run's own training files"):
        relabel(run, save(tmp_path / "mine.csv", rows), tmp_path / "train.jsonl")


def test_a_list_with_corrections_is_not_written_over(tmp_path: Path) -> None:
    rows = listed(prepared(tmp_path, questions(tmp_path)))
    file = save(tmp_path / "label_errors.csv", rows)
    page._refuse_to_lose_corrections(file)
    page._refuse_to_lose_corrections(save(file, [{key: row[key] for key in page.COLUMNS} for row in rows]))
    rows[-1]["corrected"] = "DROP"
    for filled in (save(file, rows, "utf-8-sig"), save(file, [{**row, "seen by": "me"} for row in rows])):
        with pytest.raises(InputError, match="contains corrections"):
            page._refuse_to_lose_corrections(filled)


def test_the_command_says_what_to_run_next(tmp_path: Path) -> None:
    """The last row of a label is dropped: the next run must be told that there is such a label."""
    rows = [{"id": f"x{at}", "text": f"text {at}", "label": LABELS[at % 2]} for at in range(8)]
    rows[5]["label"] = "thing"
    path = write_recipe(tmp_path, "mine", {"train": jsonl(tmp_path / "train.jsonl", rows)})
    run = Run(load_recipe(path), RunFolder(tmp_path / "mine"), Ranks.alone())
    prepare(run.recipe, run.folder)
    path.rename(run.folder.recipe)
    cells = [{**row, "corrected": {"x5": "DROP", "x6": "place"}.get(row["id"], "")} for row in listed(run)]
    file = save(tmp_path / "mine.csv", cells)
    out = succeed("local", 1, "relabel", run.folder.root, file, "--out", tmp_path / "new file.jsonl")
    assert "relabel: 1 changed, 1 dropped, 6 kept" in out
    words = shlex.split(next(line for line in out.splitlines() if line.startswith("next")).partition("atlantis-ds ")[2])
    command, recipe, *settings = words
    assert command == "run" and settings[::2] == ["--set"] * 3 and "name=mine-corrected" in settings
    prepare(load_recipe(Path(recipe), settings[1::2]), RunFolder(tmp_path / "mine-corrected"))
    new = load_examples(RunFolder(tmp_path / "mine-corrected"))
    assert new.labels == LABELS and new.train.ids.to_pylist() == ["x0", "x1", "x2", "x3", "x4", "x6", "x7"]
    assert new.train.targets.to_pylist()[5] == "place"
