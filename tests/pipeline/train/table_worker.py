"""One rank of tests/pipeline/train/test_table.py: a few steps on one batch, of every combination in the compatibility table.

Usage: table_worker.py FOLDER CELLS.json. Rank 0 writes FOLDER/result.json: for each cell its losses, or the error's line.
"""

import gc
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config.schedule import learning_rate
from pipeline.train.engine import build_engine, init_distributed, set_learning_rate
from pipeline.train.signals import StopRequest
from pipeline.train.step import global_step
from pipeline.train.telemetry import Stopwatch
from pldr_model.model import PLDRModel
from tests.helpers.worker import finish
from tests.pipeline.train.zero_worker import Batches, configuration, with_train

# In bf16 a loss has to fall far to exceed round-off; in fp32 round-off grows with every step.
STEPS = {"fp32": 4, "bf16": 32}
CPU = torch.device("cpu")


def cell_config(folder: Path, cell: dict):
    config = configuration(folder, cell["stage"], cell["precision"], "norm")
    return with_train(
        config,
        compile=cell["compile"],
        activation_checkpointing=cell["recompute"],
        micro_batch=4 // cell["accumulation"],
        offload=cell["offload"],
        optimizer=cell.get("optimizer", "adamw"),
        clip={"fp32": 0.05, "bf16": 0.5}[cell["precision"]],  # where round-off grows least, as measured
        max_lr=1e-3,
        min_lr_ratio=1.0,
        warmup_steps=0,
    )


def losses(config) -> list[float]:
    torch.manual_seed(config.seed)
    engine = build_engine(PLDRModel(config.model), config.train, dist.get_world_size())
    seen = []
    micro, _ = next(Batches(config).micro_batches(0, limit=1))  # one batch, again and again, so that its loss falls
    for step in range(STEPS[config.train.precision]):
        set_learning_rate(engine, learning_rate(config.train, step))
        seen.append(
            global_step(engine, micro, config.model, stop=StopRequest(), device=CPU, forward=Stopwatch(CPU)).loss
        )
    return seen


def main() -> None:
    folder, cells = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    init_distributed(300)
    results = []
    for cell in cells:
        torch._dynamo.reset()
        try:
            results.append(losses(cell_config(folder, cell)))
        except Exception as error:  # shown in the table; a failure of one rank alone ends in the timeout
            traceback.print_exc()
            results.append(f"{type(error).__name__}: {error}".splitlines()[0])
        gc.collect()
        if dist.get_rank() == 0:
            print(cell, results[-1], flush=True)
    finish(folder, results)


if __name__ == "__main__":
    main()
