"""Tasks on a Slurm cluster: datatrove's Slurm executor, plus waiting for the tasks and reporting what failed.

A job becomes one array with one element per incomplete task, `data.workers` of them at once (several arrays, one after another,
when it has more tasks than `data.slurm.max_array_size`). The process that submitted it waits. When that process is stopped, the
array keeps running, and the next start waits for the same array (`slurm_jobs.json`) instead of submitting another. An array
that another version of pldr submitted is never joined (PICKLE_VERSION in markers.py).

datatrove's `launch_job` cannot write scripts without submitting them, does not quote paths, starts tasks through srun (which
since Slurm 22.05 gives a task one CPU, whatever cpus-per-task says), and submits one more job to merge statistics, which waits
forever when a task fails. So scripts are submitted here; their frame, their options and what runs inside an array element are
datatrove's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from pipeline import slurm
from pipeline.data.executor.markers import Reporting, has_failed, raise_error
from pipeline.data.executor.progress import tell
from pipeline.data.executor.watch import Watch
from pipeline.environment import search_path
from pipeline.errors import ConfigError, UserError
from pipeline.io.storage import publish_json

SCRIPT = "launch_script{}.slurm"
JOBS = "slurm_jobs.json"  # ids of the arrays submitted last
POLL_SECONDS = 2.0  # between two checks of the markers, which are files
QUEUE_SECONDS = 10.0  # between two calls of squeue: many users share the controller
GONE = 3  # times in a row that a job has to be missing from the queue: markers may arrive late on a network file system
OURS = (
    "array",
    "dependency",
    "error",
    "job-name",
    "nodes",
    "ntasks",
    "output",
    "parsable",
    "test-only",
    "wait",
    "wrap",
)
ENDS = {  # what to do about a task that ended so
    "TIMEOUT": "raise data.slurm.time, or data.tasks for smaller tasks",
    "OUT_OF_MEMORY": "raise data.slurm.mem_per_cpu_gb, or data.tasks for smaller tasks",
    "CANCELLED": "someone canceled it",
    "DEADLINE": "its deadline (data.slurm.sbatch_args) passed",
    "PREEMPTED": "a job of higher priority took its node",
    "NODE_FAIL": "its node was lost",
    "BOOT_FAIL": "its node did not start",
    "FAILED": "see that log (killed without a word: perhaps out of memory, raise data.slurm.mem_per_cpu_gb)",
}


class SlurmExecutor(Reporting, SlurmPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """datatrove's Slurm executor that waits for its arrays.

    name: of the Slurm job. Jobs that publish to the same folder have the same name, so that two cannot run at once.
    """

    def __init__(
        self, steps: list[PipelineStep], *, tasks: int, workers: int, work: Path, name: str, settings: dict[str, Any]
    ) -> None:
        bin_folder = Path(sys.executable).parent  # of the virtual environment, if there is one
        modules = "".join(f" {name}={shlex.quote(value)}" for name, value in search_path().items() if value)
        super().__init__(
            steps,
            tasks=tasks,
            workers=workers,
            job_name=name,
            logging_dir=str(work.absolute()),
            env_command=f"set -e; cd {shlex.quote(os.getcwd())}; export PATH={shlex.quote(str(bin_folder))}:$PATH{modules}",
            requeue_signals=None,
            **settings,
        )
        self.settings = settings
        for key, value in settings.get("sbatch_args", {}).items():
            if key not in slurm.OPTIONS:
                raise ConfigError(f"data.slurm.sbatch_args: sbatch has no option --{key}; see man sbatch")
            if slurm.wrong_value(key, value or None) is not None:
                fix = "takes no value; set it to ''" if value else "takes a value; set one"
                raise ConfigError(f"data.slurm.sbatch_args.{key}: sbatch's --{key} {fix}")
            if key in OURS:
                raise ConfigError(f"data.slurm.sbatch_args: {key} is set by pldr; leave it out")

    def render(self, ranks: list[int]) -> list[Path]:
        """Write and check the scripts that run these tasks, one per array. Raises UserError."""
        scripts = []
        self.cluster_folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, len(ranks), self.max_array_size)):
            jobs = min(self.max_array_size, len(ranks) - start)
            pickled = shlex.quote(str(self.pickle))
            # Not `launch_pickled_pipeline`: it may be another Python's.
            command = f"exec {shlex.quote(sys.executable)} -m datatrove.tools.launch_pickled_pipeline {pickled}"
            options = {key: _quote(key, value) for key, value in self.get_sbatch_args(jobs).items()}
            script = self.cluster_folder / SCRIPT.format(f".{number}" if number else "")
            text = self.get_launch_file_contents(options, f"export RUN_OFFSET={number}\n        {command}")
            script.write_text(text, encoding="utf-8")
            check_script(script, jobs)
            scripts.append(script)
        return scripts

    def still_running(self) -> bool:
        """Whether arrays of an earlier start are still running or queued. Raises UserError when another job that writes to
        the same folder is."""
        queued = [job for job in slurm.queue() if not job.ended]
        others = sorted({job.id for job in queued if job.name == self.job_name} - set(self._jobs()))
        if others:
            raise UserError(
                f"Slurm job {others[0]} of an earlier start, with other settings or another version of pldr, still writes to "
                f"the same folder; wait for it, or scancel {others[0]}"
            )
        return bool({job.id for job in queued} & set(self._jobs()))

    def run_ranks(self, ranks: list[int], *, console: Path, workers_key: str) -> None:
        """Submit the tasks, unless those of an earlier start are still running, and wait. Raises a task's UserError, and
        UserError for tasks that can never start, or that ended without finishing, with the last line of its log."""
        if self.still_running():
            ids = " ".join(self._jobs())
            tell(f"Slurm job {ids} of an earlier start, with its settings: waiting for it (scancel {ids} to end it)")
        else:
            self._submit(ranks)
        jobs = self._jobs()
        try:
            self._wait(jobs, ranks)
        except KeyboardInterrupt:
            ids = " ".join(jobs)
            tell(f"\nSlurm job {ids} keeps running: start again to wait for it, or cancel it with: scancel {ids}")
            raise

    def _submit(self, ranks: list[int]) -> None:
        scripts = self.render(ranks)
        self.dump(self)
        publish_json(self.work / "ranks_to_run.json", ranks)
        jobs: list[str] = []
        for script in scripts:
            after = (
                [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
            )  # running together they would exceed `workers`
            jobs.append(slurm.submit(script, after, self.fixes))
            publish_json(self.cluster_folder / JOBS, jobs)
        tell(f"Slurm job {' '.join(jobs)} submitted: {len(ranks)} tasks, {self.workers} at once, {scripts[0]}")

    @property
    def fixes(self) -> dict[str, str]:
        """What to change when Slurm refuses an array, or never starts it."""
        now = {key: f"data.slurm.{key} (now {value})" for key, value in self.settings.items()}
        args = "data.slurm.sbatch_args"
        shape = f"{now['cpus_per_task']} or {now['mem_per_cpu_gb']}"
        return {
            "time": f"lower {now['time']} or change {now['partition']}",
            "partition": f"change {now['partition']}",
            "qos": f"change {now['qos']}",
            "account": f"set account in {args}",
            "memory": f"lower {now['mem_per_cpu_gb']}",
            "cpus": f"lower {now['cpus_per_task']}",
            "size": f"lower {shape}, or change {now['partition']}",
            "nodes": f"lower {shape}, or change {now['partition']}",
            "policy": f"lower {now['time']}, {now['max_array_size']} or {shape}, or set account or {now['qos']}",
            "array": f"lower {now['max_array_size']}",
            "gpus": f"fix gres and gpus in {args}: pldr asks for none",
            **{name: f"fix {name} in {args}" for name in ("constraint", "license", "reservation", "nodelist")},
            "": "fix data.slurm",
        }

    def _jobs(self) -> list[str]:
        file = self.cluster_folder / JOBS
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

    def _wait(self, jobs: list[str], ranks: list[int]) -> None:
        watch = Watch(jobs, fixes=self.fixes, ends=ENDS)
        checked_at, gone, canceled = 0.0, 0, False
        while self.get_incomplete_ranks(ranks):
            if has_failed(self.work) and not canceled:
                canceled = True  # running tasks may finish: their work is kept
                slurm.cancel(jobs, "--state=PENDING")
            if time.monotonic() - checked_at >= QUEUE_SECONDS:
                there = watch.look()
                if there is not None:
                    gone = 0 if there else gone + 1
                checked_at = time.monotonic()
            if gone and has_failed(self.work):
                raise_error(self.work)
            if gone == GONE:
                self._explain(jobs, watch)
            time.sleep(POLL_SECONDS)

    def _explain(self, jobs: list[str], watch: Watch) -> None:
        """Raise what is known about the first task that is incomplete although its array has ended."""
        ranks = json.loads((self.work / "ranks_to_run.json").read_text(encoding="utf-8"))
        missing = self.get_incomplete_ranks(ranks)
        if not missing:
            return
        position = ranks.index(missing[0])
        element = f"{jobs[position // self.max_array_size]}_{position % self.max_array_size}"
        output = Path(self.slurm_logs_folder) / f"{element}.out"
        state = slurm.state_at_end(element, output, watch.ended.get(element))
        fix = ENDS.get(state, "see that log")
        raise UserError(
            f"task {missing[0]} ({len(missing)} of {len(ranks)} are unfinished) ended as {state} in Slurm job {element}, "
            f"{output}: {_last_line(output)}; {fix}, and start again, finished work is kept"
        )


def check_script(script: Path, jobs: int) -> None:
    """Check that a script is valid bash, has valid sbatch options and an array of `jobs` elements. Raises UserError."""
    parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    if parsed.returncode:
        raise UserError(f"{script}: not a valid bash script ({parsed.stderr.strip()[:200]}); fix data.slurm")
    options = {}
    for line in script.read_text(encoding="utf-8").splitlines():
        if line.startswith("#SBATCH"):
            option = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.+))?", line)
            if option is None or option[1] not in slurm.OPTIONS:
                raise UserError(f"{script}: {line!r} is not an option of sbatch; fix data.slurm.sbatch_args")
            options[option[1]] = option[2]
    array = re.fullmatch(r"0-(\d+)(%[1-9]\d*)?", options.get("array") or "")
    assert array is not None and int(array[1]) == jobs - 1, f"{script}: the array is not of {jobs} tasks"


def _quote(key: str, value: Any) -> str:
    """A value, quoted for an #SBATCH line."""
    text = str(value)
    if "\n" in text or '"' in text:
        raise ConfigError(f"data.slurm: {key} must not contain line breaks or quotes: {text!r}")
    return f'"{text}"' if re.search(r"[\s#'\\;]", text) else text


def _last_line(file: Path) -> str:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "no output"
    return lines[-1][:300] if lines else "no output"
