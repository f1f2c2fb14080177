"""Benchmark scores of one checkpoint: what rank 0 starts beside training (pipeline/train/evaluations.py).

    python -m pipeline.stages.evaluate JOB.json step-000500

The checkpoint becomes weights and a G_LM in a folder of its own, `evaluations/step-000500/model/`, as the stages consolidate
and extract make them, and is then scored like any model. `scores.json` is written last, when all is done; training reads
nothing else. Ends with the process that started it.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.nice(19)  # before the imports below, which take seconds

import contextlib
import ctypes
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from pipeline.checkpoint.format import step_of
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.distributed import end_with_parent
from pipeline.errors import UserError
from pipeline.io.sealed import publish_sealed, read_sealed
from pipeline.io.storage import MANIFEST, sha256_file
from pipeline.train.evaluations import FAILED, MODEL, SCORES

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """The exit code: 0 where at least one task was scored."""
    end_with_parent()
    with contextlib.suppress(OSError, AttributeError):  # Linux: also where this process hangs
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        job = read_sealed(Path(argv[0]))
        config = parse_config(job["config"], where=argv[0])
        evaluate_checkpoint(config, RunPaths(config.run_dir), argv[1])
    except UserError as error:
        print(f"{FAILED}{error}", flush=True)
        return 1
    return 0


def evaluate_checkpoint(config: RunConfig, paths: RunPaths, name: str) -> dict[str, Any]:
    """Score a committed checkpoint as `train.evaluate` says. Returns what `scores.json` holds.

    Raises UserError where the checkpoint, lm-eval or the data are not there, or no task could be scored.
    """
    settings = config.train.evaluate
    assert settings is not None
    from pipeline.inference.evaluate import tasks

    tasks.quiet(offline=settings.data is not None)
    import torch

    from pipeline.inference.evaluate.logged import metrics_of
    from pipeline.inference.evaluate.run import evaluate
    from pipeline.inference.source import open_weights
    from pipeline.post.consolidate import consolidate
    from pipeline.stages.post import extract_into

    torch.set_num_threads(settings.threads)
    data = None if settings.data is None else Path(settings.data).expanduser()
    tasks.find(settings.tasks, data)  # before the checkpoint is read
    checkpoint, folder = paths.checkpoints / name, paths.evaluations / name
    model = RunPaths(folder / MODEL)
    shutil.rmtree(model.root, ignore_errors=True)  # of a start that was killed
    try:
        consolidate(checkpoint, model.weights)
        manifest = sha256_file(checkpoint / MANIFEST)
        extract_into(config, paths, model)
        opened = open_weights(config, model, checkpoint, live=None)
        results = evaluate(opened, settings.tasks, out=folder, limit=settings.limit, data=data)
    finally:
        shutil.rmtree(model.root, ignore_errors=True)
    if not results["tasks"]:
        raise UserError("; ".join(f"{task}: {why}" for task, why in results["failed"].items()))
    scores = {
        "step": step_of(checkpoint),
        "checkpoint_sha256": manifest,
        "tasks": list(settings.tasks),
        "limit": settings.limit,
        "metrics": metrics_of(results),
        "failed": results["failed"],
    }
    publish_sealed(folder / SCORES, scores)
    return scores


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
