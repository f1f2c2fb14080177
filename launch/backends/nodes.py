"""One `pldr` process on every node, as a scheduler starts them: node 0 leads, the others follow.

They coordinate through `logs/nodes/` of the run directory, which is on a file system that all of them see:

    node-I.json   node I waits for a start (rewritten every second, with a new random token for each start)
    start.json    node 0: the job file is written, and every node whose token is listed here starts its ranks
    end.json      node 0: the job is over, with this exit code

Tokens make files of earlier starts harmless, and need no clock. A crash ends the ranks of all nodes; the followers draw new
tokens and wait, and node 0 resumes from the last commit, at most `train.max_restarts` times. Node 0 decides how the job ended,
by the committed checkpoint; a follower that gets no message has failed.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.backends.dry_run import dry_run
from launch.backends.environment import rank_environment
from launch.backends.job import Report, run_job, stopped_exit_code
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import Stopped, UserError
from pipeline.io import storage
from pipeline.stages.runner import Pipeline, exclusive

BEAT_S = 1.0
POLL_S = 0.25
FAREWELL_S = 30.0  # how long node 0 waits for missing nodes before it announces the end
STOPPED_S = 5.0  # the same after a signal
LEAD_S = 60.0  # how long another node that was stopped waits for node 0's announcement, which follows its last uploads


@dataclass(frozen=True)
class NodeJob:
    """One node's part of a job: which node this is, and how its ranks are started."""

    command: Callable[[Path], list[str]]  # the launcher's command line for a job file
    node: int
    nodes: int
    ranks: int  # on all nodes
    ranks_here: int
    wait_s: float  # for the other nodes
    stopped_code: int  # exit code after a stop by signal

    def dry_run(self, logs: Path, report: Report) -> dict[str, Any]:
        """Report what would be started."""
        job_file = logs / "job.json"
        environment = rank_environment(self.ranks_here)
        return dry_run({}, [self.command(job_file)], environment, report=report, job_file=job_file)


def run_node(
    config: RunConfig, paths: RunPaths, job: NodeJob, *, resume: str, force: bool, report: Report, live: Report
) -> dict[str, Any]:
    """Run this node's ranks until the job ends. `live` gets each status line. Raises UserError; Stopped with stopped_code."""
    logs = paths.logs
    log_file = logs / ("train.log" if job.node == 0 else f"train-node{job.node}.log")

    def run() -> None:
        environment = rank_environment(job.ranks_here)
        command = job.command(logs / "job.json")
        run_job(command, environment=environment, ranks=job.ranks_here, log_file=log_file, report=live)

    with stopped_exit_code(job.stopped_code):
        if job.node == 0:
            return _lead(config, paths, job, run, resume=resume, force=force, report=report)
        logs.mkdir(parents=True, exist_ok=True)
        return _follow(config, paths, job, run, report)


def _lead(
    config: RunConfig,
    paths: RunPaths,
    job: NodeJob,
    run: Callable[[], None],
    *,
    resume: str,
    force: bool,
    report: Report,
) -> dict[str, Any]:
    """Node 0: the stage `train`, and a message to the other nodes at each start and at the end."""
    lead = Lead(paths, job.nodes, wait_s=job.wait_s)

    def start(config: RunConfig, job_file: Path, ranks: int) -> None:
        lead.start()
        run()

    pipeline = Pipeline(config, launch=start, report=report, ranks=job.ranks)
    code, message, stopped = 1, "node 0 ended early", False
    try:
        with exclusive(pipeline.paths, report, wait_s=job.wait_s):
            result = pipeline.stage("train", resume=resume, force=force)
        code, message = 0, "training is complete"
        return result
    except Stopped as stop:
        code, message, stopped = job.stopped_code, str(stop), True
        raise
    except KeyboardInterrupt as interrupted:
        code, message, stopped = job.stopped_code, f"training was stopped by {interrupted}", True
        raise
    except UserError as error:
        code, message = error.exit_code, str(error)
        raise
    finally:
        lead.end(code, message, stopped=stopped)


def _follow(
    config: RunConfig, paths: RunPaths, job: NodeJob, run: Callable[[], None], report: Report
) -> dict[str, Any]:
    """Another node: run its ranks each time node 0 starts the job, and end as node 0 does."""
    follower = Follower(paths, job.node, wait_s=job.wait_s + config.train.publish_wait_s)
    while (end := follower.wait()) is None:
        try:
            run()
        except Stopped as stop:
            end = follower.announcement(min(LEAD_S, job.wait_s))
            if end is None:  # node 0 is silent, or would start again
                raise stop from None
            break
        except UserError as error:
            report(f"node {job.node}: {error}")
    if end.stopped:
        raise Stopped(end.message, details={"node": job.node}, exit_code=end.exit_code)
    if end.exit_code:
        raise UserError(f"node 0: {end.message}", exit_code=end.exit_code)
    report(f"node {job.node}: {end.message}")
    return {"node": job.node}


@dataclass(frozen=True)
class End:
    """What node 0 announces at the end."""

    exit_code: int
    message: str
    stopped: bool  # by a signal, after a save


class Lead:
    """Node 0's side."""

    def __init__(self, paths: RunPaths, num_nodes: int, *, wait_s: float) -> None:
        self._folder, self._others, self._wait_s = paths.logs / "nodes", range(1, num_nodes), wait_s
        self._started: dict[str, str] = {}  # the tokens of the last start

    def start(self) -> None:
        """Wait for all other nodes and let them start their ranks. Raises UserError naming the missing nodes."""
        tokens = self._gather(self._wait_s)
        missing = [str(node) for node in self._others if str(node) not in tokens]
        if missing:
            raise UserError(
                f"node {', '.join(missing)} was not there within {self._wait_s:g} s; start one `pldr launch` on each node, "
                "with the same run_dir on a file system that all of them see"
            )
        storage.publish_json(self._folder / "start.json", {"tokens": tokens})
        self._started = tokens

    def end(self, exit_code: int, message: str, *, stopped: bool = False) -> None:
        """Announce the end. Nodes that are still missing get a short wait, or they would time out."""
        if not self._others:
            return
        tokens = self._started or self._gather(min(STOPPED_S if stopped else FAREWELL_S, self._wait_s))
        record = {"tokens": tokens, "exit_code": exit_code, "message": message, "stopped": stopped}
        storage.publish_json(self._folder / "end.json", record)

    def _gather(self, wait_s: float) -> dict[str, str]:
        """node -> token of the live nodes: their files change while we watch, with a token that had no start yet."""
        end = time.monotonic() + wait_s
        first: dict[int, tuple[str, int]] = {}
        tokens: dict[str, str] = {}
        while len(tokens) < len(self._others) and time.monotonic() < end:
            for node in self._others:
                record = _read(self._folder / f"node-{node}.json")
                if record is None or record["token"] == self._started.get(str(node)):
                    continue
                seen = (record["token"], record["beat"])
                if first.setdefault(node, seen)[0] != record["token"]:
                    first[node] = seen
                if first[node][1] != record["beat"]:
                    tokens[str(node)] = record["token"]
            time.sleep(POLL_S)
        return tokens


class Follower:
    """The side of every other node."""

    def __init__(self, paths: RunPaths, node_rank: int, *, wait_s: float) -> None:
        self._folder, self._node, self._wait_s = paths.logs / "nodes", str(node_rank), wait_s
        self._previous: str | None = None

    def announcement(self, wait_s: float) -> End | None:
        """The end, where node 0 announces one within wait_s."""
        try:
            return self.wait(wait_s)
        except UserError:
            return None

    def wait(self, wait_s: float | None = None) -> End | None:
        """None: start the ranks now. Raises UserError when node 0 is silent for wait_s (None: as long as this node waits)."""
        self._folder.mkdir(parents=True, exist_ok=True)
        token, limit = uuid.uuid4().hex, time.monotonic() + (self._wait_s if wait_s is None else wait_s)
        with _announced(self._folder / f"node-{self._node}.json", token):
            while time.monotonic() < limit:
                end = _read(self._folder / "end.json")
                if end is not None and end["tokens"].get(self._node, "") in (token, self._previous):
                    return End(end["exit_code"], end["message"], end["stopped"])
                start = _read(self._folder / "start.json")
                if start is not None and start["tokens"].get(self._node) == token:
                    self._previous = token
                    return None
                time.sleep(POLL_S)
        raise UserError(
            f"node {self._node}: no message from node 0 for {self._wait_s:g} s in {self._folder}; start it, with the same "
            "run_dir on a file system that all nodes see"
        )


@contextlib.contextmanager
def _announced(file: Path, token: str) -> Any:
    """Rewrite this node's file while it waits."""
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while True:
            with contextlib.suppress(OSError):
                temporary = file.with_suffix(".tmp")
                temporary.write_text(json.dumps({"token": token, "beat": number}))
                temporary.replace(file)
            number += 1
            if stop.wait(BEAT_S):
                return

    thread = threading.Thread(target=beat, name="node-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _read(file: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record
    except (OSError, ValueError):
        return None
