"""The fast ways to run a model, besides the plain one; ``check`` finds out which are correct for a model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

CHUNK = 2**26
"""Most logits in memory at one time: 256 MiB in fp32. More are computed in chunks, and again in the backward pass."""
TREE_TOKENS = 512
"""Most label tokens after one prompt: more labels are split into several trees, each of which reads the prompt
again."""


@dataclass(frozen=True)
class Ways:
    """The ways in which a model may be run, besides plain padded pairs."""

    packed: bool = True
    """Several examples in one row, for training."""
    tree: bool = True
    """All labels after one prompt, with common tokens only once."""
    prefix: bool = True
    """The keys and values of the common prefix of all prompts, read once."""
    chunked: bool = True
    """Logits in chunks of positions, if there are many."""
    padded: bool = True
    """Prompts of several lengths in one batch, padded, for generation."""
    differences: dict[str, str] = field(default_factory=dict)
    """For each way that was tried, the largest difference in nats, or the error that it raised."""

    def and_found(self, way: str, found: Ways) -> Ways:
        """These ways, plus one more that was tried."""
        return replace(self, **{way: getattr(found, way)}, differences={**self.differences, **found.differences})

    @property
    def slow(self) -> list[str]:
        """The ways that were tried and are not used."""
        return [way for way in self.differences if not getattr(self, way)]

    def __str__(self) -> str:
        off = [f"{way} ({self.differences[way]})" for way in self.slow]
        return "all fast ways" if not off else f"plain instead of {', '.join(off)}"


FAST = Ways()
PLAIN = Ways(packed=False, tree=False, prefix=False, chunked=False, padded=False)
