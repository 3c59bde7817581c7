"""The weights that one round of a cross-fitted reference gives to the next, by task (experiments/summary.md)."""

from __future__ import annotations

from atlantis_ds.config.schema import Task, Weights

LABELS = Weights(formula="reference", scope="per_label", power=2, clip=[0, 1.6])
OF_A_ROUND: dict[Task, Weights] = {
    "relation": LABELS,
    "classification": LABELS,
    # For responses there is only one study: the mean per token, limited to a bounded range.
    "response": Weights(formula="reference", length="mean", power=2, clip=[0, 1.6]),
}
