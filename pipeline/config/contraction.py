"""What the configuration alone predicts of the order parameter of G: how far N residual units contract.

Derivation. Once its GLUs have decayed, a unit of the metric learner is `x <- gamma LN(x + c) + beta`, c the last bias of the
GLUs. AdamW shrinks the first gamma, 1, to exp(-Sigma) (Sigma: the invariance budget), while its updates, of size lr whatever
the gradient, keep gamma, beta and c at a noise of nu, `nu^2 <- nu^2 (1 - lr wd)^2 + lr^2` (sqrt(lr / 2 wd) in equilibrium). LN
divides a difference by the standard deviation of `gamma n + beta + c`. The three have the same gradient but for n, so they do
not cancel but add up. Each unit multiplies a difference by

    r = g / (g + COHERENCE q nu),    g^2 = exp(-2 Sigma) + (q nu)^2

q < 1: the share of the noise that is left where gradients are not far above AdamW's eps. As long as exp(-Sigma) is far above
nu, r is near 1, and iterated LayerNorms forget nothing; beyond that r is 1 / (1 + COHERENCE), and no budget makes it smaller.
So log10 of the order parameter falls by N log10(1/r): the number of units counts as much as the budget.

START, COHERENCE and NOISE_SHARE are fitted (`python -m pipeline.bench.contraction.law`); RESIDUALS are what the fit leaves on
runs that it has not seen. What it explains, and what not: docs/certificate.md, "The invariance budget".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.schedule import (
    BUDGET_APPROXIMATE,
    BUDGET_INVARIANT,
    BUDGET_PUBLISHED,
    BUDGET_TABLE,
    MORE_BUDGET,
    learning_rate,
)
from pipeline.config.train import TrainConfig

START = -0.87  # log10 of the order parameter of G before anything contracts
COHERENCE = 4.7
NOISE_SHARE = 0.18
RESIDUALS = (-1.1, 1.4)  # log10 of measured over predicted, 5 % and 95 %
ROUND_OFF = 2e-8  # fp32
LEAST_DECAY = 2.0  # of the metric learner, among runs whose budget exceeded 1
# Of order parameters. A certificate judges the worst head on the worst prompt, which deviates about ten times as much.
INVARIANT, APPROXIMATE = 1e-6, 1e-3


@dataclass(frozen=True)
class Expected:
    """The order parameter of G at the end: what is predicted, and the interval that holds 9 of 10 runs.

    budget: of the norms' gamma. fitted: whether runs with such a decay were among those fitted. fix: what would lower it.
    """

    budget: float
    middle: float
    low: float
    high: float
    fitted: bool = True
    fix: str = MORE_BUDGET

    @property
    def word(self) -> str:
        """Both must hold: what the law predicts, and the least budget at which it was seen to (in the papers' runs, too)."""
        if self.middle <= INVARIANT and self.budget >= BUDGET_PUBLISHED:
            return "invariant expected"
        if self.low <= INVARIANT and self.budget >= BUDGET_INVARIANT:
            return "perhaps invariant"
        if self.low <= APPROXIMATE and self.budget >= BUDGET_APPROXIMATE:
            return "at best approximately invariant"
        return "NOT invariant expected"


def expected(train: TrainConfig, units: int, budget: float) -> Expected:
    """units: residual ones (model.num_reslayerA). budget: spent when the run ends, or when its G is frozen."""
    end = train.steps if train.freeze_g is None or train.freeze_g.at_step is None else train.freeze_g.at_step
    nu, decay, fix = noise(train, end), gamma_decay(train), MORE_BUDGET
    if decay != train.metric_decay:
        # Without any decay of the GLUs no budget was counted.
        spent = (
            budget / train.metric_decay
            if train.metric_decay
            else math.fsum(learning_rate(train, s) for s in range(end))
        )
        budget = spent * decay
        fix = f"norms decay by {decay:g} with train.metric_decay_on {train.metric_decay_on}: set units or norms"
    elif order_parameter(math.inf, nu, units) > INVARIANT:
        fix = "no budget is enough for so few units: raise model.num_reslayerA"
    middle = order_parameter(budget, nu, units)
    low, high = (max(ROUND_OFF, min(1.0, middle * 10**residual)) for residual in RESIDUALS)
    return Expected(budget, middle, low, high, fitted=decay >= LEAST_DECAY, fix=fix)


def gamma_decay(train: TrainConfig) -> float:
    """The weight decay of the norms' gamma and beta, which the law is of."""
    return train.weight_decay if train.metric_decay_on == "glus" else train.metric_decay


def noise(train: TrainConfig, step: int) -> float:
    """nu after `step` steps, were every gradient far above AdamW's eps."""
    variance, decay = 0.0, gamma_decay(train)
    for number in range(step):
        rate = learning_rate(train, number)
        variance = variance * (1 - rate * decay) ** 2 + rate**2
    return math.sqrt(variance)


def order_parameter(
    budget: float,
    nu: float,
    units: int,
    *,
    start: float = START,
    coherence: float = COHERENCE,
    noise_share: float = NOISE_SHARE,
) -> float:
    """The law."""
    noise_left = noise_share * nu
    gamma = math.hypot(math.exp(-budget), noise_left)
    contraction = gamma / (gamma + coherence * noise_left)
    return float(10**start * contraction**units + ROUND_OFF)


def verdict(found: Expected) -> str:
    """The prediction in words, with what to do where it is not `invariant expected`."""
    said = f"{found.word}, order parameter of G {found.low:.0e} to {found.high:.0e} (9 of 10 runs)"
    if not found.fitted:
        law = f"the law of contraction, fitted to decays of {LEAST_DECAY:g} or more, says {found.middle:.0e}"
        said = f"{found.word} by the budget; of the order parameter of G {law}"
    return said if found.word == "invariant expected" else f"{said}; {found.fix} ({BUDGET_TABLE})"
