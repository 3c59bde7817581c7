"""``init``: what a data file is, guessed and asked; the recipe it writes is one that ``check`` accepts."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENV, Done, WriteRecipe, launch, refuse, succeed

from atlantis_ds.cli.app import after_evaluate
from atlantis_ds.config.describe import SCHEMA_FILE, json_schema, reference_page
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.data.guess import guess
from atlantis_ds.data.ingest import look_at_data
from atlantis_ds.demo.grammar import grammar_corpus
from atlantis_ds.files import write_json
from atlantis_ds.run_folder import RunFolder

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).resolve().parents[1]
CORPUS = [*grammar_corpus(40, 0, 0, seed=2)]


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def relation(label: str) -> str:
    return label.split("(")[0]


def files(folder: Path) -> dict[str, Path]:
    """A data file of each kind, from the demo's grammar."""
    weak = folder / "weak labels.csv"
    with weak.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tweet", "weak_label", "truth", "annotator"])
        writer.writerows(
            [row.sentence, relation(row.label), relation(row.label), f"a{at % 3}"] for at, row in enumerate(CORPUS)
        )
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    marked = [
        {
            "sentence": row.fields["marked_sentence"]
            .replace("[E1] ", "<e1>").replace(" [/E1]", "</e1>").replace("[E2] ", "<e2>").replace(" [/E2]", "</e2>"),
            "label": row.label,
        }
        for row in CORPUS
    ]  # fmt: skip
    pairs = [
        {"premise": row.sentence, "hypothesis": f"{row.sentence} {at}", "label": at % 3}
        for at, row in enumerate(CORPUS)
    ]
    official = "".join(
        f'{at}\t"{row["sentence"]}"\n{row["label"]}\nComment:\n\n' for at, row in enumerate(marked, start=1)
    )
    (folder / "official.txt").write_text(official)
    return {
        "classification": weak,
        "pairs": lines(folder / "pairs.jsonl", pairs),
        "relation": lines(folder / "marked.jsonl", marked),
        "official": folder / "official.txt",
        "response": lines(
            folder / "said.jsonl",
            [{"instruction": f"Say {at}.", "input": "", "output": f"Here is {at}."} for at in range(9)],
        ),
        "chat": lines(folder / "chat.jsonl", [{"messages": turns}]),
    }


EXPECTED = {
    "classification": [
        "task: classification",
        "{gold: truth, group: annotator, label: weak_label}",
        "{tweet}",
        "folds_by: group",
    ],
    "pairs": [
        "task: classification",
        "label: label",
        "premise: {premise}\\nhypothesis: {hypothesis}",
        "formula: posterior",
    ],
    "relation": ["task: relation", "label: label", "rounds: 2"],
    "official": ["format: semeval2010_task8", "formula: posterior"],
    "response": ["task: response", "response: output", '"{instruction}\\n{input}"', "formula: reference, power: 2"],
    "chat": ["task: response", "messages: messages"],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_each_kind_of_file(kind: str, tmp_path: Path, base_model: Path) -> None:
    recipe = tmp_path / "first.yaml"
    said = succeed("local", 1, "init", files(tmp_path)[kind], "--model", base_model, "--out", recipe)
    assert f"recipe: {recipe}\nnext: atlantis-ds check {recipe}" in said and "guessed: " in said
    text = recipe.read_text()
    assert all(words in text for words in EXPECTED[kind]), text
    settings = load_recipe(recipe)
    look_at_data(settings)
    assert settings.models.large.model_name_or_path == str(base_model)
    assert f"$schema={SCHEMA_FILE}" in text.splitlines()[0] and SCHEMA_FILE.is_file()


@pytest.mark.parametrize("least, notes", [(-1, ["-1, in 4 of 12 rows, counts as no label"]), (0, [])])
def test_a_class_that_would_be_left_out_is_noted(tmp_path: Path, least: int, notes: list[str]) -> None:
    rows = [{"text": f"text number {at} of this file", "label": at % 3 + least} for at in range(12)]
    found = guess(lines(tmp_path / "sentiment.jsonl", rows), None, {}, [], lambda *question: "")
    told = [note for note in found.notes if "no label" in note]
    assert len(told) == len(notes) and all(words in told[0] for words in notes)


def test_check_accepts_it_and_it_is_written_once(tmp_path: Path, base_model: Path) -> None:
    recipe, data = tmp_path / "first.yaml", files(tmp_path)["classification"]
    options = ("--model", base_model, "--out", recipe, "--test", data)
    succeed("local", 1, "init", data, *options)
    assert f"next: atlantis-ds run {recipe}" in succeed("local", 1, "check", recipe)
    before = recipe.read_bytes()
    refuse(launch("local", 1, "init", data, *options), "first.yaml", "--out")
    assert recipe.read_bytes() == before


def test_what_the_rows_do_not_tell_is_asked_or_wanted(tmp_path: Path) -> None:
    rows = [{"a": f"text number {at} of this file", "x": at % 2, "y": at % 3} for at in range(12)]
    data, recipe = lines(tmp_path / "two.jsonl", list(rows)), tmp_path / "two.yaml"
    refuse(launch("local", 1, "init", data, "--out", recipe), "--label", "x, y")
    refuse(launch("local", 1, "init", data, "--label", "z", "--out", recipe), "--label z", "a, x, y")
    refuse(launch("local", 1, "init", data, "--task", "other", "--out", recipe), "--task")
    refuse(launch("local", 1, "init", tmp_path / "none.jsonl", "--out", recipe), "none.jsonl", "no such file")
    assert not recipe.exists()
    asked = in_a_terminal(["init", str(data), "--out", str(recipe)], ["y\n", "some/model\n"])
    assert asked.code == 0 and "Which column contains the label" in asked.out, asked.out
    assert "label: y" in recipe.read_text() and "model_name_or_path: some/model" in recipe.read_text()


def test_columns_that_no_recipe_can_name_are_refused(tmp_path: Path) -> None:
    """With the name of the data file or the option, not that of a draft."""
    cases: list[tuple[str, list[str], list[str]]] = [
        ("my text,label", [], ["rows.csv", "cannot name the column 'my text'", "header"]),
        ("options,label", [], ["rows.csv", "cannot name the column 'options'"]),
        ("text,label", ["--group", "label", "--label", "label"], ["--group label: given as --label"]),
        ("text,label", ["--text", "label", "--label", "label"], ["--text label: given as --label"]),
        ("text,label", ["--response", "label", "--task", "classification"], ["--response label: not for task class"]),
        ("text,label", ["--label", "label", "--task", "response"], ["--label label: not for task response"]),
        ("text,label", ["--model", ""], ["models.large: give", "`model_name_or_path`"]),
    ]
    for header, options, words in cases:
        (tmp_path / "rows.csv").write_text("\n".join([header, *(f"what is it {at},{'xy'[at % 2]}" for at in range(9))]))
        done = launch("local", 1, "init", tmp_path / "rows.csv", *options, "--out", tmp_path / "out.yaml")
        refuse(done, *words)
        assert "recipe.yaml" not in done.out and not (tmp_path / "out.yaml").exists()
    for label, words in (("", "--label label: no label"), ("x", "--label label: one label alone")):
        (tmp_path / "rows.csv").write_text("text,label\n" + f"what is it,{label}\n" * 9)
        refuse(launch("local", 1, "init", tmp_path / "rows.csv", "--out", tmp_path / "out.yaml"), words)


def test_a_run_that_was_moved_is_the_one_that_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "some where" / "else"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_bytes((ROOT / "recipes" / "demo.yaml").read_bytes())
    said = succeed("local", 1, "status", run)
    refuse(launch("local", 1, "run", run), "a folder; give a recipe file", "recipe.yaml")
    command = shlex.split(said.splitlines()[-1].removeprefix("next: atlantis-ds "))
    assert command[0] == "run" and "Run folder " + str(run) in succeed("local", 1, "check", *command[1:])


def test_status_watches_until_it_is_interrupted(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    run.mkdir()
    (run / "recipe.yaml").write_bytes((ROOT / "recipes" / "demo.yaml").read_bytes())
    watched = in_a_terminal(["status", str(run), "--watch"], [], interrupt_after=b"train atlantis")
    refuse(launch("local", 1, "status", run, "--watch"), "--watch: needs a terminal")
    assert watched.code == 0 and "not yet" in watched.out and "Traceback" not in watched.out, watched.out
    assert f"next: atlantis-ds run {run}/recipe.yaml --set runs_dir={tmp_path} --set name=demo" in succeed(
        "local", 1, "status", run
    )


def test_a_comparison_is_told_before_it_begins(tmp_path: Path, tiny_recipe: WriteRecipe) -> None:
    """What is finished counts no more, and nothing is written."""
    recipe = tiny_recipe(tmp_path, {"seeds": [0, 1, 2]})
    evaluated = tmp_path / "run" / "eval" / "sft-seed1"
    evaluated.mkdir(parents=True)
    (evaluated / "metrics.json").write_text("{}")
    said = succeed("local", 1, "compare", recipe, "--dry-run", "--gpus", "2", "--gpu", "A100")
    assert re.search(r"train and evaluate sft, 3 seeds +│ 1 +│ 2 ", said)
    assert re.search(r"train and evaluate atlantis, 3 seeds +│ 0 +│ 3 ", said)
    assert "score" in said and "train reference" not in said  # it needs no training
    assert "2 x A100" in said and "full with zero3.json" in said and f"next: atlantis-ds compare {recipe}" in said
    assert [*(tmp_path / "run").iterdir()] == [tmp_path / "run" / "eval"]
    refuse(launch("local", 1, "compare", recipe, "--dry-run", "--gpu", "P4"), "--gpu P4", "A100")
    own = tmp_path / "zero3.json"  # of the name of a bundled one, whose memory is not that of this one
    own.write_bytes((ROOT / "ds_configs" / "zero3_offload.json").read_bytes())
    said = succeed("local", 1, "compare", recipe, "--dry-run", "--set", f"train.deepspeed={own}")
    assert "your own config" in said


def test_a_recipe_without_test_examples_is_not_sent_to_compare(tmp_path: Path, base_model: Path) -> None:
    recipe, data = tmp_path / "first.yaml", files(tmp_path)["classification"]
    succeed("local", 1, "init", data, "--model", base_model, "--out", recipe)
    for option in ([], ["--dry-run"]):
        refuse(launch("local", 1, "compare", recipe, *option), "first.yaml: data.test: `compare` needs test examples")
    settings, folder = load_recipe(recipe), RunFolder(tmp_path / "run")
    assert after_evaluate(settings, folder) == ["train", "--arm", "sft"]
    for arm in settings.arms:
        write_json(folder.model(arm) / "training.json", {"step": 1})
    assert after_evaluate(settings, folder) == []
    (folder.root / "recipe.yaml").write_bytes(recipe.read_bytes())
    assert "next:" not in succeed("local", 1, "status", folder.root)


def in_a_terminal(arguments: list[str], answers: list[str], interrupt_after: bytes | None = None) -> Done:
    """Run a command in a terminal of its own; type an answer whenever it waits with a prompt, or interrupt it."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "atlantis_ds", *arguments]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=ENV,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs with `&`
    )
    os.close(theirs)
    said, todo, end = b"", list(answers), time.monotonic() + 120
    while time.monotonic() < end:
        try:
            more = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        said += more
        if todo and said.rstrip().endswith(b":"):
            os.write(ours, todo.pop(0).encode())
        if interrupt_after and interrupt_after in said:
            process.send_signal(signal.SIGINT)
            interrupt_after = None
    os.close(ours)
    return Done(process.wait(60), said.decode())


def test_schema_and_page_are_those_of_the_code() -> None:
    again = "run: make reference"
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema(), again
    assert (ROOT / "docs" / "recipe.md").read_text() == reference_page() + "\n", again
    schema = json_schema()
    for name, section in [("the recipe", schema), *schema["$defs"].items()]:
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}: `{key}` has no text"


def test_recipes_name_the_schema_and_keep_to_it() -> None:
    """A key of a bundled recipe is one that an editor knows."""
    import yaml

    known = json_schema()
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        first = path.read_text().splitlines()[0]
        there = first.removeprefix("# yaml-language-server: $schema=")
        assert (path.parent / there).resolve() == SCHEMA_FILE, path
        assert set(yaml.safe_load(path.read_text())) <= set(known["properties"]), path
