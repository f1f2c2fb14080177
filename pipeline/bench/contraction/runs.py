"""Finished runs, or runs that still train, as contraction.py needs them: checkpoints that are kept, and what validations found.

Decision: the rows that reach a metric learner are those of real held-out sequences, as in a validation, where sequence 0 is the
one that all others are compared with; SEQUENCES of them instead of train.val_sequences.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.bench.contraction.units import Prediction, predict
from pipeline.bundle.weights import load_weights
from pipeline.checkpoint.format import committed, read_state
from pipeline.config.paths import RunPaths, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.data.loading.loader import evenly_spread
from pipeline.data.loading.reader import open_split
from pipeline.data.tokens.index import TokenIndex
from pipeline.errors import UserError
from pipeline.post.consolidate import consolidate
from pipeline.tracking.query import read_run
from pipeline.tracking.run import known_run
from pipeline.tracking.sqlite_store import file_of
from pldr_model.model import PLDRModel
from pldr_model.plga import PLGA

SEQUENCES = 16
CHILDREN = "children"  # of a sweep's run_dir
MEASURED = {"A": "invariance/order_parameter_A", "G": "invariance/order_parameter_G"}


@dataclass(frozen=True)
class Run:
    """A run directory: its configuration as its checkpoints have it, and its validations: step -> order parameters of A, G."""

    name: str
    config: RunConfig
    measured: dict[int, dict[str, float]]

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are kept, oldest first."""
        return committed(RunPaths(self.config.run_dir).checkpoints)


def find_runs(folder: Path) -> list[Run]:
    """The children of a sweep's directory, or the one run of a run directory. Those without a checkpoint, and those whose G_LM
    is constant by construction, are left out. Raises UserError when none is left."""
    children = folder / CHILDREN
    folders = sorted(children.iterdir()) if children.is_dir() else [folder]
    runs = [run for each in folders if (run := _open(each)) is not None]
    if not runs:
        raise UserError(
            f"{folder}: no run with a metric learner and a checkpoint in it; name the run_dir of a sweep or of a run"
        )
    return runs


def predictions(run: Run, checkpoint: Path, *, sequences: int = SEQUENCES) -> list[Prediction]:
    """What a checkpoint's weights say of A, by layer."""
    with tempfile.TemporaryDirectory(prefix="pldr-contraction-") as folder:
        consolidate(checkpoint, Path(folder) / "weights")
        model = load_weights(Path(folder) / "weights")[0]
    return of_model(model, _held_out(run, sequences))


@torch.no_grad()
def of_model(model: PLDRModel, ids_NS: torch.Tensor) -> list[Prediction]:
    """The same of a model and sequences, of which the first is the one compared with. Made fp64 in place."""
    learners = [module.metric_learner for module in model.double().eval().modules() if isinstance(module, PLGA)]
    inputs: list[torch.Tensor] = []
    hooks = [each.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for each in learners]
    model(ids_NS, padded=False)
    for hook in hooks:
        hook.remove()
    rows = [x_NHKK.flatten(1, 2) for x_NHKK in inputs]
    return [predict(learner, x_NRK[0], x_NRK[1:]) for learner, x_NRK in zip(learners, rows, strict=True)]


def _open(folder: Path) -> Run | None:
    kept = committed(RunPaths(folder).checkpoints)
    if not kept:
        return None
    config = RunConfig.model_validate({**read_state(kept[-1])["config"], "run_dir": str(folder)})
    store = None if config.tracking.uri is None else file_of(config.tracking.uri)
    if store is not None and not store.exists():  # the run was moved: its store is looked for where it lies now
        config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": None})})
    return None if config.model.g_source != "learned" else Run(folder.name, config, _measured(config))


def _measured(config: RunConfig) -> dict[int, dict[str, float]]:
    """Validations as MLflow has them; none for a run that it does not know."""
    known = known_run(config, RunPaths(config.run_dir))
    if known is None or known.record.run_id is None:
        return {}
    histories: dict[str, Any] = read_run(known.uri, known.record.run_id)[2]
    found: dict[int, dict[str, float]] = {}
    for name, metric in MEASURED.items():
        for step, value in histories.get(metric, []):
            found.setdefault(step, {})[name] = value
    return found


def _held_out(run: Run, count: int) -> torch.Tensor:
    """Held-out sequences [n,S]; the first is the one that validations compare with."""
    index = TokenIndex.load(tokens_folder(run.config))
    reader = open_split(index, "val", cache_gigabytes=run.config.data.cache_gigabytes)
    chosen = evenly_spread(reader, np.arange(reader.num_sequences), count)
    return torch.from_numpy(reader.read(chosen).astype(np.int64))[:, :-1]
