"""The part of the configuration that decides how a model is trained."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

from pydantic import field_validator, model_validator

from pipeline.config.section import Kind, Section
from pipeline.config.train_evaluate import EvaluateConfig, beside
from pipeline.io.urls import check_url, is_http
from pldr_model.config import ActivationCheckpointing, DecayOn, GFrom

recipe = Kind("fixed", ("train",), result=True)  # what the trained weights come from: another value is another run
since = replace(recipe, added=True)
arithmetic = Kind("may change", ("train",), result=True)  # another rounding of the same run
work = Kind("may change", ("train",), result=False)  # how the training is spread, watched and saved
work_since = replace(work, added=True)


class FreezeConfig(Section):
    """When G_LM is frozen to its mean and the metric learner dropped (pipeline/train/freeze.py). At least one of the two."""

    below: float | None = recipe(
        None,
        "freeze once the relative RMS order parameter of G is below this in `evaluations` validations in a row",
        gt=0,
    )
    evaluations: int = recipe(3, "validations in a row that `below` asks for", ge=1)
    at_step: int | None = recipe(None, "freeze after this step", ge=1)
    become: Literal["constant", "parameter"] = recipe(
        "constant", "what G becomes: a fixed tensor, or a parameter that trains on from there"
    )
    sequences: int = recipe(128, "training sequences that the mean is over, rounded up to whole global batches", ge=1)

    @model_validator(mode="after")
    def _check(self) -> FreezeConfig:
        if self.below is None and self.at_step is None:
            raise ValueError("set below (an order parameter, 1e-5 say) or at_step")
        return self


class WarmupBatch(Section):
    """A stretch of steps at the beginning of training with a smaller global batch."""

    batch: int = since(..., "sequences of one step, over all ranks", ge=1)
    steps: int = since(..., "optimizer steps with this batch", ge=1)


class TrainConfig(Section):
    """Pretraining (stage `train`). Sizes count sequences of `model.context_length` tokens."""

    init_from: str | None = since(
        None, "run directory or folder of consolidated weights that step 0 begins with; null: new weights"
    )
    steps: int = recipe(250_000, "optimizer steps", ge=1)
    global_batch: int = recipe(32, "sequences of one step, over all ranks", ge=1)
    batch_warmup: list[WarmupBatch] | None = since(
        None,
        "smaller global batches that training begins with, [{batch: 8, steps: 100}, ...]; null: none",
        min_length=1,
    )
    micro_batch: int = work(4, "sequences of one forward pass of a rank", ge=1)
    ranks: int | None = work(None, "processes on this node; null: every GPU, or 2 on a CPU", ge=1)
    max_lr: float = recipe(1e-3, "peak learning rate", gt=0)
    warmup_steps: int = recipe(2000, "steps of linear warm-up from 0", ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = since(
        "cosine", "after the warm-up: cosine to the end, stable with a decay at the end (WSD), or constant"
    )
    decay_share: float = since(0.2, "wsd: share of the steps, the last ones, that decay", gt=0, le=1)
    decay_shape: Literal["linear", "1-sqrt"] = since("linear", "wsd: how the rate falls from max_lr to min_lr_ratio")
    min_lr_ratio: float = recipe(0.1, "the last learning rate as a share of max_lr", ge=0, le=1)
    optimizer: Literal["adamw", "muon"] = since(
        "adamw",
        "muon: torch's Muon for the matrices of attention and feed-forward, AdamW for all else; ZeRO stage 0 only",
    )
    muon_lr: float | None = since(
        None, "muon: its peak learning rate; null: max_lr, which its update is scaled for", gt=0
    )
    muon_momentum: float = since(0.95, "muon: its (Nesterov) momentum", ge=0, lt=1)
    betas: tuple[float, float] = recipe((0.9, 0.95), "AdamW's beta1 and beta2")
    eps: float = recipe(1e-5, "AdamW's epsilon", gt=0)
    weight_decay: float = recipe(0.1, "AdamW's weight decay", ge=0)
    metric_weight_decay: float | None = recipe(None, "of the metric learner's residual units; null: weight_decay", ge=0)
    metric_decay_on: DecayOn = since(
        "units", "what of the residual units gets metric_weight_decay; the rest gets weight_decay"
    )
    clip_by: Literal["value", "norm"] = recipe(
        "value", "each gradient's entries (the papers), or the norm of all gradients"
    )
    clip: float = recipe(1.0, "where gradients are clipped", gt=0)
    z_loss: float = since(0.0, "coefficient of the mean squared logsumexp of the logits in the loss", ge=0)
    precision: Literal["fp32", "bf16"] = arithmetic(
        "bf16", "of the forward and backward passes; master weights are fp32"
    )
    zero_stage: Literal[0, 1, 2, 3] = work(
        1, "what ZeRO shards: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too"
    )
    deepspeed: dict[str, Any] | str | None = work(
        None, "DeepSpeed's own keys: a mapping, a JSON file, or the shipped zero{stage}; {stage} is zero_stage"
    )
    compile: bool = work(False, "torch.compile of each decoder layer; on a CPU this needs a C++ compiler")
    activation_checkpointing: ActivationCheckpointing = work(
        "none", "what the backward pass computes again to save memory"
    )
    offload: Literal["none", "optimizer", "parameters"] = work(
        "none", "what is kept in CPU memory; parameters (stage 3) means both"
    )
    log_every: int = work(10, "steps between two logged losses", ge=1)
    validate_every: int = work(1000, "steps between two validations", ge=1)
    val_sequences: int = work(64, "held-out sequences of a validation", ge=1)
    checkpoint_every: int = work(1000, "steps between two checkpoints", ge=1)
    keep_checkpoints: int = work(2, "how many of the last checkpoints stay", ge=2)
    keep_every: int | None = work(None, "checkpoints at multiples of this step stay forever; null: none", ge=1)
    keep_best: bool = work(True, "the best by val/loss_cached stays; of the checkpoints validated at their step")
    staging: str | None = work(None, "folder on a node's own disk where checkpoints are written first; null: run_dir")
    publish_to: str | None = work(None, "fsspec URL for checkpoints (s3://…, a path); null: MLflow artifacts")
    publish_wait_s: float = work(600.0, "seconds that the end of training waits for the last upload", ge=0)
    timeout_s: float = work(
        60.0, "seconds; a rank that others wait for longer, or whose data take longer, fails the job", gt=0
    )
    max_skipped_steps: int = work(10, "this many steps in a row with a loss or gradients not finite stop the run", ge=1)
    on_spike: Literal["warn", "rollback", "stop"] = work("warn", "what a loss spike does (pipeline/train/spikes.py)")
    spike_window: int = work(
        200, "losses that the bound of a spike comes from, median + spike_threshold * 1.4826 MAD", ge=20
    )
    spike_threshold: float = work(8.0, "how many deviations above the median are a spike", gt=0)
    freeze_g: FreezeConfig | None = recipe(
        None, "when G is frozen and the metric learner dropped; null: it trains to the end"
    )
    document_masks: bool = since(
        False, "attention only within a document of a packed sequence; needs tokens.boundaries"
    )
    g_from: GFrom = since(
        "own",
        "whose learned G a sequence uses: its own, that of the first of its micro batch, or of its neighbor there",
    )
    share_g_below: float | None = since(
        None, "g_from becomes batch after the first validation whose order parameter of G is below this", gt=0
    )
    evaluate: EvaluateConfig | None = beside(None, "benchmark scores of checkpoints while training runs; null: none")
    deterministic: bool = work_since(
        False, "GPU: deterministic kernels only, so that the same job on the same machines is bit-equal; slower"
    )
    flight_recorder: int = work_since(
        0,
        "last collectives of a rank that torch keeps, and writes to logs/flight-recorder when one fails; 0: off",
        ge=0,
    )
    max_restarts: int = work(0, "restarts after a crash, from the last commit; not after a stop or a user error", ge=0)
    profile_steps: tuple[int, int] | None = work(
        None, "[first, last]: traced on each rank (pipeline/train/profiling.py)"
    )
    memory_history: bool = work(False, "GPU: record which code allocated each block, for a rank that is out of memory")
    peak_tflops: float | None = work(None, "of one device, for MFU; null: the data sheet of a known GPU", gt=0)

    @field_validator("publish_to")
    @classmethod
    def _writable_url(cls, url: str | None) -> str | None:
        if url is not None and (not check_url(url) or is_http(url)):
            raise ValueError(f"{url!r} cannot be written to: name a folder or an object store (s3://, gs://)")
        return url

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be smaller than steps {self.steps}: lower train.warmup_steps "
                "(a tenth, say) or raise train.steps"
            )
        if self.schedule == "wsd" and self.decay_begins < self.warmup_steps:
            raise ValueError(
                f"decay_share {self.decay_share:g} of {self.steps} steps begins at step {self.decay_begins}, before the "
                f"warm-up ends at {self.warmup_steps}; lower one of the two"
            )
        for key in ("decay_share", "decay_shape") if self.schedule != "wsd" else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is only read with schedule wsd, not {self.schedule}; remove it")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        self._check_batch_warmup()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be in [0, 1)")
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "parameters" else 1):
            raise ValueError(
                f"offload {self.offload!r} needs zero_stage {'3' if self.offload == 'parameters' else '1, 2 or 3'}, "
                f"not {self.zero_stage}"
            )
        if self.optimizer == "muon" and self.zero_stage:
            raise ValueError(
                f"optimizer muon: ZeRO stage {self.zero_stage} cuts matrices into flat pieces, which Muon cannot "
                "orthogonalize; set zero_stage=0"
            )
        if self.metric_decay_on != "units" and self.metric_weight_decay is None:
            raise ValueError(
                f"metric_decay_on {self.metric_decay_on} is only read with a metric_weight_decay: without one all decay alike; "
                "set it, or remove metric_decay_on"
            )
        for key in ("muon_lr", "muon_momentum") if self.optimizer != "muon" else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is only read with optimizer muon, not {self.optimizer}; remove it")
        at_step = self.freeze_g.at_step if self.freeze_g is not None else None
        if at_step is not None and at_step >= self.steps:
            raise ValueError(
                f"freeze_g.at_step {at_step} must be smaller than steps {self.steps}: G would never be frozen"
            )
        if self.g_from == "batch" and self.share_g_below is not None:
            raise ValueError(
                "share_g_below is not read with g_from batch, where G is shared from the start; remove one"
            )
        if self.mixes_g and self.micro_batch == 1:
            key = "g_from" if self.g_from != "own" else "share_g_below"
            raise ValueError(
                f"{key} {getattr(self, key)} needs a micro_batch of 2 or more: there is no other sequence in 1"
            )
        if self.evaluate is not None and self.evaluate.every % self.checkpoint_every:
            raise ValueError(
                f"evaluate.every {self.evaluate.every} is not a multiple of checkpoint_every {self.checkpoint_every}: only "
                "checkpoints are evaluated"
            )
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1] <= self.steps:
            raise ValueError(
                f"profile_steps {list(self.profile_steps)}: [first, last] with 1 <= first <= last <= steps"
            )
        return self

    def _check_batch_warmup(self) -> None:
        stretches = self.batch_warmup or []
        sizes = [*(stretch.batch for stretch in stretches), self.global_batch]
        if any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"batch_warmup: batches {sizes} (the last is global_batch) must grow")
        if wrong := [size for size in sizes if size % self.micro_batch]:
            raise ValueError(f"batch_warmup: batch {wrong[0]} is not a multiple of micro_batch {self.micro_batch}")
        if (total := sum(stretch.steps for stretch in stretches)) >= self.steps:
            raise ValueError(f"batch_warmup: its {total} steps must be fewer than steps {self.steps}")

    @property
    def decay_begins(self) -> int:
        """With schedule wsd: the first step, from 0, after which the rate is below max_lr."""
        return self.steps - max(1, round(self.decay_share * self.steps))

    @property
    def mixes_g(self) -> bool:
        """Whether a sequence's G can come from another one of its micro batch: micro_batch is then part of the recipe."""
        return self.g_from != "own" or self.share_g_below is not None

    @property
    def metric_decay(self) -> float:
        """The weight decay that the metric learner gets, or what of it metric_decay_on names."""
        return self.weight_decay if self.metric_weight_decay is None else self.metric_weight_decay
