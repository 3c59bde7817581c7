"""The model card: base model, data, weights and scores of a model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from atlantis_ds import __version__
from atlantis_ds.data.examples import Examples
from atlantis_ds.files import read_json, write_text
from atlantis_ds.lm.load import load_config
from atlantis_ds.reference import round_before
from atlantis_ds.run import Run
from atlantis_ds.train.jobs import Job
from atlantis_ds.weights.arms import read_log_weights
from atlantis_ds.weights.diagnostics import diagnose
from atlantis_ds.weights.facts import weight_facts

CARD = "README.md"
TAGS = {"relation": "relation-extraction", "classification": "text-classification", "response": "text-generation"}


def training_facts(run: Run, examples: Examples, job: Job) -> dict[str, Any]:
    """Facts for the card that only training knows, ready for JSON: ``training.json`` keeps them for later cards.

    Returns:
        ``arm``, ``recipe``, ``settings`` (of this job), ``base`` (the model trained from), ``encoder_decoder``,
        ``data`` (fingerprint, sizes), ``weights`` (options, ``ess``, ``ess_fraction``, ``pareto_k``,
        ``pareto_k_final``, ``pareto_k_threshold``, ``max``; None for a reference of the first round and for an arm that
        trains only on dev) and ``versions``.
    """
    packages = ["torch", "transformers", "deepspeed", *(["peft"] if job.settings.mode != "full" else [])]
    return {
        "arm": job.name,
        "task": examples.task,
        "recipe": run.recipe.model_dump(mode="json", exclude_unset=True),
        "settings": job.settings.model_dump(mode="json"),
        "base": job.model.model_dump(mode="json", exclude_defaults=True),
        "encoder_decoder": bool(load_config(job.model).is_encoder_decoder),
        "data": {
            "fingerprint": examples.train_fingerprint,
            "train": sum(len(part.rows) for part in job.parts if part.split == "train"),
            "dev": len(examples.dev),
            "dev_trained_on": sum(len(part.rows) for part in job.parts if part.split == "dev"),
            "labels": len(examples.labels or ()),
        },
        "weights": _weights_facts(run, examples, job),
        # Our own version needs no installed package: a checkout on PYTHONPATH also works.
        "versions": {"atlantis_ds": __version__} | {package: version(package) for package in packages},
    }


def _weights_facts(run: Run, examples: Examples, job: Job) -> dict[str, Any] | None:
    keys = ("ess", "ess_fraction", "pareto_k", "pareto_k_final", "pareto_k_threshold", "max")
    if job.arm is None:
        before = round_before(run.recipe, run.folder)
        return {key: read_json(before.weights_info)[key] for key in ("options", *keys)} if before else None
    if job.parts[0].split == "dev":
        return None
    options = run.recipe.arms[job.arm].weights or run.recipe.weights
    facts: dict[str, Any] = {"options": options.model_dump(mode="json")}
    if options.formula == "uniform":
        return facts
    if options == run.recipe.weights:
        diagnosis = read_json(run.folder.weights_info)
    else:
        log_weight = read_log_weights(run, examples, options).values
        diagnosis = diagnose(job.weights[: len(log_weight)], log_weight, weight_facts(examples.train, options))
    return facts | {key: diagnosis[key] for key in keys}


def write_cards(
    models: Path, facts: Mapping[str, Any], metrics: Mapping[str, Any] | None = None, scored: str = "last"
) -> None:
    """Write the model card into ``last`` and, if it exists, ``best`` below ``models``.

    Args:
        models: ``model/ARM`` of the run folder.
        facts: from ``training_facts``, plus the results of the training.
        metrics: the content of ``eval/ARM/metrics.json``, if it exists.
        scored: which of the two models ``metrics`` belongs to.
    """
    for name in ("last", "best"):
        if (models / name).is_dir():
            text = card_text(facts, name, metrics if name == scored else None)
            write_text(models / name / CARD, text)


def card_text(
    facts: Mapping[str, Any], checkpoint: str, metrics: Mapping[str, Any] | None, merged: bool = False
) -> str:
    """One model card: Markdown with the front matter that model hubs read.

    Args:
        facts: as for ``write_cards``.
        checkpoint: last or best.
        metrics: test scores of exactly this model, or None if it was not evaluated.
        merged: whether an adapter was merged into its base model.
    """
    settings, base, data = facts["settings"], facts["base"], facts["data"]
    adapter = settings["mode"] != "full" and not merged
    source = base["model_name_or_path"]
    front = {"library_name": "peft" if adapter else "transformers", "tags": ["atlantis_ds", TAGS[facts["task"]]]}
    if not Path(source).expanduser().is_dir():
        front["base_model"] = source
    form = "LoRA adapter" if adapter else "LoRA adapter merged into its base model" if merged else "all weights"
    where = f"{checkpoint}, optimizer step {facts['step'] if checkpoint == 'last' else facts['best_step']}"
    dev_loss = facts.get("dev_loss") if checkpoint == "last" else facts["best_loss"]
    on_dev = data.get("dev_trained_on")
    sizes = f"{data['train']} train, {data['dev']} dev" + (", trained on with their gold labels" if on_dev else "")
    sizes += f"; {data['labels']} labels" if data["labels"] else ""
    no_loss = "none, because the model was trained on the dev examples" if on_dev else "no dev split"
    rows = [
        ("form", form),
        ("trained from", f"`{source}`" + (f", revision `{base['revision']}`" if base.get("revision") else "")),
        ("checkpoint", where),
        ("data", f"fingerprint `{data['fingerprint']}`"),
        ("examples", sizes),
        ("training", f"fingerprint `{facts['fingerprint']}`"),
        ("mode", f"{settings['mode']}, {settings['dtype']}, `{settings['deepspeed']}`, {facts['world_size']} ranks"),
        ("hardware", facts.get("hardware", "not recorded")),
        ("batch", f"{settings['train_batch_size']} examples, loss divided by each {settings['reduction']}"),
        ("dev loss", no_loss if dev_loss is None else f"{dev_loss:.4f} (mean of -log p(target) in nats)"),
    ]
    if checkpoint == "best":
        metric = settings.get("metric_for_best_model", "loss")
        score = "" if metric == "loss" else f", {facts['best_score']:.4f}"
        rows.append(("chosen by", f"dev {metric}{score}"))
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {facts['recipe']['name']}, {facts['arm']}",
        "",
        f"Trained by atlantis_ds on the weighted loss (1/B) Σ W ℓ, with ℓ the {settings['loss']} of the target.",
        "",
        *_table(("what", ""), rows),
        "",
        "## Weights",
        "",
        *_weights_lines(facts["weights"], alone=bool(on_dev) and not data["train"]),
        "",
        "## Scores on the test split",
        "",
        *_score_lines(metrics),
        "",
        "## Use",
        "",
        "```python",
        *_use_lines(adapter, facts["encoder_decoder"]),
        "```",
        "",
        *_prompt_lines(facts),
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(facts["recipe"], sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _weights_lines(weights: Mapping[str, Any] | None, alone: bool) -> list[str]:
    if alone:
        return ["None: trained only on the gold labels of the dev examples, with equal weights."]
    if weights is None:
        return ["None: a reference model is trained with equal weights."]
    options = weights["options"]
    if options["formula"] == "uniform":
        return ["Uniform: W = 1 for every example (plain fine-tuning)."]
    said = {key: value for key, value in options.items() if key != "formula" and value is not None}
    k_hat = [weights["pareto_k"], weights["pareto_k_final"]]
    before, final = ("none can be fitted" if k is None else f"{k:.2f}" for k in k_hat)
    return _table(
        ("what", ""),
        [
            ("formula", f"`{options['formula']}`"),
            ("options", ", ".join(f"`{key}: {value}`" for key, value in said.items())),
            ("effective sample size", f"{weights['ess']:.1f} ({weights['ess_fraction']:.1%} of the examples)"),
            ("Pareto k-hat before stabilising", before),
            ("Pareto k-hat, final", f"{final} (good below {weights['pareto_k_threshold']:.2f})"),
            ("largest weight", f"{weights['max']:.3g} (the mean is 1)"),
        ],
    )


def _score_lines(metrics: Mapping[str, Any] | None) -> list[str]:
    if metrics is None:
        return ["Not evaluated."]
    names = {
        "macro_f1": "macro-F1",
        "official": "official SemEval score (percent)",
        "accuracy": "accuracy",
        "perplexity": "perplexity, per token",
        "exact_match": "exact match",
        "token_f1": "token F1",
    }
    rows = [(name, f"{metrics[key]:.4f}") for key, name in names.items() if metrics.get(key) is not None]
    return _table(("metric", "value"), [*rows, ("examples", str(metrics["n"]))])


def _prompt_lines(facts: Mapping[str, Any]) -> list[str]:
    what = (
        "The response follows"
        if facts["task"] == "response"
        else "The label is predicted by its log-likelihood, including the end-of-sequence token, after"
    )
    return [f"{what} the prompt" + ("." if facts["encoder_decoder"] else " and a newline (for a chat: its template).")]


def _use_lines(adapter: bool, encoder_decoder: bool) -> list[str]:
    kind = "Seq2SeqLM" if encoder_decoder else "CausalLM"
    name = f"AutoPeftModelFor{kind}" if adapter else f"AutoModelFor{kind}"
    return [
        f"from {'peft' if adapter else 'transformers'} import {name}",
        "from transformers import AutoTokenizer",
        "",
        'path = "."  # this folder',
        f"model, tokenizer = {name}.from_pretrained(path), AutoTokenizer.from_pretrained(path)",
    ]


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
