"""A measured scoring pass: prints the peak resident bytes above those after the imports.

Usage: measure_scoring.py MODEL SCORE.json PROMPT_TOKENS LABELS; labels of 4 tokens each, or no label set where it is 0.
"""

import json
import random
import sys

import torch
import transformers  # noqa: F401
from resident import forget_peak, resident

from atlantis_ds.config.schema import Model, Score
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.lm.likelihood import score_choices, score_pairs
from atlantis_ds.lm.load import load_scorer

model, score = Model(model_name_or_path=sys.argv[1]), Score(**json.loads(sys.argv[2]))
prompt_tokens, labels = map(int, sys.argv[3:5])
draw = random.Random(1)
before = resident("VmRSS")
lm = load_scorer(model, score.dtype, torch.device("cpu"))
forget_peak()  # of loading
prompts = [
    [draw.randrange(1000) for _ in range(prompt_tokens)] for _ in range(2 * score.tokens_per_batch // prompt_tokens)
]
if labels:
    choices = [[draw.randrange(1000) for _ in range(4)] for _ in range(labels)]
    score_choices(lm, prompts, choices, 0, score.tokens_per_batch)
else:
    score_pairs(
        lm, [Encoded(p[: prompt_tokens // 2], p[prompt_tokens // 2 :], 0) for p in prompts], 0, score.tokens_per_batch
    )
print(f"PEAK {resident('VmHWM') - before}", flush=True)
