"""One rank of tests/pipeline/train/test_zero.py: trains the same tiny run at several ZeRO stages in one process group.

Usage: zero_worker.py FOLDER STAGES(comma-separated) PRECISION. Rank 0 writes FOLDER/result.json.
"""

import sys
import time
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from pipeline.checkpoint import load, save
from pipeline.checkpoint.format import checkpoint_name, verify
from pipeline.config import schedule
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import UserError
from pipeline.train.engine import init_distributed
from pipeline.train.state import Lineage
from pipeline.train.trainer import Trainer
from tests.helpers.worker import finish

STEPS = 6


class Batches:
    """Global batches that follow from their position alone."""

    slow: ClassVar[dict[int, float]] = {}  # seconds that a rank waits for a batch

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    num_sequences = 100

    def indices(self, position):
        return np.arange(position, position + self.config.train.global_batch)

    def recorded(self, position):
        return {}

    def micro_batches(self, position, *, limit):
        train, model = self.config.train, self.config.model
        rank, world = dist.get_rank(), dist.get_world_size()
        for _ in range(limit):
            rng = np.random.default_rng(position)
            batch = rng.integers(4, model.vocab_size, size=(train.global_batch, model.context_length + 1))
            mine = batch.reshape(-1, world, train.micro_batch, batch.shape[1])[:, rank]
            position += train.global_batch
            time.sleep(self.slow.get(rank, 0.0))
            yield list(mine), position


class Recorder:
    """Keeps what the trainer logs, in place of the MLflow tracker."""

    def __init__(self) -> None:
        self.points = {}

    def log(self, step, values):
        self.points.setdefault(step, {}).update(values)


def configuration(folder: Path, stage: int, precision: str, clip_by: str, g_source: str = "learned") -> RunConfig:
    tree = {
        "name": "zero",
        "run_dir": str(folder),
        "data": {"sources": [{"url": "unused"}]},
        "model": {
            "vocab_size": 67, "num_layers": 2, "num_heads": 2, "head_dim": 8, "context_length": 16, "A_dff": 12,
            "num_reslayerA": 2, "g_source": g_source,
        },
        "train": {
            "steps": STEPS, "global_batch": 8, "micro_batch": 2, "max_lr": 2e-3, "warmup_steps": 2, "clip_by": clip_by,
            "clip": 0.05, "metric_weight_decay": 2.0, "precision": precision, "zero_stage": stage, "log_every": 1,
            "validate_every": 3, "checkpoint_every": 3, "val_sequences": 8,
        },
    }  # fmt: skip
    return parse_config(tree, where="test")


def make_trainer(config, held_out, *, data=None, resume_from=None, make=Trainer, **keywords):
    """A trainer that logs to a Recorder, on data that needs no files."""
    return make(
        config,
        RunPaths(config.run_dir),
        data or Batches(config),
        held_out,
        bytes_per_token=2.0,
        lineage=Lineage("data", "tokenizer", "run"),
        tracker=Recorder(),
        resume_from=resume_from,
        **keywords,
    )


def run(config, held_out, resume_from=None):
    trainer = make_trainer(config, held_out, resume_from=resume_from)
    trainer.train()
    return trainer.tracker


def failing_save(folder, stage, precision, held_out, bad):
    """A disk that is full under one rank; stage 0 and rank 1: that rank has nothing to write, so rank 0 fails."""
    config = configuration(folder, stage, precision, "norm")
    real, writer = load._HashingFile.write, bad if stage else 0

    def full(self, data):
        if dist.get_rank() == writer:
            raise OSError(28, "No space left on device")
        return real(self, data)

    message = "no error"
    with patch.object(load._HashingFile, "write", full):
        try:
            run(config, held_out)  # the save at step 3 fails with a warning, the one at the last step ends the run
        except UserError as error:
            message = str(error)
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return {"messages": messages, "left": sorted(p.name for p in (folder / "checkpoints").iterdir())}


def failing_copy(folder, stage, precision, held_out):
    """The disk that all nodes see is full when rank 1 copies its files of the first checkpoint there, beside training."""
    config = with_train(configuration(folder, stage, precision, "norm"), staging=str(folder / "nvme"))
    real, failed = save._copy, []

    def full(source, target):
        if dist.get_rank() == 1 and not failed:
            failed.append(target)
            raise OSError(28, "No space left on device")
        real(source, target)

    with patch.object(save, "_copy", full):
        run(config, held_out)
    return {
        "left": sorted(p.name for p in (folder / "checkpoints").iterdir()),
        "staged": [p.name for p in (folder / "nvme").rglob("*") if p.is_file()],
    }


def other_recipe(config, held_out):
    """A run that starts from another run's checkpoint with its own recipe: what its optimizer has, the budget it logs."""
    half = Path(config.run_dir) / "checkpoints" / checkpoint_name(3)
    config = config.model_copy(update={"run_dir": config.run_dir + "-other"})
    config = with_train(config, weight_decay=0.5, metric_weight_decay=9.0, betas=(0.5, 0.6), eps=1e-3)
    trainer = make_trainer(config, held_out, resume_from=half)
    trainer.train()
    points = trainer.tracker.points
    groups = [
        [group[key] for key in ("weight_decay", "betas", "eps")] for group in trainer.engine.optimizer.param_groups
    ]
    steps = [config.train.metric_decay * schedule.learning_rate(config.train, step) for step in (3, 4, 5)]
    return {"groups": groups, "grown": points[6]["invariance/budget"], "by": sum(steps)}


def with_train(config, **keys):
    return config.model_copy(update={"train": config.train.model_copy(update=keys)})


def main() -> None:
    folder, stages, precision = Path(sys.argv[1]), [int(s) for s in sys.argv[2].split(",")], sys.argv[3]
    torch.set_num_threads(1)
    init_distributed(120)
    held_out = np.random.default_rng(99).integers(4, 67, size=(9, 17))
    results = {}
    for stage in stages:
        for clip_by in ("norm", "value"):
            config = configuration(folder / f"z{stage}-{clip_by}", stage, precision, clip_by)
            straight = run(config, held_out)
            if clip_by == "norm" and stage == stages[0]:
                last = Path(config.run_dir) / "checkpoints" / checkpoint_name(STEPS)
                assert not run(config, held_out, resume_from=last).points  # nothing is left to train
            half = Path(config.run_dir) / "checkpoints" / checkpoint_name(3)
            assert verify(half)["step"] == 3
            resumed = run(config, held_out, resume_from=half)
            twin = configuration(folder / f"z{stage}-{clip_by}-sdpa", stage, precision, clip_by, "identity")
            results[f"{stage}-{clip_by}"] = {
                "sdpa": run(twin, held_out).points,
                "straight": straight.points,
                "resumed": resumed.points,
                "budget": schedule.invariance_budget(config.train),
            }
    results["failing"] = {
        f"{stage}-{bad}": failing_save(folder / f"f{stage}{bad}", stage, precision, held_out, bad)
        for stage in stages
        for bad in (0, 1)
    }
    results["recipes"] = [
        other_recipe(configuration(folder / f"z{stage}-norm", stage, precision, "norm"), held_out)
        for stage in stages[1::2]
    ]
    results["failing_copy"] = failing_copy(folder / "copy", stages[-1], precision, held_out)
    watched = configuration(folder / "watched", stages[-1], precision, "norm")
    watched = with_train(watched, profile_steps=(2, 3), staging=str(folder / "nvme"))
    Batches.slow = {1: 0.1}
    results["watched"] = run(watched, held_out).points
    finish(folder, results)


if __name__ == "__main__":
    main()
