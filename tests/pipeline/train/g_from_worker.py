"""One rank of the slow tests of tests/pipeline/train/test_sharing.py: the G of another sequence, in bf16.

Usage: g_from_worker.py FOLDER STAGES PRECISION. Rank 0 writes FOLDER/gradient-STAGE-GFROM.pt, and FOLDER/result.json.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pipeline.checkpoint.format import checkpoint_name
from pipeline.train.engine import init_distributed
from tests.helpers.worker import finish
from tests.pipeline.train.mean_worker import OF_ANOTHER, Unpadded, gradient
from tests.pipeline.train.zero_worker import configuration, make_trainer, with_train

HELD_OUT = np.random.default_rng(99).integers(4, 67, size=(9, 17))


def settings(folder: Path, stage: int, precision: str, g_from: str):
    return with_train(configuration(folder, stage, precision, "norm"), micro_batch=2, g_from=g_from)


def resumed(config) -> dict:
    """What a run logs, and what one does that resumes from its third step."""
    straight = make_trainer(config, HELD_OUT)
    straight.train()
    again = make_trainer(config, HELD_OUT, resume_from=Path(config.run_dir) / "checkpoints" / checkpoint_name(3))
    again.train()
    return {"straight": straight.tracker.points, "resumed": again.tracker.points}


def main() -> None:
    folder, stages, precision = Path(sys.argv[1]), [int(s) for s in sys.argv[2].split(",")], sys.argv[3]
    torch.set_num_threads(1)
    init_distributed(120)
    results = {}
    for stage in stages:
        for g_from in ("own", *OF_ANOTHER):
            config = settings(folder / f"{stage}-{g_from}", stage, precision, g_from)
            found = gradient(config, Unpadded)
            if dist.get_rank() == 0:
                torch.save(found, folder / f"gradient-{stage}-{g_from}.pt")
            results[f"{stage}-{g_from}"] = resumed(config)
    finish(folder, results)


if __name__ == "__main__":
    main()
