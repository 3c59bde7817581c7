"""Figures of the machine for one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.lm.size import Shape, forward_flops, peak_flops, peak_gib


@dataclass(frozen=True)
class Speed:
    """Figures of one optimizer step."""

    tokens_per_s: float
    """Prompt and label tokens of all ranks, without padding."""
    tflops: float
    """Useful TFLOP/s of a rank, from weights and tokens only; attention scores, padding and recomputing do not
    count."""
    flops_share: float | None
    """Their share of the GPU's bf16 peak; None if that is unknown."""
    peak_gib: float
    """Peak memory of this rank: of the GPU, or of the process on CPUs."""
    communication_share: float | None
    """Share of the time in collectives, in the last step in which nothing overlapped them; None before the first."""

    def __str__(self) -> str:
        share = f" ({self.flops_share:.0%})" if self.flops_share else ""
        sent = "" if self.communication_share is None else f", {self.communication_share:.0%} communication"
        return f"{self.tokens_per_s:.0f} tokens/s, {self.tflops:.3g} TFLOP/s{share}, {self.peak_gib:.2f} GiB{sent}"


def speed_of_step(
    mode: str,
    shape: Shape,
    tokens: int,
    targets: int,
    seconds: float,
    communication_share: float | None,
    ranks: Ranks,
) -> Speed:
    """What a step of all ranks with so many ``tokens``, ``targets`` of them in labels, did with the machine."""
    # Forward 2ND, backward 4ND; with frozen weights the backward pass is 2ND.
    flops = (3 if mode == "full" else 2) * forward_flops(shape, tokens - targets, targets)
    a_second, peak = flops / seconds / ranks.world_size, peak_flops(ranks.device)
    return Speed(
        round(tokens / seconds, 1),
        float(f"{a_second / 1e12:.4g}"),
        round(a_second / peak, 4) if peak else None,
        round(peak_gib(ranks.device), 3),
        communication_share,
    )
