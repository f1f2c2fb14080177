"""One rank of tests/pipeline/train/test_muon.py: runs with train.optimizer muon.

Usage: muon_worker.py FOLDER WHAT PRECISION. WHAT: "quick", "more", or "from" to resume on this number of ranks what "quick"
has saved. Rank 0 writes FOLDER/result.json.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from pipeline.checkpoint import load
from pipeline.checkpoint.deepspeed_files import ZeroState
from pipeline.checkpoint.format import checkpoint_name
from pipeline.config.run import RunConfig
from pipeline.train.engine import init_distributed
from pipeline.train.state import roll_back
from tests.helpers.worker import finish
from tests.pipeline.train.zero_worker import configuration, make_trainer

HELD_OUT = np.random.default_rng(99).integers(4, 67, size=(9, 17))
MUON = {"optimizer": "muon", "muon_lr": 0.1, "muon_momentum": 0.9, "weight_decay": 0.3}


def muon(folder: Path, precision: str, clip_by: str, g_source: str = "learned", **train) -> RunConfig:
    tree = configuration(folder, 0, precision, clip_by, g_source).as_dict()
    return RunConfig(**{**tree, "train": {**tree["train"], **MUON, **train}})


def trained(config, resume_from=None):
    trainer = make_trainer(config, HELD_OUT, resume_from=resume_from)
    trainer.train()
    return trainer


def points(config, resume_from=None):
    return trained(config, resume_from).tracker.points


def rolled_back(folder, config):
    """The names of parameters and moments that a rollback to step 3 does not restore."""
    trainer = trained(config.model_copy(update={"run_dir": str(folder)}))
    target = folder / "checkpoints" / checkpoint_name(3)
    engine, state = roll_back(trainer.engine, config, target, trainer.state)
    saved = ZeroState(target / target.name)
    assert state.step == 3 and state.sequences_consumed == 6 * 8
    wrong = []
    for name, parameter in engine.module.named_parameters():
        moments = engine.basic_optimizer.state[parameter]
        wrong += [name] * (not torch.equal(parameter, saved.tensor(name)))
        wrong += [f"{name} {k}" for k in saved.moments(name) if not torch.equal(moments[k], saved.tensor(name, k))]
    return {"wrong": wrong, "kinds": sorted({saved.moments(name) for name in saved.shapes})}


def quick(folder: Path, precision: str) -> dict:
    straight = muon(folder / "straight", precision, "value")
    half = folder / "straight" / "checkpoints" / checkpoint_name(3)
    results = {"straight": points(straight), "resumed": points(straight, half)}
    with patch.object(load, "fits", lambda *_, **__: False):
        results["converted"] = points(straight, half)
    return {**results, "sdpa": points(muon(folder / "sdpa", precision, "value", "identity"))}


def more(folder: Path, precision: str) -> dict:
    freezes = muon(
        folder / "freeze", precision, "value", freeze_g={"at_step": 3, "become": "parameter", "sequences": 8}
    )
    return {
        "frozen": points(freezes),
        "frozen_resumed": points(freezes, folder / "freeze" / "checkpoints" / checkpoint_name(4)),
        "rolled_back": rolled_back(folder / "rolled", muon(folder, precision, "value")),
        "norm": points(muon(folder / "norm", precision, "norm", "identity")),
    }


def on_other_ranks(folder: Path, precision: str) -> dict:
    half = folder / "straight" / "checkpoints" / checkpoint_name(3)
    return {"resumed": points(muon(folder / "other", precision, "value"), half)}


def main() -> None:
    folder, what, precision = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    init_distributed(120)
    finish(folder, {"quick": quick, "more": more, "from": on_other_ranks}[what](folder, precision))


if __name__ == "__main__":
    main()
