"""One rank that loads a model under ZeRO-3.

Prints its rank and, in MiB above what was resident before: the peak of its own memory, the peak of all its memory
(with the pages of the files that it reads), its shards, and the whole model.
"""

import sys
import threading
import time
from pathlib import Path

from atlantis_ds.cluster.ranks import end_rank, start_ranks, stop_ranks
from atlantis_ds.config.schema import Model
from atlantis_ds.lm.load import load_model, sharded_at_load, start_deepspeed


def resident() -> tuple[float, float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024, int(status["VmRSS"].split()[0]) / 1024


def watch() -> None:
    while not done:
        for i, value in enumerate(resident()):
            peak[i] = max(peak[i], value)
        time.sleep(0.001)


ranks = start_ranks(3)
start_deepspeed()
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
small, large = sys.argv[1:]
with sharded_at_load(config):
    load_model(Model(model_name_or_path=small), "float32")  # pays for the libraries
done, before, peak = False, resident(), [0.0, 0.0]
thread = threading.Thread(target=watch)
thread.start()
with sharded_at_load(config):
    lm = load_model(Model(model_name_or_path=large), "float32")
done = True
thread.join()
own, total = (high - low for high, low in zip(peak, before))
shards = sum(p.ds_tensor.nbytes for p in lm.parameters()) / 2**20
whole = sum(4 * p.ds_numel for p in lm.parameters()) / 2**20
sys.stdout.write(f"LOADED {ranks.rank} {own:.0f} {total:.0f} {shards:.0f} {whole:.0f}\n")
ranks.barrier()
stop_ranks()
end_rank()
