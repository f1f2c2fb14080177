"""Order parameters of G of runs that are no longer on any disk here, as docs and papers have them, for `law`."""

from __future__ import annotations

from pipeline.bench.contraction.points import Point, point
from pipeline.config.train import TrainConfig

# docs/experiments.md, "The budget in 600 steps": metric weight decay -> order parameters of seeds 1 and 2 at step 600, 8 units.
SHIPPED = {0.1: (0.25, 0.29), 10.0: (0.13, 0.11), 20.0: (6.7e-6, 4.8e-3), 40.0: (5.5e-7, 1.3e-8)}
# The papers' 110M models, 8 units (arXiv 2603.23539): max lr, warm-up, steps, RMSE / |mean| of G between two runs. Another
# measure than ours, which |mean| may make as large as it likes: their order is what can be compared.
PUBLISHED = {
    "SUB-2": (3e-4, 2000, 250_000, 46.9),
    "SUB-1": (6e-4, 6000, 250_000, 15.8),
    "SOC-4": (8e-4, 4000, 250_000, 9.2e-6),
    "SOC-3": (9e-4, 2000, 250_000, 5.1e-4),
    "SOC-2": (1e-3, 1000, 250_000, 1.3e-5),
    "SOC-1": (1.2e-3, 2000, 250_000, 2.2e-2),
    "SOC-5": (1.1e-3, 2000, 1_250_000, 0.0),
}


def shipped_sweep() -> list[Point]:
    """configs/sweeps/invariance_budget.yaml, 2026-11-25."""
    found = []
    for decay, measured in SHIPPED.items():
        train = TrainConfig(steps=600, warmup_steps=50, max_lr=1e-3, metric_weight_decay=decay)
        found += [
            point(f"decay-{decay:g}.seed-{seed}", seed, train, 600, units=8, measured=value)
            for seed, value in enumerate(measured, 1)
        ]
    return found


def published() -> list[Point]:
    """The papers' models."""
    found = []
    for name, (rate, warmup, steps, value) in PUBLISHED.items():
        train = TrainConfig(steps=steps, warmup_steps=warmup, max_lr=rate)
        found.append(point(name, 1, train, steps, units=8, measured=value))
    return found
