"""What DeepSpeed and a checkpoint cost: `pldr bench train CONFIG`.

On one rank, in this process: our training step (engine, all-reduce of the loss, clip, update) against plain PyTorch with the
same model, optimizer, clipping, compilation and accumulation, step by step in turn, so that a busy machine slows both alike.
The overhead is the median of each round's ratio, which is not affected by what slows both in a round. Then complete
checkpoints are saved, and their median is compared with 200 of our steps.

The bounds that are printed: overhead at most 10 % for a small model, 3 % at 110M sizes; stall under 1 %.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoint import load
from pipeline.checkpoint.save import Saver
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.config.schedule import learning_rate
from pipeline.environment import without_other_jobs
from pipeline.errors import ConfigError
from pipeline.train.engine import build_engine, device_of_rank, init_distributed, set_learning_rate
from pipeline.train.optim import parameter_groups
from pipeline.train.signals import StopRequest
from pipeline.train.step import global_step
from pipeline.train.targets import masks, with_documents
from pipeline.train.telemetry import Stopwatch
from pldr_model.bench import in_turn
from pldr_model.loss import total_loss
from pldr_model.model import PLDRModel, set_activation_checkpointing

SAVE_EVERY = 200  # steps
LARGE = 50_000_000  # parameters; from here the bound for 110M sizes applies
RATE_STEP = 1000  # a step of the schedule whose rate moves the weights


def bench(config: RunConfig, *, port: int, steps: int, batch: int | None, saves: int = 5) -> dict[str, Any]:
    """Time `steps` steps of each. batch: sequences of a step, in one micro batch; None: the configuration's.

    Returns medians in seconds, `overhead` = median over the rounds of ours / plain, - 1, `stall` = a save / 200 steps, with
    their bounds. Checkpoints go to a temporary folder in run_dir. Raises ConfigError when run_dir cannot be made.
    """
    for name in os.environ.keys() - without_other_jobs(os.environ).keys():
        del os.environ[name]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    root = RunPaths(config.run_dir).root
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir {root}: {error.strerror}; set run_dir to a folder that can be written") from None
    init_distributed(config.train.timeout_s)
    sizes = {} if batch is None else {"global_batch": batch, "micro_batch": batch}
    train = config.train.model_copy(update=sizes)
    config = config.model_copy(update={"train": train})
    rng = np.random.default_rng(0)
    shape = (train.global_batch // train.micro_batch, train.micro_batch, config.model.context_length + 1)
    micro_batches = list(rng.integers(4, config.model.vocab_size, shape))
    if train.document_masks:  # a mask costs the same whatever it hides
        micro_batches = [np.stack([micro, np.ones_like(micro)]) for micro in micro_batches]
    plain = _plain_step(config, micro_batches)
    ours, saver = _our_step(config, micro_batches)
    for warm_up in (plain, ours, plain, ours):
        warm_up()
    ours_s, plain_s, ratio = in_turn(ours, plain, steps, device_of_rank())
    overhead = ratio - 1
    stalls = []
    with tempfile.TemporaryDirectory(dir=root, prefix=".bench-") as folder:
        save = saver(Path(folder))
        for number in range(saves + 1):
            started = time.perf_counter()
            save.save({"step": number, "config": {}, "world_size": 1})
            stalls.append(time.perf_counter() - started)
    save_s = statistics.median(stalls[1:])
    parameters = config.model.num_parameters()["total"]
    bound = 0.03 if parameters >= LARGE else 0.10
    stall = save_s / (SAVE_EVERY * ours_s)
    torch.distributed.destroy_process_group()  # gloo may abort when Python ends with one
    return {
        "parameters": parameters,
        "sequences_per_step": train.global_batch,
        "micro_batches": shape[0],
        "zero_stage": train.zero_stage,
        "precision": train.precision,
        "device": str(device_of_rank()),
        "threads": torch.get_num_threads(),
        "steps": steps,
        "plain_step_seconds": plain_s,
        "deepspeed_step_seconds": ours_s,
        "overhead": overhead,
        "overhead_bound": bound,
        "overhead_met": overhead <= bound,
        "save_seconds": save_s,
        "stall": stall,
        "stall_met": stall < 0.01,
    }


def _plain_step(config: RunConfig, micro_batches: list[np.ndarray]) -> Callable[[], None]:
    """A step as one would write it without DeepSpeed. bf16: bf16 weights, which is less work than DeepSpeed's fp32 masters."""
    train, device = config.train, device_of_rank()
    torch.manual_seed(config.seed)
    model = PLDRModel(config.model).to(device, torch.bfloat16 if train.precision == "bf16" else torch.float32)
    set_activation_checkpointing(model, train.activation_checkpointing)
    if train.compile:
        for layer in model.layers:
            layer.compile()
    groups = parameter_groups(model, train)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=train.betas, eps=train.eps, fused=True)
    clip = torch.nn.utils.clip_grad_norm_ if train.clip_by == "norm" else torch.nn.utils.clip_grad_value_
    parameters = list(model.parameters())

    def step() -> None:
        loss_sum = torch.zeros((), device=device)
        for micro, documents in map(with_documents, micro_batches):
            ids = torch.from_numpy(micro).to(device)
            loss = _loss(model, ids, config, **masks(documents, device))
            (loss / len(micro_batches)).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        clip(parameters, train.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, min(RATE_STEP, train.steps - 1))
        optimizer.step()
        optimizer.zero_grad()
        loss_sum.item()

    return step


def _our_step(config: RunConfig, micro_batches: list[np.ndarray]) -> tuple[Callable[[], None], Callable[[Path], Saver]]:
    """The trainer's step, and what makes a Saver of its engine."""
    torch.manual_seed(config.seed)
    engine = build_engine(PLDRModel(config.model), config.train, 1)
    load.make_safe(engine)
    stop, forward = StopRequest(), Stopwatch(device_of_rank())

    def step() -> None:
        set_learning_rate(engine, learning_rate(config.train, min(RATE_STEP, config.train.steps - 1)))
        global_step(
            engine,
            micro_batches,
            config.model,
            stop=stop,
            device=device_of_rank(),
            forward=forward,
            g_from=config.train.g_from,
        )

    return step, lambda folder: Saver(engine, folder)


def _loss(model: PLDRModel, ids: Tensor, config: RunConfig, **apart: Tensor) -> Tensor:
    wants_outputs = any(config.model.dag_coefficients)
    whose = config.train.g_from
    result = model(ids[:, :-1], targets=ids[:, 1:], g_from=whose, padded=False, return_outputs=wants_outputs, **apart)
    tokens, outputs = result if wants_outputs else (result, None)
    return total_loss(tokens, config.model, outputs=outputs).total
