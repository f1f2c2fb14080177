"""DeepSpeed: how the process group, its configuration and the engine are made.

What else knows DeepSpeed: zero_patches.py (redundant work in its optimizers), pipeline/checkpoint/ (its files, and how it
saves and loads), and launch/ (its launcher). Training code sees an engine with DeepSpeed's methods.

Its oddities, explained once (measured on DeepSpeed 0.19.8):
- On a CPU `init_distributed` compiles an optional C++ op for collectives (a minute, needs a compiler; a kill during the
  build leaves a lock on which every later start hangs). It is switched off unless PLDR_BUILD_SHM_OP=1.
- `"type": "AdamW"` in DeepSpeed's configuration compiles an optimizer on a CPU: the engine is handed a torch optimizer.
- ZeRO makes process groups itself, with torch's 30 minutes: `torch.distributed.new_group` gets our timeout as its default.
- A process group's timeout is also the time in which all ranks must join. A node that starts late is no fault yet, so ranks
  meet first, with START_TIMEOUT_S, and the group is made after that.
- With contiguous gradients ZeRO 1 runs a Python hook for each gradient of each micro batch, though it reduces none before the
  last: a tenth of the step of a small model on a CPU. On a GPU the copies save memory and are left as they are.
- bf16 at stage 0 runs through a wrapper whose Adam step count is off by one after a resume, and which cannot accumulate in
  fp32: use stage 1.
- With gradients accumulated in fp32, bf16 at stage 1 gets another optimizer (BF16_Optimizer), whose checkpoints the ZeRO
  optimizer cannot load. That one supports fp32 accumulation too (it is used with offload) and gives the same sums, so it is
  used always.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from pipeline.config.train import TrainConfig
from pipeline.devices import has_gpu
from pipeline.train.deepspeed_config import deepspeed_config
from pipeline.train.optim import build_optimizer, muon_settings
from pipeline.train.zero_patches import skip_redundant_work
from pldr_model.metric_learner import run_as_modules
from pldr_model.model import PLDRModel, set_activation_checkpointing

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # for all ranks to join: images are pulled, and libraries read from a shared disk


def init_distributed(timeout_s: float) -> None:
    """Join the process group: nccl on GPUs, gloo on a CPU. Environment as a DeepSpeed launcher sets it."""
    import deepspeed

    backend = "nccl" if has_gpu() else "gloo"
    if backend == "gloo" and os.environ.get("PLDR_BUILD_SHM_OP") != "1":
        # Through sys.modules: `import deepspeed.comm.torch as T` gives the real torch.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    _default_timeout_of_new_groups(timedelta(seconds=timeout_s))
    timeout = timedelta(seconds=timeout_s)
    late = timedelta(seconds=max(START_TIMEOUT_S, timeout_s))
    store, rank, world = next(rendezvous("env://", timeout=late))
    store.set_timeout(timeout)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def _default_timeout_of_new_groups(default: timedelta) -> None:
    """ZeRO trains in a group that it makes itself, without `init_distributed`'s timeout (torch's default: 30 minutes)."""
    make = torch.distributed.new_group

    @functools.wraps(make)
    def new_group(ranks: Any = None, timeout: timedelta | None = None, *args: Any, **kwargs: Any) -> Any:
        return make(ranks, timeout or default, *args, **kwargs)

    torch.distributed.new_group = new_group


def is_peer_failure(error: BaseException) -> bool:
    """Whether a collective failed because another rank was missing or ended."""
    text = str(error).lower()
    signs = ("timed out", "timeout", "gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def device_of_rank() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def build_engine(model: PLDRModel, train: TrainConfig, world_size: int) -> Any:
    """The DeepSpeed engine around the model, with our optimizer."""
    import deepspeed

    set_activation_checkpointing(model, train.activation_checkpointing)
    if train.zero_stage == 3:
        run_as_modules(model)
    if train.compile:  # by layer: one graph for all of them, and ZeRO-3's hooks stay outside
        for layer in model.layers:
            layer.compile()
    with _without_bf16_optimizer():
        engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model, train), config=deepspeed_config(train, world_size)
        )
    skip_redundant_work(engine, train.zero_stage, world_size)
    return engine


@contextlib.contextmanager
def _without_bf16_optimizer() -> Iterator[None]:
    """Inside, bf16 at stage 1 gets DeepSpeed's ZeRO optimizer even when gradients are accumulated in fp32."""
    from deepspeed.runtime import engine

    choose = engine.DeepSpeedEngine._do_optimizer_sanity_check

    def usual(self: Any, optimizer: Any) -> Any:
        chosen = choose(self, optimizer)
        return engine.ZERO_OPTIMIZATION if chosen == engine.BFLOAT16 else chosen

    engine.DeepSpeedEngine._do_optimizer_sanity_check = usual
    try:
        yield
    finally:
        engine.DeepSpeedEngine._do_optimizer_sanity_check = choose


def release(engine: Any) -> None:
    """Free what an engine holds, before the caller drops it. ZeRO's hooks keep it alive; at stage 3 so do a list of modules and
    a cache that DeepSpeed never clears (tests/pipeline/train/test_freeze.py checks that this is all)."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    wrapped = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(wrapped).nonlocals["func"].cache_clear()


def set_recipe(engine: Any, train: TrainConfig) -> None:
    """Set this run's weight decay, betas and eps: DeepSpeed loads those of the checkpoint, which may be another run's."""
    for group, decay in zip(
        engine.optimizer.param_groups, (train.weight_decay, train.metric_decay, None), strict=False
    ):
        if group.get("use_muon"):
            group.update(muon_settings(train))
        else:
            group["weight_decay"], group["betas"], group["eps"] = decay, train.betas, train.eps


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the rate of the next step, on whatever optimizer wrapper ZeRO uses."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)
