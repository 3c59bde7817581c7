"""Started on 1, 2 or 3 ranks by test_training.py: is the gradient of a step that of its whole batch in one process?

Usage: ranks_probe.py CAUSAL_MODEL ENCODER_DECODER_MODEL RESULT.json. Rank 0 writes {case: {quantity: error}}, each
error relative to the largest absolute value of what is compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import numpy as np
import torch
from conftest import grammar_pairs
from deepspeed.utils import safe_get_full_grad

from atlantis_ds.cluster.ranks import Ranks, end_rank, start_ranks, stop_ranks
from atlantis_ds.config.schema import Model, Train
from atlantis_ds.data.relation import SEMEVAL_LABELS
from atlantis_ds.lm.batch import collate
from atlantis_ds.lm.encode import Encoder
from atlantis_ds.lm.load import load_config, load_model, load_tokenizer
from atlantis_ds.lm.ways import FAST
from atlantis_ds.train.engine import add_lora, start_engine
from atlantis_ds.train.jobs import Job, Part
from atlantis_ds.train.step import optimizer_step, weighted_loss
from atlantis_ds.train.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
BATCH = 24
Tensors = dict[str, torch.Tensor]


class Setting:
    """A model, examples with random weights, and the same model bare, in this process alone."""

    def __init__(self, path: str, ranks: Ranks, **options: Any) -> None:
        self.ranks, self.path = ranks, path
        self.train = Train.model_validate(
            {"dtype": "float32", "train_batch_size": BATCH, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
            | options
        )
        self.model = Model(model_name_or_path=path)
        self.tokenizer = load_tokenizer(self.model)
        encoder = Encoder(self.tokenizer, load_config(self.model), SEMEVAL_LABELS)
        self.pairs = grammar_pairs(encoder, BATCH, seed=4)
        assert len({len(pair.label) for pair in self.pairs}) > 2, "labels of unequal length are the point"
        weights = np.random.default_rng(1).exponential(size=BATCH) ** 2
        self.job = Job(
            "probe", None, self.model, (Part("train", "target", np.arange(BATCH)),), weights, self.train, seed=1
        )
        self.engine = start_engine(self.train, self.model, [100], 1, ranks)
        self.gradients = record_gradients(self.engine)
        self.bare = load_model(self.model, "float32")
        if self.train.mode == "lora":
            self.bare = add_lora(self.bare, self.train, None)
        self.bare.train()

    def denominator(self, rows: np.ndarray) -> int:
        targets = sum(len(self.pairs[row].label) + 1 for row in rows)
        return targets if self.train.reduction == "token" else len(rows)

    def step(self, rows: np.ndarray) -> tuple[Tensors, Any]:
        """One optimizer step of the engine; its gradients on the way."""
        trainer = SimpleNamespace(  # what `_global_batch` reads of one
            schedule=SimpleNamespace(rows=lambda step: rows),
            run=SimpleNamespace(ranks=self.ranks),
            job=self.job,
            settings=self.train,
            pair=self.pairs.__getitem__,
            lengths=[len(pair) for pair in self.pairs],
            tokenizer=self.tokenizer,
            engine=self.engine,
            ways=FAST,
        )
        _, batches = Trainer._global_batch(trainer, 0)
        options = self.train.loss, self.train.gce_q
        result = optimizer_step(self.engine, batches, self.denominator(rows), self.ranks, *options)
        return dict(self.gradients), result

    def whole(self, rows: np.ndarray, weights: Any = None, denominator: int | None = None) -> tuple[Tensors, float]:
        """Gradients and loss of the same batch on the bare model, by autograd."""
        weights = self.job.weights[rows] if weights is None else weights
        pairs = [self.pairs[row] for row in rows]
        batch = collate(pairs, self.bare.config, pairs[0].eos, list(weights))
        self.bare.zero_grad()
        options = self.train.loss, self.train.gce_q
        loss = weighted_loss(self.bare, batch, denominator or self.denominator(rows), *options)
        loss.backward()
        return {n: p.grad.clone() for n, p in self.bare.named_parameters() if p.grad is not None}, loss.item()

    def weights_now(self) -> Tensors:
        found = {}
        for name, parameter in self.engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[name] = parameter.detach().clone()
        return found

    def copy_to_bare(self) -> None:
        with torch.no_grad():
            now = self.weights_now()
            for name, parameter in self.bare.named_parameters():
                parameter.copy_(now[name])


def record_gradients(engine: Any) -> Tensors:
    """Fill the returned dict with the full gradients each time that the engine is about to update."""
    found: Tensors = {}
    step = engine.step

    def read_then_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    whole = engine.zero_optimization_stage() == 0
                    found[name] = (parameter.grad if whole else safe_get_full_grad(parameter)).clone()
        step()

    engine.step = read_then_step
    return found


def error(found: Tensors, expected: Tensors) -> float:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale


def equal_gradients(path: str, ranks: Ranks, stage: int, accumulation: int, **options: Any) -> dict[str, float]:
    """Two steps, a full batch and a short one (with padding places), at weights that the first step has moved."""
    micro = BATCH // ranks.world_size // accumulation
    config = str(CONFIGS / f"zero{stage}.json")
    setting = Setting(path, ranks, deepspeed=config, per_device_train_batch_size=micro, **options)
    order = np.random.default_rng(2).permutation(BATCH)
    errors = {}
    if setting.train.mode == "full":  # what stands in the file, and not some other initial weights
        loaded = {name: parameter.detach() for name, parameter in setting.bare.named_parameters()}
        errors["loaded weights"] = error(setting.weights_now(), loaded)
    for name, rows in (("full", order), ("short", order[:17])):
        setting.copy_to_bare()
        gradients, result = setting.step(rows)
        expected, loss = setting.whole(rows)
        norm = float(torch.nn.utils.get_total_norm(expected.values()))
        errors |= {
            f"{name}: gradient": error(gradients, expected),
            f"{name}: loss": abs(result.loss / loss - 1),
            f"{name}: norm": abs(result.grad_norm / norm - 1),
        }
    setting.engine.destroy()
    return errors


def doubled_weight(path: str, ranks: Ranks, stage: int) -> dict[str, float]:
    """Doubling one weight must add that example's own gradient, and nothing else."""
    # With such a learning rate fp32 weights stay as they are.
    config = str(CONFIGS / f"zero{stage}.json")
    setting = Setting(path, ranks, deepspeed=config, per_device_train_batch_size=2, learning_rate=1e-30)
    rows, chosen = np.arange(BATCH), 7
    before, _ = setting.step(rows)
    own, _ = setting.whole(rows[[chosen]], denominator=BATCH)
    setting.job.weights[chosen] *= 2
    after, _ = setting.step(rows)
    setting.engine.destroy()
    return {"difference": error({name: after[name] - before[name] for name in before}, own)}


def clipped_updates(path: str, ranks: Ranks, stage: int) -> dict[str, float]:
    """Steps with clipping must end where torch's own clipping and AdamW end, and not where unclipped ones do."""
    config = str(CONFIGS / f"zero{stage}.json")
    most = 0.05
    setting = Setting(path, ranks, deepspeed=config, per_device_train_batch_size=4, max_grad_norm=most)
    order = np.random.default_rng(3).permutation(BATCH)
    parts = [order[:5], order[5:10], order[10:]]
    start = setting.weights_now()
    for rows in parts:
        setting.step(rows)
    ended = setting.weights_now()
    setting.engine.destroy()

    def by_torch(clip: bool) -> Tensors:
        with torch.no_grad():
            for name, parameter in setting.bare.named_parameters():
                parameter.copy_(start[name])
        optimizer = torch.optim.AdamW(setting.bare.parameters(), lr=setting.train.learning_rate, weight_decay=0.0)
        for rows in parts:
            setting.whole(rows)
            norm = torch.nn.utils.clip_grad_norm_(setting.bare.parameters(), most if clip else torch.inf)
            assert norm > 2 * most, "clipping would do nothing"
            optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in setting.bare.named_parameters()}

    clipped, free = by_torch(True), by_torch(False)

    def distance(first: Tensors, second: Tensors) -> float:
        """Root mean square difference, as a share of that of the whole training."""
        parts = [(first[name] - second[name]).square().sum() for name in first]
        return float(torch.stack(parts).sum().sqrt())

    moved = distance(start, clipped)
    return {"from clipped": distance(ended, clipped) / moved, "from free": distance(ended, free) / moved}


def main() -> None:
    causal, encoder_decoder, result = sys.argv[1:4]
    ranks = start_ranks(2)
    found = {}
    for stage in (0, 1, 2, 3):
        for accumulation in (1, 4):
            for reduction in ("example", "token"):
                case = f"ZeRO {stage}, accumulation {accumulation}, {reduction}"
                found[case] = equal_gradients(causal, ranks, stage, accumulation, reduction=reduction)
        found[f"clipping, ZeRO {stage}"] = clipped_updates(causal, ranks, stage)
    found["LoRA, ZeRO 3"] = equal_gradients(causal, ranks, 3, 4, mode="lora")
    found["LoRA, ZeRO 3, checkpointing"] = equal_gradients(
        causal, ranks, 3, 4, mode="lora", gradient_checkpointing=True
    )
    found["ZeRO 3, checkpointing"] = equal_gradients(causal, ranks, 3, 4, gradient_checkpointing=True)
    found["encoder-decoder, ZeRO 3"] = equal_gradients(encoder_decoder, ranks, 3, 4)
    # Untrained, a label has a probability of e^-40: with a small q it counts.
    found["gce, ZeRO 3"] = equal_gradients(causal, ranks, 3, 4, loss="gce", gce_q=0.05)
    found["dft, ZeRO 3"] = equal_gradients(causal, ranks, 3, 4, loss="dft")
    found["doubled weight, ZeRO 0"] = doubled_weight(causal, ranks, 0)
    found["doubled weight, ZeRO 3"] = doubled_weight(causal, ranks, 3)
    if ranks.is_main:
        Path(result).write_text(json.dumps(found))
    ranks.barrier()
    stop_ranks()
    end_rank()


if __name__ == "__main__":
    main()
