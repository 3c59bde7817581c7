"""From Python: each function against the command whose work it does, and other trainers' gradients against ours."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ENV, launch, refuse, succeed
from datasets import Dataset
from documented import blocks, run_blocks
from families import tiny
from trainer_probe import expected, measure, off
from transformers import AutoModelForCausalLM, AutoTokenizer

import atlantis_ds as ds
from atlantis_ds import stages
from atlantis_ds.cluster.ranks import start_ranks, stop_ranks
from atlantis_ds.config.schema import Evaluate, Recipe
from atlantis_ds.data.examples import load_examples
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.evaluate.answers import response_metrics
from atlantis_ds.evaluate.predict import rank_labels
from atlantis_ds.evaluate.report import write_evaluation
from atlantis_ds.files import read_table, write_json, write_rows, write_table
from atlantis_ds.lm.encode import Encoder
from atlantis_ds.lm.ways import PLAIN
from atlantis_ds.metrics import metrics
from atlantis_ds.run import Run, open_run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.joined import as_turns, weighted_table
from atlantis_ds.weights.page import write_diagnosis

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512, "pretrain_epochs": 0}
COUNT, LABELS = 80, 19
ARMS = {"sft": 0.5, "atlantis": 0.7}
"""Share of right answers that are made up for each arm."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ``runs/demo`` (examples, models, scores, weights, made-up answers of two arms); we stand in it."""
    root = tmp_path_factory.mktemp("api")
    here, env = Path.cwd(), dict(os.environ)
    os.chdir(root)
    recipe = Recipe.model_validate(
        {
            "name": "demo",
            "seed": 1,
            "data": {"format": "grammar", "train_size": COUNT, "dev_size": 8, "test_size": 60, "noise": {"rate": 0.3}},
            "models": {
                "large": {"scratch": SHAPE},
                "small": {"scratch": {**SHAPE, "hidden_size": 24}},
                "reference": {"kind": "checkpoint", "model_name_or_path": "runs/demo/base/small"},
            },
            "score": {"shard_size": 50},
            "weights": {"formula": "product", "scope": "per_label", "temper": 0.5},
        }
    )
    run = Run(recipe, RunFolder(root / "runs" / "demo"), start_ranks(1.0))
    stages.prepare(run)
    stages.score(run)
    make_a_reference_that_knows(run.folder)
    stages.merge(run)
    make_answers(run.folder)
    stop_ranks()
    os.environ.clear()
    os.environ.update(env)
    yield root
    os.chdir(here)


def make_a_reference_that_knows(folder: RunFolder) -> None:
    """Scores of a reference that finds the true label likelier: the models here are not trained at all."""
    gold, draw = load_examples(folder).train.gold_codes, np.random.default_rng(0)
    given, done = load_examples(folder).train.codes, 0
    for path in sorted(folder.scores.glob("shard-*.parquet")):
        table, info = read_table(path)
        every = draw.normal(0, 1, (len(table), LABELS))
        every[np.arange(len(table)), gold[done : done + len(table)]] += 5
        own = every[np.arange(len(table)), given[done : done + len(table)]]
        done += len(table)
        for name, values in (("label_set_logp_reference", every.tolist()), ("logp_reference", own.tolist())):
            at = table.column_names.index(name)
            table = table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))
        write_table(path, table, info)


def make_answers(folder: RunFolder) -> None:
    test, draw = load_examples(folder).test, np.random.default_rng(1)
    ids, gold = test.ids.to_pylist(), test.golds.to_pylist()
    labels = load_examples(folder).labels or []
    for arm, right in ARMS.items():
        for seed in range(2):
            said = [label if draw.random() < right else str(draw.choice(labels)) for label in gold]
            rows = [{"id": id, "gold": true, "predicted": said[at]} for at, (id, true) in enumerate(zip(ids, gold))]
            name = "weighted" if arm == "atlantis" else arm
            Path(f"{name}-{seed}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        columns = {"id": ids, "gold": gold, "predicted": said}
        write_evaluation(folder.evaluation(arm), metrics(labels, ids, gold, said), columns, {"fingerprint": "x"}, False)
        write_json(folder.model(arm) / "training.json", {"seconds": 1.0})


def columns_of(folder: RunFolder) -> tuple[pa.Table, np.ndarray]:
    """All score shards of a run as one table, and the labels given."""
    paths = sorted(folder.scores.glob("shard-*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in paths]), load_examples(folder).train.codes


def test_importing_is_light() -> None:
    code = "import sys, atlantis_ds as ds; ds.__all__; assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True, timeout=60)
    assert set(ds.__all__) <= set(dir(ds)) and all(getattr(ds, name) for name in ds.__all__)
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        ds.weight  # noqa: B018


def test_weights_are_those_of_merge_to_the_last_bit(place: Path) -> None:
    folder = open_run("runs/demo").folder
    merged = pq.read_table(folder.weights)["weight"].to_numpy()
    assert np.ptp(merged) > 0.5
    assert ds.weights_from_scores("runs/demo").tobytes() == merged.tobytes()
    scores, labels = columns_of(folder)
    own = {"formula": "product", "scope": "per_label", "temper": 0.5}
    assert ds.weights_from_scores(scores, labels, seed=1, **own).tobytes() == merged.tobytes()


@pytest.mark.parametrize(
    "options",
    [
        {"formula": "posterior", "power": 2},
        {"formula": "posterior", "eos": True, "scope": "per_label"},
        {"formula": "reference", "clip": [0, 1.6], "calibrate": "label_set"},
        {"formula": "ratio", "length": "mean", "calibrate": "label_mean"},
        {"formula": "shuffled", "shuffled_from": "influence", "smooth": "psis"},
    ],
    ids=lambda options: options["formula"],
)
def test_weights_from_columns_are_those_of_the_run(place: Path, options: dict[str, Any]) -> None:
    """Of shards read one by one, and of columns: a table, and arrays of what the formula needs and no more."""
    run = {"scope": "global", "temper": None, **options}
    expected_weights = ds.weights_from_scores("runs/demo", **run)
    assert np.ptp(expected_weights) > 0.01 and expected_weights.mean() == pytest.approx(1)
    scores, labels = columns_of(open_run("runs/demo").folder)
    found = ds.weights_from_scores(scores, labels, seed=1, **options)
    assert found.dtype == np.float64 and found.tobytes() == expected_weights.tobytes()
    arrays = {name: np.array(scores[name].to_pylist()) for name in scores.column_names if name != "id"}
    if options["formula"] == "posterior":
        arrays = {name: array for name, array in arrays.items() if name.startswith("label_set_")}
    elif options["formula"] == "reference":
        arrays = {name: arrays[name] for name in ("logp_reference", "label_set_logp_reference")}
    assert ds.weights_from_scores(arrays, labels, seed=1, **options).tobytes() == expected_weights.tobytes()


def test_the_posterior_of_a_reference_alone_tells_right_labels_from_wrong_ones(place: Path) -> None:
    folder = open_run("runs/demo").folder
    scores, labels = columns_of(folder)
    only = scores.select(["label_set_logp_reference"])
    weights = ds.weights_from_scores(only, labels, formula="posterior")
    correct = load_examples(folder).train.correct
    assert weights[correct == 1].mean() > 3 * weights[correct == 0].mean()
    diagnosis = ds.diagnose(weights, [str(label) for label in labels], [*map(str, load_gold(folder))])
    assert diagnosis["gold"]["auroc_correct"] > 0.9 and diagnosis["gold"]["share_wrong"] == 0.3


def load_gold(folder: RunFolder) -> list[int]:
    gold: list[int] = load_examples(folder).train.gold_codes.tolist()
    return gold


BAD: list[tuple[Any, Any, dict[str, Any], str]] = [
    ({"logp_large": [0.0]}, None, {}, "needs the columns logp_small, logp_reference"),
    ({"logp_reference": [0.0, np.nan]}, None, {"formula": "reference"}, "logp_reference: row 1 is not finite"),
    ({"logp_reference": ["a"]}, None, {"formula": "reference"}, "logp_reference: not numbers"),
    ({"logp_reference": [[0.0]]}, None, {"formula": "reference"}, r"has shape \(1, 1\); it must be \[n\]"),
    ({"logp_reference": [0.0, 1.0]}, [0], {"formula": "reference"}, "the same length: logp_reference 2, labels 1"),
    ({"logp_reference": [0.0]}, None, {"formula": "reference", "scope": "per_label"}, "labels: these weights"),
    ({"label_set_logp_reference": [[0.0, 1.0]]}, [2], {"formula": "posterior"}, "labels: with a label set of 2"),
    (
        {"label_set_logp_reference": [[0.0, 1.0]]},
        ["a"],
        {"formula": "posterior"},
        "whole numbers: indices into the set, from 0",
    ),
    ({"label_set_logp_reference": [[0.0, 1.0]]}, None, {"formula": "posterior"}, "labels: these weights"),
    ({"logp_reference": [0.0]}, None, {"formla": "reference"}, "weights.formla: unknown key; did you mean `formula`"),
    ({"logp_reference": [0.0]}, None, {"power": -1}, "weights.power: input should be greater than 0"),
    ({}, None, {"formula": "uniform"}, "nothing is given"),
    ({"logp_reference": [0.0]}, None, {"formula": "reference", "seed": -1}, "seed: -1 is below 0"),
    ({"logp_reference": []}, [], {"formula": "reference"}, "scores: there are no examples"),
    ({"logp_reference": [0.0, 1.0]}, ["a", np.nan], {"scope": "per_label", "formula": "reference"}, "labels: row 1"),
    ({"logp_reference": [0.0, 1.0]}, pd.Series(["a", None]), {"formula": "reference"}, "labels: row 1 has none"),
    ({"logp_reference": [0.0, 1.0]}, [["a"], ["b"]], {"formula": "reference"}, "labels: give a list"),
    ({"logp_reference": [0.0, 1.0]}, "ab", {"formula": "reference"}, "labels: give a list"),
    (
        pa.table({"label_set_logp_reference": [[0.0, 1.0], None, [0.0, 1.0, 2.0, 3.0]]}),
        [0, 1, 0],
        {"formula": "posterior"},
        "rows of different lengths",
    ),
    ("runs/demo", None, {"clip": {1}}, "weights.clip"),
    ("nowhere", None, {}, "nowhere: no run here"),
    ("runs/demo", None, {"formula": "wrong"}, "recipe.yaml: weights.formula"),
    ("runs/demo", [0], {}, "a run folder has its own"),
]


@pytest.mark.parametrize(("scores", "labels", "options", "words"), BAD, ids=lambda value: str(value)[:30])
def test_bad_scores_are_refused(place: Path, scores: Any, labels: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        ds.weights_from_scores(scores, labels, **options)
    assert "\n" not in str(error.value)


def test_columns_of_pandas_are_those_of_numpy(place: Path) -> None:
    columns = pd.DataFrame({"label_set_logp_reference": [[-1.0, -2.0], [-2.0, -1.0], [-1.5, -0.5]]})
    array = np.array(columns["label_set_logp_reference"].to_list())
    options: dict[str, Any] = {"formula": "reference", "calibrate": "label_set"}
    frame = columns.assign(logp_reference=array[:, 0])
    weights = ds.weights_from_scores(frame, pd.Series([0, 0, 1], index=[7, 8, 9]), **options)
    own = {"label_set_logp_reference": array, "logp_reference": array[:, 0]}
    assert np.array_equal(weights, ds.weights_from_scores(own, [0, 0, 1], **options))
    clip = np.array([0, 1.6])
    assert np.array_equal(
        ds.weights_from_scores("runs/demo", clip=clip), ds.weights_from_scores("runs/demo", clip=[0, 1.6])
    )


def test_gold_labels_that_are_missing_are_not_wrong_ones() -> None:
    weights, labels, gold = [1.0, 2.0, 0.5, 1.0], ["a", "b", "a", "b"], ["a", "b", "b", None]
    expected = ds.diagnose(weights, labels, gold)
    assert expected["gold"]["known"] == 3
    for column in (pd.Series([*gold[:3], np.nan]), pd.array(gold, dtype="string"), pa.array(gold)):
        assert ds.diagnose(pd.Series(weights), pd.Series(labels), column)["gold"] == expected["gold"]
    with pytest.raises(InputError, match="labels: row 1 has none"):
        ds.diagnose(weights, ["a", None, "a", "b"])


def test_the_diagnosis_does_not_depend_on_the_scale_of_the_weights() -> None:
    weights = np.exp(2.5 * np.random.default_rng(0).normal(size=1000))
    found = [ds.diagnose(weights / weights.mean() * scale) for scale in (1, 1e-4, 1e4, 1e300)]
    assert len(found[0]["warnings"]) == 2 and "Pareto" in found[0]["warnings"][1]
    for other in found[1:]:
        assert other["max"] == pytest.approx(found[0]["max"]) and other["warnings"] == found[0]["warnings"]
        assert other["quantiles"] == pytest.approx(found[0]["quantiles"])


@pytest.mark.parametrize("kind", [str, int, " {} ".format])
def test_numbers_and_texts_may_be_the_same_label(kind: Any) -> None:
    labels = [0, 1, 1, 0, 1]
    gold: list[Any] = [*map(kind, [0, 1, 1, 1]), None]
    for one, other in ((labels, gold), ([*map(str, labels)], gold)):
        found = ds.diagnose([1.0, 2.0, 0.5, 1.0, 1.0], one, other)
        assert (found["gold"]["known"], found["gold"]["share_wrong"]) == (4, 0.25)
        assert [row["label"] for row in found["classes"]] == ["1", "0"]


def test_the_diagnosis_is_the_runs(place: Path) -> None:
    diagnosis = ds.diagnose("runs/demo")
    write_diagnosis(open_run("runs/demo"))
    assert diagnosis == json.loads(Path("runs/demo/diagnosis/diagnosis.json").read_text())
    weights, labels = ds.weights_from_scores("runs/demo"), ds.weighted_dataset("runs/demo")["target"]
    of_weights = ds.diagnose(weights, labels)
    for key in ("n", "ess", "pareto_k_final", "max", "top_percent_share", "tied"):
        assert of_weights[key] == diagnosis[key]
    known = ("label", "data_share", "weight_share")
    pairs = zip(by_label(of_weights), by_label(diagnosis), strict=True)
    assert all([one[key] for key in known] == [other[key] for key in known] for one, other in pairs)
    collapsed = ds.diagnose(np.r_[1000.0, np.ones(99)])
    assert collapsed["classes"] is None and "effective sample size" in collapsed["warnings"][0]
    for bad in ([1.0, -1.0], [0.0, 0.0], [[1.0]], [np.nan], ["a"], [[1.0], [1.0, 2.0]]):
        with pytest.raises(InputError, match="weights: they must be"):
            ds.diagnose(bad)
    with pytest.raises(InputError, match="labels: 1 for 2 weights"):
        ds.diagnose([1.0, 1.0], ["a"])


def by_label(diagnosis: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(diagnosis["classes"], key=lambda row: row["label"])


def test_runs_are_compared_from_a_folder_and_from_files(place: Path, tmp_path: Path) -> None:
    of_run = ds.compare_runs("runs/demo")
    assert of_run["peers"] == ["sft"] and [row["arm"] for row in of_run["arms"]] == ["sft", "atlantis"]
    files: dict[str, Any] = {"sft": ["runs/demo/eval/sft"], "atlantis": ["runs/demo/eval/atlantis/predictions.parquet"]}
    of_files = ds.compare_runs(files)
    for one, other in zip(of_run["arms"], of_files["arms"], strict=True):
        assert one["differences"] == other["differences"] and one["macro_f1"] == other["macro_f1"]
    gain = of_files["arms"][1]["differences"]["sft"]
    assert gain["low"] < gain["mean"] < gain["high"] and gain["seeds"] == 1
    # The order of the rows is not that of the examples.
    rows = pq.read_table("runs/demo/eval/atlantis/predictions.parquet").to_pylist()
    with (tmp_path / "turned.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[::-1])
    assert ds.compare_runs({**files, "atlantis": [tmp_path / "turned.csv"]})["arms"] == of_files["arms"]


@pytest.mark.parametrize("change", ["other examples", "other gold labels"])
def test_an_evaluation_on_other_test_examples_is_not_compared(change: str, place: Path, tmp_path: Path) -> None:
    """The test split may change after an arm was evaluated; scores and models stay valid."""
    root = shutil.copytree("runs/demo", tmp_path / "demo")
    rows = pq.read_table(root / "eval/atlantis/predictions.parquet").to_pydict()
    if change == "other examples":
        rows = {name: values[::-1] for name, values in rows.items()}
    else:
        rows["gold"] = rows["gold"][::-1]
    figures = json.loads((root / "eval/atlantis/metrics.json").read_text())
    write_evaluation(root / "eval" / "atlantis", figures, rows, {"fingerprint": "x"}, False)
    with pytest.raises(InputError, match="eval/atlantis: evaluated on other test examples"):
        ds.compare_runs(root)


def test_a_model_that_has_diverged_predicts_no_label(place: Path) -> None:
    """With NaN for every label, the first label of the set would be predicted for every example."""
    examples = load_examples(RunFolder(place / "runs" / "demo"))
    tokenizer = AutoTokenizer.from_pretrained("runs/demo/base/small")
    lm = AutoModelForCausalLM.from_pretrained("runs/demo/base/small").eval()
    encoder = Encoder(tokenizer, lm.config, examples.labels)
    prompts = encoder.prompt_ids(examples.test.prompts.slice(0, 3).to_pylist())
    options = Evaluate()
    assert len(rank_labels(lm, encoder, prompts, examples.labels or [], options, PLAIN, print)) == 3
    lm.get_output_embeddings().weight.data[:] = np.nan
    with pytest.raises(RunError, match="is nan; the model diverged"):
        rank_labels(lm, encoder, prompts, examples.labels or [], options, PLAIN, print)


def test_predictions_that_do_not_belong_together_are_refused(place: Path, tmp_path: Path) -> None:
    lines = Path("sft-0.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    cases = {
        "short.jsonl": (lines[1:], "other test examples"),
        "gold.jsonl": ([json.dumps(first | {"gold": "another"}), *lines[1:]], "another gold answer"),
        "twice.jsonl": ([*lines, lines[0]], "is a duplicate"),
        "empty.jsonl": ([json.dumps(first | {"gold": None}), *lines[1:]], "has no gold answer"),
        "column.jsonl": ([json.dumps({"id": 1, "gold": "a"})], "no column 'predicted'"),
    }
    for name, (text, words) in cases.items():
        (tmp_path / name).write_text("\n".join(text))
        with pytest.raises(InputError, match=f"{name}.*{words}"):
            ds.compare_runs({"sft": ["sft-0.jsonl"], "other": [tmp_path / name]})
    with pytest.raises(InputError, match="no such file"):
        ds.compare_runs({"sft": ["gone.jsonl"]})
    with pytest.raises(InputError, match="there is no arm 'gold'"):
        ds.compare_runs({"sft": ["sft-0.jsonl"]}, upper="gold")
    with pytest.raises(InputError, match="metric: 'f1' is not one of"):
        ds.compare_runs({"sft": ["sft-0.jsonl"]}, metric="f1")
    with pytest.raises(InputError, match="no gold answer is 'none'"):
        ds.compare_runs({"sft": ["sft-0.jsonl"]}, negative_label="none")


def test_responses_are_compared_by_their_words(tmp_path: Path) -> None:
    for arm, said in (("sft", "a red cat"), ("weighted", "the red dog")):
        rows = [{"id": id, "gold": "red dog", "predicted": said} for id in range(20)]
        (tmp_path / f"{arm}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arms = {arm: [tmp_path / f"{arm}.jsonl"] for arm in ("sft", "weighted")}
    found = ds.compare_runs(arms, metric="token_f1")["arms"]
    assert [row["token_f1"] for row in found] == [0.5, 1.0] and found[1]["differences"]["sft"]["mean"] == 0.5
    assert found[0]["perplexity"] is None and found[0]["seconds"] is None


@pytest.mark.parametrize("kind", [int, bool, float, " {} ".format])
def test_predictions_are_read_as_prepare_reads_labels(kind: Any, tmp_path: Path) -> None:
    """The label 0 is not an empty prediction, and neither spaces nor a column of floats make a label another one."""
    rows = [{"id": id, "gold": int(id % 2), "predicted": kind(id % 2)} for id in range(20)]
    if kind is bool:
        rows = [{**row, "gold": bool(row["gold"])} for row in rows]
    path = tmp_path / "all-right.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert ds.compare_runs({"arm": path})["arms"][0]["macro_f1"] == 1
    assert ds.compare_runs({"arm": path}, metric="exact_match")["arms"][0]["exact_match"] == 1
    empty = [{**row, "predicted": None if row["id"] % 2 else float("nan")} for row in rows]
    path.write_text("\n".join(map(json.dumps, empty)))
    assert ds.compare_runs({"arm": path})["arms"][0]["accuracy"] == 0
    path.write_text(json.dumps({"id": 1, "gold": [1], "predicted": 1}))
    with pytest.raises(InputError, match="the label is not a text or whole number"):
        ds.compare_runs({"arm": path})


def test_only_the_answers_of_responses_are_compared(tmp_path: Path) -> None:
    """As in the run itself, from files and from a folder ``eval/ARM``, which knows its ``evaluate.answer``."""
    ids, answer = [str(id) for id in range(20)], "#### (.*)"
    gold = [f" by one way\n#### {id}" for id in ids]
    said = [f"by another\n#### {id if at < 15 else 'no'}" for at, id in enumerate(ids)]
    figures, of_each = response_metrics(ids, gold, said, [-1.0] * 20, [2] * 20, answer)
    info = {"fingerprint": "x", "settings": {"answer": answer}}
    folder = tmp_path / "eval" / "arm"
    write_evaluation(folder, figures, {"id": ids, "gold": gold, "predicted": said, **of_each}, info, False)
    for path in (folder, folder / "predictions.parquet"):
        (found,) = ds.compare_runs({"arm": path}, metric="exact_match", answer=answer)["arms"]
        assert found["exact_match"] == figures["exact_match"] == 0.75 and found["token_f1"] == figures["token_f1"]
    with pytest.raises(InputError, match=r"evaluated with evaluate\.answer: '#### \(\."):
        ds.compare_runs({"arm": folder}, metric="exact_match")
    with pytest.raises(InputError, match="must capture something"):
        ds.compare_runs({"arm": folder}, metric="exact_match", answer="####")
    with pytest.raises(InputError, match="captures nothing in the gold response of test example '0'"):
        ds.compare_runs({"arm": folder / "predictions.parquet"}, metric="exact_match", answer="A: (.*)")


def plain_sums(lm: Any, tokenizer: Any, prompts: list[str], labels: list[str], eos: bool) -> np.ndarray:
    """One forward for each prompt and label, full logits in float64."""
    sums = np.zeros((len(prompts), len(labels)))
    for row, prompt in enumerate(prompts):
        before = tokenizer(prompt + "\n")["input_ids"]
        for at, label in enumerate(labels):
            ids = [*tokenizer(label, add_special_tokens=False)["input_ids"], *[tokenizer.eos_token_id] * eos]
            with torch.no_grad():
                logits = lm(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].double()
            sums[row, at] = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()
    return sums


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_label_log_likelihoods_are_those_of_plain_forwards(place: Path, family: str) -> None:
    """gemma2 adds a mask where others read it: only the check keeps it off the fast ways."""
    tokenizer = AutoTokenizer.from_pretrained("runs/demo/base/small")
    data = ds.weighted_dataset("runs/demo")
    prompts, labels = data["prompt"][:5], sorted(set(data["target"]))[:6]
    lm = AutoModelForCausalLM.from_pretrained("runs/demo/base/small") if family == "qwen2" else wide(family, tokenizer)
    lm.train()
    for eos in (False, True):
        found = ds.label_log_likelihoods(lm, tokenizer, prompts, labels, eos=eos, tokens_per_batch=256)
        assert found.shape == (5, 6) and found.dtype == np.float64 and lm.training
        np.testing.assert_allclose(found, plain_sums(lm, tokenizer, prompts, labels, eos), rtol=0, atol=1e-3)
    if family == "qwen2":
        loaded = ds.label_log_likelihoods("runs/demo/base/small", None, prompts, labels, eos=True, dtype="float32")
        np.testing.assert_array_equal(loaded, ds.label_log_likelihoods(lm, tokenizer, prompts, labels, eos=True))
        for bad, words in (([""], "no tokens"), ([], "at least"), (["a", "a"], "'a' is a duplicate")):
            with pytest.raises(InputError, match=words):
                ds.label_log_likelihoods(lm, tokenizer, prompts, bad)
        series = ds.label_log_likelihoods(lm, tokenizer, pd.Series(prompts), np.array(labels), eos=True)
        np.testing.assert_array_equal(series, loaded)
        texts: list[Any] = ["one text", [None], [float("nan")], [0]]
        for bad in texts:
            with pytest.raises(InputError, match="prompts: give a list of texts"):
                ds.label_log_likelihoods(lm, tokenizer, bad, labels)
            with pytest.raises(InputError, match="labels: give a list of texts"):
                ds.label_log_likelihoods(lm, tokenizer, prompts, bad)
        with pytest.raises(InputError, match="tokenizer: a model in memory"):
            ds.label_log_likelihoods(lm, None, prompts, labels)
        with pytest.raises(InputError, match="dtype: 'int8'"):
            ds.label_log_likelihoods("runs/demo/base/small", None, prompts, labels, dtype="int8")


def wide(family: str, tokenizer: Any) -> Any:
    """A tiny model of a family, with an embedding for every token."""
    lm = tiny(family)
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return lm


def test_a_bf16_model_gives_fp32_logits_and_keeps_its_own_head(place: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("runs/demo/base/small")
    lm = AutoModelForCausalLM.from_pretrained("runs/demo/base/small", dtype=torch.bfloat16)
    head = lm.get_output_embeddings()
    found = ds.label_log_likelihoods(lm, tokenizer, ["one prompt", "another"], ["a label", "b"])
    assert lm.get_output_embeddings() is head and head.weight.dtype == torch.bfloat16
    loaded = ds.label_log_likelihoods(
        "runs/demo/base/small", None, ["one prompt", "another"], ["a label", "b"], dtype="bfloat16"
    )
    np.testing.assert_array_equal(found, loaded)


def test_weights_are_joined_by_id(place: Path) -> None:
    data = ds.weighted_dataset("runs/demo")
    merged = pq.read_table("runs/demo/weights.parquet")
    assert data["id"] == merged["id"].to_pylist() and data["weight"] == merged["weight"].to_pylist()
    assert data.column_names == ["id", "prompt", "target", "weight"]
    own = data.remove_columns("weight").add_column("mine", [*range(COUNT)]).shuffle(seed=0)
    joined = ds.weighted_dataset("runs/demo", own)
    assert joined["mine"] == own["mine"] != [*range(COUNT)]
    assert joined["weight"] == [data["weight"][row] for row in own["mine"]]
    bad: list[tuple[Dataset, str]] = [
        (own.select(range(COUNT - 1)), r"is missing \(1 are missing\)"),
        (own.map(lambda row: {"id": "x" if row["mine"] == 3 else row["id"]}), "id x has no weight"),
        (own.select([0, *range(COUNT)]), "occurs more than once"),
        (own.remove_columns("id"), "needs a column `id`"),
        (joined, "and no `weight`"),
    ]
    for dataset, words in bad:
        with pytest.raises(InputError, match=words):
            ds.weighted_dataset("runs/demo", dataset)


def test_the_command_writes_what_the_dataset_holds(place: Path, tmp_path: Path) -> None:
    data = [*ds.weighted_dataset("runs/demo")]
    for suffix in ("jsonl", "parquet", "csv"):
        write_rows(tmp_path / f"out.{suffix}", weighted_table(open_run("runs/demo").folder))
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == data
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == data
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = [row | {"weight": float(row["weight"])} for row in csv.DictReader(file)]
    assert rows == data
    out = succeed("local", 1, "weights", place / "runs" / "demo", tmp_path / "chat.jsonl", "--messages")
    assert f"{COUNT} weighted examples" in out
    chat = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert chat == [*ds.weighted_dataset("runs/demo", messages=True)]
    assert [turn["content"] for turn in chat[0]["messages"]] == [data[0]["prompt"], data[0]["target"]]
    refuse(launch("local", 1, "weights", place / "runs" / "demo", tmp_path / "out.txt"), "out.txt", ".parquet")
    assert not (tmp_path / "out.txt").exists()


def test_a_chat_keeps_apart_what_is_learned() -> None:
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    learned = [{"role": "assistant", "content": "Hi"}]
    batch = pa.record_batch({"prompt": [json.dumps(before)], "target": [json.dumps(learned)]})
    assert as_turns(batch, chat=True, messages=False).to_pylist() == [{"prompt": before, "target": learned}]
    assert as_turns(batch, chat=True, messages=True).to_pylist() == [{"messages": before + learned}]


def test_the_trainer_of_the_docs_takes_our_gradient(place: Path) -> None:
    """Two micro-batches of two examples of unequal length, then a step with one example in its second micro-batch."""
    steps = measure(7)
    assert [len(rows) for rows, _ in steps] == [4, 3]
    for rows, gradient in steps:
        wanted = expected(rows)
        assert off(gradient, wanted) < 1e-5
        assert float(gradient.norm()) == pytest.approx(float(wanted.norm()), rel=1e-5)


def test_weights_divided_by_those_of_the_micro_batch_give_another_gradient(place: Path) -> None:
    names = run_blocks(blocks("transformers Trainer")[:1], {"ds": ds})

    class Naive(names["WeightedTrainer"]):  # type: ignore[misc]
        loss_is_scaled_for_ga = False

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            self.examples = inputs["weight"].sum()
            return super().compute_loss(model, inputs, return_outputs)

    for rows, gradient in measure(7, "Naive", names | {"Naive": Naive}):
        assert off(gradient, expected(rows)) > 0.05


@pytest.mark.slow  # two interpreters that import transformers' Trainer
def test_two_processes_take_the_gradient_of_one(place: Path) -> None:
    out = succeed("torchrun", 2, Path(__file__).with_name("trainer_probe.py"), place)
    found = [float(line.split()[1]) for line in out.splitlines() if line.startswith("OFF")]
    assert len(found) == 2 and max(found) < 1e-5, out[-2000:]


def test_the_code_of_the_docs_runs(place: Path) -> None:
    names: dict[str, Any] = {}
    of_page = ("", "Weights from scores", "Scores of your own", "Can the weights be trusted?", "Does it help?")
    for heading in (*of_page, "Use the weights elsewhere", "transformers Trainer", "ms-swift", "Fine-tuning services"):
        assert blocks(heading), heading
        run_blocks(blocks(heading), names)
    assert names["weights"].mean() == pytest.approx(1) and names["comparison"]["arms"][1]["runs"] == 2
    assert names["log_likelihoods"].shape == (8, LABELS) and names["trainer"].state.global_step == 3
    rows = [json.loads(line)["messages"] for line in Path("swift.jsonl").read_text().splitlines()]
    assert [row[-1]["loss_scale"] for row in rows] == ds.weighted_dataset("runs/demo")["weight"]
    repeated = len(Path("repeated.jsonl").read_text().splitlines())
    assert abs(repeated - COUNT) < 4 * np.sqrt(COUNT / 4)


def test_trl_takes_our_gradient(place: Path) -> None:
    """TRL is no part of the environment of the tests; where it is (``.venv-bench``), its section of the docs runs."""
    pytest.importorskip("trl", reason="trl is not installed: it is in tools/bench/requirements.txt")
    names = run_blocks(blocks("transformers Trainer")[:1], {"ds": ds, "data": ds.weighted_dataset("runs/demo")})
    run_blocks(blocks("TRL"), names)
    assert names["trainer"].state.global_step == 3
    fresh = AutoModelForCausalLM.from_pretrained(names["path"], dtype=torch.float32)
    options = {"max_length": None, "packing": False, "bf16": False}
    config = names["SFTConfig"]
    names |= {"model": fresh, "arguments_of": lambda **given: config(**given, **options)}
    for rows, gradient in measure(7, "WeightedSFTTrainer", names):
        assert off(gradient, expected(rows)) < 1e-5
