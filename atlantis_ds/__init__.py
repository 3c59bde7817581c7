"""Importance-weighted fine-tuning of language models at cluster scale.

The packages follow the data, one for each step: data (examples) → lm (label log-likelihoods) → weights (scores and
weights) → train → evaluate.

To use it from Python, call the functions of ``api.py``, which can be imported from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from atlantis_ds.api import (
        compare_runs,
        diagnose,
        label_log_likelihoods,
        weighted_dataset,
        weights_from_scores,
    )

__all__ = [
    "__version__",
    "compare_runs",
    "diagnose",
    "label_log_likelihoods",
    "weighted_dataset",
    "weights_from_scores",
]


def __getattr__(name: str) -> Any:
    """The functions of ``api.py``, imported at first use, so that `check` stays fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from atlantis_ds import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
