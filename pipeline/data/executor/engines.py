"""Where the tasks of a job run: this machine's processes, a Slurm cluster, or a Ray cluster (`data.executor`).

    local  processes of this machine        tasks.py
    slurm  a job array, one task an element slurm.py
    ray    processes of a Ray cluster       ray_cluster.py

All three are datatrove's executors, and a task does the same in each of them (reporting.py), so the result has the same
bytes. Slurm and Ray need `run_dir`, and `data.output` where it is a folder, on a file system that every node sees at the same
path, and the same installation on every node. Both hand the pipeline over as a pickle, `executor.pik` in run_dir: whoever
may write to run_dir may run programs as you on the nodes.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, UserError

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig


@dataclass(frozen=True)
class Engine:
    """Where tasks run. slurm: `data.slurm` as plain values. dry_run: only write the scripts and check them. in_process: one
    after the other in this process, which alone sees what memory:// holds."""

    kind: str = "local"
    slurm: dict[str, Any] = field(default_factory=dict)
    ray_address: str = "auto"
    dry_run: bool = False
    in_process: bool = False


LOCAL = Engine()


class DryRun(Exception):
    """Not an error: the Slurm scripts of a job were written and checked, and nothing was submitted.

    script: the first; scripts: all, one for each array of the job. tasks: how many they run.
    """

    def __init__(self, scripts: list[Path], tasks: int) -> None:
        super().__init__(f"{tasks} tasks: {', '.join(map(str, scripts))}")
        self.script = scripts[0]
        self.scripts = scripts
        self.tasks = tasks


def engine_of(data: DataConfig, *, dry_run: bool = False, output: str | None = None) -> Engine:
    """The engine a configuration asks for. output: `tokens.output`, of stage tokenize. Raises UserError when the engine cannot
    be used here."""
    evaluation = data.clean.decontaminate.files if data.clean.decontaminate else []
    urls = [source.url for source in data.sources] + [url for url in (data.output, output, *evaluation) if url]
    in_process = any(url.startswith("memory://") for url in urls)
    if in_process and data.executor != "local":
        raise ConfigError(f"memory:// is seen by one process only, data.executor is {data.executor}; set it to local")
    if dry_run and data.executor != "slurm":
        raise ConfigError(f"--dry-run writes Slurm scripts, data.executor is {data.executor}; set data.executor=slurm")
    if data.executor == "slurm" and not dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "data.executor is slurm, but there is no sbatch on this machine; start it where there is (a login node), look at "
            "the script with --dry-run, or set data.executor=local"
        )
    if data.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("data.executor is ray, but ray is not installed; pip install 'pldr[ray]'")
    return Engine(data.executor, data.slurm.model_dump(), data.ray_address, dry_run, in_process)
