"""One rank of tests/pipeline/train/test_muon.py, test_batch_warmup.py, test_backend.py and test_variants.py: runs with the keys
that those test.

Usage: recipe_worker.py FOLDER WHAT PRECISION. WHAT: "quick", "more", or "from" to resume on this number of ranks what "quick"
has saved. Rank 0 writes FOLDER/result.json.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from pipeline.checkpoint import load
from pipeline.checkpoint.deepspeed_files import ZeroState
from pipeline.checkpoint.format import checkpoint_name
from pipeline.config.run import RunConfig
from pipeline.train.backend import set_up
from pipeline.train.engine import init_distributed
from pipeline.train.state import roll_back
from pipeline.train.trainer import Trainer
from tests.helpers.worker import finish
from tests.pipeline.train import variants_worker
from tests.pipeline.train.zero_worker import Batches, configuration, make_trainer

WARMUP = [{"batch": 4, "steps": 3}, {"batch": 8, "steps": 1}]  # three steps of one micro batch, one of two, then four
HELD_OUT = np.random.default_rng(99).integers(4, 67, size=(9, 17))
MUON = {"optimizer": "muon", "muon_lr": 0.1, "muon_momentum": 0.9, "weight_decay": 0.3}


def muon(folder: Path, precision: str, clip_by: str, g_source: str = "learned", **train) -> RunConfig:
    tree = configuration(folder, 0, precision, clip_by, g_source).as_dict()
    return RunConfig(**{**tree, "train": {**tree["train"], **MUON, **train}})


class Sized(Batches):
    """Batches of any size, as pipeline/data/loading/loader.py has them."""

    def of_batch(self, global_batch: int) -> "Sized":
        train = self.config.train.model_copy(update={"global_batch": global_batch})
        return Sized(self.config.model_copy(update={"train": train}))


def growing(folder: Path, stage: int, precision: str = "fp32", **train) -> RunConfig:
    tree = configuration(folder, stage, precision, "value", "identity").as_dict()
    sizes = {
        "global_batch": 16,
        "batch_warmup": WARMUP,
        "checkpoint_every": 2,
        "keep_checkpoints": 3,
        "validate_every": 6,
    }
    return RunConfig(**{**tree, "train": {**tree["train"], **sizes, **train}})


def trained(config, resume_from=None):
    trainer = make_trainer(config, HELD_OUT, data=Sized(config), resume_from=resume_from)
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
    results["sdpa"] = points(muon(folder / "sdpa", precision, "value", "identity"))
    if precision == "fp32":
        results["variants"] = variants_worker.quick(folder / "variants")
        results["growing"] = grown(folder, 1)
        config = growing(folder / "deterministic", 1, deterministic=True)
        set_up(config.train, folder / "recordings")
        results["deterministic"] = points(config)
        results["kernels"] = torch.are_deterministic_algorithms_enabled()
    return results


def grown(folder: Path, stage: int, **train) -> dict:
    """A run whose batches grow, and one that resumes from within."""
    config = growing(folder / f"growing-{stage}{len(train)}", stage, **train)
    trainer = trained(config)
    state = asdict(trainer.state)
    half = Path(config.run_dir) / "checkpoints" / checkpoint_name(2)
    return {
        "straight": trainer.tracker.points,
        "resumed": points(config, half),
        "state": {key: state[key] for key in ("sequences_consumed", "tokens_consumed", "sequences_left_out")},
        "samples": trainer.engine.global_samples,
    }


def more(folder: Path, precision: str) -> dict:
    freezes = muon(
        folder / "freeze", precision, "value", freeze_g={"at_step": 3, "become": "parameter", "sequences": 8}
    )
    return {
        "frozen": points(freezes),
        "frozen_resumed": points(freezes, folder / "freeze" / "checkpoints" / checkpoint_name(4)),
        "rolled_back": rolled_back(folder / "rolled", muon(folder, precision, "value")),
        "norm": points(muon(folder / "norm", precision, "norm", "identity")),
        "growing": {str(stage): grown(folder, stage) for stage in (0, 2, 3)},
        "offload": grown(folder, 2, offload="optimizer"),
        "grown_back": grown_back(folder / "back"),
    }


def grown_back(folder: Path) -> dict:
    """A run that is rolled back once, after step 4 to step 2: the sizes of the batches that it trains on, and where it ends."""
    config = growing(folder, 1)
    seen, rolled = [], []

    class Rolled(Trainer):
        def optimize(self, micro_batches):
            seen.append(sum(map(len, micro_batches)) * dist.get_world_size())
            return super().optimize(micro_batches)

        def _check_for_spike(self, outcome, values, sequences):
            if self.state.step == 3 and not rolled:
                rolled.append(self.state.step)
                return {"action": "rollback"}
            return None

    trainer = make_trainer(config, HELD_OUT, data=Sized(config), make=Rolled)
    state = trainer.train()
    return {"sizes": seen, "consumed": state.sequences_consumed, "left_out": state.sequences_left_out}


def on_other_ranks(folder: Path, precision: str) -> dict:
    half = folder / "straight" / "checkpoints" / checkpoint_name(3)
    inside = folder / "growing-10" / "checkpoints" / checkpoint_name(2)
    return {
        "resumed": points(muon(folder / "other", precision, "value"), half),
        "growing": points(growing(folder / "other-growing", 1), inside),
    }


def main() -> None:
    folder, what, precision = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    init_distributed(120)
    finish(folder, {"quick": quick, "more": more, "from": on_other_ranks}[what](folder, precision))


if __name__ == "__main__":
    main()
