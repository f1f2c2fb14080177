"""The learning rate of every step, and what it adds up to: the invariance budget.

Pure functions of the configuration, so that `pldr plan` can compute the budget before anything is spent and a resumed run
needs no scheduler state.

Invariance budget: `Sigma = sum_t lr_t * weight_decay` over the metric learner's parameters. AdamW multiplies them by
`1 - lr_t * weight_decay` at every step, so they shrink like exp(-Sigma) until the metric learner forgets its input: how far is
in contraction.py. What was measured at which budget is one table: docs/certificate.md, "The invariance budget".
"""

from __future__ import annotations

import math

from pipeline.config.train import TrainConfig

# The limits of what is predicted; no text has numbers of its own.
BUDGET_PUBLISHED = 9.0  # invariance is expected
BUDGET_INVARIANT = 6.0  # invariance is possible
BUDGET_APPROXIMATE = 3.0
MORE_BUDGET = f"train longer or raise train.metric_weight_decay, to {BUDGET_PUBLISHED:g} or more"
BUDGET_TABLE = 'docs/certificate.md, "The invariance budget"'  # what was measured at which budget


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear warm-up from 0 to `max_lr`, then `train.schedule`. `step` counts from 0 (its rate is 0 with warm-up).

    cosine: to `min_lr_ratio * max_lr` at the end. constant: `max_lr`. wsd (warmup-stable-decay, arXiv 2404.06395):
    `max_lr`, and over the last `decay_share` of the steps down to `min_lr_ratio * max_lr`, linear or as 1 - sqrt
    (arXiv 2405.18392).
    """
    if step < train.warmup_steps:
        return train.max_lr * step / train.warmup_steps
    return train.max_lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * _above_floor(train, step))


def _above_floor(train: TrainConfig, step: int) -> float:
    """How far the rate still is above its floor, 1 to 0."""
    begins = {"cosine": train.warmup_steps, "wsd": train.decay_begins, "constant": train.steps}[train.schedule]
    if step < begins or train.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - begins) / (train.steps - begins))
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (math.sqrt(progress) if train.decay_shape == "1-sqrt" else progress)


def invariance_budget(train: TrainConfig, step: int | None = None) -> float:
    """Sigma after `step` steps (all of them when None), dimensionless."""
    last = train.steps if step is None else step
    return train.metric_decay * math.fsum(learning_rate(train, s) for s in range(last))


def planned_budget(train: TrainConfig) -> float:
    """Sigma of a run that goes as planned: up to `freeze_g.at_step`, if set (the metric learner is then gone)."""
    return invariance_budget(train, None if train.freeze_g is None else train.freeze_g.at_step)
