"""Train one job from its first optimizer step, or from its last checkpoint, to its model."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from atlantis_ds.cluster.preemption import stop_asked
from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.schema import Recipe
from atlantis_ds.data.prepare import Examples
from atlantis_ds.errors import InputError, Preempted, RunError
from atlantis_ds.events import append_log
from atlantis_ds.files import finished, write_json
from atlantis_ds.lm.batch import Batch, collate, collate_to_train, token_budget_batches
from atlantis_ds.lm.encode import Encoded, Encoder
from atlantis_ds.lm.likelihood import label_log_likelihoods
from atlantis_ds.lm.load import hash_files, load_config, load_tokenizer
from atlantis_ds.progress import Steps, console, since_process_start
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.train.card import training_facts, write_cards
from atlantis_ds.train.checkpoint import complete_checkpoints, resume, save_checkpoint, save_model
from atlantis_ds.train.deepspeed_config import accumulation_steps
from atlantis_ds.train.engine import start_engine
from atlantis_ds.train.jobs import Job
from atlantis_ds.train.step import loss_of_step, micro_batch_rows, optimizer_step, step_rows, steps_per_epoch


def fit(recipe: Recipe, folder: RunFolder, examples: Examples, job: Job, ranks: Ranks) -> None:
    """Train ``job`` into ``model/NAME/{last,best}``; resume where a checkpoint is, skip what is finished.

    Raises:
        InputError: the run folder holds a model or checkpoint of this name made with other data or settings.
        RunError: too many steps in a row without a finite loss or gradient; the last good checkpoint stays.
        Preempted: the job was asked to stop; a checkpoint of the last step is there.
    """
    settings, seed = job.settings, job.seed
    done = folder.model(job.name) / "training.json"
    with ThreadPoolExecutor(1) as thread:
        if ranks.is_main:  # takes as long as importing what trains the model; the fingerprint finds the hashes there
            thread.submit(hash_files, job.model)
        if not done.exists():
            import deepspeed  # noqa: F401

            if settings.mode != "full":
                import peft  # noqa: F401
    mark = ranks.broadcast(job.fingerprint(recipe, examples) if ranks.is_main else None)
    if ranks.broadcast(finished(done, mark)):
        if ranks.is_main:
            console.print(f"train {job.name}: already finished")
        return
    if done.exists():
        raise InputError(f"{done.parent}: trained with other data or settings; choose another `name` or remove it")

    tokenizer = load_tokenizer(job.model)
    encoder = Encoder(tokenizer, load_config(job.model), recipe.prompt, examples.labels)
    pairs = [encoder(example) for example in job.examples]
    dev = [encoder(example) for example in examples.dev]
    lengths = [len(pair) for pair in pairs]
    an_epoch = steps_per_epoch(len(pairs), settings.train_batch_size)
    total = max(1, math.ceil(settings.num_train_epochs * an_epoch))
    every_eval, every_save = settings.eval_steps or an_epoch, settings.save_steps or an_epoch
    if ranks.is_main:
        accumulation = accumulation_steps(
            settings.train_batch_size, settings.per_device_train_batch_size, ranks.world_size
        )
        console.print(
            f"train {job.name}: {len(pairs)} examples, {total} optimizer steps of {settings.train_batch_size} "
            f"({ranks.world_size} ranks x {accumulation} micro-batches x {settings.per_device_train_batch_size}), "
            f"{settings.mode}, {settings.dtype}"
        )
    engine = start_engine(settings, job.model, total, seed, ranks)
    state = resume(engine, folder.checkpoints(job.name), mark, ranks) or {
        "step": 0,
        "fingerprint": mark,
        "best_loss": None,
        "seconds": 0.0,
        "skipped": 0,
        "skipped_in_a_row": 0,
    }
    if state["step"] and ranks.is_main:
        console.print(f"train {job.name}: going on from step {state['step']}")

    if ranks.is_main:
        waited = round(since_process_start(), 1)
        console.print(f"train {job.name}: first batch {waited} s after this program began")
        append_log(folder.log, event="start", arm=job.name, step=state["step"], steps=total, since_process_start=waited)
    with Steps(f"train {job.name}", total, "steps", ranks.is_main, settings.logging_steps) as steps:
        steps.resume(state["step"])
        for step in range(state["step"], total):
            start = time.monotonic()
            rows = step_rows(len(pairs), settings.train_batch_size, seed, step)
            batches = _micro_batches(job, pairs, lengths, rows, engine, ranks)
            targets = sum(len(pairs[row].label) + 1 for row in rows)
            denominator = len(rows) if settings.reduction == "example" else targets
            # Dropout depends on seed, step and rank alone, so that a resumed run repeats it.
            torch.manual_seed(hash((seed, step, ranks.rank)) & 0x7FFFFFFF)
            rate = engine.get_lr()[0]
            loss, stop = loss_of_step(settings, step, total), stop_asked(folder, ranks.is_main)
            result = optimizer_step(engine, batches, denominator, ranks, loss, settings.gce_q, stop)
            seconds = time.monotonic() - start
            state = {
                **state,
                "step": step + 1,
                "seconds": state["seconds"] + seconds,
                "skipped": state["skipped"] + result.skipped,
                "skipped_in_a_row": state["skipped_in_a_row"] + 1 if result.skipped else 0,
            }
            if ranks.is_main:
                append_log(
                    folder.log,
                    event="train",
                    arm=job.name,
                    step=step + 1,
                    loss=_finite(result.loss),
                    grad_norm=_finite(result.grad_norm),
                    learning_rate=rate,
                    examples_per_s=round(len(rows) / seconds, 2),
                    tokens_per_s=round(sum(lengths[row] for row in rows) / seconds, 1),
                )
            if result.skipped:
                _note_skipped(folder, job, rows, state, ranks)
            if dev and (state["step"] % every_eval == 0 or state["step"] == total):
                dev_loss = mean_loss(engine, dev, tokenizer.eos_token_id, recipe.score.tokens_per_batch, ranks)
                if ranks.is_main:
                    append_log(folder.log, event="dev", arm=job.name, step=step + 1, loss=_finite(dev_loss))
                state["dev_loss"] = _finite(dev_loss)
                if math.isfinite(dev_loss) and (state["best_loss"] is None or dev_loss < state["best_loss"]):
                    state["best_loss"], state["best_step"] = dev_loss, step + 1
                    save_model(engine, tokenizer, folder.model(job.name) / "best", ranks)
            note = f"loss {result.loss:.4f}" + (f", dev {state['best_loss']:.4f}" if state["best_loss"] else "")
            steps.advance(note=note)
            if (state["step"] % every_save == 0 or result.stop) and state["step"] < total:
                save_checkpoint(engine, folder.checkpoints(job.name), state, settings.save_total_limit, ranks)
                if result.stop:
                    raise Preempted(
                        f"train {job.name}: stopped after step {state['step']} of {total}, checkpoint written; "
                        "the same command goes on from here"
                    )

    save_model(engine, tokenizer, folder.model(job.name) / "last", ranks)
    engine.destroy()
    if ranks.is_main:
        summary = {
            **state,
            **training_facts(recipe, folder, examples, job),
            "examples": len(pairs),
            "examples_per_s": round(_examples_seen(state["step"], len(pairs), settings) / state["seconds"], 2),
            "world_size": ranks.world_size,
            "hardware": ranks.hardware,
        }
        write_cards(folder.model(job.name), summary)
        write_json(done, summary)
        # The model is there; optimizer states several times its size are of no more use.
        shutil.rmtree(folder.checkpoints(job.name), ignore_errors=True)
    ranks.barrier()


def mean_loss(engine: Any, pairs: Sequence[Encoded], pad_token_id: int, tokens_per_batch: int, ranks: Ranks) -> float:
    """Mean of -log p(y|x) over all pairs, sharded over ranks; every rank runs the same number of forwards."""
    batches = token_budget_batches([len(pair) for pair in pairs], tokens_per_batch)
    engine.eval()
    local = 0.0
    for first in range(0, len(batches), ranks.world_size):
        mine = first + ranks.rank
        rows = batches[min(mine, len(batches) - 1)]
        batch = collate([pairs[row] for row in rows], engine.module.config, pad_token_id).to(ranks.device)
        with torch.no_grad():
            log_likelihood = float(label_log_likelihoods(engine, batch).sum())
        local -= log_likelihood if mine < len(batches) else 0.0
    engine.train()
    return ranks.sum(local)[0] / len(pairs)


def _micro_batches(
    job: Job, pairs: list[Encoded], lengths: list[int], rows: Any, engine: Any, ranks: Ranks
) -> list[Batch]:
    settings = job.settings
    places = micro_batch_rows(rows, lengths, settings.train_batch_size, settings.per_device_train_batch_size, ranks)
    return [
        collate_to_train(
            [pairs[row] for row, _ in micro],
            engine.module.config,
            pairs[0].eos,
            [job.weights[row] if counts else 0.0 for row, counts in micro],
        )
        for micro in places
    ]


def _examples_seen(steps: int, examples: int, settings: Any) -> int:
    epochs, rest = divmod(steps, steps_per_epoch(examples, settings.train_batch_size))
    return int(epochs * examples + rest * settings.train_batch_size)


def _note_skipped(folder: RunFolder, job: Job, rows: Any, state: dict[str, Any], ranks: Ranks) -> None:
    """Log a skipped step with the examples of its batch; raise RunError when it is one too many in a row."""
    ids = [job.examples[row].id for row in rows]
    if ranks.is_main:
        append_log(folder.log, event="skipped", arm=job.name, step=state["step"], ids=ids)
    if state["skipped_in_a_row"] >= job.settings.max_skipped_steps:
        saved = complete_checkpoints(folder.checkpoints(job.name))
        raise RunError(
            f"train {job.name}: {state['skipped_in_a_row']} steps in a row had no finite loss or gradient; step "
            f"{state['step']} held the examples {', '.join(ids)}; "
            f"last good checkpoint: {saved[-1] if saved else 'none yet'}"
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
