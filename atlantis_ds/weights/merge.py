"""Merges the score shards into one weight per training example, and says whether the weights can be trusted."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from atlantis_ds import __version__
from atlantis_ds.data.examples import load_examples
from atlantis_ds.data.prepare import refuse_other_data
from atlantis_ds.files import finished, read_json, write_json, write_table
from atlantis_ds.reference import judged_by_others
from atlantis_ds.run import Run
from atlantis_ds.weights.arms import WEIGHTS_VERSION, read_log_weights, scores_fingerprint, weights_fingerprint
from atlantis_ds.weights.diagnostics import diagnose
from atlantis_ds.weights.facts import weight_facts
from atlantis_ds.weights.formulas import stabilise
from atlantis_ds.weights.picture import plot_weights


def merge(run: Run) -> dict[str, Any]:
    """Write ``weights.parquet``, ``weights.png`` and, last, ``weights.json``.

    Returns:
        the contents of ``weights.json``: diagnostics, options and fingerprints.
    """
    recipe, folder = run.recipe, run.folder
    refuse_other_data(recipe, folder)
    examples = load_examples(folder)
    train = examples.train
    scores = scores_fingerprint(folder)
    mark = weights_fingerprint(recipe, examples, recipe.weights, scores)
    if finished(folder.weights_info, mark) and finished(folder.weights, mark) and folder.weights_plot.exists():
        found: dict[str, Any] = read_json(folder.weights_info)
        # Gold labels or groups may be added later: the weights stay the same, but the diagnostics change.
        if found["examples"] == examples.fingerprint:
            return found
    found_weights = read_log_weights(run, examples, recipe.weights)
    log_weight, noise = found_weights.values, found_weights.noise
    weight = stabilise(log_weight, train.codes, recipe.weights)
    told = noise.as_json(examples.labels or []) if noise else None
    facts = weight_facts(
        train,
        recipe.weights,
        tokens=found_weights.tokens,
        suggested=found_weights.suggested,
        judged=judged_by_others(recipe.models.reference, train),
        reference=recipe.models.reference,
        one_base=found_weights.one_base and not run.folder.round,
    )
    diagnosis = diagnose(weight, log_weight, facts, told)
    if run.folder.round:  # its weights are only for the next round, with fixed options
        diagnosis["warnings"] = []
    info = {
        "fingerprint": mark,
        "scores": scores,
        "examples": examples.fingerprint,
        "version": WEIGHTS_VERSION,
        "options": recipe.weights.model_dump(),
        "seed": recipe.seed,
        "atlantis_ds": __version__,
        **diagnosis,
    }
    ids = train.ids.cast(pa.int64()) if examples.info["whole_ids"] else train.ids  # the same type as in the data
    write_table(
        folder.weights,
        pa.table({"id": ids, "log_weight": log_weight, "weight": weight}),
        {"fingerprint": mark, "scores": scores},
    )
    plot_weights(folder.weights_plot, weight, diagnosis)
    write_json(folder.weights_info, info)
    _log(run, info)
    return info


def _log(run: Run, info: dict[str, Any]) -> None:
    keys = ("ess_fraction", "pareto_k_final", "max", "top_percent_share")
    noise, gold = info["noise"] or {}, info["gold"] or {}
    run.log(
        event="weights",
        arm=f"weights-round-{run.folder.round}" if run.folder.round else "weights",
        **{key: info[key] for key in keys},
        noise=noise.get("rate"),
        auroc=gold.get("auroc_correct"),
        picture=str(run.folder.weights_plot),
    )
