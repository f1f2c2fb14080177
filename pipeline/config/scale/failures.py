"""How much of the time is training, when devices fail: checkpoints, lost work, restarts.

Failures are a Poisson process with the job's mean time between failures M. Every one costs a restart R and the work since
the last checkpoint. T: seconds of training between two checkpoints; d: seconds that training stops for one.
Young 1974 (CACM 17:9): T = sqrt(2 d M). Daly 2006 (FGCS 22:3), equations 20 and 37: the complete model, and its optimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, sqrt


@dataclass(frozen=True)
class Failures:
    """What failures and checkpoints cost. Seconds."""

    mtbf: float
    """Of the job, M."""
    stall: float
    """Of a checkpoint, d."""
    restart: float
    """R: until the step is computed again at which the last checkpoint was; with train.staging also the time of its copy, in
    which work is done that a failure loses."""

    def goodput(self, interval: float) -> float:
        """Useful share of the time, 0..1, with a checkpoint after every `interval` seconds of training. Daly's equation 20:
        T / (M exp(R / M) (exp((T + d) / M) - 1)); failures during restarts and saves are in it."""
        if interval / self.mtbf > 500 or self.restart / self.mtbf > 500:  # exp would overflow: nothing gets done
            return 0.0
        return interval / (self.mtbf * exp(self.restart / self.mtbf) * expm1((interval + self.stall) / self.mtbf))

    def best_interval(self) -> float:
        """Seconds between two checkpoints with the highest goodput, Daly's equation 37; M where a save takes 2 M or more."""
        if self.stall >= 2 * self.mtbf:
            return self.mtbf
        x = self.stall / (2 * self.mtbf)
        return sqrt(2 * self.stall * self.mtbf) * (1 + sqrt(x) / 3 + x / 9) - self.stall

    def young_interval(self) -> float:
        """Young's, the first term of it."""
        return sqrt(2 * self.stall * self.mtbf)


def spares(failures_per_s: float, repair_s: float, *, miss: float = 1e-3) -> int:
    """Spare nodes so that one is missing for at most this share of the time. Nodes in repair are Poisson distributed with mean
    rate * repair time, whatever the distribution of repairs (Palm's theorem, M/G/infinity)."""
    mean = failures_per_s * repair_s
    term = total = exp(-mean)
    count = 0
    while total < 1 - miss and count < 10_000:
        count += 1
        term *= mean / count
        total += term
    return count
