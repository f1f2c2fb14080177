"""AdamW with a weight decay of its own for the metric learner, or Muon beside it, with clipping inside the step.

Decision: clipping by value sits in the optimizer's step. DeepSpeed cannot clip by value, but at every ZeRO stage it hands
its base optimizer the reduced, unscaled gradients (all of them, or this rank's partition) right before `step`; clamping is
elementwise, so it can be done by partition. Clipping by norm is DeepSpeed's own, except at stage 0 in fp32, where DeepSpeed
does not return the norm: there every rank holds all gradients, and the optimizer clips and returns it.

Decision: `train.optimizer: muon` is torch's own Muon for the matrices of the decoder layers (attention, feed-forward), and
AdamW for all else: embedding, output, norms, biases, PLGA's [H,K,K] tensors, and the metric learner, whose decay by AdamW is
what the papers study. Muon's rate is adjusted to the size of AdamW's update ("match_rms_adamw", arXiv 2502.16982), so that it
takes the same rate and weight decay. It orthogonalizes a matrix as a whole: ZeRO 1 to 3 hand the optimizer flat pieces of all
parameters, so that is refused (pipeline/config/train.py). DeepSpeed's own Muon orthogonalizes before the optimizer's step, so
that clipping by value would clip the update.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.deepspeed_files import DECAY_ON
from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError
from pipeline.train.deepspeed_config import optimizer_clips_norm
from pldr_model.config import DecayOn
from pldr_model.model import optimizer_group


class Clipping:
    """Scales gradients to a 2-norm of at most `norm`, or clamps every entry to [-value, value]; None: no clipping.

    checks_finite: find NaN or infinity in the gradients, and set `overflow`. Waits for the device.

    `sum_of_squares` is the squared 2-norm of the last step's gradients before clipping, of what this rank holds. It is computed
    only where it is needed, for `norm` and `checks_finite`: at the ZeRO stages DeepSpeed computes its own.
    """

    def __init__(self, *, value: float | None, norm: float | None, checks_finite: bool = False) -> None:
        self.value, self.norm, self.checks_finite = value, norm, checks_finite
        self.sum_of_squares: torch.Tensor | None = None
        self.overflow = False

    def clip(self, groups: list[dict[str, Any]]) -> bool:
        """Clip the gradients of these parameter groups. Returns whether the step is to be made."""
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return True
        if self.checks_finite or self.norm is not None:
            self.sum_of_squares = torch.stack(torch._foreach_norm(gradients)).float().square().sum()
            self.overflow = self.checks_finite and not math.isfinite(float(self.sum_of_squares))
            if self.overflow:
                return False
            if self.norm is not None:
                scale = (self.norm / (self.sum_of_squares.sqrt() + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_(gradients, scale)
        if self.value is not None:
            torch._foreach_clamp_max_(gradients, self.value)
            torch._foreach_clamp_min_(gradients, -self.value)
        return True


class ClippedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that first clips its gradients, and skips a step for which these are not finite (Clipping)."""

    def __init__(self, params: Any, clipping: Clipping, **kwargs: Any) -> None:
        # One kernel, on a CPU too.
        super().__init__(params, fused=True, **kwargs)
        self.clipping = clipping

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped: DeepSpeed reads it to count skipped steps."""
        return self.clipping.overflow

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One AdamW step on clipped gradients."""
        return super().step(closure) if self.clipping.clip(self.param_groups) else None


class ClippedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` for the groups with `use_muon`, `torch.optim.AdamW` for the others, as one optimizer: one list of
    groups and one state, which DeepSpeed saves and loads. Clips and skips as ClippedAdamW does; the norm is that of all
    gradients."""

    def __init__(self, groups: list[dict[str, Any]], clipping: Clipping, **kwargs: Any) -> None:
        """kwargs: AdamW's; lr and weight_decay are set in each group."""
        self.clipping = clipping
        others, matrices = _by_kind(groups)
        self._adamw = torch.optim.AdamW(others, fused=True, **kwargs)
        self._muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
        super().__init__(groups, {})

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped."""
        return self.clipping.overflow

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of each on clipped gradients."""
        if self.clipping.clip(self.param_groups):
            groups = _by_kind(self.param_groups)  # DeepSpeed and load_state_dict replace what they hold
            for optimizer, own in zip((self._adamw, self._muon), groups, strict=True):
                optimizer.param_groups, optimizer.state = own, self.state
                optimizer.step()
        return None


def _by_kind(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """AdamW's groups, and Muon's."""
    return [g for g in groups if not g.get("use_muon")], [g for g in groups if g.get("use_muon")]


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """The metric learner's residual units (or `metric_decay_on` of them) with `metric_decay`, everything else with
    `weight_decay`; with Muon its matrices in a last group of their own (the order of pldr_model.model.optimizer_group).

    Biases and norms decay too: that is the papers' recipe, and it is what makes the metric learner forget its input.
    """
    muon = train.optimizer == "muon"
    params: tuple[list[nn.Parameter], ...] = ([], [], [])
    for name, parameter in model.named_parameters():
        group = optimizer_group(name, parameter.ndim, muon=muon, decay_on=train.metric_decay_on)
        params[group].append(parameter)
    settings: list[dict[str, Any]] = [
        {"weight_decay": train.weight_decay},
        {"weight_decay": train.metric_decay} | _written(train.metric_decay_on),
        muon_settings(train),
    ]
    return [{"params": own, **more} for own, more in zip(params, settings, strict=True) if own]


def _written(decay_on: DecayOn) -> dict[str, str]:
    """What a checkpoint needs to know of the groups, beside names: in which one a parameter is (deepspeed_files.py)."""
    return {} if decay_on == "units" else {DECAY_ON: decay_on}


def muon_settings(train: TrainConfig) -> dict[str, Any]:
    """What Muon's parameter group holds. rate_scale: its learning rate as a multiple of AdamW's (set_learning_rate,
    engine.py)."""
    rate_scale = 1.0 if train.muon_lr is None else train.muon_lr / train.max_lr
    settings = {"weight_decay": train.weight_decay, "momentum": train.muon_momentum, "rate_scale": rate_scale}
    return {**settings, "use_muon": True}


def build_optimizer(model: nn.Module, train: TrainConfig) -> ClippedAdamW | ClippedMuon:
    """The optimizer of a run; its learning rate is set before every step. Raises ConfigError when this torch has no Muon."""
    clipping = Clipping(
        value=train.clip if train.clip_by == "value" else None,
        norm=train.clip if optimizer_clips_norm(train) else None,
        checks_finite=train.zero_stage == 0 and train.precision == "fp32",  # else DeepSpeed does
    )
    if train.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"train.optimizer muon: torch {torch.__version__} has no Muon; install torch>=2.9, or set train.optimizer=adamw"
        )
    optimizer = ClippedMuon if train.optimizer == "muon" else ClippedAdamW
    return optimizer(parameter_groups(model, train), clipping, lr=0.0, betas=train.betas, eps=train.eps)


def gradient_norm(optimizer: ClippedAdamW | ClippedMuon) -> float:
    """2-norm of the last step's gradients where every rank holds all of them (no ZeRO) and it was computed, else NaN. Waits
    for the device."""
    squares = optimizer.clipping.sum_of_squares
    return math.nan if squares is None else math.sqrt(float(squares))
