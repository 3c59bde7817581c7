"""Do the diagnostics see what is wrong with weights, and say what to change?"""

import io
import itertools
import json
from dataclasses import replace

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
from arviz_stats.base import array_stats
from rich.console import Console
from scipy.stats import norm, spearmanr
from sklearn.metrics import roc_auc_score

from atlantis_ds.config.schema import Reference, Weights
from atlantis_ds.data.examples import Split
from atlantis_ds.weights import diagnostics, formulas
from atlantis_ds.weights.agreement import Suggestions
from atlantis_ds.weights.arms import lowest_first
from atlantis_ds.weights.facts import WeightFacts, auroc_interval, largest, weight_facts
from atlantis_ds.weights.picture import plot_weights

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


@pytest.mark.parametrize(("shape", "said"), [(0.3, None), (0.85, "above 0.70"), (1.5, "no finite mean")])
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
        assert diagnosis["pareto_k"] is None and any("infinite" in warning for warning in diagnosis["warnings"])
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
    assert all("on: dev" in warning for warning in (blind, level))
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
    assert "hardly distinguish" in blind


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
    plot_weights(path, weights, diagnose(weights, log_weight, labels, None))
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] > 1500 and picture.shape[0] >= 600 and picture.std() > 0.05
    assert [file.name for file in tmp_path.iterdir()] == ["weights.png"]


def test_responses_have_shares_by_length_and_no_classes():
    weights, log_weight, tokens, correct = responses()
    diagnosis = diagnose(
        weights, log_weight, None, None, tokens=tokens, correct=correct, options=Weights(length="mean")
    )
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
    warnings = diagnose(weights, log_weight, None, None, tokens=tokens, options=Weights(length=length))["warnings"]
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
    facts = {
        "tokens": tokens,
        "correct": correct,
        "options": Weights(length=length),
        "groups": rng.integers(0, 9, 3000),
    }
    warnings = diagnose(weights, log_weight, None, None, **facts, group_names=list("abcdefghi"))["warnings"]
    assert warnings
    said = " ".join(warnings)
    assert "label" not in said and "class" not in said and "calibrate" not in said and "scope" not in said
    assert ("length: mean" in said) == (length == "sum" and scale > 1)
    numbered = diagnose(weights, log_weight, correct if known else tokens % 2, None, options=Weights(length=length))[
        "warnings"
    ]
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
    bare = dict.fromkeys(("auroc_correct_within_group", "auroc_correct_within_group_interval"))
    without = diagnosis | {"groups": None, "gold": diagnosis["gold"] | bare}
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
            "group": pa.array([None, "rule 7", "rule 2", "rule 7; rule 2"]),
        }
    )
    table = pa.Table.from_batches(table.to_batches(max_chunksize=3))
    facts = weight_facts(Split(table, ["a", "b"], "", ""), Weights(length="mean"), tokens=np.array([1, 2, 1, 1]))
    assert facts.labels.tolist() == [1, 0, 1, 1] and facts.correct.tolist() == [1, 0, -1, 0]
    assert facts.groups.tolist() == [-1, 0, 1, 0, 1] and facts.group_rows.tolist() == [0, 1, 2, 3, 3]
    assert facts.group_names == ["rule 7", "rule 2"]
    assert facts.tokens.tolist() == [1, 2, 1, 1] and facts.options.length == "mean"
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
    plot_weights(path, weights, diagnose(weights, log_weight, None, None, **facts))
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] > 800 and 600 <= picture.shape[0] < 2000 and picture.std() > 0.05


@pytest.mark.parametrize("right,wrong", [(12, 3), (40, 20), (180, 20)])
def test_the_interval_of_an_auroc_holds_the_true_one(right, wrong):
    rng = np.random.default_rng(right)
    shift, held, draws = np.sqrt(2) * norm.ppf(0.86), 0, 400  # two normals this far apart have an AUROC of 0.86
    for _ in range(draws):
        scores = rng.normal(size=right + wrong) + shift * (np.arange(right + wrong) < right)
        auroc = roc_auc_score(np.arange(right + wrong) < right, scores)
        low, high = auroc_interval(auroc, np.array([[right, wrong]]))
        held += low <= 0.86 <= high
    assert held / draws > 0.92
    assert auroc_interval(1.0, np.array([[right, wrong]]))[0] < 0.95  # no certainty from a few


def few_gold_labels(n=300, known=15, shift=1.53, seed=0):
    """Good weights, AUROC 0.86, and gold labels for a few of the examples: two right ones for each wrong one."""
    rng = np.random.default_rng(seed)
    correct = (np.arange(n) % 3 > 0).astype(np.int64)
    log_weight = rng.normal(size=n) + shift * correct
    correct[known:] = -1
    return formulas.stabilise(0.3 * log_weight, np.zeros(n, int), Weights()), log_weight, correct


def test_a_few_gold_labels_do_not_warn_of_good_weights():
    warned = 0
    for seed in range(60):
        weights, log_weight, correct = few_gold_labels(seed=seed)
        warned += any(
            "hardly distinguish" in text
            for text in diagnose(weights, log_weight, None, None, correct=correct)["warnings"]
        )
    assert warned <= 1  # by the AUROC itself it was one in six
    weights, log_weight, correct = few_gold_labels(known=300, shift=0.1)
    assert any(
        "hardly distinguish" in text for text in diagnose(weights, log_weight, None, None, correct=correct)["warnings"]
    )


def test_weights_held_at_a_bound_are_named():
    weights, log_weight, _, gold = noisy_examples()
    labels = np.zeros(4000, int)
    correct = np.where(log_weight + np.random.default_rng(3).normal(size=4000) > 0, 1, 0)
    options = Weights(clip=[0, 1.05])
    weights = formulas.stabilise(log_weight, labels, options)
    facts = WeightFacts(labels=labels, label_names=["a"], correct=correct, options=options)
    diagnosis = diagnostics.diagnose(weights, log_weight, facts)
    assert diagnosis["tied"] > 0.5
    (warning,) = [text for text in diagnosis["warnings"] if "are equal because of" in text]
    gold = diagnosis["gold"]
    assert (
        f"{gold['auroc_correct_unbounded']:.2f}" in warning and gold["auroc_correct_unbounded"] > gold["auroc_correct"]
    )
    weights = formulas.stabilise(log_weight, labels, Weights())
    assert not any("are equal" in text for text in diagnostics.diagnose(weights, log_weight, facts)["warnings"])


def test_weights_at_a_bound_are_equal_for_all_labels():
    """Normalised within each label, they differ by rounding, which must not order the labels."""
    rng = np.random.default_rng(0)
    labels, log_weight = rng.integers(0, 8, 400), 3 * rng.normal(size=400)
    correct = (rng.random(400) < np.linspace(0.5, 1, 8)[labels]).astype(int)
    options = Weights(scope="per_label", clip=[0.25, 3])
    weights = formulas.stabilise(log_weight, labels, options)
    low, high = np.isclose(weights, 0.25), np.isclose(weights, 3)
    exact = np.where(low, 0.25, np.where(high, 3, weights))
    assert len(np.unique(weights[low])) > 1, "this seed shows nothing"
    assert lowest_first(weights, log_weight).tolist() == lowest_first(exact, log_weight).tolist()
    assert set(lowest_first(weights, log_weight)[: low.sum()]) == set(np.flatnonzero(low))
    facts = WeightFacts(labels=labels, label_names=[*"abcdefgh"], correct=correct, options=options)
    found, plain = (diagnostics.diagnose(some, log_weight, facts) for some in (weights, exact))
    assert found["tied"] == plain["tied"] == low.mean()
    auroc = roc_auc_score(correct, exact)
    assert found["gold"]["auroc_correct"] == plain["gold"]["auroc_correct"] == pytest.approx(auroc)
    assert found["gold"]["lowest_tenth_wrong"] == pytest.approx(1 - correct[low].mean())


def test_one_label_that_takes_the_abstentions_makes_the_scope_global():
    """As on TREC's rule labels: what no rule covers is DESC, and two thirds of that are wrong."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 2000)
    correct = (rng.random(2000) < np.where(labels == 0, 0.33, 0.95)).astype(int)
    log_weight = rng.normal(size=2000) - 1.5 * (labels == 0) - 0.5 * (1 - correct)
    options = Weights(scope="per_label")
    facts = {"label_names": ["DESC", "HUM", "LOC", "NUM"], "labels": labels, "correct": correct}
    diagnosis = diagnostics.diagnose(
        formulas.stabilise(log_weight, labels, options), log_weight, WeightFacts(**facts, options=options)
    )
    (warning,) = [text for text in diagnosis["warnings"] if "per_label hides" in text]
    assert "'DESC' in 6" in warning and "Set weights.scope: global" in warning
    assert diagnosis["gold"]["auroc_correct_global"] > diagnosis["gold"]["auroc_correct"] + 0.05
    classes = {row["label"]: row["wrong"] for row in diagnosis["classes"]}
    assert classes["DESC"] == pytest.approx(1 - correct[labels == 0].mean())
    after = diagnostics.diagnose(formulas.stabilise(log_weight, labels, Weights()), log_weight, WeightFacts(**facts))
    assert not any("scope: per_label" in text for text in after["warnings"])  # the advice is not taken back


def test_a_bound_is_not_taken_for_the_scope():
    """Labels that are wrong equally often, held by a narrow bound: another scope would change nothing."""
    rng = np.random.default_rng(0)
    labels, correct = rng.integers(0, 2, 3000), (rng.random(3000) < 0.8).astype(int)
    log_weight = rng.normal(size=3000) + 2 * correct
    options = Weights(scope="per_label", clip=[0.9, 1.1])
    weights = formulas.stabilise(log_weight, labels, options)
    facts = WeightFacts(labels=labels, label_names=["a", "b"], correct=correct, options=options)
    said_of = " ".join(diagnostics.diagnose(weights, log_weight, facts)["warnings"])
    assert "because of weights.clip" in said_of and "scope" not in said_of


@pytest.mark.parametrize("options", [{"temper": 0.05}, {"calibrate": "label_mean"}, {"scope": "per_label"}])
def test_nothing_is_advised_that_is_set(options):
    _, log_weight, labels = collapsed_examples()
    names, codes = np.unique(labels, return_inverse=True)
    chosen = Weights(**options)
    facts = WeightFacts(labels=codes, label_names=names.tolist(), options=chosen)
    weights = formulas.stabilise(log_weight, codes, chosen)
    said_of = " ".join(diagnostics.diagnose(weights, log_weight, facts)["warnings"])
    assert said_of and not any(f"Set weights.{key}" in said_of or f"or weights.{key}" in said_of for key in options)


def said(labels):
    return Suggestions(np.asarray(labels, dtype=np.int32), np.ones(len(labels)), np.ones(len(labels)))


def test_a_reference_that_has_learned_nothing_is_named_without_gold():
    rng = np.random.default_rng(0)
    labels = rng.choice(9, 600, p=[0.2, *[0.1] * 8])
    weights = formulas.stabilise(0.3 * rng.normal(size=600), labels, Weights())
    facts = {"labels": labels, "label_names": [f"l{number}" for number in range(9)]}
    known = WeightFacts(**facts, suggested=said(rng.integers(0, 7, 600)))
    guessed = diagnostics.diagnose(weights, np.log(weights), known)
    assert guessed["agreement"]["never_said"] == ["l7", "l8"]
    assert guessed["agreement"]["share"] == pytest.approx(1 / 9, abs=0.05)
    assert guessed["agreement"]["majority_share"] == pytest.approx(0.2, abs=0.05)
    agrees, never = (
        [text for text in guessed["warnings"] if word in text] for word in ("agrees with", "most likely for no example")
    )
    assert len(agrees) == 1 and "always predicting 'l0'" in agrees[0] and "rounds: 2" in agrees[0]
    assert len(never) == 1 and "2 of 9 labels" in never[0] and "'l7', 'l8'" in never[0]
    # Gold labels that show a good order all the same have the last word.
    correct = (rng.random(600) < 0.7).astype(int)
    ordered = formulas.stabilise(rng.normal(size=600) + 3.0 * correct, labels, Weights())
    good = diagnostics.diagnose(ordered, np.log(ordered), replace(known, correct=correct))
    assert good["gold"]["auroc_correct_within_class_interval"][0] > 0.9
    assert not any("agrees with" in text or "most likely for no" in text for text in good["warnings"])
    bad = diagnostics.diagnose(weights, np.log(weights), replace(known, correct=correct))
    assert any("agrees with" in text for text in bad["warnings"])
    learned = np.where(rng.random(600) < 0.8, labels, rng.integers(0, 9, 600))
    fine = diagnostics.diagnose(weights, np.log(weights), WeightFacts(**facts, suggested=said(learned)))
    assert not any("agrees with" in text or "most likely" in text for text in fine["warnings"])
    assert [row["contradicted"] for row in fine["classes"]] == pytest.approx([0.18] * 9, abs=0.12)


@pytest.mark.parametrize(
    "reference,grouped,wanted,unwanted",
    [
        ({}, False, ["rounds: 2", "column `group`", "on: dev"], ["folds: 4"]),
        ({}, True, ["rounds: 2", "folds_by: group", "on: dev"], ["column `group`"]),
        ({"folds": 1}, False, ["folds: 4", "on: dev"], ["rounds"]),
        ({"folds": 4, "rounds": 2}, False, ["num_train_epochs"], ["rounds: 2"]),
        ({"folds_by": "group"}, True, ["on: dev"], ["folds_by"]),
        ({"on": "dev", "folds": 1}, True, ["data.dev"], ["on: dev", "folds", "rounds"]),
        ({"kind": "checkpoint", "model_name_or_path": "m"}, False, ["kind: finetuned"], ["rounds: 2", "folds: 4"]),
    ],
)
def test_advice_can_be_followed(reference, grouped, wanted, unwanted):
    """Nothing is advised that is set already, or that the recipe would refuse."""
    rng = np.random.default_rng(0)
    labels, correct = rng.integers(0, 3, 900), rng.integers(0, 2, 900)
    facts = {"labels": labels, "label_names": list("abc"), "correct": correct}
    if grouped:
        facts |= {"groups": rng.integers(0, 2, 900), "group_names": ["g", "h"]}
    weights = formulas.stabilise(0.3 * rng.normal(size=900), labels, Weights())
    known = WeightFacts(**facts, reference=Reference(**reference))
    (warning,) = [
        text
        for text in diagnostics.diagnose(weights, np.log(weights), known)["warnings"]
        if "hardly distinguish" in text
    ]
    assert all(words in warning for words in wanted) and not any(words in warning for words in unwanted)


@pytest.mark.parametrize("differ", [True, False])
def test_groups_that_the_reference_contradicts_more_often_speak_for_errors(differ):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    groups = 5 * labels + rng.integers(0, 5, 2000)  # a rule gives one label
    # One label is harder than the other: that alone says nothing of the rules.
    against = rng.random(2000) < np.where(differ & (groups == 3), 0.3, np.where(labels == 1, 0.06, 0.02))
    facts = WeightFacts(
        labels=labels,
        label_names=["a", "b"],
        groups=groups,
        group_names=[f"rule {number}" for number in range(10)],
        suggested=said(np.where(against, 1 - labels, labels)),
    )
    diagnosis = diagnostics.diagnose(np.ones(2000), np.zeros(2000), facts, {"found": False, **NO_NOISE})
    (warning,) = [text for text in diagnosis["warnings"] if "no noise is found" in text]
    assert ("'rule 3' in " in warning) == ("probably contain errors" in warning) == differ
    assert (diagnosis["groups_differ_p"] < 1e-6) == differ
    assert printed(diagnosis)


@pytest.mark.parametrize("labels", [2, 15, 40, 41])
def test_the_noise_matrix_is_drawn_where_noise_is_found(tmp_path, labels):
    weights, log_weight, given, gold = noisy_examples()
    names = [f"label {number} $x$" for number in range(labels)]
    noise = {**NO_NOISE, "found": True, "matrix": (0.8 * np.eye(labels) + 0.2 / labels).tolist(), "labels": names}
    shapes = []
    for found in (True, False):
        diagnosis = diagnose(weights, log_weight, given, gold) | {"noise": noise | {"found": found}}
        plot_weights(tmp_path / "weights.png", weights, diagnosis)
        shapes.append(matplotlib.image.imread(tmp_path / "weights.png").shape)
    assert (shapes[0][:2] != shapes[1][:2]) == (labels <= 40)


NO_NOISE = {"interval": [0, 0.01], "rate": 0.004, "evidence": -1.0, "evidence_clean": -1.01, "temperature": 1.0}
NO_NOISE |= {
    "share": 0.0,
    "matrix": [[1, 0], [0, 1]],
    "labels": ["a", "b"],
    "examples": 2000,
    "pairs": 0,
    "meaning": None,
    "informed": True,
}


def test_groups_that_were_not_judged_by_others_show_no_contradiction():
    labels = np.zeros(8, int)
    facts = WeightFacts(
        labels=labels,
        label_names=["a", "b"],
        groups=np.array([0, 0, 0, 0, 1, 1, 1, 1, 0]),
        group_rows=np.array([0, 1, 2, 3, 4, 5, 6, 7, 7]),
        group_names=["seen", "apart"],
        suggested=said([1, 1, 1, 1, 1, 1, 0, 0]),
        judged=np.array([*[False] * 4, *[True] * 4, False]),
    )
    rows = {row["label"]: row for row in diagnostics.diagnose(np.ones(8), np.zeros(8), facts)["groups"]}
    assert rows["apart"]["contradicted"] == 0.5 and rows["apart"]["data_share"] == 0.5
    assert rows["apart"]["precision"] == pytest.approx([0.5, 0.15, 0.85], abs=0.01)
    assert rows["seen"]["contradicted"] is None and rows["seen"]["data_share"] == 5 / 8
