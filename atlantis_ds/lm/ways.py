"""The fast ways of running a model beside the plain one; ``check`` finds out which of them a model takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

CHUNK = 2**26
"""Logits that are in memory at one time: 256 MiB in fp32. More are made in chunks, and again in the backward pass."""
TREE_TOKENS = 512
"""Tokens of labels behind one prompt: more labels are cut into several trees, for which a prompt is read again each."""


@dataclass(frozen=True)
class Ways:
    """What a model may be run with, beside plain padded pairs."""

    packed: bool = True
    """Several examples in one row, for training."""
    tree: bool = True
    """All labels behind one prompt, each token of them once."""
    prefix: bool = True
    """The keys and values of what all prompts begin with, read once."""
    chunked: bool = True
    """Logits a chunk of positions at a time, where there are many."""
    padded: bool = True
    """Prompts of several lengths in one batch, padded, for generation."""
    differences: dict[str, str] = field(default_factory=dict)
    """For each way that was tried, the largest difference found in nats, or the error that it ended in."""

    def and_found(self, way: str, found: Ways) -> Ways:
        """These ways, with one more that was tried."""
        return replace(self, **{way: getattr(found, way)}, differences={**self.differences, **found.differences})

    @property
    def slow(self) -> list[str]:
        """The ways that were tried and are not taken."""
        return [way for way in self.differences if not getattr(self, way)]

    def __str__(self) -> str:
        off = [f"{way} ({self.differences[way]})" for way in self.slow]
        return "all fast ways" if not off else f"plain instead of {', '.join(off)}"


FAST = Ways()
PLAIN = Ways(packed=False, tree=False, prefix=False, chunked=False, padded=False)
