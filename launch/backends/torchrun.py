"""torchrun: its command line for the ranks of one node. Every node runs its own (launch/backends/nodes.py)."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.backends.job import WORKER


def node_command(
    job_file: Path, *, nodes: int, node_rank: int, ranks_here: int, address: str | None, port: int
) -> list[str]:
    """The command line for one node. address: node 0's; None when it is the only one."""
    options = {
        "--nnodes": nodes,
        "--node-rank": node_rank,
        "--nproc-per-node": ranks_here,
        "--master-addr": address or "127.0.0.1",
        "--master-port": port,
        "--max-restarts": 0,  # ours is train.max_restarts: a restart begins at the last commit, not at the first one
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [sys.executable, "-m", "torch.distributed.run", *words, "-m", WORKER, str(job_file)]
