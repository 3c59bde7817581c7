"""Do the diagnostics see what is wrong with weights, and say what to change?"""

import io
import json

import matplotlib.image
import numpy as np
import pytest
from arviz_stats.base import array_stats
from rich.console import Console
from sklearn.metrics import roc_auc_score

from atlantis_ds.config.schema import Weights
from atlantis_ds.weights import diagnostics, formulas

RELATIONS = ["Cause-Effect", "Component-Whole", "Content-Container", "Entity-Destination", "Entity-Origin"]
RELATIONS += ["Instrument-Agency", "Member-Collection", "Message-Topic", "Product-Producer"]
DIRECTED = [f"{name}({ends})" for name in RELATIONS for ends in ("e1,e2", "e2,e1")] + ["Other"]


def noisy_examples(n=4000, scale=1.0, options=None, seed=0):
    """Weights, log weights, labels and gold: a fifth of the labels are wrong and tend to weigh less."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(RELATIONS[:5], n)
    wrong = rng.random(n) < 0.2
    gold = np.where(wrong, np.roll(labels, 1), labels).astype(object)
    log_weight = scale * (rng.normal(size=n) - (gold != labels))
    return formulas.stabilise(log_weight, labels, options or Weights()), log_weight, labels, gold


def collapsed_examples():
    """Like the published collapse: 27 of 4,000 examples, all of one class, hold 88% of the weight."""
    rng = np.random.default_rng(0)
    labels = np.repeat(RELATIONS[:5], [272, 932, 932, 932, 932])
    log_weight = rng.normal(0, 1, 4000)
    log_weight[:27] = np.log(0.88 / 0.12 * np.exp(log_weight[27:]).sum() / 27) + rng.normal(0, 0.3, 27)
    return formulas.stabilise(log_weight, labels, Weights()), log_weight, labels


def diagnose(weights, log_weight, labels, gold):
    names = sorted({str(label) for label in [*labels, *(gold if gold is not None else [])] if label is not None})
    number = {name: index for index, name in enumerate(names)} | {None: -1}

    def numbers(some):
        return None if some is None else np.array([number[label] for label in some])

    return diagnostics.diagnose(weights, log_weight, numbers(labels), numbers(gold), names)


def keys_named(warnings):
    return {key for key in Weights.model_fields for warning in warnings if f"weights.{key}" in warning}


def test_good_weights_raise_no_warning():
    diagnosis = diagnose(*noisy_examples(scale=0.5))
    assert diagnosis["warnings"] == []
    assert diagnosis["ess_fraction"] > 0.7
    assert diagnosis["pareto_k"] < diagnosis["pareto_k_threshold"] == 0.7


def test_numbers_agree_with_the_libraries():
    weights, log_weight, labels, gold = noisy_examples()
    correct = labels == gold
    diagnosis = diagnose(weights, log_weight, labels, gold)
    assert diagnosis["n"] == 4000
    assert diagnosis["ess"] == pytest.approx(1 / np.sum((weights / weights.sum()) ** 2))
    assert diagnosis["pareto_k"] == pytest.approx(float(array_stats.psislw(-log_weight)[1]))
    assert diagnosis["pareto_k_final"] == pytest.approx(diagnosis["pareto_k"])
    assert diagnosis["max"] == weights.max()
    assert diagnosis["quantiles"]["0.5"] == pytest.approx(np.median(weights))
    assert diagnosis["top_percent_share"] == pytest.approx(np.sort(weights)[-40:].sum() / 4000)
    found = diagnosis["gold"]
    assert found["auroc_correct"] == pytest.approx(roc_auc_score(correct, weights))
    assert found["auroc_correct"] == pytest.approx(0.76, abs=0.02)  # Φ(1/√2), a shift by one standard deviation
    by_class = [roc_auc_score(correct[labels == name], weights[labels == name]) for name in RELATIONS[:5]]
    sizes = [(labels == name).sum() for name in RELATIONS[:5]]
    assert found["auroc_correct_within_class"] == pytest.approx(np.average(by_class, weights=sizes))
    assert found["share_wrong"] == pytest.approx((~correct).mean())
    assert found["weight_share_wrong"] == pytest.approx(weights[~correct].sum() / weights.sum())
    assert found["lowest_tenth_wrong"] == pytest.approx((~correct)[np.argsort(weights)[:400]].mean())


def test_the_published_collapse_is_seen_and_named():
    weights, log_weight, labels = collapsed_examples()
    diagnosis = diagnose(weights, log_weight, labels, None)
    assert diagnosis["ess_fraction"] < 0.01
    assert diagnosis["gold"] is None
    first = next(row for row in diagnosis["classes"] if row["label"] == RELATIONS[0])
    assert first["data_share"] == pytest.approx(0.068) and first["weight_share"] > 0.85 and first["ratio"] > 12
    refused, tail, shares = diagnosis["warnings"]
    assert "effective sample size" in refused and "--force" in refused
    assert "k-hat" in tail
    assert repr(RELATIONS[0]) in shares and "6.8% of the data" in shares
    assert {"temper", "length"} <= keys_named([refused]) and {"scope", "calibrate"} <= keys_named([shares])


def test_following_the_advice_clears_the_warnings():
    _, log_weight, labels = collapsed_examples()
    options = Weights(temper=0.6, scope="per_label")
    weights = formulas.stabilise(log_weight, labels, options)
    diagnosis = diagnose(weights, log_weight, labels, None)
    assert diagnosis["warnings"] == []
    assert all(row["ratio"] == pytest.approx(1) for row in diagnosis["classes"])
    assert diagnosis["pareto_k"] >= 0.7  # what the formula gave is still on record


@pytest.mark.parametrize(("target", "said"), [(0.3, "minority"), (0.05, "--force"), (0.6, None)])
def test_the_effective_sample_size_has_two_limits(target, said):
    weights, log_weight, labels, _ = noisy_examples(scale=3, options=Weights(temper=target))
    warnings = [w for w in diagnose(weights, log_weight, labels, None)["warnings"] if "effective" in w]
    assert [said in warning for warning in warnings] == ([True] if said else [])


@pytest.mark.parametrize(("shape", "said"), [(0.3, None), (0.85, "above 0.70"), (1.5, "no mean")])
def test_pareto_k_has_two_limits(shape, said):
    log_weight = -shape * np.log(np.random.default_rng(1).random(20_000))
    labels = np.full(20_000, "a")
    diagnosis = diagnose(formulas.stabilise(log_weight, labels, Weights()), log_weight, labels, None)
    warnings = [warning for warning in diagnosis["warnings"] if "k-hat" in warning]
    assert [said in warning for warning in warnings] == ([True] if said else [])


def test_weights_near_one_have_no_heavy_tail():
    """As of a reference that finds all labels likely: most weights of a class tie, at another height in each class."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["often", "rarely"], [860, 40])
    doubted = rng.random(900) < np.where(labels == "often", 0.02, 0.3)
    log_weight = np.where(doubted, -5.0, -1e-3 * rng.random(900))
    diagnosis = diagnose(formulas.stabilise(log_weight, labels, Weights(scope="per_label")), log_weight, labels, None)
    assert diagnosis["pareto_k_final"] > 1 and diagnosis["max"] < 2
    assert not [warning for warning in diagnosis["warnings"] if "k-hat" in warning]


@pytest.mark.parametrize("n", [1, 2, 24, 25, 400])
@pytest.mark.parametrize("scale", [0, 1, 1e4])
@pytest.mark.parametrize("known", ["all", "some", "none", "all right"])
def test_every_diagnosis_is_json_and_prints(n, scale, known):
    rng = np.random.default_rng(n)
    labels = rng.choice(["a", "[b]"], n)
    gold = rng.choice(["a", "[b]"], n).astype(object)
    if known == "some":
        gold[::2] = None
    elif known != "all":
        gold = labels.astype(object) if known == "all right" else np.full(n, None, dtype=object)
    log_weight = scale * rng.normal(size=n)
    weights = formulas.stabilise(log_weight, labels, Weights())
    diagnosis = diagnose(weights, log_weight, labels, gold)
    assert json.loads(json.dumps(diagnosis, allow_nan=False)) == diagnosis
    assert (diagnosis["gold"] is None) == all(label is None for label in gold)
    if known == "all right":
        assert diagnosis["gold"]["auroc_correct"] is None and diagnosis["gold"]["auroc_correct_within_class"] is None
    if n == 400 and scale == 1e4:
        assert diagnosis["pareto_k"] is None and any("beyond measure" in warning for warning in diagnosis["warnings"])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(diagnostics.diagnosis_table(diagnosis))
    text = console.export_text()
    assert "effective sample size" in text and "k-hat" in text
    assert all(row["label"] in text for row in diagnosis["classes"])


def test_equal_weights_find_no_wrong_labels():
    _, _, labels, gold = noisy_examples()
    order = np.argsort(labels == gold, kind="stable")  # wrong ones first: the order of rows must not matter
    diagnosis = diagnose(np.ones(4000), np.zeros(4000), labels[order], gold[order])
    found = diagnosis["gold"]
    assert found["auroc_correct"] == 0.5
    assert found["lowest_tenth_wrong"] == pytest.approx(found["share_wrong"]) == found["weight_share_wrong"]
    assert diagnosis["ess"] == 4000 and diagnosis["pareto_k"] is None
    (equal,) = diagnosis["warnings"]
    assert "all weights are equal" in equal


def test_weights_that_do_not_see_wrong_labels_are_named():
    _, _, labels, gold = noisy_examples()
    log_weight = np.random.default_rng(2).normal(0, 0.25, 4000)  # an effective sample size of 94%
    weights = formulas.stabilise(log_weight, labels, Weights())
    (blind,) = diagnose(weights, log_weight, labels, gold)["warnings"]
    (level,) = diagnose(weights, log_weight, labels, None)["warnings"]
    assert "AUROC 0.4" in blind and "hardly differ" in level and "formula: uniform" in level
    assert all("models.reference.on: dev" in warning for warning in (blind, level))
    assert diagnose(weights, log_weight, gold, gold)["warnings"] == []  # no wrong labels to be seen


def test_a_class_prior_does_not_pass_for_seeing_wrong_labels():
    rng = np.random.default_rng(3)
    labels = rng.choice(RELATIONS[:5], 4000)
    doubtful = labels == RELATIONS[0]
    gold = np.where(doubtful & (rng.random(4000) < 0.5), RELATIONS[1], labels)
    log_weight = rng.normal(0, 0.1, 4000) - 0.5 * doubtful
    diagnosis = diagnose(formulas.stabilise(log_weight, labels, Weights()), log_weight, labels, gold)
    assert diagnosis["gold"]["auroc_correct"] > 0.9 and diagnosis["gold"]["auroc_correct_within_class"] < 0.6
    (blind,) = diagnosis["warnings"]
    assert "hardly tell" in blind


def test_gold_counts_only_where_it_is_known():
    weights, log_weight, labels, gold = noisy_examples()
    rows = np.arange(4000) % 3 == 0
    partly = np.where(rows, gold, None)
    found = diagnose(weights, log_weight, labels, partly)["gold"]
    assert found == diagnose(weights[rows], log_weight[rows], labels[rows], gold[rows])["gold"]
    assert found["known"] == 1334


@pytest.mark.parametrize("names", [["a"], RELATIONS[:5], DIRECTED, ["$x_{$", "y" * 90]])
@pytest.mark.parametrize("scale", [0, 1, 30])
def test_the_picture_is_a_whole_png(tmp_path, names, scale):
    rng = np.random.default_rng(0)
    labels = rng.choice(names, 500)
    log_weight = scale * rng.normal(size=500)
    weights = formulas.stabilise(log_weight, labels, Weights())
    path = tmp_path / "weights.png"
    diagnostics.plot_weights(path, weights, diagnose(weights, log_weight, labels, None))
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] > 1500 and picture.shape[0] >= 600 and picture.std() > 0.05
    assert [file.name for file in tmp_path.iterdir()] == ["weights.png"]
