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
from pipeline.distributed import has_gpu
from pipeline.errors import ConfigError
from pipeline.train.optim import build_optimizer, optimizer_clips_norm
from pipeline.train.zero_patches import skip_redundant_work
from pldr_model.model import PLDRModel, set_activation_checkpointing

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # for all ranks to join: images are pulled, and libraries read from a shared disk
OURS = {  # DeepSpeed keys that our configuration sets, and where
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "optimizer": "train.*",
    "scheduler": "train.schedule and train.warmup_steps",
    "activation_checkpointing": "train.activation_checkpointing",
}
# Sums of bf16 gradients over micro batches and ranks. In bf16 their error grows with the number of micro batches
# (docs/compatibility.md).
WIDE_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def deepspeed_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's keys of `train.deepspeed`, with our settings on top.

    Raises ConfigError when they set what our configuration sets, or the batch sizes do not divide.
    """
    assert not isinstance(train.deepspeed, str), "load_config puts the keys in place of their file's name"
    own: dict[str, Any] = dict(train.deepspeed or {})
    for key in ("zero_optimization", "data_types"):
        if not isinstance(own.get(key, {}), dict):
            raise ConfigError(f"train.deepspeed: {key} must be a mapping of DeepSpeed's keys")
    for key, ours in OURS.items():
        if key in own:
            raise ConfigError(f"train.deepspeed: {key} is set by {ours}; remove it there")
    stage = own.get("zero_optimization", {}).get("stage", train.zero_stage)
    if stage != train.zero_stage:
        raise ConfigError(f"train.deepspeed: ZeRO stage {stage}, but train.zero_stage is {train.zero_stage}")
    zero = {**own.pop("zero_optimization", {}), "stage": train.zero_stage, **_offload(train)}
    if train.zero_stage == 1 and not has_gpu():
        zero.setdefault("contiguous_gradients", False)
    chosen = own.get("data_types", {}).get("grad_accum_dtype")
    if chosen == "fp32" and train.precision == "bf16" and train.zero_stage == 0:
        raise ConfigError(
            "train.deepspeed: data_types.grad_accum_dtype: DeepSpeed cannot accumulate in fp32 in bf16 at ZeRO stage 0; "
            "set train.zero_stage=1"
        )
    accumulation = accumulation_steps(train, world_size)
    wide = train.precision == "bf16" and train.zero_stage > 0 and accumulation > 1 and chosen is None
    return {
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **(WIDE_SUMS if wide else {}),
        **own,
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip if train.clip_by == "norm" and not optimizer_clips_norm(train) else 0.0,
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_optimization": zero,
    }


def _offload(train: TrainConfig) -> dict[str, Any]:
    """What ZeRO keeps in CPU memory. The step is then torch's fused AdamW on the CPU: DeepSpeed's own would have to be
    compiled, and cannot clip by value (optim.py)."""
    target = {"device": "cpu", "pin_memory": has_gpu()}
    kept = {"none": (), "optimizer": ("offload_optimizer",), "parameters": ("offload_optimizer", "offload_param")}
    return dict.fromkeys(kept[train.offload], target)


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro batches that a rank runs for one global batch. Raises ConfigError when they do not divide."""
    per_pass = train.micro_batch * world_size
    if train.global_batch % per_pass:
        raise ConfigError(
            f"train.global_batch {train.global_batch} is not a multiple of micro_batch {train.micro_batch} "
            f"x {world_size} ranks; set train.micro_batch or train.global_batch"
        )
    return train.global_batch // per_pass


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
    for group, decay in zip(engine.optimizer.param_groups, (train.weight_decay, train.metric_decay), strict=False):
        group["weight_decay"], group["betas"], group["eps"] = decay, train.betas, train.eps


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the rate of the next step, on whatever optimizer wrapper ZeRO uses."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
