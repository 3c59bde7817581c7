"""The weights to take with a cross-fitted reference, by task; what they were found on is in docs/results.md."""

from __future__ import annotations

from atlantis_ds.config.schema import Task, Weights

LABELS = Weights(formula="reference", scope="per_label", power=2, clip=[0, 1.6])
RECOMMENDED: dict[Task, Weights] = {
    "relation": LABELS,
    "classification": LABELS,
    # Of responses nothing is measured beyond one study: the mean per token, held to a bounded range.
    "response": Weights(formula="reference", length="mean", power=2, clip=[0, 1.6]),
}
