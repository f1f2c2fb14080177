"""The part of the configuration that decides how a model is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from pipeline.config.section import Kind, Section
from pipeline.io.urls import check_url, is_http
from pldr_model.config import ActivationCheckpointing

recipe = Kind("fixed", ("train",), result=True)  # what the trained weights come from: another value is another run
arithmetic = Kind("may change", ("train",), result=True)  # another rounding of the same run
work = Kind("may change", ("train",), result=False)  # how the training is spread, watched and saved


class FreezeConfig(Section):
    """When G_LM is frozen to its mean and the metric learner dropped (pipeline/train/freeze.py). At least one of the two."""

    below: float | None = recipe(None, gt=0)  # relative RMS order parameter of G, in `evaluations` validations in a row
    evaluations: int = recipe(3, ge=1)
    at_step: int | None = recipe(None, ge=1)
    become: Literal["constant", "parameter"] = recipe("constant")  # a fixed tensor, or one that trains on from there
    sequences: int = recipe(128, ge=1)  # training sequences that the mean is over, rounded up to whole global batches

    @model_validator(mode="after")
    def _check(self) -> FreezeConfig:
        if self.below is None and self.at_step is None:
            raise ValueError("set below (an order parameter, 1e-5 say) or at_step")
        return self


class TrainConfig(Section):
    """Pretraining (stage `train`). Sizes count sequences of `model.context_length` tokens."""

    steps: int = recipe(250_000, ge=1)
    global_batch: int = recipe(32, ge=1)
    micro_batch: int = work(4, ge=1)  # per rank and forward pass
    ranks: int | None = work(None, ge=1)  # processes on this node; null: every GPU, or 2 on a CPU
    max_lr: float = recipe(1e-3, gt=0)
    warmup_steps: int = recipe(2000, ge=0)
    min_lr_ratio: float = recipe(0.1, ge=0, le=1)
    betas: tuple[float, float] = recipe((0.9, 0.95))
    eps: float = recipe(1e-5, gt=0)
    weight_decay: float = recipe(0.1, ge=0)
    metric_weight_decay: float | None = recipe(None, ge=0)  # of the metric learner's residual units; null: the same
    clip_by: Literal["value", "norm"] = recipe("value")
    clip: float = recipe(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = arithmetic("bf16")
    zero_stage: Literal[0, 1, 2, 3] = work(1)
    deepspeed: str | None = work(None)  # JSON with DeepSpeed's own keys; {stage} in the name is zero_stage
    compile: bool = work(False)  # torch.compile of each decoder layer; on a CPU this needs a C++ compiler
    activation_checkpointing: ActivationCheckpointing = work("none")  # what the backward pass computes again
    offload: Literal["none", "optimizer", "parameters"] = work("none")  # in CPU memory; parameters (stage 3): both
    log_every: int = work(10, ge=1)
    validate_every: int = work(1000, ge=1)
    val_sequences: int = work(64, ge=1)
    checkpoint_every: int = work(1000, ge=1)
    keep_checkpoints: int = work(2, ge=2)  # the last ones stay
    keep_every: int | None = work(None, ge=1)  # checkpoints at multiples of this step are kept forever; null: none
    keep_best: bool = work(True)  # the best by val/loss_cached stays; of the checkpoints validated at their step
    staging: str | None = work(None)  # folder on a node's own disk where checkpoints are written first; null: run_dir
    publish_to: str | None = work(None)  # fsspec URL for checkpoints (s3://…, a path); null: MLflow artifacts
    publish_wait_s: float = work(600.0, ge=0)  # how long the end of training waits for the last upload
    timeout_s: float = work(60.0, gt=0)  # a rank that others wait for longer, or whose data take longer, fails the job
    max_skipped_steps: int = work(10, ge=1)  # this many in a row with a loss or gradients not finite stop the run
    on_spike: Literal["warn", "rollback", "stop"] = work("warn")  # what a loss spike does (pipeline/train/spikes.py)
    spike_window: int = work(200, ge=20)  # losses that its bound comes from, median + spike_threshold * 1.4826 MAD
    spike_threshold: float = work(8.0, gt=0)
    freeze_g: FreezeConfig | None = recipe(None)  # null: the metric learner trains to the end
    max_restarts: int = work(0, ge=0)  # after a crash, from the last commit; not after a stop or a user error
    profile_steps: tuple[int, int] | None = work(None)  # [first, last]: traced on each rank (profiling.py)
    memory_history: bool = work(False)  # GPU: record which code allocated each block, for a rank that is out of memory
    peak_tflops: float | None = work(None, gt=0)  # of one device, for MFU; null: the data sheet of a known GPU

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
