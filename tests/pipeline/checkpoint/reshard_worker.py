"""One rank of tests/pipeline/checkpoint/test_reshard.py: straight runs that save checkpoints, and runs that resume from them.

Usage: reshard_worker.py FOLDER CASE...; a job of each world size runs at the same time, on the same folder.
    PRECISION-STAGE                                           a straight run of 2n steps, with a checkpoint at n
    WORLD-PRECISION-STAGE:PRECISION-STAGE:MICRO[:split|:lost] n steps from that checkpoint. split: stage 3 partitions
                                                              every parameter; lost: zeros for the moments (must be noticed)
Rank 0 writes FOLDER/w{ranks}.json: case -> losses, and whether the state that was carried over is equal, bit for bit.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from pipeline.checkpoint import load
from pipeline.checkpoint.deepspeed_files import MOMENTS, WEIGHT, ZeroState
from pipeline.checkpoint.format import checkpoint_name, verify
from pipeline.checkpoint.save import Saver
from pipeline.config.load import parse_config
from pipeline.train.engine import build_engine, init_distributed
from pldr_model.model import PLDRModel
from tests.pipeline.train.zero_worker import STEPS, configuration, run

HALF = checkpoint_name(STEPS // 2)
HELD_OUT = np.random.default_rng(99).integers(4, 67, size=(9, 17))


def settings(folder, target, **train):
    """A smaller learning rate than zero_worker's: PLGA's fp32 gradients are ill-conditioned at the start, and at 2e-3 two
    straight runs of other world sizes already differ by 1e-4 after six steps."""
    precision, stage = target.split("-")
    tree = configuration(folder, int(stage), precision, "value").as_dict()
    tree["train"] |= {"max_lr": 1e-4, "validate_every": STEPS, **train}
    return parse_config(tree, where="test")


def losses(recorder):
    return [recorder.points[step]["train/loss"] for step in sorted(recorder.points)]


def straight(folder, case):
    return {"losses": losses(run(settings(folder / f"w{dist.get_world_size()}-{case}", case), HELD_OUT))}


def resumed(folder, case):
    source, target, micro, *how = case.split(":")
    start = folder / f"w{source}" / "checkpoints" / HALF
    while not (start / "COMMITTED").exists():  # the other job is writing it
        time.sleep(0.05)
    split = {"zero_optimization": {"stage3_param_persistence_threshold": 10}}
    train = {"micro_batch": int(micro), "deepspeed": split if how == ["split"] else None}
    config = settings(folder / f"to-{dist.get_world_size()}-{case.replace(':', '-')}", target, **train)
    with lost_moments() if how == ["lost"] else contextlib.nullcontext():
        seen = losses(run(config, HELD_OUT, resume_from=start))
    return {"losses": seen, "equal": carried(config, start, folder / f"again-{dist.get_world_size()}")}


def carried(config, start, folder):
    """Load (twice: what a rollback does), save at once, and compare what the two checkpoints hold of every parameter."""
    engine = build_engine(PLDRModel(config.model), config.train, dist.get_world_size())
    load.make_safe(engine)
    for _ in range(2):
        load.load(engine, start, verify(start), precision=config.train.precision)
    Saver(engine, folder).save({"step": STEPS // 2})
    old, new = ZeroState(start / HALF), ZeroState(folder / HALF / HALF)
    assert new.zero["stage"] == config.train.zero_stage and old.shapes.keys() == new.shapes.keys()
    same = [torch.equal(old.tensor(n, key), new.tensor(n, key)) for n in old.shapes for key in (WEIGHT, *MOMENTS)]
    assert len(same) > 100
    return all(same) and old.adam_step == new.adam_step and old.counters == new.counters


def lost_moments():
    real = ZeroState.tensor
    return patch.object(ZeroState, "tensor", lambda self, name, what=WEIGHT: real(self, name, what) * (what == WEIGHT))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    init_distributed(120)
    results = {case: (resumed if ":" in case else straight)(folder, case) for case in sys.argv[2:]}
    if dist.get_rank() == 0:
        (folder / f"w{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
