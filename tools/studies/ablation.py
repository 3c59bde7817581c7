"""What each choice that the paper leaves open does to the weights: one table from the cached scores of runs.

    python tools/studies/ablation.py runs/conll04_uniform_noise [runs/another ...]

Nothing is scored again. Each row changes one option of the run's own weights, or takes a formula as the paper has it.
AUROC is that of the weight for "the label is right", where gold labels are known.
"""

from __future__ import annotations

import sys
from pathlib import Path

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Weights
from atlantis_ds.data.examples import load_examples
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.diagnostics import diagnose
from atlantis_ds.weights.facts import weight_facts
from atlantis_ds.weights.formulas import log_weights, stabilise
from atlantis_ds.weights.shards import load_scores

FORMULAS = ("product", "ratio", "influence", "reference")
CHANGES = (
    {},
    {"length": "mean"},
    {"eos": True},
    {"calibrate": "label_mean"},
    {"calibrate": "label_set"},
    {"scope": "global"},
    {"scope": "per_label"},
    {"power": 1.0},
    {"power": 2.0},
    {"power": 4.0},
    {"clip": (0.0, 1.6)},
    {"clip": None},
    {"temper": 0.5},
    {"smooth": "psis"},
    {"truncate": "sqrt_n"},
)


def main() -> None:
    columns = ("run", "formula", "options", "AUROC", "within class", "ESS/n", "weight on wrong", "max")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for root in map(Path, sys.argv[1:]):
        folder = RunFolder(root)
        recipe = load_recipe(folder.recipe)
        examples = load_examples(folder)
        train = examples.train
        scores = load_scores(Run(recipe, folder, Ranks.alone()), examples)
        base = recipe.weights
        rows = [("raw", Weights(formula=formula)) for formula in FORMULAS]
        rows += [
            (_said(change) if change else "the recipe's", base.model_copy(update=change))
            for change in CHANGES
            if not change or base.model_copy(update=change) != base
        ]
        if base.formula != "product":
            rows += [("the recipe's", base.model_copy(update={"formula": f})) for f in FORMULAS if f != base.formula]
        for said, options in rows:
            log_weight = log_weights(scores, options, recipe.seed)
            weight = stabilise(log_weight, train.codes, options)
            found = diagnose(weight, log_weight, weight_facts(train, options))
            known = found["gold"] or {}
            auroc, within, wrong = (
                known.get(key) for key in ("auroc_correct", "auroc_correct_within_class", "weight_share_wrong")
            )
            cells = [
                recipe.name,
                options.formula,
                said,
                _number(auroc),
                _number(within),
                f"{found['ess_fraction']:.3f}",
            ]
            print("| " + " | ".join([*cells, _number(wrong), f"{found['max']:.3g}"]) + " |")


def _said(change: dict[str, object]) -> str:
    return ", ".join(f"`{key}: {value}`" for key, value in change.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
