"""Warnings about a set of weights, in plain sentences, each with what to change. They never suggest settings that are
already set or that the recipe refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from atlantis_ds.weights.facts import WeightFacts

ESS_WARN = 0.5
ESS_REFUSE = 0.1
ESS_LEVEL = 0.9  # it was 0.94 to 0.96 on gold labels, and on labels whose errors the reference had learned
TAIL_WARN = (
    3.0  # below this multiple of the mean there is no tail: several classes with peaks can also give a k-hat of 2
)
AUROC_WARN = 0.7
AUROC_LOST = 0.02
TIED = 0.25
CLASS_RATIO = (0.5, 2.0)
LENGTH_WARN = 0.5
AGREEMENT_WARN = 0.3
"""As a share of what is left above always predicting the most frequent label, like Cohen's kappa."""
NEVER_SAID = 0.01
GROUPS_DIFFER = 0.001


def noun(diagnosis: dict[str, Any]) -> str:
    """The word for a target of the diagnosed examples."""
    return "response" if diagnosis["classes"] is None else "label"


def warnings(diagnosis: dict[str, Any], facts: WeightFacts) -> list[str]:
    """Args:
    diagnosis: the numbers of ``diagnostics.diagnose``.
    facts: facts about the same examples.
    """
    parts = (_spread, _tail, _class_shares, _length, _agreement, _order, _no_noise)
    return [warning for part in parts for warning in part(diagnosis, facts)]


def _or_mean(facts: WeightFacts) -> str:
    return "" if facts.options.length == "mean" else ", or weights.length: mean"


def _temper(facts: WeightFacts) -> str:
    verb = "Set" if facts.options.temper is None else "Raise"
    return f"{verb} weights.temper (0.5 means half of n){_or_mean(facts)}."


def _ess(diagnosis: dict[str, Any]) -> str:
    return (
        f"the effective sample size is {diagnosis['ess']:,.1f} of {diagnosis['n']:,} examples "
        f"({100 * diagnosis['ess_fraction']:.3g}%)"
    )


def _spread(diagnosis: dict[str, Any], facts: WeightFacts) -> Iterator[str]:
    advice = _temper(facts)
    if diagnosis["ess_fraction"] < ESS_REFUSE:
        yield (
            f"{_ess(diagnosis)}, and the top 1% have {diagnosis['top_percent_share']:.0%} of the weight: `train` "
            f"refuses this without --force. {advice}"
        )
    elif diagnosis["ess_fraction"] < ESS_WARN:
        yield f"{_ess(diagnosis)}: training will depend on a minority of them. {advice}"


def _tail(diagnosis: dict[str, Any], facts: WeightFacts) -> Iterator[str]:
    k, threshold = diagnosis["pareto_k_final"], diagnosis["pareto_k_threshold"]
    if diagnosis["max"] < TAIL_WARN:
        return
    advice = _temper(facts)
    if k == math.inf:
        yield f"Pareto k-hat is infinite: nearly all weights are zero compared with the largest few. {advice}"
    elif k >= 1:
        yield (
            f"Pareto k-hat is {k:.2f}: with 1 or more, the weights have no finite mean, and another sample would give "
            f"very different weights. {advice}"
        )
    elif k >= threshold:
        yield f"Pareto k-hat is {k:.2f}, above {threshold:.2f}: a few large weights decide the result. {advice}"


def _class_shares(diagnosis: dict[str, Any], facts: WeightFacts) -> Iterator[str]:
    """Wrong labels should have small weights, and thus a small share: name only what exceeds this."""
    low, high = CLASS_RATIO
    gold, noise = diagnosis["gold"], diagnosis["noise"]
    outside, deserved = [], False
    for row in diagnosis["classes"] or ():
        right = 1 - row["wrong"] if gold and row["wrong"] is not None else None
        wanted = right / (1 - gold["share_wrong"]) if right and gold["share_wrong"] < 1 else 1.0
        if not low <= row["ratio"] <= high and not low <= row["ratio"] / wanted <= high:
            outside.append(row)
            deserved |= (wanted - 1) * (row["ratio"] - 1) > 0
    if not outside or (noise and noise["found"]):
        return
    outside.sort(key=lambda row: -abs(row["weight_share"] - row["data_share"]))
    named = "; ".join(
        f"{row['label']!r} has {row['data_share']:.1%} of the data and {row['weight_share']:.1%} of the weight"
        for row in outside[:3]
    )
    more = f"; and {len(outside) - 3} more" if len(outside) > 3 else ""
    keep = facts.options.scope == "global" and not deserved
    advice = ["weights.scope: per_label to keep every class's share"] if keep else []
    advice += ["weights.calibrate: label_mean"] if facts.options.calibrate == "none" else []
    advice += ["weights.length: mean"] if facts.options.length != "mean" else []
    yield (
        f"the weights change the class shares by more than {high:g} times: {named}{more}."
        + (f" Set {', or '.join(advice)}." if advice else "")
    )


def _length(diagnosis: dict[str, Any], facts: WeightFacts) -> Iterator[str]:
    correlation = diagnosis["length_correlation"]
    if correlation is not None and abs(correlation) > LENGTH_WARN:
        favoured = "long" if correlation > 0 else "short"
        mean = facts.options.length == "mean"
        yield (
            f"the weights follow the response length: Spearman's correlation is {correlation:.2f}, {favoured} "
            f"responses weigh more{', even with weights.length: mean.' if mean else '. Set weights.length: mean.'}"
        )


def _agreement(diagnosis: dict[str, Any], facts: WeightFacts) -> Iterator[str]:
    """Whether the reference has learned the labels at all, which needs no gold labels. If gold labels show that the
    weights order the labels well, there is no warning."""
    if (found := diagnosis["agreement"]) is None or _seen_to_be_good(diagnosis):
        return
    share, majority = found["share"], found["majority_share"]
    if majority < 1 and (share - majority) / (1 - majority) < AGREEMENT_WARN:
        yield (
            f"the reference agrees with {share:.0%} of the labels; always predicting {found['majority']!r} would "
            f"agree with {majority:.0%}. Either it has not learned the labels, and the weights say little, or few "
            "labels are right. "
            f"{_better_reference('label', facts)}"
        )
    never, labels = found["never_said"], len(facts.label_names)
    if never and (found["never_said_share"] >= NEVER_SAID or len(never) > labels / 5):
        named = ", ".join(map(repr, never[:5])) + (", …" if len(never) > 5 else "")
        yield (
            f"the reference finds {len(never)} of {labels} labels most likely for no example ({named}), and "
            f"{found['never_said_share']:.1%} of the examples have them: it cannot tell whether these are right. "
            "It needs more examples of them, or more training (models.reference.num_train_epochs)."
        )


def _seen_to_be_good(diagnosis: dict[str, Any]) -> bool:
    """Whether gold labels show significantly that the weights separate right from wrong, overall and within class."""
    gold = diagnosis["gold"] or {}
    intervals = [gold.get(f"auroc_{key}_interval") for key in ("correct", "correct_within_class")]
    return all(interval is not None and interval[0] > AUROC_WARN for interval in intervals)


def _order(diagnosis: dict[str, Any], facts: WeightFacts) -> Iterator[str]:
    """Whether the weights separate right from wrong labels, if these are known."""
    if (gold := diagnosis["gold"]) is None or _all_equal(diagnosis):
        return
    what = noun(diagnosis)
    found = [
        (gold[f"auroc_{key}"], gold[f"auroc_{key}_interval"][1])
        for key in ("correct", "correct_within_class")
        if gold[f"auroc_{key}"] is not None
    ]
    # The upper end, because a few known gold labels could cause warnings about good weights by chance.
    if found and min(high for _, high in found) < AUROC_WARN:
        where = " (overall or within class)" if diagnosis["classes"] else ""
        yield (
            f"the weights hardly distinguish right {what}s from wrong ones: AUROC {min(found)[0]:.2f}{where}; 0.50 is "
            f"chance. {_better_reference(what, facts)}"
        )
    after = gold["auroc_correct"]
    if after is None:
        return
    if (without := gold["auroc_correct_global"]) is not None and without - after >= AUROC_LOST:
        worst = max(diagnosis["classes"], key=lambda row: row["wrong"] or 0)
        yield (
            f"weights.scope: per_label hides errors: AUROC {after:.2f}, but {without:.2f} without it. Some labels are "
            f"wrong more often than others ({worst['label']!r} in {worst['wrong']:.0%}), but each keeps its share of "
            "the weight. Set weights.scope: global."
        )
    elif diagnosis["tied"] >= TIED and gold["auroc_correct_unbounded"] - after >= AUROC_LOST:
        yield (
            f"{diagnosis['tied']:.0%} of the weights are equal because of weights.clip or truncate, which hides their "
            f"order: AUROC {after:.2f}, but {gold['auroc_correct_unbounded']:.2f} without it. Widen the bound, or "
            "lower weights.power."
        )


def _no_noise(diagnosis: dict[str, Any], facts: WeightFacts) -> Iterator[str]:
    """Weights that hardly differ: the labels are right, or the reference has learned their errors."""
    noise, what = diagnosis["noise"], noun(diagnosis)
    differ = _groups_differ(diagnosis)
    if noise and not noise["informed"]:
        yield (
            "the reference explains the labels hardly better than their frequencies do: its contradictions are no "
            f"sign of noise, so all weights are 1. {_better_reference(what, facts)}"
        )
    elif noise and not noise["found"]:
        yield (
            f"no noise is found in the {what}s, so all weights are 1 and training with them is plain SFT. Either the "
            f"{what}s are right, or the reference has learned their errors. {differ}{_unseen_errors(what, facts)}"
        )
    elif _all_equal(diagnosis):
        yield "all weights are equal: training with them is plain SFT, and their order says nothing."
    elif diagnosis["gold"] is None and diagnosis["ess_fraction"] > ESS_LEVEL:
        yield (
            f"{_ess(diagnosis)}: the weights hardly differ. Either nearly all {what}s are right, and training without "
            "weights (weights.formula: uniform) is the better choice, or the reference also finds the wrong ones "
            f"likely. {differ}{_unseen_errors(what, facts)}"
        )


def _all_equal(diagnosis: dict[str, Any]) -> bool:
    return bool(diagnosis["ess_fraction"] > 1 - 1e-9)


def _groups_differ(diagnosis: dict[str, Any]) -> str:
    """Right labels are contradicted about equally often in all groups."""
    p = diagnosis["groups_differ_p"]
    if p is None or p >= GROUPS_DIFFER:
        return ""
    rows = [row for row in diagnosis["groups"] if row.get("contradicted")]
    # In a small group a share says little, so name the groups with the most contradicted examples.
    worst = sorted(rows, key=lambda row: -row["contradicted"] * row["examples"])[:3]
    named = ", ".join(f"{row['label']!r} in {row['contradicted']:.0%}" for row in worst)
    chance = f"p = {p:.1g}" if p > 1e-12 else "p below 1e-12"
    return (
        f"The groups differ in how often the reference contradicts them ({chance}), such as {named}: they probably "
        "contain errors. "
    )


def _better_reference(what: str, facts: WeightFacts) -> str:
    reference = facts.reference
    if reference.kind == "checkpoint":
        return (
            f"Fine-tune a reference on the examples (models.reference.kind: finetuned). {_unseen_errors(what, facts)}"
        )
    advice = "Train the reference longer (models.reference.num_train_epochs)"
    if reference.on == "train" and reference.folds == 1:
        advice += ", in folds (models.reference.folds: 4)"
    elif reference.on == "train" and reference.rounds == 1:
        advice += ", in two rounds (models.reference.rounds: 2)"
    return f"{advice}. {_unseen_errors(what, facts)}"


def _unseen_errors(what: str, facts: WeightFacts) -> str:
    """What helps if the reference learns errors because rules, patterns or a model make them repeatedly."""
    reference = facts.reference
    if reference.on != "train":
        return f"More gold {what}s for it (data.dev) help most."
    gold = f"train it on gold {what}s (models.reference: {{on: dev, folds: 1}}, with data.dev)"
    if reference.folds_by == "group":
        return f"If many groups share an error, {gold}."
    by_group = "folds_by: group" if reference.folds > 1 else "{folds: 4, folds_by: group}"
    by_group = f"models.reference{'.' if reference.folds > 1 else ': '}{by_group}"
    if facts.groups is not None:
        return f"A reference learns the errors of rules: set {by_group}, or {gold}."
    return (
        f"If rules or patterns made the {what}s, a reference trained on them learns their errors: add a column "
        f"`group` that names what made each, and set {by_group}, or {gold}."
    )
