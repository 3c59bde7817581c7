"""Arms x seeds: the statistics against plain ones, and the command on a real run that is cut off and goes on."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import WriteRecipe, in_process, launch, refuse, succeed

from atlantis_ds.config.schema import Recipe
from atlantis_ds.evaluate.compare import (
    REPLICATES,
    Trained,
    compare_arms,
    comparison,
    resampled_macro_f1,
)
from atlantis_ds.evaluate.compare_report import comparison_table
from atlantis_ds.metrics import macro_f1
from atlantis_ds.run_folder import RunFolder

LABELS = ["Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Message-Topic(e1,e2)", "Other"]


def answers(gold: list[str], right: float, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [label if draw.random() < right else draw.choice(LABELS) for label in gold]


@pytest.fixture(scope="module")
def gold() -> list[str]:
    draw = random.Random(1)
    return [draw.choice(LABELS) for _ in range(120)]


def trained(gold: list[str], arm: str, right: float, seeds: int = 3) -> list[Trained]:
    found = []
    for seed in range(seeds):
        predicted = answers(gold, right, 10 * seed + len(arm))
        figures = {"macro_f1": macro_f1(gold, predicted), "official": None, "accuracy": 0.5}
        found.append(Trained(arm, seed, predicted, figures, 60.0))
    return found


@pytest.mark.parametrize("apart", [None, "Other"])
def test_macro_f1_of_resamples_is_macro_f1(gold: list[str], apart: str | None) -> None:
    predicted = ["" if row % 11 == 0 else label for row, label in enumerate(answers(gold, 0.6, 3))]
    draws = np.random.default_rng(0).multinomial(len(gold), [1 / len(gold)] * len(gold), 20)
    draws[0] = 1
    for counts, found in zip(draws, resampled_macro_f1(gold, predicted, draws, apart)):
        rows = np.repeat(np.arange(len(gold)), counts)
        assert found == pytest.approx(macro_f1([gold[row] for row in rows], [predicted[row] for row in rows], apart))


def test_a_resample_of_nothing_but_the_label_apart_counts_as_0() -> None:
    gold, draws = ["Other", "Kill"], np.array([[2, 0], [1, 1]])
    assert resampled_macro_f1(gold, gold, draws, "Other").tolist() == [0, 1]


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in found["arms"]}


def test_equal_arms_differ_by_nothing_and_better_ones_by_their_gain(gold: list[str]) -> None:
    runs = [*trained(gold, "sft", 0.5), *trained(gold, "better", 0.8), *trained(gold, "gold", 0.95)]
    runs += [Trained("copy", run.seed, run.outcomes, run.metrics, 1.0) for run in runs[:3]]
    found = comparison(gold, runs, ["sft"], "gold")
    rows = by_name(found)
    assert rows["copy"]["differences"]["sft"] == {"mean": 0, "low": 0, "high": 0, "seeds": 3}
    gain = rows["better"]["differences"]["sft"]
    assert 0 < gain["low"] < gain["mean"] < gain["high"]
    assert gain["mean"] == pytest.approx(rows["better"]["macro_f1"] - rows["sft"]["macro_f1"])
    closed = {arm: [row["gap_closed"][key] for key in ("low", "mean", "high")] for arm, row in rows.items()}
    assert closed["sft"] == closed["copy"] == [0, 0, 0] and closed["gold"] == [1, 1, 1]
    low, mean, high = closed["better"]
    assert 0 < low < mean < min(high, 1)
    assert found == comparison(gold, runs, ["sft"], "gold"), "seeded"
    assert (found["replicates"], found["metric"]) == (REPLICATES, "macro_f1")


def test_gap_closed_is_of_the_seeds_that_all_share(gold: list[str]) -> None:
    runs = [*trained(gold, "sft", 0.5), *trained(gold, "gold", 0.95)]
    low, high = (run.metrics["macro_f1"] for run in (runs[1], runs[4]))
    half = Trained("half", 1, runs[1].outcomes, {**runs[1].metrics, "macro_f1": (low + high) / 2}, 1.0)
    rows = by_name(comparison(gold, [*runs, half], ["sft"], "gold"))
    assert rows["half"]["gap_closed"]["mean"] == pytest.approx(0.5) and rows["half"]["gap_closed"]["seeds"] == 1


def test_where_gold_labels_gain_nothing_there_is_no_gap_to_close(gold: list[str]) -> None:
    runs = [*trained(gold, "sft", 0.7), *trained(gold, "gold", 0.7), *trained(gold, "better", 0.9)]
    found = comparison(gold, runs, ["sft"], "gold")
    assert [row["gap_closed"] for row in found["arms"]] == [None, None, None]


def test_the_gap_is_measured_from_sft_alone(gold: list[str], tmp_path: Path) -> None:
    """Where a recipe has GCE and gold labels but no SFT, GCE is not taken for it."""
    model = {"model_name_or_path": "some/model"}
    uniform = {"formula": "uniform"}
    arms = {"gce": {"weights": uniform, "loss": "gce"}, "gold": {"weights": uniform, "gold": True}}
    tree = {"name": "r", "data": {"format": "grammar"}, "models": {"large": model, "small": model}, "arms": arms}
    runs = [*trained(gold, "gce", 0.5), *trained(gold, "gold", 0.95)]
    found = compare_arms(Recipe.model_validate(tree), RunFolder(tmp_path), gold, runs)
    assert found["peers"] == ["gce"] and [row["gap_closed"] for row in found["arms"]] == [None, None]


def test_an_arm_with_gold_dev_examples_is_taken_for_no_other(gold: list[str], tmp_path: Path) -> None:
    model = {"model_name_or_path": "some/model"}
    uniform = {"weights": {"formula": "uniform"}}
    arms = {
        "sft_mixed": {**uniform, "dev": "mixed"},
        "gold_mixed": {**uniform, "gold": True, "dev": "mixed"},
        "only_dev": {"dev": "alone"},
        "sft": uniform,
        "gold": {**uniform, "gold": True},
    }
    tree = {"name": "r", "data": {"format": "grammar"}, "models": {"large": model, "small": model}, "arms": arms}
    shares = {"sft": 0.5, "sft_mixed": 0.6, "only_dev": 0.55, "gold_mixed": 0.99, "gold": 0.9}
    runs = [run for arm, share in shares.items() for run in trained(gold, arm, share)]
    found = compare_arms(Recipe.model_validate(tree), RunFolder(tmp_path), gold, runs)
    assert found["peers"] == ["sft", "sft_mixed"]
    closed = {row["arm"]: row["gap_closed"] for row in found["arms"]}
    assert closed["gold"]["mean"] == pytest.approx(1) and closed["gold_mixed"]["mean"] > 1


def test_an_interval_of_one_seed_is_marked(gold: list[str]) -> None:
    several = comparison(gold, [*trained(gold, "sft", 0.5), *trained(gold, "arm", 0.8)], ["sft"], None)
    one = comparison(gold, [*trained(gold, "sft", 0.5), *trained(gold, "arm", 0.8, 1)], ["sft"], None)
    assert comparison_table(several).caption is None and "one seed" in str(comparison_table(one).caption)


def test_resamples_without_a_gap_do_not_spoil_its_share() -> None:
    """Four errors in forty: one resample in sixty holds none of them, and there SFT is as good as gold labels."""
    gold = LABELS[:2] * 20
    wrong = [LABELS[3]] * 4 + gold[4:]
    figures = {"macro_f1": macro_f1(gold, wrong), "official": None, "accuracy": 0.9}
    runs = [Trained("sft", 0, wrong, figures, 1.0), Trained("gold", 0, gold, {**figures, "macro_f1": 1.0}, 1.0)]
    rows = by_name(comparison(gold, runs, ["sft"], "gold"))
    closed = {arm: [row["gap_closed"][key] for key in ("low", "mean", "high")] for arm, row in rows.items()}
    assert closed == {"sft": [0, 0, 0], "gold": [1, 1, 1]}


def test_the_table_says_where_arms_were_trained_on_different_hardware(gold: list[str]) -> None:
    sft, better = trained(gold, "sft", 0.5), trained(gold, "better", 0.8)
    one = [replace(run, hardware="NVIDIA A100") for run in [*sft, *better]]
    assert comparison_table(comparison(gold, one, ["sft"], None)).caption is None
    two = [*one, replace(sft[0], seed=9, hardware="NVIDIA H100"), replace(sft[0], seed=10, hardware="")]
    assert "NVIDIA A100; NVIDIA H100" in str(comparison_table(comparison(gold, two, ["sft"], None)).caption)


def test_interval_grows_with_the_spread_over_seeds(gold: list[str]) -> None:
    """About the same mean gain, once of every seed alike, once of one seed alone."""
    gold = 10 * gold

    def run(arm: str, seed: int, right: float) -> Trained:
        predicted = answers(gold, right, 7)
        return Trained(
            arm, seed, predicted, {"macro_f1": macro_f1(gold, predicted), "official": None, "accuracy": 0.5}, 1.0
        )

    def width(rights: list[float]) -> float:
        runs = [run("sft", seed, 0.5) for seed in (0, 1)] + [run("arm", *each) for each in enumerate(rights)]
        difference = by_name(comparison(gold, runs, ["sft"], None))["arm"]["differences"]["sft"]
        return float(difference["high"] - difference["low"])

    assert width([0.5, 0.9]) > 2 * width([0.7, 0.7])


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "spread"), [(5, 0.6), (3, 1.5)])
def test_the_interval_holds_the_true_difference(seeds: int, spread: float) -> None:
    """In 100 studies of two equally good arms with 400 test examples each; 98 and 98 when this was written.

    Without the widening 89 and 80 hold it, of the test examples alone 68 and 38.
    """
    rng = np.random.default_rng(1)
    holds = 0
    for _ in range(100):
        truth = rng.choice(LABELS, 400)
        hard = rng.normal(3.5, 2.5, len(truth))
        runs = []
        for arm in ("sft", "other"):
            hard_for_arm = hard + rng.normal(0, 1, len(truth))
            for seed in range(seeds):
                right = rng.random(len(truth)) < 1 / (1 + np.exp(-hard_for_arm - rng.normal(0, spread)))
                predicted = np.where(right, truth, rng.choice(LABELS, len(truth))).tolist()
                figures = {"macro_f1": macro_f1(truth.tolist(), predicted), "official": None, "accuracy": 0.5}
                runs.append(Trained(arm, seed, predicted, figures, 60.0))
        interval = comparison(truth.tolist(), runs, ["sft"], None)["arms"][1]["differences"]["sft"]
        holds += interval["low"] <= 0 <= interval["high"]
    assert 93 <= holds <= 99


def responses(arm: str, right: float, seeds: int = 3) -> list[Trained]:
    found = []
    for seed in range(seeds):
        values = np.random.default_rng(100 * seed + len(arm)).random(150) < right
        figures = {"macro_f1": None, "exact_match": float(values.mean()), "token_f1": 0.5, "perplexity": 3.0 + seed}
        found.append(Trained(arm, seed, values.tolist(), figures, 60.0))
    return found


def test_responses_are_compared_by_the_mean_of_their_examples(tmp_path: Path) -> None:
    model = {"model_name_or_path": "some/model"}
    uniform = {"formula": "uniform"}
    arms = {"sft": {"weights": uniform}, "better": {}}
    tree = {"name": "r", "data": {"format": "grammar"}, "models": {"large": model, "small": model}, "arms": arms}
    runs = [*responses("sft", 0.4), *responses("better", 0.7)]
    recipe = Recipe.model_validate(tree)
    found = compare_arms(recipe, RunFolder(tmp_path), ["a response"] * 150, runs, "exact_match")
    rows = by_name(found)
    assert found["metric"] == "exact_match" and rows["sft"]["token_f1"] == 0.5 and rows["sft"]["perplexity"] == 4.0
    gain = rows["better"]["differences"]["sft"]
    means = [np.mean([np.mean(run.outcomes) for run in runs if run.arm == arm]) for arm in ("sft", "better")]
    assert gain["mean"] == pytest.approx(means[1] - means[0]) and 0 < gain["low"] < gain["mean"] < gain["high"]
    assert "exact_match" in str(comparison_table(found).title)
    with (tmp_path / "compare" / "runs.csv").open() as file:
        assert next(file) == "arm,seed,exact_match,token_f1,perplexity,seconds\n"
    with (tmp_path / "compare" / "comparison.csv").open() as file:
        assert next(file).startswith("arm,runs,exact_match,sd,token_f1,perplexity,seconds,minus_sft_mean,")


def test_the_interval_of_one_seed_of_responses_is_the_paired_bootstrap_one() -> None:
    """By the normal approximation: 1.96 standard errors of the paired differences to each side."""
    sft, better = responses("sft", 0.4, 1), responses("better", 0.7, 1)
    gain = by_name(comparison(["r"] * 150, [*sft, *better], ["sft"], None, "exact_match"))["better"]["differences"]
    paired = np.subtract(np.array(better[0].outcomes, float), np.array(sft[0].outcomes, float))
    half = 1.96 * paired.std() / np.sqrt(150)
    assert gain["sft"]["low"] == pytest.approx(paired.mean() - half, abs=0.02)
    assert gain["sft"]["high"] == pytest.approx(paired.mean() + half, abs=0.02)


def test_only_common_seeds_are_paired(gold: list[str]) -> None:
    rows = by_name(
        comparison(gold, [*trained(gold, "sft", 0.5, 1), *trained(gold, "arm", 0.7, 3)], ["sft", "gce"], "gold")
    )
    assert rows["arm"]["runs"] == 3 and rows["arm"]["differences"]["sft"]["seeds"] == 1
    assert rows["arm"]["gap_closed"] is None and rows["sft"]["sd"] is None


# --- the command


ARMS = {
    "sft": {"weights": {"formula": "uniform"}},
    "hard": {"drop_lowest": 0.2},
    "gce": {"weights": {"formula": "uniform"}, "loss": "gce"},
    "gold": {"weights": {"formula": "uniform"}, "gold": True},
}


@pytest.mark.slow
def test_compare_stopped_and_gone_on(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    changes = {
        "arms": ARMS,
        "seeds": [0, 7],
        "data.noise": {"kind": "uniform", "rate": 0.3},
        "train.num_train_epochs": 1,
        "timeout_minutes": 1,
    }
    recipe, run = tiny_recipe(tmp_path, changes), tmp_path / "run"
    refuse(launch("local", 1, "compare", recipe, "--part", "1/2"), "examples.json", "run the stage")
    in_process(recipe, "prepare", "score", "merge")
    # Two jobs of an array; then the whole, which trains nothing again.
    succeed("local", 1, "compare", recipe, "--part", "1/2")
    assert not (run / "compare").exists()
    succeed("local", 1, "compare", recipe, "--part", "2/2")
    steps = sum('"event": "train"' in line for line in (run / "log.jsonl").open())
    out = succeed("local", 1, "compare", recipe)
    assert sum('"event": "train"' in line for line in (run / "log.jsonl").open()) == steps == 2 * 4 * 5
    with (run / "compare" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for seed in "07" for arm in ARMS]
    found = json.loads((run / "compare" / "comparison.json").read_text())
    assert len(found["hardware"]) == 1
    assert found["peers"] == ["sft", "gce"] and all(row["runs"] == 2 for row in found["arms"])
    assert (run / "compare" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert found["seeds"] == [0, 7] and len(found["runs"]) == 8 and not found["warnings"]
    assert found["data"]["train"] == 37 and found["data"]["noise"] == pytest.approx(11 / 37)
    assert "torch" in found["versions"] and len(found["fingerprint"]) == 16
    text = (run / "compare" / "comparison.html").read_text(encoding="utf-8")
    assert "macro-F1" in text and found["fingerprint"] in text and found["hardware"][0] in text
    assert "gap" in out and all(arm in out for arm in ARMS)

    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = {(event["arm"], event["step"]): event["loss"] for event in events if event["event"] == "train"}
    # Another seed, another order; the same seed, the same examples in the same order for all arms.
    assert losses["sft-seed0", 1] != losses["sft-seed7", 1]
    assert losses["sft-seed0", 1] == losses["gce-seed0", 1], "GCE begins with the cross-entropy"
    assert losses["sft-seed0", 1] != losses["gold-seed0", 1]
    kept = json.loads((run / "model" / "hard-seed0" / "training.json").read_text())
    assert kept["settings"]["loss"] == "cross_entropy" and kept["seconds"] > 0
    answers = run / "eval" / "gold-seed7" / "predictions.parquet"
    assert pq.read_table(answers).num_rows == 10
    # Other test examples: everything is evaluated again, nothing is trained again.
    succeed("local", 1, "compare", recipe, "--set", "data.test_size=14")
    assert sum('"event": "train"' in line for line in (run / "log.jsonl").open()) == steps
    assert pq.read_table(answers).num_rows == 14


@pytest.mark.ranks
def test_hard_selection_and_files_of_ids(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    from atlantis_ds.cluster.ranks import Ranks
    from atlantis_ds.config.loading import load_recipe
    from atlantis_ds.data.examples import load_examples
    from atlantis_ds.errors import InputError
    from atlantis_ds.run import Run
    from atlantis_ds.weights.arms import arm_weights

    bad = tmp_path / "bad.txt"
    arms = {
        "all": {},
        "hard": {"drop_lowest": 0.2},
        "listed": {"weights": {"formula": "uniform"}, "drop_ids": str(bad)},
    }
    path = tiny_recipe(tmp_path, {"arms": arms})
    in_process(path, "prepare", "score", "merge")
    recipe, folder = load_recipe(path), RunFolder(tmp_path / "run")
    examples, run = load_examples(folder), Run(recipe, folder, Ranks.alone())
    ids = examples.train.ids.to_pylist()
    soft = arm_weights(run, examples, "all")
    hard = arm_weights(run, examples, "hard")
    dropped = hard == 0
    assert dropped.sum() == round(0.2 * len(soft)) and soft[dropped].max() <= soft[~dropped].min()
    assert np.unique(hard[~dropped]).size == 1 and hard.mean() == pytest.approx(1)
    bad.write_text(f"{ids[3]}\n\n {ids[5]} \n")
    listed = arm_weights(run, examples, "listed")
    assert np.flatnonzero(listed == 0).tolist() == [3, 5] and listed.mean() == pytest.approx(1)
    bad.write_text("nobody here\n")
    with pytest.raises(InputError, match="id nobody here is not a training example"):
        arm_weights(run, examples, "listed")
    for command in ("compare", "run"):
        refuse(launch("local", 1, command, path), "id nobody here is not a training example")
    assert not list(folder.root.glob("model/*")), "the last arm is refused before the first one trains"
    bad.write_text("\n".join(ids))
    with pytest.raises(InputError, match="no example is left"):
        arm_weights(run, examples, "listed")
    bad.unlink()
    refuse(launch("local", 1, "check", path), "arms.listed.drop_ids", "no such file")
