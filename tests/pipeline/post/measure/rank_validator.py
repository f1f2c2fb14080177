"""Run as a module, one process a rank: validates the model of tests/helpers/models.py's `make_model(gain=GAIN)` over its
own text and writes each rank's certificate. `python -m tests.pipeline.post.measure.rank_validator OUT GAIN`; ranks and
rendezvous come from the environment."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.helpers import models as helpers


def main(out: Path, gain: float) -> None:
    model = helpers.make_model(gain=gain)
    text = helpers.sample_text(model)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    certificate = helpers.certify(model, text, seed=3)
    (out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(certificate))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
