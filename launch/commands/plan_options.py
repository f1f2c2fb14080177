"""The options of `pldr plan` that describe a cluster, and the cluster that they make."""

from __future__ import annotations

import argparse
from typing import Any

from pipeline.errors import ConfigError

_OPTIONS: dict[
    str, tuple[type, str]
] = {  # name -> its type, its help; defaults are Cluster's (pipeline/config/scale/cluster.py)
    "gpus_per_node": (int, "devices of one node (8)"),
    "link_gbps": (float, "Gbit/s between nodes, all network cards of a node together (400)"),
    "nvlink_gbps": (float, "Gbit/s of a device within its node (3600)"),
    "gpu_memory_gb": (float, "GB of a device (80)"),
    "mtbf_hours": (float, "mean hours between two failures of one device (50000)"),
    "restart_minutes": (float, "from a failure until training computes again (10)"),
    "storage_gb_per_s": (float, "of the shared file system, for all ranks together (10)"),
    "price_per_gpu_hour": (float, "shows what the run costs"),
}


def add_cluster_options(sub: argparse.ArgumentParser) -> None:
    """Each of them asks for the plan of a cluster."""
    group = sub.add_argument_group(
        "a cluster (docs/scale.md); any of these shows communication, failures and sizes from 8 to 4096"
    )
    for name, (kind, text) in _OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)


def wants_cluster(arguments: Any) -> bool:
    """Whether one of these options was given."""
    return any(getattr(arguments, name) is not None for name in _OPTIONS)


def cluster_values(arguments: Any, assumed: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Cluster. assumed: mfu, peak_tflops, devices where given. Raises ConfigError for what is not positive."""
    given = {name: getattr(arguments, name) for name in _OPTIONS}
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        if not value > 0 or value == float("inf"):
            raise ConfigError(f"plan: --{name.replace('_', '-')} {value:g} must be a positive number")
    return {"devices": 8, **assumed, **values}
