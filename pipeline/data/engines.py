"""Where datatrove tasks run: this machine's processes, a Slurm cluster, or a Ray cluster (`data.executor`).

Local tasks run in `tasks.py`. Slurm and Ray are datatrove's own executors with what they lack added here:

- They end without a word about tasks that failed: every task leaves its error in `work/errors/`, and the waiting process
  raises it, one line where it was a user's mistake.
- They are quiet, and leave out what nobody reads (datatrove submits a second Slurm job to merge statistics).

Both need `run_dir` on a file system that every node sees at the same path, with the same installation. datatrove hands the
pipeline over as a pickle: in `work/executor.pik` (Slurm), or through the Ray cluster. So nobody but you may be able to write
to run_dir, and the Ray cluster must be yours.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from pipeline.data import progress
from pipeline.errors import UserError, first_line
from pipeline.storage import publish_json

if TYPE_CHECKING:
    from pipeline.data_config import DataConfig

ERRORS = "errors"
SCRIPT = "launch_script.slurm"
POLL_SECONDS = 2.0
# Options of sbatch's manual page (Slurm 24.05) that datatrove and data.slurm.sbatch_args may write.
SBATCH_OPTIONS = """
account array batch begin chdir cluster-constraint clusters comment constraint container contiguous core-spec
cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude
exclusive export extra-node-info get-user-env gpus gpus-per-node gpus-per-task gres hint hold input job-name
kill-on-invalid-dep licenses mail-type mail-user mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill
no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-node ntasks-per-socket open-mode oom-kill-step
output overcommit oversubscribe parsable partition power prefer priority profile propagate qos quiet reboot requeue
reservation segment signal sockets-per-node spread-job switches thread-spec threads-per-core time time-min tmp
tres-per-task use-min-nodes verbose wait wait-all-nodes wckey wrap
"""


@dataclass(frozen=True)
class Engine:
    """Where tasks run. slurm: `data.slurm` as plain values. dry_run: only write the script and check it."""

    kind: str = "local"
    slurm: dict[str, Any] = field(default_factory=dict)
    ray_address: str = "auto"
    dry_run: bool = False


LOCAL = Engine()


class DryRun(Exception):
    """Not an error: the Slurm script at `script` was written and checked, and nothing was submitted."""

    def __init__(self, script: Path, tasks: int) -> None:
        super().__init__(f"{script}: checked, {tasks} tasks")
        self.script = script
        self.tasks = tasks


def engine_of(data: DataConfig, *, dry_run: bool = False) -> Engine:
    """The engine a configuration asks for. Raises UserError where it cannot be used here."""
    if dry_run and data.executor != "slurm":
        raise UserError("--dry-run shows the script of data.executor=slurm; this configuration's is " + data.executor)
    if data.executor == "slurm" and not dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "data.executor: slurm: there is no sbatch here; run this on a login node, or set data.executor=local"
        )
    if data.executor == "ray":
        try:
            import ray  # noqa: F401
        except ImportError:
            raise UserError("data.executor: ray: it is not installed; pip install 'pldr[ray]'") from None
    return Engine(data.executor, data.slurm.model_dump(), data.ray_address, dry_run)


class Reporting:
    """An executor whose tasks report how far they are and, when they fail, why."""

    logging_dir: Any

    def _run_for_rank(self, rank: int, *arguments: Any, **options: Any) -> Any:
        work = Path(self.logging_dir.path)
        progress.begin(work, rank)
        try:
            return super()._run_for_rank(rank, *arguments, **options)  # type: ignore[misc]
        except Exception as error:
            user = isinstance(error, UserError)
            message = str(error) if user else first_line(error)
            facts = {"message": message, "user": user, "kind": type(error).__name__}
            publish_json(work / ERRORS / f"{rank:05d}.json", facts)
            raise
        finally:
            progress.end()


def raise_first_error(work: Path) -> None:
    """Raise what the first task that failed left behind, if one did."""
    for file in sorted((work / ERRORS).glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["user"]:
            raise UserError(facts["message"])
        log = work / "logs" / f"task_{file.stem}.log"
        raise UserError(f"task {int(file.stem)} failed ({facts['kind']}: {facts['message'][:300]}); see {log}")


class SlurmExecutor(Reporting, SlurmPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """datatrove's Slurm executor that waits for its job array."""

    def __init__(self, steps: list[PipelineStep], *, tasks: int, workers: int, work: Path, engine: Engine) -> None:
        bin_folder = Path(sys.executable).parent  # not resolved: a venv's own
        super().__init__(
            steps,
            tasks=tasks,
            workers=workers,
            job_name=f"pldr-{work.name}",
            logging_dir=str(work),
            env_command=f"cd {shlex.quote(os.getcwd())}\nexport PATH={shlex.quote(str(bin_folder))}:$PATH",
            requeue_signals=None,
            **engine.slurm,
        )

    def launch_merge_stats(self) -> None:
        """Not needed: tasks.py adds the statistics up."""

    def render(self) -> Path:
        """Write the script that `run` would submit, and check it. Raises UserError for an option that sbatch does not know."""
        work = Path(self.logging_dir.path)
        ranks = self.get_incomplete_ranks()
        jobs = min(len(ranks), self.max_array_size)
        command = f"srun  -l -n {self.nodes_per_task} launch_pickled_pipeline {work / 'executor.pik'}"
        script = work / SCRIPT
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(self.get_launch_file_contents(self.get_sbatch_args(jobs), command), encoding="utf-8")
        check_script(script)
        return script

    def run_ranks(self, ranks: list[int], *, console: Path, workers_key: str) -> None:
        """Submit the job array and wait until every rank is complete."""
        work = Path(self.logging_dir.path)
        self.render()
        try:
            with _quiet():
                self.run()
        except subprocess.CalledProcessError as error:
            raise UserError(f"sbatch refused {work / SCRIPT} ({error}); mend data.slurm") from None
        try:
            while missing := self.get_incomplete_ranks(ranks):
                raise_first_error(work)
                if not self._is_queued() and self.get_incomplete_ranks(missing):
                    raise_first_error(work)
                    raise UserError(
                        f"Slurm job {self.job_id} ended with {len(missing)} of {len(ranks)} tasks undone; see "
                        f"{self.slurm_logs_folder} (time limit? memory? data.slurm) and start again, finished work is kept"
                    )
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            print(f"Slurm job {self.job_id} goes on; scancel {self.job_id} ends it", file=sys.stderr)
            raise
        except UserError:
            subprocess.run(["scancel", str(self.job_id)], check=False, capture_output=True)
            raise

    def _is_queued(self) -> bool:
        asked = subprocess.run(["squeue", "-h", "-j", str(self.job_id), "-o", "%T"], capture_output=True, text=True)
        return bool(asked.stdout.strip())  # a job that ended is unknown after a while: an error, and no output


def check_script(script: Path) -> None:
    """A script is good bash, and its options are sbatch's. Raises UserError."""
    asked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"{script}: not a bash script ({asked.stderr.strip()[:200]}); mend data.slurm")
    for line in script.read_text(encoding="utf-8").splitlines():
        if line.startswith("#SBATCH"):
            option = re.fullmatch(r"#SBATCH --([a-z-]+)(=.*)?", line)
            if option is None or option[1] not in SBATCH_OPTIONS.split():
                raise UserError(f"{script}: {line!r} is no option of sbatch; mend data.slurm.sbatch_args")


class RayExecutor(Reporting, RayPipelineExecutor):  # type: ignore[misc]
    """datatrove's Ray executor that says what went wrong. It ends quietly, whatever became of its tasks."""

    def __init__(self, steps: list[PipelineStep], *, tasks: int, workers: int, work: Path, engine: Engine) -> None:
        with _quiet():  # of a warning that the folder has to be shared
            super().__init__(steps, tasks=tasks, workers=workers, logging_dir=str(work), mem_per_cpu_gb=0.5)
        self.address = engine.ray_address

    def run_ranks(self, ranks: list[int], *, console: Path, workers_key: str) -> None:
        """Run the ranks on the cluster and wait for them."""
        import ray

        try:
            ray.init(address=self.address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"data.ray_address: {self.address}: no Ray cluster answers ({first_line(error)}); start one (ray start --head) "
                "or mend the address"
            ) from None
        with _quiet():
            self.run()
        work = Path(self.logging_dir.path)
        raise_first_error(work)
        if missing := self.get_incomplete_ranks(ranks):
            raise UserError(
                f"Ray ended with {len(missing)} of {len(ranks)} tasks undone (a worker died? memory?); see the cluster's "
                "logs and start again, finished work is kept"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without datatrove's log lines in the user's terminal."""
    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")
