"""One rank of tests/pipeline/train/test_sharing.py: runs that begin to share G.

Usage: sharing_worker.py FOLDER STAGES PRECISION. Rank 0 writes FOLDER/result.json.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from pipeline.checkpoint.format import checkpoint_name, verify
from pipeline.config.train import FreezeConfig
from pipeline.train.engine import init_distributed
from pipeline.train.state import roll_back
from tests.helpers.worker import finish
from tests.pipeline.train.zero_worker import configuration, make_trainer, with_train


def trained(config, held_out, at=None):
    """What a run logs, and where it began to share G."""
    start = None if at is None else Path(config.run_dir) / "checkpoints" / checkpoint_name(at)
    trainer = make_trainer(config, held_out, resume_from=start)
    state = trainer.train()
    return {"points": trainer.tracker.points, "shared": state.shared, "frozen": state.frozen}


def around_the_switch(folder: Path, stage: int, precision: str, held_out: np.ndarray) -> dict:
    """Shared after step 3, where the first validation is; resumed from before and after, and from after with another rule."""
    config = with_train(
        configuration(folder / f"s{stage}", stage, precision, "norm"),
        share_g_below=1e9, checkpoint_every=2, keep_checkpoints=9, peak_tflops=1.0,
    )  # fmt: skip
    result = {"straight": trained(config, held_out)}
    checkpoints = Path(config.run_dir) / "checkpoints"
    saved = {step: checkpoints / checkpoint_name(step) for step in (2, 4, 6)}
    result["saved"] = {step: verify(folder)["shared"] for step, folder in saved.items()}
    trainer = make_trainer(config, held_out, resume_from=saved[6])
    back = {step: roll_back(trainer.engine, config, saved[step], trainer.state)[1].shared for step in (4, 2)}
    return result | {
        "rolled_back": back,
        "before": trained(config, held_out, at=2),
        "after": trained(config, held_out, at=4),
        "other_rule": trained(with_train(config, share_g_below=1e-30), held_out, at=4),
    }


def main() -> None:
    folder, stages, precision = Path(sys.argv[1]), [int(s) for s in sys.argv[2].split(",")], sys.argv[3]
    torch.set_num_threads(1)
    init_distributed(120)
    held_out = np.random.default_rng(99).integers(4, 67, size=(9, 17))
    results: dict = {stage: around_the_switch(folder, stage, precision, held_out) for stage in stages}
    later = with_train(
        configuration(folder / "later", 1, "fp32", "norm"),
        g_from="neighbor", share_g_below=1e9, validate_every=1, freeze_g=FreezeConfig(at_step=4, sequences=8),
    )  # fmt: skip
    results["frozen_later"] = trained(later, held_out)
    finish(folder, results)


if __name__ == "__main__":
    main()
