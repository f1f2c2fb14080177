"""The trainer's step and the trainer itself, in this process as the only rank, with the recipe of configs/pldr-110m.yaml."""

from __future__ import annotations

import atexit
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from pipeline.bench.gpu.training.forms import Form
from pipeline.bench.gpu.training.setting import RECIPE
from pipeline.bench.gpu.training.steps import ADAMW, random_ids
from pldr_model.config import ModelConfig

if TYPE_CHECKING:
    from pipeline.config.run import RunConfig

TIMEOUT_S = 120.0
STEPS = 10_000  # of the schedule; few are run


def join(device: torch.device) -> None:
    """The process group of one rank: nccl on a GPU, gloo on a CPU."""
    from pipeline.environment import without_other_jobs
    from pipeline.network import free_port

    for name in os.environ.keys() - without_other_jobs(os.environ).keys():
        del os.environ[name]
    os.environ["DS_ACCELERATOR"] = device.type
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(one | {"MASTER_PORT": str(free_port())})
    from pipeline.train.engine import init_distributed

    init_distributed(TIMEOUT_S)
    atexit.register(torch.distributed.destroy_process_group)  # gloo may abort when Python ends with one


def recipe(model: ModelConfig, folder: Path, **keys: Any) -> RunConfig:
    """The papers' recipe for a model; keys: of `train`, and `sources` and `workers` of `data`."""
    from pipeline.config.load import load_config

    data = {name: keys.pop(name) for name in ("sources", "workers", "tasks", "val_fraction") if name in keys}
    sizes = {name: getattr(model, name) for name in (field.name for field in fields(model))}
    values = {"run_dir": str(folder), "train.max_restarts": 0}
    values |= {
        f"model.{name}": value for name, value in sizes.items() if name not in ("rope_scaling", "dag_coefficients")
    }
    values |= {f"train.{name}": value for name, value in keys.items()}
    values |= {f"data.{name}": value for name, value in data.items()}
    return load_config(RECIPE, [f"{key}={_inline(value)}" for key, value in values.items()])


def _inline(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


class EngineStep:
    """One step of the trainer on a micro batch: DeepSpeed's engine, the weighted loss, its all-reduce, the update."""

    def __init__(self, form: Form, micro_batch: int, device: torch.device, folder: Path, *, compiled: bool) -> None:
        from pipeline.train.engine import build_engine, set_learning_rate
        from pipeline.train.signals import StopRequest
        from pipeline.train.telemetry import Stopwatch

        sizes = {"global_batch": micro_batch, "micro_batch": micro_batch, "steps": STEPS, "g_from": form.g_from}
        config = recipe(form.config, folder, compile=compiled, **sizes)
        self.form, self.device, self.micro = form, device, random_ids(form, micro_batch)
        self.engine = build_engine(form.model(device), config.train, 1)
        set_learning_rate(self.engine, ADAMW["lr"])
        self.stop, self.forward = StopRequest(), Stopwatch(device)

    def __call__(self) -> float:
        from pipeline.train.step import global_step

        outcome = global_step(
            self.engine,
            [self.micro],
            self.form.config,
            stop=self.stop,
            device=self.device,
            forward=self.forward,
            g_from=self.form.g_from,
        )
        self.forward.read()
        return outcome.loss

    def close(self) -> None:
        """Free the engine's memory."""
        from pipeline.train.engine import release

        release(self.engine)
        del self.engine
