"""``atlantis-ds diagnose``: what the weights say, as one page to read and one list to work through."""

from __future__ import annotations

import base64
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlantis_ds.config.schema import Recipe
from atlantis_ds.data.prepare import Examples, load_examples, load_train_labels
from atlantis_ds.data.prompts import marked_sentence
from atlantis_ds.errors import InputError
from atlantis_ds.files import read_json, write_atomic, write_json, write_text
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.diagnostics import plot_weights
from atlantis_ds.weights.formulas import Scores
from atlantis_ds.weights.merge import load_scores, lowest_first, read_weights

COLUMNS = ("id", "sentence", "label", "suggested_label", "p_label", "p_suggested", "weight", "gold")
SHOWN = 50
"""Rows of a list on the page; the CSV file has all."""


def write_diagnosis(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """Write ``diagnosis/`` in the run folder: ``diagnosis.json``, ``diagnosis.html``, ``weights.png`` and
    ``label_errors.csv``, all training examples with those of the lowest weights first.

    Returns:
        what stands in ``diagnosis.json``: the diagnosis of ``weights.json``, with the options of the weights.

    Raises:
        InputError: the weights are missing, or are not those of the run's scores and examples.
    """
    examples = load_examples(folder)
    diagnosis = read_json(folder.weights_info)
    train = load_train_labels(folder)
    scores = load_scores(recipe, folder, train)
    table, info = read_weights(folder)
    if info["fingerprint"] != diagnosis["fingerprint"]:
        raise InputError(f"{folder.weights}: does not belong to {folder.weights_info.name}; run `merge` again")
    weights = table["weight"].to_numpy()
    rows = likely_errors(examples, weights, table["log_weight"].to_numpy(), scores)
    target = folder.root / "diagnosis"
    _write_csv(target / "label_errors.csv", rows)
    plot_weights(target / "weights.png", weights, diagnosis)
    write_text(target / "diagnosis.html", _page(recipe.name, diagnosis, rows, target / "weights.png"))
    write_json(target / "diagnosis.json", diagnosis)
    return diagnosis


def likely_errors(
    examples: Examples, weights: np.ndarray, log_weight: np.ndarray, scores: Scores
) -> list[dict[str, Any]]:
    """All examples, lowest weight first, with the label that the reference model would give.

    Args:
        examples: of the run, n of them to train on.
        weights: float64 [n].
        log_weight: float64 [n], before stabilising: decides between equal weights.
        scores: of the training examples.

    Returns:
        dicts with the keys ``COLUMNS``. ``p_label`` and ``p_suggested`` are the reference model's probabilities among
        the labels of the set, end-of-sequence token included, as in ranking; None, as ``suggested_label`` is, where
        the label set was not scored.
    """
    every = scores.label_set
    chances = best = None
    if every is not None:
        log_likelihood = every.reference + every.eos_reference
        chances = np.exp(log_likelihood - np.logaddexp.reduce(log_likelihood, axis=1, keepdims=True))
        best = chances.argmax(axis=1)
    rows = []
    for row in lowest_first(weights, log_weight).tolist():
        example = examples.train[row]
        entry = {"id": example.id, "sentence": marked_sentence(example), "label": example.label, "gold": example.gold}
        entry |= {"weight": float(weights[row]), "suggested_label": None, "p_label": None, "p_suggested": None}
        if every is not None and chances is not None and best is not None:
            entry["suggested_label"] = examples.labels[best[row]]
            entry["p_label"] = float(chances[row, scores.labels[row]])
            entry["p_suggested"] = float(chances[row, best[row]])
        rows.append({name: entry[name] for name in COLUMNS})
    return rows


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomic(path, write)


def _page(name: str, diagnosis: dict[str, Any], rows: Sequence[dict[str, Any]], picture: Path) -> str:
    """One HTML file with all in it: no script, no other file, no network."""
    import jinja2

    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE)
    return template.render(
        name=name,
        diagnosis=diagnosis,
        picture=base64.b64encode(picture.read_bytes()).decode(),
        options={key: value for key, value in diagnosis["options"].items() if value is not None},
        lists=[("Lowest weights: likely label errors", rows[:SHOWN]), ("Highest weights", rows[: -SHOWN - 1 : -1])],
    )


_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Weights of {{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #e3e8ee; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.warning { background: #fff4e5; border-left: 4px solid #d9822b; padding: .5rem .8rem; margin: .4rem 0; }
.good { background: #eaf6ee; border-left: 4px solid #2f855a; padding: .5rem .8rem; }
.wrong { color: #b3261e; }
img { max-width: 100%; }
</style>
</head>
<body>
<h1>Weights of {{ name }}</h1>
{% for warning in diagnosis.warnings %}
<p class="warning">{{ warning }}</p>
{% else %}
<p class="good">No warnings: effective sample size, tail and class shares are within their bounds.</p>
{% endfor %}
<table>
<tr><td>effective sample size</td><td class="n">{{ "{:,.1f}".format(diagnosis.ess) }} of {{ diagnosis.n }}
  ({{ "{:.1%}".format(diagnosis.ess_fraction) }})</td></tr>
{% for title, key in [("before", "pareto_k"), ("after", "pareto_k_final")] %}
<tr><td>Pareto k-hat {{ title }} stabilising (good below {{ "{:.2f}".format(diagnosis.pareto_k_threshold) }})</td>
<td class="n">{{ "–" if diagnosis[key] is none else "{:.2f}".format(diagnosis[key]) }}</td></tr>
{% endfor %}
<tr><td>largest weight (the mean is 1)</td><td class="n">{{ "{:.4g}".format(diagnosis.max) }}</td></tr>
<tr><td>weight on the heaviest 1% of examples</td>
<td class="n">{{ "{:.1%}".format(diagnosis.top_percent_share) }}</td></tr>
{% for quantile, value in diagnosis.quantiles.items() %}
<tr><td>quantile {{ quantile }}</td><td class="n">{{ "{:.3g}".format(value) }}</td></tr>
{% endfor %}
{% if diagnosis.gold %}
<tr><td>known gold labels</td><td class="n">{{ diagnosis.gold.known }}</td></tr>
{% for title, key in [("wrong labels", "share_wrong"), ("weight on wrong labels", "weight_share_wrong"),
  ("wrong in the lowest tenth of the weights", "lowest_tenth_wrong")] if diagnosis.gold[key] is not none %}
<tr><td>{{ title }}</td><td class="n">{{ "{:.1%}".format(diagnosis.gold[key]) }}</td></tr>
{% endfor %}
{% for title, key in [("overall", "auroc_correct"), ("within class", "auroc_correct_within_class")]
  if diagnosis.gold[key] is not none %}
<tr><td>AUROC for right labels, {{ title }}</td><td class="n">{{ "{:.3f}".format(diagnosis.gold[key]) }}</td></tr>
{% endfor %}
{% endif %}
</table>
<p>Options of the weights: {% for key, value in options.items() %}<code>{{ key }}: {{ value }}</code>
{% endfor %}</p>
<img alt="Distribution of the weights; shares of labels and label lengths"
  src="data:image/png;base64,{{ picture }}">
{% for title, shares in [("Labels", diagnosis.classes), ("Tokens of the label", diagnosis.label_lengths)] if shares %}
<h2>{{ title }}</h2>
<table>
<tr><th></th><th>share of data</th><th>share of weight</th><th>ratio</th></tr>
{% for row in shares %}
<tr><td>{{ row.label }}</td><td class="n">{{ "{:.1%}".format(row.data_share) }}</td>
<td class="n">{{ "{:.1%}".format(row.weight_share) }}</td>
<td class="n{{ "" if 0.5 <= row.ratio <= 2 else " wrong" }}">{{ "{:.2f}".format(row.ratio) }}</td></tr>
{% endfor %}
</table>
{% endfor %}
{% for title, rows in lists %}
<h2>{{ title }}</h2>
<table>
<tr><th>weight</th><th>label</th><th>reference would say</th><th>gold</th><th>sentence</th><th>id</th></tr>
{% for row in rows %}
<tr><td class="n">{{ "{:.3g}".format(row.weight) }}</td>
<td{% if row.gold is not none and row.gold != row.label %} class="wrong"{% endif %}>{{ row.label }}</td>
<td>{% if row.suggested_label %}{{ row.suggested_label }} ({{ "{:.0%}".format(row.p_suggested) }}){% endif %}</td>
<td>{{ row.gold or "" }}</td><td>{{ row.sentence }}</td><td>{{ row.id }}</td></tr>
{% endfor %}
</table>
{% endfor %}
<p>All examples, lowest weight first, are in <code>label_errors.csv</code>.</p>
</body>
</html>
"""
