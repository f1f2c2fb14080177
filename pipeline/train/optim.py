"""AdamW with a weight decay of its own for the metric learner, and clipping inside its step.

Decision: clipping by value sits in the optimizer's step. DeepSpeed cannot clip by value, but at every ZeRO stage it hands
its base optimizer the reduced, unscaled gradients (all of them, or this rank's partition) right before `step`; clamping is
elementwise, so it can be done by partition. Clipping by norm is DeepSpeed's own, except at stage 0 in fp32, where DeepSpeed
does not return the norm: there every rank holds all gradients, and the optimizer clips and returns it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pipeline.config.train import TrainConfig
from pipeline.train.deepspeed_config import optimizer_clips_norm
from pldr_model.model import is_metric_parameter


class ClippedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that first scales its gradients to a 2-norm of at most `clip_norm`, or clamps every entry to
    [-clip_value, clip_value]; None: no clipping.

    checks_finite: skip a step whose gradients hold NaN or infinity, and set `overflow`, which DeepSpeed reads to count
    skipped steps. Waits for the device.

    `sum_of_squares` is the squared 2-norm of the last step's gradients before clipping, of what this rank holds. It is computed
    only where it is needed, for `clip_norm` and `checks_finite`: at the ZeRO stages DeepSpeed computes its own.
    """

    def __init__(
        self,
        params: Any,
        *,
        clip_value: float | None,
        clip_norm: float | None,
        checks_finite: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            params, fused=True, **kwargs
        )  # one kernel, on a CPU too: there six times as fast (docs/speed.md)
        self.clip_value, self.clip_norm, self.checks_finite = clip_value, clip_norm, checks_finite
        self.sum_of_squares: torch.Tensor | None = None
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One AdamW step on clipped gradients."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            if self.checks_finite or self.clip_norm is not None:
                self.sum_of_squares = torch.stack(torch._foreach_norm(gradients)).float().square().sum()
                self.overflow = self.checks_finite and not math.isfinite(float(self.sum_of_squares))
                if self.overflow:
                    return None
                if self.clip_norm is not None:
                    scale = (self.clip_norm / (self.sum_of_squares.sqrt() + 1e-6)).clamp(max=1.0)
                    torch._foreach_mul_(gradients, scale)
            if self.clip_value is not None:
                torch._foreach_clamp_max_(gradients, self.clip_value)
                torch._foreach_clamp_min_(gradients, -self.clip_value)
        return super().step(closure)


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Two groups: the metric learner's residual units with `metric_decay`, everything else with `weight_decay`.

    Biases and norms decay too: that is the papers' recipe, and it is what makes the metric learner forget its input.
    """
    metric = [p for name, p in model.named_parameters() if is_metric_parameter(name)]
    other = [p for name, p in model.named_parameters() if not is_metric_parameter(name)]
    groups = [{"params": other, "weight_decay": train.weight_decay}]
    if metric:
        groups.append({"params": metric, "weight_decay": train.metric_decay})
    return groups


def build_optimizer(model: nn.Module, train: TrainConfig) -> ClippedAdamW:
    """The optimizer of a run; its learning rate is set before every step."""
    return ClippedAdamW(
        parameter_groups(model, train),
        clip_value=train.clip if train.clip_by == "value" else None,
        clip_norm=train.clip if optimizer_clips_norm(train) else None,
        checks_finite=train.zero_stage == 0 and train.precision == "fp32",  # else DeepSpeed does
        lr=0.0,
        betas=train.betas,
        eps=train.eps,
    )


def gradient_norm(optimizer: ClippedAdamW) -> float:
    """2-norm of the last step's gradients where every rank holds all of them (no ZeRO) and it was computed, else NaN. Waits
    for the device."""
    return math.nan if optimizer.sum_of_squares is None else math.sqrt(float(optimizer.sum_of_squares))
