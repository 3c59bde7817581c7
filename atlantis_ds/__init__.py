"""Importance-weighted fine-tuning of language models at cluster scale.

The way of the data is the architecture, one room for each step:
data (examples) → lm (label log-likelihoods) → weights (scores and weights) → train → evaluate.
"""

__version__ = "0.1.0"
