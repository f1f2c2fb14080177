"""`pldr sweep SWEEP.yaml`: a grid of runs as children of one MLflow run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pipeline.config import RunConfig

Result = dict[str, Any]
Show = Callable[[str], None]


def add_sweep_verb(verbs: Any, common: argparse.ArgumentParser) -> None:
    """The verb `sweep`."""
    about = "run every combination of a grid, skip what is complete, and end with one table and plot"
    sweep = verbs.add_parser("sweep", help=about, description=about, parents=[common])
    sweep.add_argument(
        "config", metavar="SWEEP", help="YAML of the sweep, such as configs/sweeps/invariance_budget.yaml"
    )
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of every child's run")
    sweep.set_defaults(work=_sweep)


def _sweep(arguments: Any, show: Show) -> Result:
    from launch.deepspeed import launch
    from pipeline.sweep import Sweep
    from pipeline.sweep_report import table_lines

    def start(config: RunConfig, job_file: Any, ranks: int) -> None:
        launch(config, job_file, ranks, show=lambda text: show(f"  {text}"))

    sweep = Sweep(arguments.config, arguments.overrides)
    result = sweep.run(launch=start, say=show)
    for line in table_lines(list(sweep.settings.grid), result["table"]):
        show(line)
    show(result["files"]["page"])
    return result
