"""Run as a script, one process a rank: validates the model of conftest's `make_model(gain=GAIN)` over its own text and
writes each rank's certificate. `python rank_validator.py OUT GAIN`; ranks and rendezvous come from the environment."""

from __future__ import annotations

import importlib.util
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def main(out: Path, gain: float) -> None:
    spec = importlib.util.spec_from_file_location("helpers", Path(__file__).with_name("conftest.py"))
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    model = helpers.make_model(gain=gain)
    text = helpers.sample_text(model)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    certificate = helpers.certify(model, text, seed=3)
    (out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(certificate))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
