"""One rank of tests/pipeline/train/test_gpu.py, on the device that DS_ACCELERATOR names. Usage: gpu_worker.py FOLDER."""

import sys
from pathlib import Path

import numpy as np
import torch

from pipeline.checkpoint.format import checkpoint_name
from pipeline.train.engine import device_of_rank, init_distributed
from tests.helpers.worker import finish
from tests.pipeline.train.zero_worker import configuration, run, with_train


def main() -> None:
    folder = Path(sys.argv[1])
    torch.use_deterministic_algorithms(True)
    init_distributed(120)
    held_out = np.random.default_rng(99).integers(4, 67, size=(9, 17))
    results = {"device": device_of_rank().type}
    for precision in ("fp32", "bf16"):
        for variant in ("learned", "identity"):
            name = f"{precision}-{variant}"
            config = configuration(folder / name, 1, precision, "norm", variant)
            straight = run(config, held_out).points
            half = Path(config.run_dir) / "checkpoints" / checkpoint_name(3)
            results[name] = {"straight": straight, "resumed": run(config, held_out, resume_from=half).points}
    compiled = with_train(configuration(folder / "compiled", 1, "bf16", "norm", "identity"), compile=True)
    results["compiled"] = {"straight": run(compiled, held_out).points}
    finish(folder, results)


if __name__ == "__main__":
    main()
