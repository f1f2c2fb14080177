"""One rank of tests/pipeline/train/test_variants.py: where the metric learner's weight decay is; constraints of a constant G.

Usage: variants_worker.py FOLDER STAGES(comma-separated) PRECISION. Rank 0 writes FOLDER/result.json. `quick` is run by
recipe_worker.py, whose ranks have started anyway.
"""

import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from pipeline.checkpoint import load
from pipeline.checkpoint.deepspeed_files import MOMENTS, ZeroState
from pipeline.checkpoint.format import checkpoint_name
from pipeline.config.run import RunConfig
from pipeline.train.engine import init_distributed
from tests.helpers.worker import finish
from tests.pipeline.train.zero_worker import configuration, make_trainer

HELD_OUT = np.random.default_rng(99).integers(4, 67, size=(9, 17))
HALF = checkpoint_name(3)
CONSTRAINTS = [{"g_constraint": "low_rank", "g_rank": 3}, {"g_constraint": "rotary"}, {"g_constraint": "nonrotary"}]


def trained(config, resume_from=None):
    trainer = make_trainer(config, HELD_OUT, resume_from=resume_from)
    trainer.train()
    return trainer


def points(config, resume_from=None):
    return trained(config, resume_from).tracker.points


def decaying_on(part: str, folder: Path, stage: int, **train) -> RunConfig:
    tree = configuration(folder, stage, "fp32", "value").as_dict()
    return RunConfig(**{**tree, "train": {**tree["train"], "metric_decay_on": part, **train}})


def constant(folder: Path, stage: int, **model) -> RunConfig:
    config = configuration(folder, stage, "fp32", "value", "constant")
    return config.model_copy(update={"model": replace(config.model, **model)})


def by_part(part: str, folder: Path, stage: int) -> dict:
    """A run, the same resumed by DeepSpeed and converted, and what is carried over into a run with all units decaying."""
    config = decaying_on(part, folder / "straight", stage)
    trainer = trained(config)
    half = folder / "straight" / "checkpoints" / HALF
    found = {"straight": trainer.tracker.points, "resumed": points(config, half)}
    with patch.object(load, "fits", lambda *_, **__: False):
        found["converted"] = points(config, half)
    other = decaying_on("units", folder / "other", stage, steps=4, checkpoint_every=4)
    found["into_units"] = points(other, half)
    return found


def moments_follow_names(part: str, folder: Path) -> bool:
    """Whether a checkpoint has, by name, the moments that the optimizer had (stage 0, where they are numbered)."""
    config = decaying_on(part, folder, 0)
    trainer = trained(config)
    last = folder / "checkpoints" / checkpoint_name(config.train.steps)
    saved, states = ZeroState(last / last.name), trainer.engine.basic_optimizer.state
    named = trainer.engine.module.named_parameters()
    return all(torch.equal(states[p][key], saved.tensor(name, key)) for name, p in named for key in MOMENTS)


def quick(folder: Path) -> dict:
    return {
        "moments": moments_follow_names("norms", folder / "moments"),
        "low_rank": [points(constant(folder / f"low-{stage}", stage, **CONSTRAINTS[0])) for stage in (1, 3)],
    }


def main() -> None:
    folder, stages = Path(sys.argv[1]), [int(s) for s in sys.argv[2].split(",")]
    torch.set_num_threads(1)
    init_distributed(120)
    results: dict = {"decay": {}, "constant": {}, "frozen": {}}
    for stage in stages:
        for part in ("norms", "glus", "units"):
            results["decay"][f"{part}-{stage}"] = by_part(part, folder / f"{part}-{stage}", stage)
        rule = {"at_step": 3, "become": "parameter", "sequences": 8}
        config = decaying_on("norms", folder / f"frozen-{stage}", stage, freeze_g=rule)
        results["frozen"][stage] = [points(config), points(config, folder / f"frozen-{stage}/checkpoints/step-000004")]
        for change in CONSTRAINTS:
            name = f"{change['g_constraint']}-{stage}"
            config = constant(folder / name, stage, **change)
            straight = points(config)
            resumed = points(config, folder / name / "checkpoints" / HALF)
            results["constant"][name] = {"straight": straight, "resumed": resumed}
    finish(folder, results)


if __name__ == "__main__":
    main()
