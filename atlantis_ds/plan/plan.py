"""``atlantis-ds plan``: memory of every mode, the largest micro-batch, hours; without a GPU and without weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atlantis_ds.bundled import bundled_files
from atlantis_ds.cluster.ranks import hush_libraries
from atlantis_ds.config.schema import Model, Recipe, Train
from atlantis_ds.data.examples import Examples, load_examples
from atlantis_ds.data.prepare import prepare
from atlantis_ds.errors import InputError
from atlantis_ds.files import write_json
from atlantis_ds.lm.load import dtype_on, load_tokenizer, model_source
from atlantis_ds.lm.size import PEAKS, Shape, forward_flops, model_shape
from atlantis_ds.plan.memory import largest_micro_batch, training_memory, usable
from atlantis_ds.plan.scoring import CHARACTERS_A_TOKEN, GIB, Sizes, scoring_memory
from atlantis_ds.plan.trace import Activations, activations, build_model, read_config
from atlantis_ds.progress import console
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.train.deepspeed_config import accumulation_steps, refusal

GPUS = {"A100": 80, "H100": 80, "H200": 141, "L4": 24, "4090": 24}
"""Memory in GB, as sold."""
SIZES = {24: 23.5 * GIB, 40: 39.4 * GIB, 80: 79.1 * GIB, 141: 139.7 * GIB}
"""Bytes that GPUs of these sizes in GB report."""
UTILISATION = 0.35
"""Assumed share of the peak; short examples in small batches reach less."""
FASTEST_FIRST = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme"]


@dataclass(frozen=True)
class Lengths:
    """Token counts of the examples (label with its end token), or an assumption about them."""

    source: str
    train: int
    dev: int
    test: int
    labels: int
    prompt_mean: float
    prompt_max: int
    label_mean: float
    label_max: int


def plan(recipe: Recipe, folder: RunFolder, gpus: int, gpu: str, out: Path | None) -> None:
    """Print the plan of a recipe, and write it as JSON if ``out`` is given.

    Raises:
        InputError: an unknown kind of GPU, or a model without a readable config.
    """
    result = estimate(recipe, folder, gpus, gpu)
    _show(recipe, result)
    if out is not None:
        write_json(out, result)


def estimate(recipe: Recipe, folder: RunFolder, gpus: int, gpu: str) -> dict[str, Any]:
    """Memory of every mode and hours of every stage, as written by `plan`.

    Raises:
        InputError: an unknown kind of GPU, or a model without a readable config.
    """
    hush_libraries()
    if gpu not in GPUS:
        raise InputError(f"--gpu {gpu}: unknown; known: {', '.join(GPUS)}")
    model = model_source(recipe, folder, "large")
    config = read_config(model)
    lengths = measure_lengths(recipe, folder, model)
    rows, shapes = _modes(recipe.train, config, lengths, gpus)
    behind = round(lengths.labels * lengths.label_mean) if recipe.score.label_set and lengths.labels else None
    sizes = Sizes.of(config.to_dict(), shapes["full"].parameters)
    score = recipe.score.model_copy(update={"dtype": dtype_on(recipe.score.dtype, torch.device("cuda"))})
    return {
        "model": str(model.model_name_or_path),
        "parameters": shapes["full"].parameters,
        "gpus": gpus,
        "gpu": gpu,
        "lengths": lengths.__dict__,
        "modes": rows,
        "score": str(scoring_memory(sizes, score, lengths.prompt_max, behind)),
        "hours": work_hours(recipe, folder, shapes, lengths, gpus, gpu),
        "take": choose(rows, recipe.train, GPUS[gpu]),
    }


def _modes(train: Train, config: Any, lengths: Lengths, gpus: int) -> tuple[list[dict[str, Any]], dict[str, Shape]]:
    """One row of the plan for each mode and bundled DeepSpeed config; and the shapes of full and lora."""
    files = sorted(bundled_files("ds_configs").values(), key=_speed)
    rows, shapes = [], {}
    for mode in ("full", "lora", "qlora"):
        # QLoRA computes like LoRA; its weights are unpacked one layer at a time.
        traced = _with(train, mode="lora" if mode == "qlora" else mode)
        if mode != "qlora":
            shapes[mode] = model_shape(build_model(config, traced))
            passes = {
                kept: activations(
                    config, _with(traced, gradient_checkpointing=kept), lengths.prompt_max, lengths.label_max
                )
                for kept in (False, True)
            }
        for file in files:
            row = mode_row(train, mode, file, shapes[traced.mode], passes, gpus)
            if row is not None:
                rows.append(row)
    return rows, shapes


def _with(train: Train, **changes: Any) -> Train:
    changes.setdefault("bnb_4bit_quant_storage", None)
    return train.model_copy(update=changes)


def _speed(file: Path) -> int:
    return FASTEST_FIRST.index(file.stem) if file.stem in FASTEST_FIRST else len(FASTEST_FIRST)


def mode_row(
    train: Train, mode: str, file: Path, shape: Shape, passes: dict[bool, Activations], gpus: int
) -> dict[str, Any] | None:
    """One row of the plan, sizes in GiB, for the recipe's micro-batch; None for a combination that is refused."""
    try:
        zero = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON: {error}") from None
    if refusal(_with(train, mode=mode), {"zero_optimization": zero}):
        return None
    micro = train.per_device_train_batch_size
    accumulation = accumulation_steps(train.train_batch_size, micro, gpus)
    memory = training_memory(_with(train, mode=mode), shape, zero, gpus, accumulation)
    taken = passes[train.gradient_checkpointing].bytes(micro)
    return {
        "mode": mode,
        "deepspeed": file.name,
        "parameters": round(memory.parameters / GIB, 2),
        "gradients": round(memory.gradients / GIB, 2),
        "optimizer": round(memory.optimizer / GIB, 2),
        "buffers": round((memory.bucket + memory.gathered) / GIB, 2),
        "activations": round(taken / GIB, 2),
        "total": round(memory.peak(taken) / GIB, 2),
        "host": round(memory.host / GIB, 1),
        "largest_micro_batch": {
            str(size): [largest_micro_batch(memory, passes[kept], usable(room)) for kept in (False, True)]
            for size, room in SIZES.items()
        },
    }


def choose(rows: list[dict[str, Any]], train: Train, size: int) -> str:
    """The fastest ``ds_configs`` file for the recipe's mode on GPUs of ``size`` GB, and the settings that it needs."""
    mine = [(row["deepspeed"], row["largest_micro_batch"][str(size)]) for row in rows if row["mode"] == train.mode]
    wanted = train.per_device_train_batch_size
    kept = train.gradient_checkpointing
    for file, fits in mine:
        if fits[kept] >= wanted:
            return f"{file}, as the recipe is"
    for file, fits in mine:
        if fits[True] >= wanted:
            return f"{file} with gradient_checkpointing: true"
    for file, fits in mine:
        if fits[True]:
            return f"{file} with gradient_checkpointing: true and per_device_train_batch_size: {fits[True]}"
    return f"none: mode {train.mode} does not fit; use more GPUs, larger ones, or a smaller mode (lora, qlora)"


def measure_lengths(recipe: Recipe, folder: RunFolder, model: Model) -> Lengths:
    """Token counts of the examples: from the run folder, else from the data files, else assumed; it names the
    source."""
    try:
        if folder.examples_info.exists():
            examples, source = load_examples(folder), "examples of the run folder"
        else:
            with tempfile.TemporaryDirectory() as place:
                examples, source = prepare(recipe, RunFolder(Path(place))), "the data files"
    except InputError as error:
        return Lengths(f"ASSUMED, no data ({error})", 8000, 0, 2000, 19, 100.0, 200, 8.0, 12)
    try:
        tokenizer = load_tokenizer(model)

        def count(texts: list[str]) -> list[int]:
            return [len(ids) for ids in tokenizer(texts)["input_ids"]]

    except (InputError, OSError):
        source += f", tokens ASSUMED as {CHARACTERS_A_TOKEN} characters each (no tokenizer available)"

        def count(texts: list[str]) -> list[int]:
            return [round(len(text) / CHARACTERS_A_TOKEN) + 1 for text in texts]

    return _lengths(examples, source, count)


def _lengths(examples: Examples, source: str, count: Callable[[list[str]], list[int]]) -> Lengths:
    train = examples.train
    prompts = count([prompt + "\n" for prompt in train.prompts.to_pylist()])
    of_label = [tokens + 1 for tokens in count(examples.labels)] if examples.labels else []
    targets = (
        [of_label[code] for code in train.codes] if of_label else [n + 1 for n in count(train.targets.to_pylist())]
    )
    sizes = len(train), len(examples.dev), len(examples.test), len(of_label)
    mean_prompt, mean_target = sum(prompts) / len(prompts), sum(targets) / len(targets)
    return Lengths(source, *sizes, mean_prompt, max(prompts), mean_target, max(of_label or targets))


def ranking_flops(shape: Shape, lengths: Lengths) -> float:
    """Like ``forward_flops``, for all labels after one prompt. A causal model reads the prompt once for all of them.

    So does an encoder, but each label's cross-attention reads the prompt again: there this is an upper bound.
    """
    if shape.decoder:
        return lengths.labels * forward_flops(shape, lengths.prompt_mean, lengths.label_mean)
    return forward_flops(shape, lengths.prompt_mean, lengths.labels * lengths.label_mean)


def work_hours(
    recipe: Recipe, folder: RunFolder, shapes: dict[str, Shape], lengths: Lengths, gpus: int, gpu: str
) -> list[dict[str, Any]]:
    """Operations and hours of each stage, on ``gpus`` GPUs at ``UTILISATION`` of their bf16 peak."""
    train = recipe.train
    # Forward 2ND, backward 4ND; with frozen weights the backward pass is 2ND; recomputing is one more forward.
    passes = (3 if train.mode == "full" else 2) + train.gradient_checkpointing
    factor = {key: 2 * value for key, value in {"score": 1, "train": passes}.items()}
    models = [shapes["full"]]
    for name in ("small", "reference"):
        source = read_config(model_source(recipe, folder, name))
        models.append(model_shape(build_model(source, _with(train, mode="full"))))
    one = [forward_flops(shape, lengths.prompt_mean, lengths.label_mean) for shape in models]
    ranked = [ranking_flops(shape, lengths) for shape in models]
    epochs = train.num_train_epochs
    reference = recipe.models.reference
    stages = []
    if reference.kind == "finetuned":
        share = reference.folds - 1 if reference.folds > 1 else 1
        others = {"train": 0, "dev": lengths.dev, "both": reference.folds * lengths.dev}[reference.on]
        examples = others + (0 if reference.on == "dev" else share * lengths.train)
        seen = reference.rounds * examples * (reference.num_train_epochs or epochs)
        rounds = f", {reference.rounds} rounds" if reference.rounds > 1 else ""
        name = f"train reference ({reference.folds} folds{rounds}), {factor['train']}ND"
        stages.append(("reference", name, passes * one[2] * seen))
    # An earlier round scores the reference and the model that it starts from, which has the same shape.
    scored = ranked if recipe.score.label_set else one
    earlier = 2 * (reference.rounds - 1) * scored[2]
    every = ", all labels" if recipe.score.label_set else ""
    stages.append(("score", f"score (large, small, reference{every}), 2ND", lengths.train * (sum(scored) + earlier)))
    stages.append(("train", f"train one arm, {factor['train']}ND", passes * one[0] * lengths.train * epochs))
    if recipe.task != "response" and recipe.evaluate.method == "rank":
        stages.append(("evaluate", f"evaluate one arm ({lengths.labels} labels ranked), 2ND", lengths.test * ranked[0]))
    speed = gpus * PEAKS[gpu] * UTILISATION
    return [
        {"what": what, "stage": name, "flops": flops, "hours": flops / speed / 3600} for what, name, flops in stages
    ]


def _show(recipe: Recipe, result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    wide = Console(width=max(console.width, 136), highlight=False)  # a narrow table of numbers cannot be read
    train, lengths = recipe.train, result["lengths"]
    micro = train.per_device_train_batch_size
    console.print(
        f"{result['model']}: {result['parameters'] / 1e9:.3f}e9 weights, {train.dtype}; "
        f"{result['gpus']} x {result['gpu']} ({GPUS[result['gpu']]} GB)"
    )
    console.print(
        f"lengths: {lengths['source']}; {lengths['train']} train examples, prompt {lengths['prompt_mean']:.0f} tokens "
        f"(longest {lengths['prompt_max']}), label and end {lengths['label_mean']:.1f} (longest {lengths['label_max']})"
    )
    sizes = [f"{size} GB" for size in SIZES]
    table = Table(
        box=box.SIMPLE,
        title=f"GiB per GPU (host: per node of up to 8), micro-batch {micro}, "
        f"gradient_checkpointing: {str(train.gradient_checkpointing).lower()}; "
        "right: largest micro-batch without/with it",
    )
    heads = ["weights", "grads", "optim.", "buffers", "activ.", "peak", "host", *sizes]
    table.add_column("mode", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in result["modes"]:
        numbers = [f"{row[k]:.1f}" for k in ("parameters", "gradients", "optimizer", "buffers", "activations", "total")]
        fits = ["/".join(str(n or "-") for n in pair) for pair in row["largest_micro_batch"].values()]
        table.add_row(f"{row['mode']} {Path(row['deepspeed']).stem}", *numbers, f"{row['host']:.0f}", *fits)
    wide.print(table)
    console.print(f"score large, a replica: about {result['score']}")
    hours = Table(box=box.SIMPLE, title=f"at {UTILISATION:.0%} of the bf16 peak (assumed)")
    for head in ("stage", "FLOPs", "hours"):
        hours.add_column(head, justify="left" if head == "stage" else "right")
    for stage in result["hours"]:
        hours.add_row(stage["stage"], f"{stage['flops']:.2e}", f"{stage['hours']:.2f}")
    wide.print(hours)
    console.print(f"take ({train.mode}): {result['take']}")
