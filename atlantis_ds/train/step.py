"""One weighted optimizer step, and the examples in it.

The loss of a step is L = (1/D) Σ_i W_i ℓ_i over its global batch, with ℓ_i = -log p(y_i|x_i) (ATLANTIS, Algorithm 1)
or a loss that is more robust against wrong labels, and D the number of examples, or of label tokens, in that batch. D
is known before the first backward pass and divides once, so that, up to rounding, the gradient is the same for every
micro-batch size, accumulation and world size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.schema import Loss, Train
from atlantis_ds.lm.batch import Batch
from atlantis_ds.lm.likelihood import sum_over_labels, token_log_likelihoods
from atlantis_ds.train.deepspeed_config import accumulation_steps


@dataclass(frozen=True)
class StepResult:
    loss: float
    """The step's loss over all ranks."""
    grad_norm: float
    """L2 norm of the gradient over all ranks, before clipping; not finite if the step was skipped for this reason."""
    skipped: bool
    """Whether the update was skipped because loss or gradient is not finite; the same on all ranks."""
    stop: bool
    """Whether any rank was asked to stop; the same on all ranks."""


def weighted_loss(
    model: Any, batch: Batch, denominator: float, loss: Loss = "cross_entropy", q: float = 0.7
) -> torch.Tensor:
    """(1/D) Σ_i W_i ℓ_i over one micro-batch, including the end-of-sequence token.

    With p the probability of a whole label and p_t that of its token t, ℓ is

    - ``cross_entropy``: -log p
    - ``gce``: (1 - p^q) / q (Zhang and Sabuncu 2018, Eq. 6), whose gradient is that of -log p times p^q
    - ``dft``: -Σ_t [p_t] log p_t, no gradient through [p_t] (Wu et al. 2025, On the generalization of SFT, Eq. 9)

    Args:
        model: the DeepSpeed engine, or a bare model.
        batch: the micro-batch, with its weights.
        denominator: D of the whole global batch.
        q: of ``gce``, in (0, 1]; 1 is the mean absolute error, near 0 the cross-entropy.

    Returns:
        float64 scalar.
    """
    tokens = token_log_likelihoods(model, batch)
    if loss == "dft":
        tokens = tokens.detach().exp() * tokens
    log_likelihood = sum_over_labels(tokens, batch).sum(dim=1)
    gain = torch.expm1(q * log_likelihood) / q if loss == "gce" else log_likelihood
    return -(batch.weight * gain).sum() / denominator


def loss_of_step(settings: Train, step: int, total: int) -> Loss:
    """The loss of optimizer step ``step`` (from 0): cross-entropy during the warm-up, then ``train.loss``.

    While the probability of a label is near 0, so is its gradient with ``gce`` and ``dft``, and it would stay there.
    """
    return "cross_entropy" if step < settings.loss_warmup_ratio * total else settings.loss


def optimizer_step(
    engine: Any,
    micro_batches: Sequence[Batch],
    denominator: float,
    ranks: Ranks,
    loss: Loss = "cross_entropy",
    q: float = 0.7,
    stop: bool = False,
) -> StepResult:
    """Forward, backward and update for one global batch; ``micro_batches`` is this rank's part of it.

    A step whose loss or gradient is not finite on any rank changes no weight, on all ranks.

    Args:
        denominator, loss, q: as in ``weighted_loss``.
        stop: whether this rank was asked to stop; it is exchanged together with the loss.
    """
    local = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        engine.set_gradient_accumulation_boundary(last)
        micro_loss = weighted_loss(engine, batch.to(ranks.device), denominator, loss, q)
        local += micro_loss.detach()
        if last:
            # DeepSpeed skips the update on all ranks if the gradient on one is not finite.
            micro_loss = micro_loss * torch.where(local.isfinite(), 1.0, math.nan)
        # DeepSpeed averages gradients over the ranks, and D already counts them all.
        engine.backward(micro_loss * ranks.world_size, scale_wrt_gas=False)
        if not last:
            engine.step()
    # After the last backward pass: if a stage reduces gradients once per step, no rank has to wait before that.
    total, stops = ranks.sum(local.item(), float(stop))
    return _update(engine, total, stops > 0)


def _update(engine: Any, loss: float, stop: bool) -> StepResult:
    if hasattr(engine.optimizer, "overflow"):
        engine.step()
        return StepResult(loss, float(engine.get_global_grad_norm()), not engine.was_step_applied(), stop)
    # Stage 0 in fp32 is torch's own optimizer, which never skips.
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
    if math.isfinite(norm):
        engine.step()
    else:
        engine.zero_grad()
        engine.global_steps += 1
    return StepResult(loss, norm, not math.isfinite(norm), stop)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return math.ceil(examples / batch_size)


@dataclass(frozen=True)
class Schedule:
    """The examples of each optimizer step of a job."""

    phases: tuple[int, ...]
    """Numbers of examples: all epochs on the first ones, then all epochs on the next ones."""
    epochs: float
    batch_size: int
    seed: int

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimizer steps of each phase."""
        return tuple(max(1, math.ceil(self.epochs * steps_per_epoch(n, self.batch_size))) for n in self.phases)

    def rows(self, step: int) -> np.ndarray:
        """The examples of optimizer step ``step`` (from 0), int64; see ``step_rows``."""
        first = 0
        for examples, steps in zip(self.phases, self.steps, strict=True):
            if step < steps:
                break
            step, first = step - steps, first + examples
        return first + step_rows(examples, self.batch_size, self.seed, step)

    def examples_seen(self, steps: int) -> int:
        """Number of examples in the first steps."""
        seen = 0
        for examples, of_phase in zip(self.phases, self.steps, strict=True):
            epochs, rest = divmod(min(steps, of_phase), steps_per_epoch(examples, self.batch_size))
            seen, steps = seen + epochs * examples + rest * self.batch_size, max(0, steps - of_phase)
        return seen


def step_rows(examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of the global batch of optimizer step ``step`` (from 0): int64, the last batch of an epoch may be short.

    Depends only on its arguments, not on ranks or on what ran before: a resumed run sees the same rows.
    """
    epoch, position = divmod(step, steps_per_epoch(examples, batch_size))
    return _order(examples, seed, epoch)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(1)
def _order(examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def micro_batch_rows(
    rows: np.ndarray, lengths: Sequence[int] | np.ndarray, batch_size: int, micro_batch_size: int, ranks: Ranks
) -> list[list[tuple[int, bool]]]:
    """This rank's micro-batches of one global batch, as (row, counts) pairs.

    Rows are grouped by length, so that the micro-batches that run at the same time on all ranks cost the same. They are
    assigned to ranks in alternating order, so that all ranks also read about the same number of tokens in the whole
    step. Every rank gets the same number of micro-batches of equal size, as ZeRO-3 requires: free places are filled
    with the shortest row, which does not count (weight 0).
    """
    accumulation = accumulation_steps(batch_size, micro_batch_size, ranks.world_size)
    by_length = sorted(rows.tolist(), key=lambda row: (-int(lengths[row]), row))
    places = accumulation * ranks.world_size * micro_batch_size
    filled = [(row, True) for row in by_length] + [(by_length[-1], False)] * (places - len(by_length))
    micro_batches = [filled[start : start + micro_batch_size] for start in range(0, places, micro_batch_size)]
    back = ranks.world_size - 1 - ranks.rank
    return [micro_batches[lap * ranks.world_size + (back if lap % 2 else ranks.rank)] for lap in range(accumulation)]
