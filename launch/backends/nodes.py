"""One `pldr` process on every node, as a scheduler starts them: node 0 leads, the others follow.

They meet in `logs/nodes/` of the run directory, which is on a file system that all of them see:

    node-I.json   node I waits for a start (renewed every second, with a token that it draws anew for each start)
    start.json    node 0: the job file is written, whoever finds its token here starts its ranks
    end.json      node 0: it is over, with this exit code

Tokens make what earlier starts left behind harmless, and need no clock. A crash ends the ranks of all nodes; the followers
draw new tokens and wait, and node 0 goes on from the last commit as often as `train.max_restarts` says. How it ended is node
0's to say, by the committed checkpoint; a follower that is not told has failed.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.paths import RunPaths
from pipeline.errors import UserError
from pipeline.io import storage

BEAT_S = 1.0
POLL_S = 0.25
FAREWELL_S = 30.0  # node 0 waits so long for nodes that have not come yet, to tell them the end


@dataclass(frozen=True)
class End:
    """What node 0 says at the end."""

    exit_code: int
    message: str
    stopped: bool  # by a signal, after a save


class Lead:
    """Node 0's end."""

    def __init__(self, paths: RunPaths, num_nodes: int, *, wait_s: float) -> None:
        self._folder, self._others, self._wait_s = paths.logs / "nodes", range(1, num_nodes), wait_s
        self._started: dict[str, str] = {}  # the tokens of the last start

    def start(self) -> None:
        """Wait for all other nodes and let them start their ranks. Raises UserError naming the nodes that do not come."""
        tokens = self._gather(self._wait_s)
        missing = [str(node) for node in self._others if str(node) not in tokens]
        if missing:
            raise UserError(
                f"node {', '.join(missing)} did not come within {self._wait_s:g} s; start one `pldr launch` on each node, "
                "with the same run_dir on a file system that all of them see"
            )
        storage.publish_json(self._folder / "start.json", {"tokens": tokens})
        self._started = tokens

    def end(self, exit_code: int, message: str, *, stopped: bool = False) -> None:
        """Tell the others. Those that never came are waited for a little: they would wait for a start in vain."""
        if not self._others:
            return
        tokens = self._started or self._gather(min(FAREWELL_S, self._wait_s))
        record = {"tokens": tokens, "exit_code": exit_code, "message": message, "stopped": stopped}
        storage.publish_json(self._folder / "end.json", record)

    def _gather(self, wait_s: float) -> dict[str, str]:
        """node -> token of those that live: whose file changes while we look, with a token that had no start yet."""
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
    """The end of another node."""

    def __init__(self, paths: RunPaths, node_rank: int, *, wait_s: float) -> None:
        self._folder, self._node, self._wait_s = paths.logs / "nodes", str(node_rank), wait_s
        self._previous: str | None = None

    def wait(self) -> End | None:
        """None: start the ranks now. Raises UserError when node 0 says nothing for wait_s."""
        self._folder.mkdir(parents=True, exist_ok=True)
        token, limit = uuid.uuid4().hex, time.monotonic() + self._wait_s
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
            f"node {self._node}: node 0 said nothing for {self._wait_s:g} s in {self._folder}; start it, with the same "
            "run_dir on a file system that all nodes see"
        )


@contextlib.contextmanager
def _announced(file: Path, token: str) -> Any:
    """Renew this node's file while it waits."""
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
