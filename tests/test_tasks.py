"""Every task from its data file to its table, on a small corpus of the project's own and a tiny model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chat_templates import CHATML
from conftest import WriteRecipe, in_process, launch, refuse, succeed

from atlantis_ds.demo.grammar import grammar_corpus

pytestmark = pytest.mark.ranks

ROWS = 60


def corpus() -> list[tuple[str, str]]:
    """Sentences of the demo grammar, each with its relation without direction."""
    return [(row.sentence, row.label.split("(")[0]) for row in grammar_corpus(ROWS, 0, 0, seed=4)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as a CSV file of weak labels with a source, as prompts and responses, and as chats."""
    folder = tmp_path_factory.mktemp("data")
    rows = corpus()
    with (folder / "weak.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "weak", "gold", "source"])
        for at, (sentence, label) in enumerate(rows[:48]):
            weak = "" if at % 16 == 15 else rows[at - 1][1] if at % 5 == 0 else label
            writer.writerow([sentence, weak, label, f"rule {at % 3}"])
    with (folder / "test.jsonl").open("w") as file:
        for sentence, label in rows[48:]:
            file.write(json.dumps({"text": sentence, "gold": label}) + "\n")
    for name, part in (("train", rows[:48]), ("test", rows[48:])):
        with (folder / f"said.{name}.jsonl").open("w") as said, (folder / f"chat.{name}.jsonl").open("w") as chat:
            for sentence, label in part:
                words = f"It is {label}. #### {label}"
                said.write(json.dumps({"prompt": sentence, "completion": words}) + "\n")
                turns = [{"role": "user", "content": sentence}, {"role": "assistant", "content": words}]
                chat.write(json.dumps({"messages": turns}) + "\n")
    return folder


@pytest.fixture(scope="module")
def chat_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base_model`` with a chat template."""
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(base_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return folder


def metrics(run: Path, arm: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval" / arm / "metrics.json").read_text())
    return found


def new_rows(source: Path, out: Path, drop: str) -> Path:
    """The rows of a JSON Lines file without what is to be predicted."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    if drop == "messages":
        rows = [{"messages": row["messages"][:-1]} for row in rows]
    out.write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != drop or drop == "messages"}) + "\n" for row in rows)
    )
    return out


def test_classification(files: Path, tmp_path: Path, tiny_recipe: WriteRecipe) -> None:
    data = {
        "train": str(files / "weak.csv"),
        "test": str(files / "test.jsonl"),
        "columns": {"label": "weak", "gold": "gold", "group": "source"},
    }
    recipe = tiny_recipe(tmp_path, {"data": data, "weights": {"formula": "reference", "scope": "per_label"}})
    out = succeed("local", 2, "run", recipe)
    run = tmp_path / "run"
    assert "left out 3 rows of train that have no label (empty, null, or -1 unless data.labels" in out
    info = json.loads((run / "examples" / "examples.json").read_text())
    assert info["task"] == "classification" and info["counts"] == {"train": 45, "dev": 0, "test": 12}
    weights = pq.read_table(run / "weights.parquet")
    assert str(weights.schema.field("id").type) == "int64"  # row numbers, as the file has no ids
    assert weights["id"].to_pylist() == [at for at in range(48) if at % 16 != 15]
    diagnosis = json.loads((run / "weights.json").read_text())
    assert {row["label"] for row in diagnosis["groups"]} == {"rule 0", "rule 1", "rule 2"}
    assert diagnosis["gold"]["known"] == 45
    for arm in ("sft", "atlantis"):
        figures = metrics(run, arm)
        assert figures["n"] == 12 and 0 <= figures["macro_f1"] <= 1
        assert (figures["official"] is None) == (not all("(" in label or label == "Other" for label in info["labels"]))
    assert f"next: atlantis-ds train {run}/recipe.yaml" not in succeed("local", 1, "diagnose", recipe)
    assert (run / "diagnosis" / "diagnosis.html").exists()
    _predicts_as_it_was_evaluated(files, tmp_path, run, info["labels"])


def _predicts_as_it_was_evaluated(files: Path, tmp_path: Path, run: Path, labels: list[str]) -> None:
    """New rows get the labels that the same texts got as test examples, whatever the number of ranks and the format."""
    rows = new_rows(files / "test.jsonl", tmp_path / "new.jsonl", drop="gold")
    said = succeed("local", 2, "predict", run, rows, "--arm", "sft", "--out", tmp_path / "two.jsonl")
    assert f"predictions: {tmp_path / 'two.jsonl'}" in said
    succeed("local", 1, "predict", tmp_path / "recipe.yaml", rows, "--arm", "sft", "--out", tmp_path / "one.csv")
    found = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    evaluated = pq.read_table(run / "eval" / "sft" / "predictions.parquet")["predicted"].to_pylist()
    assert [row["predicted"] for row in found] == evaluated
    assert [row["text"] for row in found] == [sentence for sentence, _ in corpus()[48:]]
    for row in found:
        shares = {label: row[f"p({label})"] for label in labels}
        assert abs(sum(shares.values()) - 1) < 1e-9
        assert row["probability"] == max(shares.values()) == shares[row["predicted"]]
    with (tmp_path / "one.csv").open(newline="") as file:
        for one, two in zip(csv.DictReader(file), found, strict=True):
            assert one["predicted"] == two["predicted"] and abs(float(one["probability"]) - two["probability"]) < 1e-6
    refuse(launch("local", 1, "predict", run, rows, "--arm", "sft", "--out", rows), "is the file to read")
    one_row = tmp_path / "one row.jsonl"  # one rank has none
    one_row.write_text(rows.read_text().splitlines()[0] + "\n")
    succeed("local", 2, "predict", run, one_row, "--arm", "sft", "--out", tmp_path / "single.jsonl")
    assert json.loads((tmp_path / "single.jsonl").read_text())["predicted"] == evaluated[0]
    (tmp_path / "other.jsonl").write_text('{"words": "The fire caused panic."}\n')
    refuse(launch("local", 1, "predict", run, tmp_path / "other.jsonl"), "other.jsonl:1", "text")
    refuse(launch("local", 1, "predict", run, rows, "--arm", "nope"), "--arm nope: no arm of this run", "sft")
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "The fire.", f"p({labels[0]})": 1}) + "\n")
    refuse(launch("local", 1, "predict", run, tmp_path / "other.jsonl"), f"'p({labels[0]})' exists already")
    assert not (tmp_path / "other.atlantis.jsonl").exists()


def test_responses(files: Path, tmp_path: Path, tiny_recipe: WriteRecipe) -> None:
    recipe = tiny_recipe(
        tmp_path,
        {
            "data": {
                "task": "response",
                "train": str(files / "said.train.jsonl"),
                "test": str(files / "said.test.jsonl"),
                "noise": {"rate": 0.25},
            },
            "models.reference": {"kind": "finetuned", "folds": 2, "num_train_epochs": 1},
            "weights": {"formula": "reference"},
            "train.reduction": "token",
            "score.label_set": False,
            "evaluate": {"answer": "#### (.*)", "max_new_tokens": 8},
            "seeds": [0, 1],
        },
    )
    out = succeed("local", 2, "compare", recipe)
    run = tmp_path / "run"
    assert "exact_match" in out
    shard = pq.read_table(next((run / "scores").glob("shard-*.parquet")))
    assert not any(name.startswith("label_set") for name in shard.column_names)
    assert min(shard["tokens_large"].to_pylist()) > 3
    diagnosis = json.loads((run / "weights.json").read_text())
    assert diagnosis["options"]["length"] == "mean" and diagnosis["classes"] is None
    assert diagnosis["target_lengths"] and diagnosis["gold"]["share_wrong"] == 0.25
    figures = metrics(run, "sft-seed1")
    assert figures["macro_f1"] is None and figures["perplexity"] > 1 and 0 <= figures["exact_match"] <= 1
    predictions = pq.read_table(run / "eval" / "sft-seed1" / "predictions.parquet")
    assert {"id", "gold", "predicted", "log_likelihood", "tokens", "exact_match", "token_f1"} <= {
        *predictions.column_names
    }
    comparison = json.loads((run / "compare" / "comparison.json").read_text())
    assert comparison["metric"] == "exact_match" and comparison["arms"][0]["runs"] == 2
    _answers_as_it_was_evaluated(files / "said.test.jsonl", "completion", tmp_path, "sft-seed1")


def _answers_as_it_was_evaluated(source: Path, drop: str, folder: Path, arm: str) -> None:
    rows = new_rows(source, folder / "new.jsonl", drop)
    succeed("local", 1, "predict", folder / "run", rows, "--arm", arm, "--out", folder / "out.parquet")
    evaluated = pq.read_table(folder / "run" / "eval" / arm / "predictions.parquet")["predicted"].to_pylist()
    assert pq.read_table(folder / "out.parquet")["predicted"].to_pylist() == evaluated


@pytest.mark.parametrize("train_on", [pytest.param("last", marks=pytest.mark.slow), "all"])
def test_chats(files: Path, tmp_path: Path, tiny_recipe: WriteRecipe, chat_model: Path, train_on: str) -> None:
    model = {"model_name_or_path": str(chat_model)}
    recipe = tiny_recipe(
        tmp_path,
        {
            "data": {
                "task": "response",
                "train": str(files / "chat.train.jsonl"),
                "test": str(files / "chat.test.jsonl"),
                "train_on": train_on,
            },
            "models": {"large": model, "small": model, "reference": {"kind": "checkpoint", **model}},
            "weights": {"formula": "product", "temper": 0.5},
            "score.label_set": False,
            "evaluate": {"max_new_tokens": 4},
            "train.num_train_epochs": 1,
        },
    )
    succeed("local", 1, "run", recipe)
    run = tmp_path / "run"
    gold = pq.read_table(run / "eval" / "sft" / "predictions.parquet")["gold"].to_pylist()
    assert gold == [f"It is {label}. #### {label}" for _, label in corpus()[48:]]
    assert metrics(run, "sft")["exact_match"] is not None
    _answers_as_it_was_evaluated(files / "chat.test.jsonl", "messages", tmp_path, "sft")


def test_weights_alone_need_no_test_file(files: Path, tmp_path: Path, tiny_recipe: WriteRecipe) -> None:
    data = {"train": str(files / "weak.csv"), "columns": {"label": "weak"}}
    recipe = tiny_recipe(tmp_path, {"data": data, "arms": {"sft": {"weights": {"formula": "uniform"}}}})
    in_process(recipe, "prepare", "score", "merge")
    assert len(pq.read_table(tmp_path / "run" / "weights.parquet")) == 45
    assert "no test examples" in succeed("local", 1, "run", recipe)
    refuse(launch("local", 1, "evaluate", recipe), "data.test")


def test_too_long_is_said_before_anything_is_trained(files: Path, tmp_path: Path, tiny_recipe: WriteRecipe) -> None:
    text = "the storm caused damage " * 200
    with (tmp_path / "long.jsonl").open("w") as file:
        file.write(json.dumps({"text": text, "label": "Other"}) + "\n")
    changes = {
        "data": {"train": [str(files / "weak.csv")], "test": str(tmp_path / "long.jsonl"), "columns": {"label": "weak"}}
    }
    refuse(launch("local", 1, "prepare", tiny_recipe(tmp_path, changes)), "column", "weak")
    with (tmp_path / "long.jsonl").open("w") as file:
        for row in ({"text": text, "weak": "Other"}, {"text": "The fire caused panic.", "weak": "Cause-Effect"}):
            file.write(json.dumps(row) + "\n")
    recipe = tiny_recipe(tmp_path, changes)
    refuse(launch("local", 2, "prepare", recipe), "example 0", "tokens", "on_too_long")
    out = succeed("local", 1, "prepare", recipe, "--set", "data.on_too_long=drop")
    assert "left out 1 rows of test that are longer than a model's context" in out
    succeed("local", 1, "prepare", recipe, "--set", "data.on_too_long=truncate_prompt")
