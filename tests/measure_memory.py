"""One rank of a measured training run: prints the peak resident bytes of its steps above those after the imports."""

import json
import sys

import deepspeed
import peft  # noqa: F401
import transformers  # noqa: F401
from resident import forget_peak, resident

from atlantis_ds.cluster.ranks import end_rank, start_ranks, stop_ranks
from atlantis_ds.config.schema import Model, Train
from atlantis_ds.lm.batch import collate
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.train.engine import start_engine
from atlantis_ds.train.step import optimizer_step

model, train, tokens = sys.argv[1], Train(**json.loads(sys.argv[2])), int(sys.argv[3])
ranks = start_ranks(5)
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
ranks.sum(1.0)
before = resident("VmRSS")
engine = start_engine(train, Model(model_name_or_path=model), [4], 0, ranks)
forget_peak()  # of loading
size = train.per_device_train_batch_size
pairs = [Encoded([100] * (tokens - 6), [7] * 6, 0)] * size
for _ in range(2):
    optimizer_step(engine, [collate(pairs, engine.module.config, 0, [1.0] * size)], train.train_batch_size, ranks)
print(f"PEAK {resident('VmHWM') - before}", flush=True)
stop_ranks()
end_rank()
