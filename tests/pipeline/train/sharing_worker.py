"""One rank of tests/pipeline/train/test_sharing.py: gradients with another sequence's G, and a run that begins to share G.

Usage: sharing_worker.py FOLDER STAGES PRECISION. Rank 0 writes the gradient of a step to FOLDER/STAGE-G_FROM.pt, in fp64 (stage
3, which refuses fp64, in fp32), and FOLDER/result.json.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline.checkpoint.format import checkpoint_name, verify
from pipeline.config.train import FreezeConfig
from pipeline.train.engine import init_distributed
from tests.helpers.worker import finish
from tests.pipeline.train.mean_worker import DAG, gradient
from tests.pipeline.train.zero_worker import configuration, make_trainer, with_train

GRADIENTS = ("batch", "neighbor")


def settings(folder: Path, stage: int, **train):
    """As mean_worker.settings, but with a metric learner at stage 3 too."""
    config = configuration(folder, stage, "fp32", "norm")
    return with_train(config.model_copy(update={"model": replace(config.model, dag_coefficients=DAG)}), **train)


def trained(config, held_out, at=None):
    """What a run logs, and where it began to share G."""
    start = None if at is None else Path(config.run_dir) / "checkpoints" / checkpoint_name(at)
    trainer = make_trainer(config, held_out, resume_from=start)
    state = trainer.train()
    return {"points": trainer.tracker.points, "shared": state.shared, "frozen": state.frozen}


def around_the_switch(folder: Path, stage: int, held_out: np.ndarray) -> dict:
    """Shared after step 3, where the first validation is; resumed from before and after, and from after with another rule."""
    config = with_train(
        configuration(folder / f"s{stage}", stage, "fp32", "norm"),
        share_g_below=1e9, checkpoint_every=2, keep_checkpoints=9, peak_tflops=1.0,
    )  # fmt: skip
    result = {
        "straight": trained(config, held_out),
        "before": trained(config, held_out, at=2),
        "after": trained(config, held_out, at=4),
        "other_rule": trained(with_train(config, share_g_below=1e-30), held_out, at=4),
    }
    folder = Path(config.run_dir) / "checkpoints"
    result["saved"] = {step: verify(folder / checkpoint_name(step))["shared"] for step in (2, 4, 6)}
    return result


def main() -> None:
    folder, stages = Path(sys.argv[1]), [int(s) for s in sys.argv[2].split(",")]
    torch.set_num_threads(1)
    init_distributed(120)
    reduced = [*get_accelerator().supported_dtypes(), torch.float64]  # without ZeRO DeepSpeed refuses fp64 gradients
    get_accelerator().supported_dtypes = lambda: reduced
    held_out = np.random.default_rng(99).integers(4, 67, size=(9, 17))
    results: dict = {}
    for stage in stages:
        for g_from in GRADIENTS:
            torch.set_default_dtype(torch.float32 if stage == 3 else torch.float64)
            found = gradient(settings(folder, stage, micro_batch=2, g_from=g_from))
            if dist.get_rank() == 0:
                torch.save(found, folder / f"{stage}-{g_from}.pt")
        torch.set_default_dtype(torch.float32)
        results[stage] = around_the_switch(folder, stage, held_out)
    if len(stages) > 1:
        later = with_train(
            configuration(folder / "later", 1, "fp32", "norm"),
            g_from="neighbor", share_g_below=1e9, validate_every=1, freeze_g=FreezeConfig(at_step=4, sequences=8),
        )  # fmt: skip
        results["frozen_later"] = trained(later, held_out)
    finish(folder, results)


if __name__ == "__main__":
    main()
