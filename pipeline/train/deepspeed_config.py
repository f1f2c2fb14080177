"""DeepSpeed's configuration of a run, made without DeepSpeed and torch: `pldr check` asks for it too."""

from __future__ import annotations

from typing import Any

from pipeline.config.batches import batch_sizes
from pipeline.config.train import TrainConfig
from pipeline.devices import has_gpu
from pipeline.errors import ConfigError

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
    """Micro batches that a rank runs for one global batch, after a batch warm-up. Raises ConfigError where they do not
    divide."""
    per_pass = train.micro_batch * world_size
    for size in batch_sizes(train):
        if size % per_pass:
            key = "global_batch" if size == train.global_batch else "batch_warmup: batch"
            raise ConfigError(
                f"train.{key} {size} is not a multiple of micro_batch {train.micro_batch} "
                f"x {world_size} ranks; set train.micro_batch or train.{key.partition(':')[0]}"
            )
    return train.global_batch // per_pass


def optimizer_clips_norm(train: TrainConfig) -> bool:
    """Whether the optimizer clips by norm (else DeepSpeed does)."""
    return train.clip_by == "norm" and train.zero_stage == 0 and train.precision == "fp32"
