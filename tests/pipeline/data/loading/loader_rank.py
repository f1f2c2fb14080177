"""One rank of test_loader_ranks.py: its batches, as the training worker would read them.

`python -m tests.pipeline.data.loading.loader_rank RANK WORLD RENDEZVOUS TOKENS POSITION BATCHES RESULT` writes
{"batches", "left_out", "held_out"} as JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from pipeline.data.loading.loader import TrainLoader, evenly_spread
from pipeline.data.loading.reader import open_split
from pipeline.data.tokens.index import TokenIndex
from pipeline.distributed import agreement


def main() -> None:
    rank, world, rendezvous, tokens, position, batches, result = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world))
    agree = agreement(60)
    index = TokenIndex.load(tokens)
    val = open_split(index, "val", cache_gigabytes=1)
    chosen = evenly_spread(val, np.arange(val.num_sequences), 5, skip=True, agree=agree)
    loader = TrainLoader(
        open_split(index, "train", cache_gigabytes=1),
        seed=5,
        global_batch=12,
        micro_batch=2,
        rank=int(rank),
        world_size=int(world),
        on_bad_shard="skip",
        agree=agree,
    )
    got = []
    for parts, behind in loader.micro_batches(int(position), limit=int(batches)):
        got.append([np.concatenate(parts)[:, 0].tolist(), behind])
        dist.barrier()  # training's own collectives, at the same time as those of the thread that reads ahead
    found = {"batches": got, "left_out": loader.left_out, "held_out": chosen.tolist()}
    Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
