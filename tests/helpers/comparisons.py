"""Rows and files of sweeps that compare variants, without a training."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.io.storage import read_json
from pipeline.sweep.compare import as_json, compared, in_order, is_wanted, to_come
from pipeline.sweep.config import VARIANT, CompareConfig, Scalar, child_name
from pipeline.sweep.report import write_sweep_report

RATES, SEEDS = (1e-3, 3e-3, 6e-3, 1.2e-2), (1, 2, 3)
TUNED = CompareConfig(baseline="sdpa", tune="train.max_lr")
PLAIN = CompareConfig(baseline="sdpa")


@dataclass(frozen=True, eq=False)
class Varied:
    """A child without a configuration."""

    name: str
    values: dict[str, Scalar]


def children(*variants: str, rates: tuple[float, ...] = (), seeds: tuple[int, ...] = SEEDS) -> list[Varied]:
    """All that a grid of rates (none: it has none) and seeds makes, in the sweep's order."""
    combinations: list[dict[str, Scalar]] = [
        {VARIANT: variant, **({} if rate is None else {"train.max_lr": rate}), "seed": seed}
        for variant in variants
        for rate in rates or (None,)
        for seed in seeds
    ]
    return [Varied(child_name(values), values) for values in combinations]


def row(child: Varied, value: float | None, **more: Any) -> dict[str, Any]:
    """The row of a child that finished."""
    finished = {"status": "finished", "error": None, "run_id": f"id-{child.name}", "val_loss_cached": value}
    return {"child": child.name, **child.values, **finished, "order_parameter": None, "train_seconds": None, **more}


def sweep_file(folder: Path, *, name: str = "fair", variants: int = 6, tune: bool = True) -> Path:
    """The sweep.json (and beside it the page) of an invented sweep of some variants, of which the last one's trainings failed
    at the largest rate, and one variant is better than the baseline."""
    draw = random.Random(name)
    names = ["sdpa", *(f"variant-{number}" for number in range(1, variants))]
    compare = TUNED if tune else PLAIN
    every = children(*names, rates=RATES if tune else ())
    rows: dict[str, dict[str, Any]] = {}
    for number in in_order(every, compare):
        child = every[number - 1]
        if not is_wanted(child, every, rows, compare):
            continue
        place = names.index(str(child.values[VARIANT]))
        rate = child.values.get("train.max_lr", 3e-3)
        assert isinstance(rate, float)
        shared = random.Random(str(child.values["seed"])).gauss(0, 0.02)
        loss = (
            4.17 + 0.012 * place * (-1) ** place + 0.08 * math.log10(rate / 4e-3) ** 2 + shared + draw.gauss(0, 0.004)
        )
        found = row(
            child, loss, order_parameter=10.0 ** -(place + draw.random()), train_seconds=100.0 + 10 * place, step=3000
        )
        found["curves"] = {
            "val/loss_cached": [[step, loss + 2 * math.exp(-step / 700)] for step in range(250, 3001, 250)],
            "invariance/order_parameter_G": [
                [step, 10.0 ** (-step / 3000 * (place + 0.2))] for step in range(250, 3001, 250)
            ],
        }
        if place == variants - 1 and rate == RATES[-1]:
            found |= {"status": "failed", "error": "the loss is not finite", "val_loss_cached": None}
        rows[child.name] = found
    facts = {
        "name": name,
        "about": "Does any variant reach plain attention, each at its own best learning rate?",
        "run_id": "parent",
        "config": "base.yaml",
        "set": {"train.steps": "3000"},
        "grid": [VARIANT, *(["train.max_lr"] if tune else []), "seed"],
        "variants": {name: {} for name in names},
        "compare": compare.model_dump(),
        "compared": as_json(compared(every, rows, compare)),
        "children": len(rows) + to_come(every, rows, compare),
        "plot": {"x": "train_seconds", "y": "val_loss_cached", "log_x": False, "log_y": False},
    }
    files = write_sweep_report(facts, list(rows.values()), folder / name)["files"]
    assert read_json(files["table"])["name"] == name
    return Path(files["table"])
