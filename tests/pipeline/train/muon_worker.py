"""One rank of the slow tests of tests/pipeline/train/test_muon.py: runs that go on on another number of ranks.

Usage: muon_worker.py FOLDER straight|resumed PRECISION. "resumed" goes on, on this number of ranks, from what "straight" has
saved at step 3. Rank 0 writes FOLDER/result.json.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from pipeline.checkpoint import load
from pipeline.checkpoint.deepspeed_files import WEIGHT, ZeroState
from pipeline.checkpoint.format import checkpoint_name, verify
from pipeline.checkpoint.save import Saver
from pipeline.config.run import RunConfig
from pipeline.train.engine import build_engine, init_distributed
from pldr_model.model import PLDRModel
from tests.helpers.worker import finish
from tests.pipeline.train.recipe_worker import muon, points

HALF = checkpoint_name(3)
RATE = 1e-4  # of tests/pipeline/checkpoint/reshard_worker.py, for both optimizers: at more, sums in another order show


def settings(folder: Path, precision: str, clip_by: str) -> RunConfig:
    return muon(folder / f"{precision}-{clip_by}", precision, clip_by, max_lr=RATE, muon_lr=None, validate_every=6)


def straight(folder: Path, precision: str, clip_by: str) -> dict:
    return {"points": points(settings(folder, precision, clip_by))}


def resumed(folder: Path, precision: str, clip_by: str) -> dict:
    source = folder / f"{precision}-{clip_by}" / "checkpoints" / HALF
    config = settings(folder / f"on-{dist.get_world_size()}", precision, clip_by)
    found = {"points": points(config, source), "wrong": not_carried(config, source, folder / "again")}
    real = ZeroState.tensor
    with patch.object(ZeroState, "tensor", lambda self, name, what=WEIGHT: real(self, name, what) * (what == WEIGHT)):
        found["lost"] = points(config, source)
    return found


def not_carried(config: RunConfig, source: Path, folder: Path) -> list[str]:
    """Load, save at once, and name what is not as it was, bit for bit, of every parameter's weight and moments."""
    engine = build_engine(PLDRModel(config.model), config.train, dist.get_world_size())
    load.make_safe(engine)
    load.load(engine, source, verify(source), precision=config.train.precision)
    Saver(engine, folder).save({"step": 3})
    old, new = ZeroState(source / HALF), ZeroState(folder / HALF / HALF)
    assert old.shapes.keys() == new.shapes.keys() and {old.moments(n) for n in old.shapes} == {
        ("exp_avg", "exp_avg_sq"),
        ("momentum_buffer",),
    }
    kept = [(name, what) for name in old.shapes for what in (WEIGHT, *old.moments(name))]
    return [f"{name} {what}" for name, what in kept if not torch.equal(old.tensor(name, what), new.tensor(name, what))]


def main() -> None:
    folder, what, precision = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    init_distributed(120)
    work = {"straight": straight, "resumed": resumed}[what]
    finish(folder, {clip_by: work(folder, precision, clip_by) for clip_by in ("value", "norm")})


if __name__ == "__main__":
    main()
