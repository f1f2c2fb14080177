"""The end of a worker that `run_ranks` (ranks.py) starts."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist


def finish(folder: Path, results: Any) -> None:
    """Rank 0 leaves the results where `run_ranks` reads them; then every rank leaves the process group."""
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
