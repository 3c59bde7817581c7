"""Do the diagnostics see what is wrong with weights, and say what to change?"""

import io
import itertools
import json

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
from arviz_stats.base import array_stats
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from atlantis_ds.config.schema import Weights
from atlantis_ds.data.examples import Split
from atlantis_ds.weights import diagnostics, formulas
from atlantis_ds.weights.facts import WeightFacts, largest, weight_facts

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


def diagnose(weights, log_weight, labels, gold, **facts):
    """Of labels; of responses where ``labels`` is None, with ``correct`` among ``facts``."""
    if labels is not None:
        facts["label_names"], facts["labels"] = np.unique(labels, return_inverse=True)
        facts["label_names"] = facts["label_names"].tolist()
    if gold is not None:
        facts["correct"] = np.array([-1 if true is None else true == said for said, true in zip(labels, gold)])
    return diagnostics.diagnose(weights, log_weight, WeightFacts(**facts))


def printed(diagnosis):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(diagnostics.diagnosis_table(diagnosis))
    return console.export_text()


def responses(n=4000, by_length=0.0, options=None, seed=0):
    """Weights, log weights, tokens and correctness of responses; the longer, the less they weigh, as told."""
    rng = np.random.default_rng(seed)
    tokens = rng.lognormal(3.5, 0.8, n).astype(int) + 1
    correct = (rng.random(n) < 0.8).astype(np.int8)
    log_weight = 0.5 * rng.normal(size=n) - 0.7 * (1 - correct) - by_length * np.log(tokens)
    return formulas.stabilise(log_weight, np.full(n, -1), options or Weights()), log_weight, tokens, correct


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
    text = printed(diagnosis)
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


def test_responses_have_shares_by_length_and_no_classes():
    weights, log_weight, tokens, correct = responses()
    diagnosis = diagnose(weights, log_weight, None, None, tokens=tokens, correct=correct, length="mean")
    assert diagnosis["warnings"] == []
    assert [diagnosis[key] for key in ("classes", "groups", "label_lengths")] == [None] * 3
    bins = [tuple(map(int, row["label"].split("-"))) for row in diagnosis["target_lengths"]]
    assert len(bins) == 10 and bins[0][0] == tokens.min() and bins[-1][1] == tokens.max()
    assert all(end + 1 == start for (_, end), (start, _) in itertools.pairwise(bins))
    for (start, end), row in zip(bins, diagnosis["target_lengths"]):
        inside = (tokens >= start) & (tokens <= end)
        assert row["data_share"] == pytest.approx(inside.mean()) == pytest.approx(0.1, abs=0.03)
        assert row["weight_share"] == pytest.approx(weights[inside].sum() / 4000)
    assert diagnosis["length_correlation"] == pytest.approx(spearmanr(weights, tokens).statistic)
    found = diagnosis["gold"]
    assert found["auroc_correct"] == pytest.approx(roc_auc_score(correct, weights))
    assert found["share_wrong"] == pytest.approx((correct == 0).mean())
    assert found["auroc_correct_within_class"] is None and found["auroc_correct_within_group"] is None
    text = printed(diagnosis)
    assert "AUROC for right responses" in text and "within" not in text and "label" not in text
    assert all(row["label"] in text for row in diagnosis["target_lengths"])


@pytest.mark.parametrize(
    ("tokens", "labels"), [([7] * 50, ["7"]), ([1, 1, 1, 2, 30], ["1", "2", "3-30"]), ([4], ["4"])]
)
def test_few_different_lengths_make_few_ranges(tokens, labels):
    weights = np.ones(len(tokens))
    diagnosis = diagnose(weights, np.log(weights), None, None, tokens=np.array(tokens))
    assert [row["label"] for row in diagnosis["target_lengths"]] == labels
    assert sum(row["data_share"] for row in diagnosis["target_lengths"]) == pytest.approx(1)
    assert diagnosis["length_correlation"] is None


@pytest.mark.parametrize(("by_length", "favoured"), [(1.0, "short"), (-1.0, "long"), (0.2, None)])
@pytest.mark.parametrize("length", ["sum", "mean"])
def test_weights_that_follow_the_length_are_named(by_length, favoured, length):
    weights, log_weight, tokens, _ = responses(by_length=by_length)
    warnings = diagnose(weights, log_weight, None, None, tokens=tokens, length=length)["warnings"]
    named = [warning for warning in warnings if "follow the response length" in warning]
    assert [f"{favoured} responses" in warning for warning in named] == ([True] if favoured else [])
    advised = [warning for warning in warnings if "Set weights" in warning and "weights.length: mean" in warning]
    assert bool(advised) == (length == "sum" and favoured is not None)


@pytest.mark.parametrize("scale", [0, 0.25, 3, 12, 1e4])
@pytest.mark.parametrize("length", ["sum", "mean"])
@pytest.mark.parametrize("known", [True, False])
def test_advice_is_of_the_task_and_not_set_already(scale, length, known):
    rng = np.random.default_rng(5)
    tokens, correct = rng.integers(1, 90, 3000), rng.integers(0, 2, 3000) if known else None
    log_weight = scale * rng.normal(size=3000)
    weights = formulas.stabilise(log_weight, np.full(3000, -1), Weights())
    facts = {"tokens": tokens, "correct": correct, "length": length, "groups": rng.integers(0, 9, 3000)}
    warnings = diagnose(weights, log_weight, None, None, **facts, group_names=list("abcdefghi"))["warnings"]
    assert warnings
    said = " ".join(warnings)
    assert "label" not in said and "class" not in said and "calibrate" not in said and "scope" not in said
    assert ("length: mean" in said) == (length == "sum" and scale > 1)
    numbered = diagnose(weights, log_weight, correct if known else tokens % 2, None, length=length)["warnings"]
    assert length == "sum" or "length" not in " ".join(numbered)


def test_groups_are_shown_for_every_task():
    weights, log_weight, labels, gold = noisy_examples()
    rng = np.random.default_rng(1)
    wrong = gold != labels
    groups = np.where(wrong & (rng.random(4000) < 0.8), 2, rng.integers(-1, 2, 4000))
    names = ["rule a", "rule b", "the bad [rule]"]
    plain = diagnose(weights, log_weight, labels, gold)
    diagnosis = diagnose(weights, log_weight, labels, gold, groups=groups, group_names=names)
    shares = {row["label"]: row for row in diagnosis["groups"]}
    assert set(shares) == {*names, "(no group)"}
    assert shares[names[2]]["data_share"] == (groups == 2).mean() and shares[names[2]]["ratio"] < 0.5
    within = [roc_auc_score(~wrong[groups == g], weights[groups == g]) for g in (0, 1)]
    sizes = [(groups == g).sum() for g in (0, 1)]  # all labels of the third are wrong
    assert diagnosis["gold"]["auroc_correct_within_group"] == pytest.approx(np.average(within, weights=sizes))
    without = diagnosis | {"groups": None, "gold": diagnosis["gold"] | {"auroc_correct_within_group": None}}
    assert plain == without  # groups change no other number
    text = printed(diagnosis)
    assert "within class" in text and "within group" in text and all(name in text for name in shares)
    unknown = diagnose(weights, log_weight, labels, gold, groups=np.full(4000, -1))
    assert unknown == plain


def test_long_tables_show_the_largest_and_count_the_others():
    groups = np.concatenate([np.repeat(np.arange(40), 30), 40 + np.arange(2000)])
    names = [f"source {number}" for number in range(2040)]
    weights = np.random.default_rng(0).random(len(groups))
    weights /= weights.mean()
    diagnosis = diagnose(weights, np.log(weights), None, None, groups=groups, group_names=names)
    shares = diagnosis["groups"]
    assert len(shares) == 1001 and shares[-1]["label"] == "and 1,040 more" and shares[-1]["of"] == 1040
    assert [row["label"] for row in shares[:40]] == names[:40]
    for key in ("data_share", "weight_share"):
        assert sum(row[key] for row in shares) == pytest.approx(1)
        assert sum(row[key] for row in largest(shares, 30)) == pytest.approx(1)
    text = printed(diagnosis)
    assert "source 29 " in text and "source 30 " not in text and "and 2,010 more" in text
    assert json.loads(json.dumps(diagnosis, allow_nan=False)) == diagnosis


def test_facts_come_from_the_columns_of_a_split():
    table = pa.table(
        {
            "target": ["b", "a", "b", "b"],
            "gold": pa.array(["b", "b", None, "a"]),
            "group": pa.array([None, "rule 7", "rule 2", "rule 7"]),
        }
    )
    table = pa.Table.from_batches(table.to_batches(max_chunksize=3))
    facts = weight_facts(Split(table, ["a", "b"], "", ""), Weights(length="mean"), np.array([1, 2, 1, 1]))
    assert facts.labels.tolist() == [1, 0, 1, 1] and facts.correct.tolist() == [1, 0, -1, 0]
    assert facts.groups.tolist() == [-1, 0, 1, 0] and facts.group_names == ["rule 7", "rule 2"]
    assert facts.tokens.tolist() == [1, 2, 1, 1] and facts.length == "mean"
    bare = table.set_column(2, "group", pa.nulls(4, pa.string()))
    facts = weight_facts(Split(bare, None, "", ""), Weights())
    assert facts.labels is None and facts.groups is None and facts.tokens is None


@pytest.mark.parametrize("groups", [None, 3, 900])
@pytest.mark.parametrize("tokens", [False, True])
def test_the_picture_of_responses(tmp_path, groups, tokens):
    weights, log_weight, lengths, _ = responses(n=1800)
    facts = {"tokens": lengths} if tokens else {}
    if groups:
        facts |= {"groups": np.arange(1800) % groups, "group_names": [f"g{number}" for number in range(groups)]}
    path = tmp_path / "weights.png"
    diagnostics.plot_weights(path, weights, diagnose(weights, log_weight, None, None, **facts))
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] > 800 and 600 <= picture.shape[0] < 2000 and picture.std() > 0.05
