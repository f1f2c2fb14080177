"""Tasks on a Ray cluster: datatrove's Ray executor, which distributes tasks and restarts those of lost nodes.

Added here:

- datatrove's executor returns without an error even if its tasks failed. Here errors and markers are checked afterwards.
- It waits forever when a node cannot import datatrove. Here each node is checked first, also whether it sees run_dir.
- It runs a task in a fork of an actor, which is a process with threads, and waits forever when that fork is killed (out of
  memory). Here the fork only starts `python -m pipeline.data.executor.run_task`, a process like those of a local job, and
  checks its exit code. It also kills that process when the actor is gone, so that tasks of a killed run do not keep writing
  while the next run starts.
- Its tasks wait for free CPUs without a word. Here a line a minute says so while none runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from pipeline.data.executor.markers import Reporting, has_failed, leave_error, raise_error
from pipeline.data.executor.progress import Counter, tell
from pipeline.errors import UserError, first_line

PROBE_SECONDS = 120
TELL_SECONDS = 60.0
CONNECT_SECONDS = 10
log = logging.getLogger(__name__)


class RayExecutor(Reporting, RayPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """datatrove's Ray executor that reports what went wrong. in_process: the executor that runs a task in a node's process."""

    def __init__(
        self,
        steps: list[PipelineStep],
        *,
        tasks: int,
        workers: int,
        work: Path,
        address: str,
        in_process: PipelineExecutor,
    ) -> None:
        with _quiet():  # hide a warning that the folder has to be shared
            super().__init__(steps, tasks=tasks, workers=workers, logging_dir=str(work.absolute()), mem_per_cpu_gb=0)
        self.address = address
        self.folder = os.getcwd()
        self.python_path = os.pathsep.join(path for path in sys.path if path)
        self.in_process = in_process

    def run_ranks(self, ranks: list[int], *, console: Path, workers_key: str) -> None:
        """Run the tasks on the cluster and wait for them. Raises a task's UserError, and UserError for an unreachable cluster,
        a node that cannot run tasks, or tasks that did not finish."""
        self.dump(self.in_process)
        with _connected(self.address), _quiet():
            _check_nodes(self.work)
            # In the end it adds up statistics, which failed tasks do not have.
            with _telling_waits(self.work), contextlib.suppress(FileNotFoundError):
                self.run()
        raise_error(self.work)
        if missing := self.get_incomplete_ranks(ranks):
            raise UserError(
                f"{len(missing)} of {len(ranks)} tasks (the first is {missing[0]}) did not finish on the Ray cluster: their "
                f"nodes were lost; check them (ray status, {console}) and start again, finished work is kept"
            )

    def _run_for_rank(self, rank: int, *arguments: Any, **options: Any) -> PipelineStats:
        """In the fork of a Ray actor: run the task in a separate process."""
        if self.is_rank_completed(rank) or has_failed(self.work):
            return PipelineStats()
        actor = os.getppid()
        console = self.work / "console.log"
        with open(console, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.data.executor.run_task", str(self.pickle), str(rank)],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": self.python_path, "PYTHONSAFEPATH": "1"},
                stdin=subprocess.PIPE,  # the task process exits when this closes, so also when this process is killed
                stdout=output,
                stderr=output,
            )
        while process.poll() is None:
            if os.getppid() != actor:
                process.kill()
                os._exit(1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        if process.returncode and not has_failed(self.work):
            error = UserError(
                f"task {rank}: its process on {os.uname().nodename} ended with {process.returncode} (negative: killed by that "
                f"signal; -9 may mean out of memory), see {console}; raise data.tasks for smaller tasks or free memory and "
                "start again, finished work is kept"
            )
            leave_error(self.work, rank, error)
        return PipelineStats()


@contextmanager
def _connected(address: str) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    _check_address(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"data.ray_address {address}: cannot connect to a Ray cluster ({first_line(error)}); start one (ray start --head) "
            "or fix the address"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _telling_waits(work: Path) -> Iterator[None]:
    """While no task runs, say once a minute what the tasks wait for."""
    import ray

    ended = threading.Event()

    def watch() -> None:
        counter, quiet_since = Counter(work), time.monotonic()
        while not ended.wait(TELL_SECONDS / 10):
            if any(not task.done for task in counter.read()):
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since >= TELL_SECONDS:
                quiet_since = time.monotonic()
                free, all_ = (found.get("CPU", 0) for found in (ray.available_resources(), ray.cluster_resources()))
                tell(
                    f"no task runs: each waits for a CPU of the Ray cluster ({free:g} of {all_:g} are free; see ray status)"
                )

    thread = threading.Thread(target=watch, name="ray-waits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _check_address(address: str) -> None:
    """Raise UserError when nothing listens at host:port: Ray itself would retry silently for many minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return  # auto, local, or a client's address: Ray reports these at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"data.ray_address {address}: unreachable ({first_line(error)}); start a cluster (ray start --head) or "
            "fix the address"
        ) from None


def _check_nodes(work: Path) -> None:
    """Raise UserError for a node that cannot run tasks. Nodes that an autoscaler adds later are not checked."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = work / f".probe-{os.getpid()}-{time.time_ns()}"
    probe.touch()
    checks = {}
    try:
        for node in ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU"):
                here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = ray.remote(_can_see).options(num_cpus=0, scheduling_strategy=here, max_retries=0)
                checks[node["NodeManagerAddress"], node["NodeID"]] = task.remote(str(probe))
        for (address, _), answer in checks.items():
            try:
                seen = ray.get(answer, timeout=PROBE_SECONDS)
            except Exception as error:
                cause = getattr(error, "cause", None) or error
                raise UserError(
                    f"the Ray node {address} cannot run tasks ({first_line(cause)}); install the same version of pldr there"
                ) from None
            if not seen:
                raise UserError(
                    f"the Ray node {address} does not see {work}; set run_dir to a file system that all nodes share"
                )
    finally:
        probe.unlink()
    if not checks:
        log.warning("the Ray cluster has no node with CPUs yet; waiting for one")


def _can_see(path: str) -> bool:
    """On a node: whether this package can be imported and the file is visible."""
    import pipeline.data.executor.local  # noqa: F401

    return Path(path).is_file()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep datatrove's log lines off the user's terminal."""
    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")
