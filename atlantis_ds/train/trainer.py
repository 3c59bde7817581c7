"""Trains one job, from its first optimizer step or its last checkpoint, to the final model."""

from __future__ import annotations

import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from atlantis_ds.cluster.preemption import stop_asked
from atlantis_ds.data.examples import Examples
from atlantis_ds.errors import InputError, Preempted, RunError
from atlantis_ds.files import finished, write_json
from atlantis_ds.lm.batch import Batch, ahead, collate_to_train
from atlantis_ds.lm.check import check_packed, check_scoring, sample_rows
from atlantis_ds.lm.encode import Encoded, Encoder
from atlantis_ds.lm.load import give_memory_back, hash_files, load_config, load_tokenizer
from atlantis_ds.lm.size import model_shape
from atlantis_ds.lm.staging import node_copy
from atlantis_ds.lm.tokens import encode_split
from atlantis_ds.lm.ways import Ways
from atlantis_ds.metrics import metrics
from atlantis_ds.progress import Steps, since_process_start
from atlantis_ds.run import Run
from atlantis_ds.train.card import training_facts, write_cards
from atlantis_ds.train.checkpoint import complete_checkpoints, resume, save_checkpoint, save_model
from atlantis_ds.train.communication import is_measured, timed_collectives
from atlantis_ds.train.deepspeed_config import accumulation_steps
from atlantis_ds.train.dev import likeliest_labels, mean_loss
from atlantis_ds.train.engine import start_engine
from atlantis_ds.train.jobs import Job
from atlantis_ds.train.profile import profiled
from atlantis_ds.train.speed import speed_of_step
from atlantis_ds.train.step import (
    Schedule,
    StepResult,
    loss_of_step,
    micro_batch_rows,
    optimizer_step,
    steps_per_epoch,
)


def fit(run: Run, examples: Examples, job: Job) -> None:
    """Train ``job`` into ``model/NAME/{last,best}``; resume from a checkpoint, skip what is finished.

    Raises:
        InputError: the run folder has a model or checkpoint of this name, made with other data or settings.
        RunError: too many steps in a row without a finite loss or gradient; the last good checkpoint is kept.
        Preempted: the job was asked to stop; there is a checkpoint of the last step.
    """
    done = run.folder.model(job.name) / "training.json"
    mark = _fingerprint(run, examples, job, import_ahead=not done.exists())
    if run.ranks.broadcast(finished(done, mark)):
        run.say(f"train {job.name}: already finished")
        return
    if done.exists():
        raise InputError(f"{done.parent}: trained with other data or settings; choose another `name` or remove it")
    trainer = Trainer(run, examples, job, mark)
    trainer.train()
    trainer.finish()
    del trainer
    give_memory_back(run.ranks.device)


def _fingerprint(run: Run, examples: Examples, job: Job, import_ahead: bool) -> str:
    """The job's fingerprint, from rank 0; files are read while the libraries are imported."""
    with ThreadPoolExecutor(1) as thread:
        if run.ranks.is_main:  # the fingerprint reuses these hashes
            thread.submit(hash_files, job.model)
        if import_ahead:
            import deepspeed  # noqa: F401

            if job.settings.mode != "full":
                import peft  # noqa: F401
    mark: str = run.ranks.broadcast(job.fingerprint(run, examples) if run.ranks.is_main else None)
    return mark


@dataclass
class State:
    """The state of a training; every checkpoint contains it."""

    fingerprint: str
    step: int = 0
    """Optimizer steps done."""
    best_loss: float | None = None
    """Dev loss of the best model so far."""
    best_score: float | None = None
    """Its dev score, if ``train.metric_for_best_model`` is a score."""
    best_step: int | None = None
    dev_loss: float | None = None
    evaluations_since_best: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0


class Trainer:
    """One training job on all ranks: engine, tokens and state; see ``train`` for the course of a step."""

    def __init__(self, run: Run, examples: Examples, job: Job, mark: str) -> None:
        self.began = time.monotonic()
        self.run, self.examples, self.job, self.settings = run, examples, job, job.settings
        self.tokens = [encode_split(run, examples, part.split, job.model, part.column) for part in job.parts]
        self.lengths = np.concatenate([tokens.lengths[part.rows] for tokens, part in zip(self.tokens, job.parts)])
        self.targets = np.concatenate([tokens.targets[part.rows] for tokens, part in zip(self.tokens, job.parts)])
        self.dev = encode_split(run, examples, "dev", job.model)
        # A loss on the training rows themselves would say nothing, and would choose the last model as the best.
        self.dev_loss_asked = bool(len(self.dev)) and all(part.split != "dev" for part in job.parts)
        self.tokenizer = load_tokenizer(job.model)
        settings = job.settings
        self.label_ids: list[list[int]] = []
        """Token ids of the label set, if dev examples are ranked."""
        if settings.metric_for_best_model != "loss":
            encoder = Encoder(self.tokenizer, load_config(job.model), examples.labels, examples.chat)
            self.label_ids = encoder.label_set or []
        self.schedule = Schedule(job.phases, settings.num_train_epochs, settings.train_batch_size, job.seed)
        self.total = sum(self.schedule.steps)
        self._say_what_is_trained()
        copy = node_copy(run, job.model)
        self.engine = start_engine(settings, job.model, self.schedule.steps, job.seed, run.ranks, copy)
        self.shape = model_shape(self.engine.module)
        self.ways = self._find_ways()
        self.checkpoints = run.folder.checkpoints(job.name)
        found = resume(self.engine, self.checkpoints, mark, run.ranks) or {"fingerprint": mark}
        self.state = State(**{key: found[key] for key in State.__dataclass_fields__ if key in found})
        self.steps_of_job = 0
        self.communication_share: float | None = None
        self.coming = ahead(self._global_batch, range(self.state.step, self.total))

    def train(self) -> None:
        """All remaining steps: step → log → dev loss → checkpoint."""
        self._say_where_it_begins()
        settings, state = self.settings, self.state
        an_epoch = steps_per_epoch(self.job.phases[0], settings.train_batch_size)
        every_eval, every_save = settings.eval_steps or an_epoch, settings.save_steps or an_epoch
        title = f"train {self.job.name}"
        with (
            Steps(title, self.total, "steps", self.run.ranks.is_main, settings.logging_steps) as steps,
            profiled(settings.profile_steps, self.run.folder.profile(self.job.name), self.run.ranks) as next_step,
        ):
            steps.resume(state.step)
            while state.step < self.total and not self.stopped_early:
                result = self.step()
                next_step()
                if self.dev_loss_asked and (state.step % every_eval == 0 or state.step == self.total):
                    self.evaluate()
                best = f", dev {state.best_loss:.4f}" if state.best_loss else ""
                steps.advance(note=f"loss {result.loss:.4f}{best}, {self.speed}")
                if (state.step % every_save == 0 or result.stop) and state.step < self.total:
                    self.save(stop=result.stop)

    def step(self) -> StepResult:
        """One optimizer step on one global batch."""
        start = time.monotonic()
        settings, state, job, ranks = self.settings, self.state, self.job, self.run.ranks
        places, batches = next(self.coming)
        denominator = len(places) if settings.reduction == "example" else int(self.targets[places].sum())
        # Dropout depends only on seed, step and rank, so that a resumed run repeats it.
        torch.manual_seed(hash((job.seed, state.step, ranks.rank)) & 0x7FFFFFFF)
        rate = self.engine.get_lr()[0]
        first = self.schedule.steps[0]
        loss = (
            loss_of_step(settings, state.step, first) if state.step < first else "cross_entropy"
        )  # after that come gold labels
        stop = stop_asked(self.run.folder, ranks.is_main)
        with timed_collectives(ranks) if is_measured(self.steps_of_job, ranks) else nullcontext() as measured:
            result = optimizer_step(self.engine, batches, denominator, ranks, loss, settings.gce_q, stop)
        seconds = time.monotonic() - start
        if measured:
            self.communication_share = round(measured.seconds / seconds, 3)
        self.steps_of_job += 1
        counts = int(self.lengths[places].sum()), int(self.targets[places].sum())
        self.speed = speed_of_step(settings.mode, self.shape, *counts, seconds, self.communication_share, ranks)
        state.step += 1
        state.seconds += seconds
        state.skipped += result.skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.skipped else 0
        if ranks.is_main:
            self.run.log(
                event="train",
                arm=job.name,
                step=state.step,
                loss=_finite(result.loss),
                grad_norm=_finite(result.grad_norm),
                learning_rate=rate,
                examples_per_s=round(len(places) / seconds, 2),
                **asdict(self.speed),
            )
        if result.skipped:
            self._note_skipped(places)
        return result

    def evaluate(self) -> None:
        """The dev loss, and the dev score if the recipe needs it; the best model so far is saved as ``best``."""
        state, name, metric = self.state, self.job.name, self.settings.metric_for_best_model
        budget = self.run.recipe.score.tokens_per_batch
        loss = mean_loss(self.engine, self.dev, self.tokenizer.eos_token_id, budget, self.ways, self.run.ranks)
        score = None if metric == "loss" else self.dev_score(metric, budget)
        if self.run.ranks.is_main:
            found = {} if score is None else {metric: score}
            self.run.log(event="dev", arm=name, step=state.step, loss=_finite(loss), **found)
        state.dev_loss = _finite(loss)
        state.evaluations_since_best += 1
        if not math.isfinite(loss):
            return
        if score is None:
            better = state.best_loss is None or loss < state.best_loss
        else:
            better = state.best_score is None or score > state.best_score
        if better:
            state.best_loss, state.best_score, state.best_step = loss, score, state.step
            state.evaluations_since_best = 0
            save_model(self.engine, self.tokenizer, self.run.folder.model(name) / "best", self.run.ranks)

    def dev_score(self, metric: str, tokens_per_batch: int) -> float:
        """Accuracy or macro-F1 on the dev split, of the same labels as the dev loss."""
        dev, labels = self.examples.dev, self.examples.labels
        assert labels is not None
        end, ranks = self.tokenizer.eos_token_id, self.run.ranks
        best = likeliest_labels(self.engine, self.dev, self.label_ids, end, tokens_per_batch, self.ways, ranks)
        predicted = [labels[index] for index in best]
        negative = self.run.recipe.data.negative_label
        return float(metrics(labels, dev.ids.to_pylist(), dev.targets.to_pylist(), predicted, negative)[metric])

    @property
    def stopped_early(self) -> bool:
        """Whether there has been no better model for as long as the recipe allows."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def save(self, stop: bool) -> None:
        """Write a checkpoint of this step.

        Raises:
            Preempted: the job was asked to ``stop``.
        """
        save_checkpoint(
            self.engine, self.checkpoints, asdict(self.state), self.settings.save_total_limit, self.run.ranks
        )
        if stop:
            raise Preempted(
                f"train {self.job.name}: stopped after step {self.state.step} of {self.total}, checkpoint written; "
                "the same command resumes from here"
            )

    def finish(self) -> None:
        """Save the model and the facts about its training, ``training.json`` last; remove the checkpoints."""
        run, job, state = self.run, self.job, self.state
        if self.stopped_early:
            run.say(
                f"train {job.name}: ended after step {state.step} of {self.total}: best dev "
                f"{job.settings.metric_for_best_model} at {state.best_step}"
            )
        self.coming.close()
        save_model(self.engine, self.tokenizer, run.folder.model(job.name) / "last", run.ranks)
        self.engine.destroy()
        if run.ranks.is_main:
            summary = {
                **asdict(state),
                **training_facts(run, self.examples, job),
                "examples": len(job),
                "examples_per_s": round(self.schedule.examples_seen(state.step) / state.seconds, 2),
                "world_size": run.ranks.world_size,
                "hardware": run.ranks.hardware,
            }
            write_cards(run.folder.model(job.name), summary)
            write_json(run.folder.model(job.name) / "training.json", summary)
            # The model is saved; optimizer states, several times its size, are no longer needed.
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        run.ranks.barrier()

    def _global_batch(self, step: int) -> tuple[np.ndarray, list[Batch]]:
        """The examples of an optimizer step, as indices into the job's examples, and this rank's micro-batches of
        them."""
        job, settings = self.job, self.settings
        micro_batch_size = settings.per_device_train_batch_size
        places = self.schedule.rows(step)
        batches = [
            collate_to_train(
                [self.pair(place) for place, _ in micro],
                self.engine.module.config,
                self.tokenizer.eos_token_id,
                [float(job.weights[place]) if counts else 0.0 for place, counts in micro],
                "less" if self.ways.packed else "never",
            )
            for micro in micro_batch_rows(
                places, self.lengths, settings.train_batch_size, micro_batch_size, self.run.ranks
            )
        ]
        batches = [replace(batch, chunked=self.ways.chunked) for batch in batches]
        return places, [batch.pinned() for batch in batches] if self.run.ranks.device.type == "cuda" else batches

    def pair(self, place: int) -> Encoded:
        """The tokens of one of the job's examples."""
        part, row = self.job.find(place)
        return self.tokens[part][row]

    def _find_ways(self) -> Ways:
        """The fast ways that are correct for this model, checked on a few of the job's own examples."""
        self.engine.eval()
        samples = [self.pair(int(at)) for at in sample_rows(self.lengths)]
        ways = check_packed(self.engine, samples, self.tokenizer.eos_token_id)
        if self.label_ids:
            scoring = check_scoring(self.engine, samples, self.label_ids, self.tokenizer.eos_token_id, prefix=False)
            ways = ways.and_found("tree", scoring)
        self.engine.train()
        if ways.slow:
            self.run.say(f"train {self.job.name}: {ways}")
        return ways

    def _say_what_is_trained(self) -> None:
        settings, ranks = self.settings, self.run.ranks
        micro = settings.per_device_train_batch_size
        accumulation = accumulation_steps(settings.train_batch_size, micro, ranks.world_size)
        self.run.say(
            f"train {self.job.name}: {len(self.job)} examples, {self.total} optimizer steps of "
            f"{settings.train_batch_size} ({ranks.world_size} ranks x {accumulation} micro-batches x {micro}), "
            f"{settings.mode}, {settings.dtype}"
        )

    def _say_where_it_begins(self) -> None:
        name, step = self.job.name, self.state.step
        if step:
            self.run.say(f"train {name}: resuming from step {step}")
        waited = time.monotonic() - self.began
        self.run.say(f"train {name}: first batch {waited:.1f} s after its model began to load")
        if self.run.ranks.is_main:
            since = round(since_process_start(), 1)
            self.run.log(event="start", arm=name, step=step, steps=self.total, since_process_start=since)

    def _note_skipped(self, places: np.ndarray) -> None:
        """Log a skipped step with the examples of its batch; raise RunError if there are too many in a row."""
        name, state = self.job.name, self.state
        ids = self.job.ids(self.examples, places)
        if self.run.ranks.is_main:
            self.run.log(event="skipped", arm=name, step=state.step, ids=ids)
        if state.skipped_in_a_row >= self.settings.max_skipped_steps:
            saved = complete_checkpoints(self.checkpoints)
            raise RunError(
                f"train {name}: {state.skipped_in_a_row} steps in a row had no finite loss or gradient; step "
                f"{state.step} contained the examples {', '.join(ids)}; "
                f"last good checkpoint: {saved[-1] if saved else 'none yet'}"
            )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
