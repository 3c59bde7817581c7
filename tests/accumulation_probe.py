"""One rank: the gradient of one global batch in bf16, in micro-batches of several sizes, and how far they differ.

Rank 0 prints for each size the L2 norm of the difference from the fewest micro-batches over that of the gradient.
"""

import random
import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from families import tiny

from atlantis_ds.cluster.ranks import end_rank, start_ranks, stop_ranks
from atlantis_ds.config.schema import Train
from atlantis_ds.lm.batch import collate
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.train.deepspeed_config import deepspeed_config
from atlantis_ds.train.step import weighted_loss

BATCH = 64
ranks = start_ranks(5)
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
draw = random.Random(1)
pairs = [
    Encoded([draw.randrange(3, 96) for _ in range(20)], [draw.randrange(3, 96) for _ in range(4)], 1)
    for _ in range(BATCH)
][ranks.rank :: ranks.world_size]


def gradient(micro_batch_size: int) -> torch.Tensor:
    lm = tiny("llama").bfloat16().train()
    train = Train(
        dtype="bfloat16",
        deepspeed=sys.argv[1],
        train_batch_size=BATCH,
        per_device_train_batch_size=micro_batch_size,
    )
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-30)
    config = deepspeed_config(train, ranks.world_size)
    engine, *_ = deepspeed.initialize(model=lm, optimizer=optimizer, config=config)
    for start in range(0, len(pairs), micro_batch_size):
        some = pairs[start : start + micro_batch_size]
        last = start + micro_batch_size >= len(pairs)
        engine.set_gradient_accumulation_boundary(last)
        loss = weighted_loss(engine, collate(some, lm.config, 0, [1.0] * len(some)), BATCH)
        engine.backward(loss * ranks.world_size, scale_wrt_gas=False)
        if not last:
            engine.step()
    return torch.cat([safe_get_full_grad(parameter).flatten().float() for parameter in engine.module.parameters()])


whole = gradient(len(pairs) // 2)
for size in (4, 1):
    off = float((gradient(size) - whole).norm() / whole.norm())
    if ranks.is_main:
        print(f"OFF {off}", flush=True)
stop_ranks()
end_rank()
