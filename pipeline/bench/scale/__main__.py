"""`python -m pipeline.bench.scale`: predicted against measured steps, two ranks, ZeRO 0 to 3, over a link of each rate.

What each rank computes alone is timed at every stage with one rank on each host at once; alpha and beta of the link with
all-reduces in the same processes as the steps. Exit code 0 if every predicted step is within the bound, and the bytes too.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.rounds import machine
from pipeline.bench.scale.compare import compare, traffic
from pipeline.bench.scale.hosts import TwoHosts
from pipeline.bench.scale.ranks import Ranks, Sizes
from pipeline.config.load import load_config
from pipeline.errors import UserError

BOUND, BYTES_BOUND = 0.2, 0.01


def main(words: list[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.scale", description=__doc__)
    parser.add_argument(
        "--mbit", type=float, nargs="+", default=[100.0, 1000.0], help="rates of the link (%(default)s)"
    )
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3])
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps of each case; the fastest counts (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts are removed
    try:
        result = measure(arguments.stages, arguments.mbit, arguments.steps)
    except UserError as error:
        print(f"pipeline.bench.scale: {error}", file=sys.stderr)
        return 1
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    worst = max(abs(case["ratio"] - 1) for case in result["cases"])
    bytes_worst = max(abs(case["bytes_ratio"] - 1) for case in result["cases"])
    print(f"worst: steps {worst:.1%} off (allowed {BOUND:.0%}), bytes {bytes_worst:.2%} (allowed {BYTES_BOUND:.0%})")
    return 0 if worst <= BOUND and bytes_worst <= BYTES_BOUND else 1


def measure(stages: list[int], mbit: list[float], steps: int) -> dict[str, Any]:
    """Every case. Prints a line for each as it is known."""
    sizes, cases = Sizes(), []
    print(
        "ZeRO   Mbit/s   link Gbit/s  alpha us   compute s  predicted s  measured s  ratio   MB predicted  MB measured  ratio"
    )
    with tempfile.TemporaryDirectory(prefix="pldr-scale-") as name, TwoHosts() as hosts:
        ranks = Ranks(hosts, Path(name), sizes, steps)
        for number, stage in enumerate(stages):
            alone = ranks.alone(stage, port=29500 + 2 * number)
            found = ranks.together(stage, [*mbit], port=29501 + 2 * number)
            config = load_config(str(sizes.write(Path(name))), sizes.overrides(stage, 2))
            for rate in mbit:
                case = compare(config, alone, found, str(rate))
                case["traffic"] = traffic(config, found[0])
                cases.append(case)
                print(
                    f"{stage:>4} {rate:>8g} {case['link_gbps']:>13.3f} {case['link_latency_us']:>9.0f} "
                    f"{case['compute_seconds']:>11.3f} {case['predicted_seconds']:>12.3f} {case['measured_seconds']:>11.3f} "
                    f"{case['ratio']:>6.2f} {case['predicted_bytes'] / 1e6:>14.3f} {case['measured_bytes'] / 1e6:>12.3f} "
                    f"{case['bytes_ratio']:>6.4f}",
                    flush=True,
                )
    return {
        "machine": machine(torch.device("cpu")),
        "parameters": config.model.num_parameters()["total"],
        "cases": cases,
    }


if __name__ == "__main__":
    sys.exit(main())
