"""The part of the configuration that decides how a model is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section
from pipeline.io.urls import check_url, is_http
from pldr_model.config import ActivationCheckpointing


class FreezeConfig(Section):
    """When G_LM is frozen to its mean and the metric learner dropped (pipeline/train/freeze.py). At least one of the two."""

    below: float | None = Field(
        None, gt=0
    )  # order parameter of G (RMS, relative), for `evaluations` validations in a row
    evaluations: int = Field(3, ge=1)
    at_step: int | None = Field(None, ge=1)
    become: Literal["constant", "parameter"] = "constant"  # a fixed tensor, or one that trains on from there
    sequences: int = Field(128, ge=1)  # training sequences that the mean is over, rounded up to whole global batches

    @model_validator(mode="after")
    def _check(self) -> FreezeConfig:
        if self.below is None and self.at_step is None:
            raise ValueError("set below (an order parameter, 1e-5 say) or at_step")
        return self


class TrainConfig(Section):
    """Pretraining (stage `train`). Sizes count sequences of `model.context_length` tokens."""

    steps: int = Field(250_000, ge=1)
    global_batch: int = Field(32, ge=1)
    micro_batch: int = Field(4, ge=1)  # per rank and forward pass
    ranks: int | None = Field(None, ge=1)  # processes on this node; null: every GPU, or 2 on a CPU
    max_lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(2000, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    metric_weight_decay: float | None = Field(None, ge=0)  # of the metric learner's residual units; null: the same
    clip_by: Literal["value", "norm"] = "value"
    clip: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    deepspeed: str | None = None  # JSON with DeepSpeed's own keys; {stage} in the name is zero_stage
    compile: bool = False  # torch.compile of each decoder layer; on a CPU this needs a C++ compiler
    activation_checkpointing: ActivationCheckpointing = "none"  # what the backward pass computes again
    offload: Literal["none", "optimizer", "parameters"] = (
        "none"  # kept in CPU memory; parameters (stage 3): with the optimizer
    )
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(1000, ge=1)
    val_sequences: int = Field(64, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=2)  # the last ones stay
    keep_every: int | None = Field(None, ge=1)  # checkpoints at multiples of this step stay for ever; null: none
    keep_best: bool = True  # the best by val/loss_cached stays; only a checkpoint that was validated at its step counts
    staging: str | None = None  # a folder on each node's own disk that checkpoints are written to first; null: run_dir
    publish_to: str | None = None  # URL for checkpoints of any fsspec kind (s3://…, a path); null: MLflow artifacts
    publish_wait_s: float = Field(600.0, ge=0)  # how long the end of training waits for the last upload
    timeout_s: float = Field(
        60.0, gt=0
    )  # a rank that another waits for longer, or whose data take longer, fails the job
    max_skipped_steps: int = Field(10, ge=1)  # in a row, whose loss or gradients are not finite: the run stops
    on_spike: Literal["warn", "rollback", "stop"] = "warn"  # what a loss spike does (pipeline/train/spikes.py)
    spike_window: int = Field(200, ge=20)  # losses that its bound comes from, median + spike_threshold * 1.4826 MAD
    spike_threshold: float = Field(8.0, gt=0)
    freeze_g: FreezeConfig | None = None  # null: the metric learner trains to the end
    max_restarts: int = Field(0, ge=0)  # after a crash, from the last commit; not after a stop or a user's mistake
    profile_steps: tuple[int, int] | None = None  # [first, last]: traced on every rank (pipeline/train/profiling.py)
    memory_history: bool = False  # on a GPU: which code asked for each block, in the snapshot of a rank out of memory
    peak_tflops: float | None = Field(None, gt=0)  # of one device, for MFU; null: the data sheet of a known GPU

    @field_validator("publish_to")
    @classmethod
    def _writable_url(cls, url: str | None) -> str | None:
        if url is not None and (not check_url(url) or is_http(url)):
            raise ValueError(f"{url!r} cannot be written to: name a folder or an object store (s3://, gs://)")
        return url

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be smaller than steps {self.steps}")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be in [0, 1)")
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "parameters" else 1):
            raise ValueError(
                f"offload {self.offload!r} needs zero_stage {'3' if self.offload == 'parameters' else '1, 2 or 3'}, "
                f"not {self.zero_stage}"
            )
        at_step = self.freeze_g.at_step if self.freeze_g is not None else None
        if at_step is not None and at_step >= self.steps:
            raise ValueError(
                f"freeze_g.at_step {at_step} must be smaller than steps {self.steps}: G would never be frozen"
            )
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1] <= self.steps:
            raise ValueError(
                f"profile_steps {list(self.profile_steps)}: [first, last] with 1 <= first <= last <= steps"
            )
        return self

    @property
    def metric_decay(self) -> float:
        """The weight decay that the metric learner gets."""
        return self.weight_decay if self.metric_weight_decay is None else self.metric_weight_decay
