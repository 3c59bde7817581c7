"""Early stopping, the best model by a task's metric, and the profiler."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe, events, in_process, succeed

from atlantis_ds import stages
from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Model
from atlantis_ds.data.examples import load_examples
from atlantis_ds.data.prepare import prepare
from atlantis_ds.errors import InputError
from atlantis_ds.evaluate.predict import trained_model
from atlantis_ds.lm.encode import Encoder
from atlantis_ds.lm.likelihood import score_pairs
from atlantis_ds.lm.load import load_config, load_model, load_scorer, load_tokenizer
from atlantis_ds.lm.size import model_shape
from atlantis_ds.metrics import macro_f1
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.train.deepspeed_config import deepspeed_config
from atlantis_ds.train.engine import _check_machine
from atlantis_ds.train.jobs import arm_job, trained_otherwise, training_summary

KINDS = {"apple": "fruit", "pear": "fruit", "oak": "tree", "elm": "tree", "cow": "animal", "dog": "animal"}
UNIFORM = {"arms": {"sft": {"weights": {"formula": "uniform"}}}}


@pytest.mark.ranks
def test_a_training_ends_when_the_dev_loss_rises_and_is_profiled(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    changes = {
        **UNIFORM,
        "train.learning_rate": 0.05,
        "train.num_train_epochs": 40,
        "train.eval_steps": 2,
        "train.early_stopping_patience": 3,
        "train.profile_steps": 2,
    }
    recipe = tiny_recipe(tmp_path, changes)
    out = succeed("local", 1, "run", recipe)
    run = tmp_path / "run"
    losses = [(event["step"], event["loss"]) for event in events(run, "dev", "sft")]
    best = min(losses, key=lambda each: each[1])[0]
    summary = json.loads((run / "model" / "sft" / "training.json").read_text())
    assert summary["step"] == losses[-1][0] == best + 3 * 2 < 200
    assert f"ended after step {best + 6} of 200: best dev loss at {best}" in out
    trace = json.loads((run / "profile" / "sft" / "rank-0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"ProfilerStep#3", "ProfilerStep#4", "aten::mm"} <= names and "ProfilerStep#2" not in names
    assert "aten::mm" in (run / "profile" / "sft" / "rank-0.txt").read_text()
    # Finished, it is not trained again.
    assert "already finished" in succeed("local", 1, "train", recipe, "--arm", "sft")


def train_on_two_ranks(recipe: Path) -> None:
    prepare(load_recipe(recipe), RunFolder(recipe.parent / "run"))
    succeed("local", 2, "train", recipe, "--arm", "sft")


@pytest.mark.ranks
def test_the_best_model_is_that_of_the_highest_dev_score(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Under ZeRO-3 with ranks of unequal share; the scores are those of the saved model, and training goes on alike."""
    draw = random.Random(0)
    for split, size in (("train", 40), ("dev", 21)):
        words = [draw.choice(list(KINDS)) for _ in range(size)]
        rows = [{"text": f"a {word} of {split} {at}", "label": KINDS[word]} for at, word in enumerate(words)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {
        **UNIFORM,
        "data": {"task": "classification"} | {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "dev")},
        "train.learning_rate": 1e-2,
        "train.num_train_epochs": 14,
        "train.eval_steps": 7,
        "train.metric_for_best_model": "macro_f1",
    }
    train_on_two_ranks(tiny_recipe(tmp_path, changes))
    run, model = tmp_path / "run", tmp_path / "run" / "model" / "sft"
    scores = {event["step"]: event["macro_f1"] for event in events(run, "dev", "sft")}
    summary = json.loads((model / "training.json").read_text())
    first_best = max(scores, key=lambda step: scores[step])
    assert (summary["best_step"], summary["best_score"]) == (first_best, scores[first_best])
    assert len(scores) == 10 and len(set(scores.values())) > 2 and first_best < 70, scores
    assert f"| chosen by | dev macro_f1, {scores[first_best]:.4f} |" in (model / "best" / "README.md").read_text()

    examples = load_examples(RunFolder(run))
    labels, dev = examples.labels, examples.dev
    for name, step in (("best", first_best), ("last", 70)):
        source = Model(model_name_or_path=str(model / name))
        lm = load_scorer(source, "float32", torch.device("cpu"))
        encoder = Encoder(load_tokenizer(source), load_config(source), labels)
        pairs = [[*encoder.pairs([prompt] * len(labels), labels)] for prompt in dev.prompts.to_pylist()]
        predicted = [labels[int(score_pairs(lm, each, 0, 1).sum(dim=1).argmax())] for each in pairs]
        assert macro_f1(dev.targets.to_pylist(), predicted) == pytest.approx(scores[step])

    train_on_two_ranks(tiny_recipe(tmp_path / "loss", {**changes, "train.metric_for_best_model": "loss"}))
    trained = [[event["loss"] for event in events(place, "train", "sft")] for place in (run, tmp_path / "loss" / "run")]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train.early_stopping_patience": 3}, r"train\.early_stopping_patience: there are no dev examples"),
        ({"train.metric_for_best_model": "accuracy"}, r"train\.metric_for_best_model: there are no dev examples"),
        ({"evaluate": {"checkpoint": "best"}}, r"evaluate\.checkpoint: best: there are no dev examples"),
        ({"arms": {"sft": {**UNIFORM["arms"]["sft"], "dev": "last"}}}, r"arms\.sft\.dev: there are no dev examples"),
        ({"arms": {"sft": {**UNIFORM["arms"]["sft"], "gold": True}}}, r"example 0: it has no gold label"),
    ],
)
def test_what_needs_dev_examples_is_refused_before_any_training(
    tiny_recipe: WriteRecipe, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """The reference, which may take hours, is trained first."""
    rows = [{"text": f"sentence {at}", "label": "ab"[at % 2]} for at in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"task": "classification", "train": str(tmp_path / "train.jsonl")}
    weighted = {"arms": {**UNIFORM["arms"], "atlantis": {}}, "models.reference": {"kind": "finetuned"}}
    recipe = tiny_recipe(tmp_path, {**weighted, "data": data, **changes})
    for stage in ("run", "reference"):
        with pytest.raises(InputError, match=said):
            in_process(recipe, stage)
    with pytest.raises(InputError, match=said):
        stages.train(Run(load_recipe(recipe), RunFolder(tmp_path / "run"), Ranks.alone()), "sft", force=False)
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "scores").exists()


def test_a_score_to_choose_by_needs_labels(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    data = {"task": "response", "train": "train.jsonl", "dev_size": 4}
    recipe = tiny_recipe(tmp_path, {**UNIFORM, "data": data, "train.metric_for_best_model": "accuracy"})
    with pytest.raises(InputError, match=r"`train\.metric_for_best_model: accuracy` needs a label set"):
        load_recipe(recipe)


def test_a_best_model_that_was_never_chosen(tmp_path: Path, tiny_recipe: WriteRecipe) -> None:
    run = Run(
        load_recipe(tiny_recipe(tmp_path, {"evaluate": {"checkpoint": "best"}})), RunFolder(tmp_path), Ranks.alone()
    )
    (tmp_path / "model" / "sft" / "last").mkdir(parents=True)
    with pytest.raises(InputError, match="no trained model; run `train --arm sft` first"):
        trained_model(run, "sft")
    (tmp_path / "model" / "sft" / "training.json").write_text("{}")
    with pytest.raises(InputError, match="sft was trained without a dev loss, so it has no `best` model"):
        trained_model(run, "sft")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train.learning_rate": 0.1}, "train.learning_rate: 0.002, not 0.1"),
        ({"train.reduction": "token"}, "train.reduction: example, not token"),
        ({"arms": {"sft": {**UNIFORM["arms"]["sft"], "loss": "gce"}}}, "train.loss: cross_entropy, not gce"),
        ({"train.early_stopping_patience": 2}, "train.early_stopping_patience: None, not 2"),
        ({"train.eval_steps": 2}, None),
        ({"train.per_device_train_batch_size": 2}, None),
    ],
)
def test_an_arm_that_was_trained_otherwise_is_not_evaluated(
    tiny_recipe: WriteRecipe, tmp_path: Path, changes: dict[str, Any], said: str | None
) -> None:
    """A table of arms compares what was trained alike."""
    recipe, folder = load_recipe(tiny_recipe(tmp_path, UNIFORM)), RunFolder(tmp_path / "run")
    job = arm_job(Run(recipe, folder, Ranks.alone()), prepare(recipe, folder), "sft", force=False)
    folder.model("sft").mkdir(parents=True)
    (folder.model("sft") / "training.json").write_text(json.dumps({"settings": job.settings.model_dump(mode="json")}))
    run = Run(load_recipe(tiny_recipe(tmp_path, {**UNIFORM, **changes})), folder, Ranks.alone())
    other = arm_job(run, load_examples(folder), "sft", force=False)
    same = job.fingerprint(run, load_examples(folder)) == other.fingerprint(run, load_examples(folder))
    assert same == (said is None), "`train` does not agree"
    assert trained_otherwise(run.recipe, "sft", training_summary(folder, "sft")) == said
    if said:
        with pytest.raises(InputError, match=re.escape(f"other settings than this recipe's ({said})")):
            stages.evaluate(run, ["sft"])


@pytest.mark.parametrize("patience", [None, 3])
def test_how_often_is_evaluated_counts_where_it_can_end_a_training(
    tiny_recipe: WriteRecipe, tmp_path: Path, patience: int | None
) -> None:
    marks = []
    for steps in (2, 3):
        train = {"train.early_stopping_patience": patience, "train.eval_steps": steps}
        recipe = load_recipe(tiny_recipe(tmp_path, {**UNIFORM, **train}))
        run = Run(recipe, RunFolder(tmp_path / "run"), Ranks.alone())
        examples = prepare(recipe, run.folder)
        marks.append(arm_job(run, examples, "sft", force=False).fingerprint(run, examples))
    assert (marks[0] == marks[1]) == (patience is None)


@pytest.mark.ranks
def test_steps_tell_what_they_do_with_the_machine(tiny_recipe: WriteRecipe, base_model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, {**UNIFORM, "train.logging_steps": 2, "train.deepspeed": "zero3.json"})
    prepare(load_recipe(recipe), RunFolder(tmp_path / "run"))
    out = succeed("local", 2, "train", recipe, "--arm", "sft")
    shape = model_shape(load_model(Model(model_name_or_path=str(base_model)), "float32"))
    steps = events(tmp_path / "run", "train", "sft")
    shares = [event["communication_share"] for event in steps]  # measured in the sixth step
    assert shares[:5] == [None] * 5 and 0 < shares[5] < 1 and shares[6:] == [shares[5]] * 4
    for event in steps:
        assert 0 < event["tflops"] < 1 and 0.1 < event["peak_gib"] < 20 and event["flops_share"] is None  # of a CPU
        a_token = event["tflops"] * 1e12 / (event["tokens_per_s"] / 2)  # two ranks share the tokens
        assert 6 * shape.body < a_token < 6 * (shape.body + shape.head)  # label tokens alone go through the head
    assert re.search(
        r"8/10 steps.*loss [\d.]+, dev [\d.]+, \d+ tokens/s, [\d.e-]+ TFLOP/s, [\d.]+ GiB, \d+% communication", out
    )


@pytest.mark.ranks
def test_the_time_of_collectives_has_waiting_for_ranks_and_no_compute() -> None:
    out = succeed("torchrun", 2, Path(__file__).with_name("communication_probe.py"))
    seconds = dict(re.findall(r"rank (\d): ([\d.]+) s", out))
    assert 0.4 < float(seconds["0"]) < 0.9 and float(seconds["1"]) < 0.4


@pytest.mark.ranks
def test_eager_attention_trains_to_the_same_model(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    losses = {}
    for kind in ("auto", "eager"):
        changes = {**UNIFORM, "train.attn_implementation": kind, "name": kind}
        recipe = tiny_recipe(tmp_path / kind, changes)
        prepare(load_recipe(recipe), RunFolder(tmp_path / kind / kind))
        succeed("local", 1, "train", recipe, "--arm", "sft")
        losses[kind] = [event["loss"] for event in events(tmp_path / kind / kind, "train", "sft")]
    assert losses["eager"] == pytest.approx(losses["auto"], rel=1e-4) and losses["eager"] != losses["auto"]


@pytest.mark.slow  # the compiler takes a minute
def test_compiled_layers_train_to_the_same_model(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    losses = {}
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        changes = {**UNIFORM, "train.torch_compile": compiled, "train.deepspeed": "zero2.json", "train.mode": "lora"}
        recipe = tiny_recipe(folder, changes)
        prepare(load_recipe(recipe), RunFolder(folder / "run"))
        succeed("local", 1, "train", recipe, "--arm", "sft")
        losses[compiled] = [event["loss"] for event in events(folder / "run", "train", "sft")]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"train.torch_compile": True}, "torch.compile does not see the hooks in which ZeRO-3 gathers weights"),
        ({"train.attn_implementation": "flex_attention"}, "flex_attention has no backward pass on CPUs; use auto"),
        ({"train.attn_implementation": "flash_attention_2"}, "flash_attention_2 has no backward pass on CPUs"),
    ],
)
def test_kernels_that_cannot_work_are_refused(
    tiny_recipe: WriteRecipe, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    train = load_recipe(tiny_recipe(tmp_path, change)).train
    with pytest.raises(InputError, match=message):
        _check_machine(train, deepspeed_config(train, world_size=1), torch.device("cpu"))
