"""`python -m pipeline.bench.contraction SWEEP_DIR|RUN_DIR [--checkpoint step-N] [--out FILE]`: what the weights of each kept
checkpoint predict of A's deviation over inputs, beside the order parameters that were measured at that step.

gamma, beta, input, GLU: geometric means over units and layers of RMS gamma, std beta, and the std of the residual input and of
what the GLUs add to it. a unit: geometric mean of the contraction formula. formula, Jacobian, fp64: relative deviation of A
predicted by either, and as it is on the same sequences. A, G: order parameters of the validation, fp32, on more sequences.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.contraction.runs import SEQUENCES, Run, find_runs, predictions
from pipeline.bench.contraction.units import Prediction
from pipeline.checkpoint.format import step_of
from pipeline.config.schedule import invariance_budget
from pipeline.errors import UserError

SMALL = 1e-300  # in a geometric mean
COLUMNS = ("gamma", "beta", "input", "GLU", "a unit", "formula", "Jacobian", "fp64", "A", "G")


def main(words: list[str] | None = None) -> int:
    """Print a line for each checkpoint as it is known; write JSON."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.contraction", description=__doc__)
    parser.add_argument("folder", type=Path, help="run_dir of a sweep, or of one run")
    parser.add_argument(
        "--checkpoint", help="only this one of each run, such as step-001000; default: all that are kept"
    )
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="held-out sequences (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)  # small matrices
    try:
        rows = measure(find_runs(arguments.folder), arguments.checkpoint, arguments.sequences)
    except UserError as error:
        print(f"pipeline.bench.contraction: {error}", file=sys.stderr)
        return 1
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"sequences": arguments.sequences, "checkpoints": rows}, indent=1) + "\n")
    return 0


def measure(runs: list[Run], checkpoint: str | None, sequences: int) -> list[dict[str, Any]]:
    """One row a checkpoint. Raises UserError when no run has the checkpoint that is named."""
    wide = max(len(run.name) for run in runs)
    print(f"{'run':<{wide}} {'step':>7} {'budget':>7} " + " ".join(f"{name:>8}" for name in COLUMNS))
    rows = []
    for run in runs:
        for path in run.checkpoints:
            if checkpoint in (None, path.name):
                rows.append(row(run, path, predictions(run, path, sequences=sequences)))
                cells = " ".join(f"{rows[-1]['table'][name]:8.1e}" for name in COLUMNS)
                print(f"{run.name:<{wide}} {rows[-1]['step']:>7} {rows[-1]['budget']:>7.2f} {cells}", flush=True)
    if not rows:
        raise UserError(f"--checkpoint {checkpoint}: no run has it; leave it out to see all that are kept")
    return rows


def row(run: Run, checkpoint: Path, layers: list[Prediction]) -> dict[str, Any]:
    """A checkpoint's numbers: `table`, and every unit of each layer."""
    step, units = step_of(checkpoint), [unit for layer in layers for unit in layer.units]
    measured = run.measured.get(step, {})
    fields = ("gamma_rms", "beta_std", "input_std", "glu_std", "contraction")
    means = [statistics.geometric_mean(max(getattr(unit, field), SMALL) for unit in units) for field in fields]
    pooled = [_pooled(layers, field) for field in ("formula", "jacobian", "fp64")]
    values = [*means, *pooled, *(measured.get(name, math.nan) for name in ("A", "G"))]
    return {
        "run": run.name,
        "step": step,
        "budget": invariance_budget(run.config.train, step),
        "table": dict(zip(COLUMNS, values, strict=True)),
        "layers": [asdict(layer) for layer in layers],
    }


def _pooled(layers: list[Prediction], field: str) -> float:
    """A relative deviation over layers, as an order parameter has it: squares are summed before they are divided."""
    squares = [(getattr(layer, field) * layer.size) ** 2 for layer in layers]
    return math.sqrt(sum(squares) / sum(layer.size**2 for layer in layers))


if __name__ == "__main__":
    sys.exit(main())
