"""Started on 2 ranks by test_train_options.py: prints for each rank the seconds of its collectives.

Rank 1 comes half a second late, so rank 0 waits, in a collective that returns at once and is waited for later.
"""

from __future__ import annotations

import time

import torch

from atlantis_ds.cluster.ranks import end_rank, start_ranks, stop_ranks
from atlantis_ds.lm.load import start_deepspeed
from atlantis_ds.train.communication import timed_collectives


def main() -> None:
    ranks = start_ranks(1.0)
    comm = start_deepspeed().comm
    ones = torch.ones(3)
    with timed_collectives(ranks) as timed:
        assert comm.get_world_size() == 2
        time.sleep(0.5 * ranks.rank)
        work = comm.all_reduce(ones, async_op=True)
        time.sleep(0.5)  # compute does not count
        work.wait()
    inside = timed.seconds
    comm.all_reduce(ones)
    assert timed.seconds == inside and ones.tolist() == [4.0] * 3
    print(f"rank {ranks.rank}: {inside:.3f} s")
    stop_ranks()
    end_rank()


if __name__ == "__main__":
    main()
