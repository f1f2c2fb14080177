"""Save committed checkpoints (the format: pipeline/checkpoint/format.py; which stay: pipeline/checkpoint/retention.py).
Every rank has a Saver.

All ranks write into a hidden folder; each hashes and fsyncs what it writes (checkpoint.py), rank 0 checks that every file has
arrived in its whole length, commits, and renames the folder. DeepSpeed's `latest` is not written and never read: it precedes
the other ranks' data. The bytes themselves are read and hashed once more by the publisher, beside training, and by who loads.

Decision: without `train.staging` the hidden folder is in the run directory, which all nodes see, and training stops for the
write. With it, training stops for a write to the node's own disk only: a thread of each rank then brings its files to the run
directory, and rank 0's commits once all are there. The next save waits for that, as does the end of training. Threads use no
collectives; whether all went well the ranks tell one another in `settle`.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint.format import COMMITTED, SCHEMA_VERSION, STATE, checkpoint_name
from pipeline.checkpoint.load import rng_state
from pipeline.errors import UserError, first_line
from pipeline.io import storage

POLL_S = 0.1  # for the other ranks' files
LOOK_S = 1.0
Files = dict[str, dict[str, Any]]  # name in the checkpoint -> {sha256, size}, as a manifest has it


class Saver:
    """Saves an engine's checkpoints into `folder`, which all ranks see; collective throughout.

    staging: a folder on each node's own disk, or None. first_on_node: whether this rank clears it. committed: called on rank
    0 with the step of each committed checkpoint, with `staging` from another thread.
    """

    def __init__(
        self,
        engine: Any,
        folder: Path,
        *,
        staging: Path | None = None,
        first_on_node: bool = True,
        committed: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.engine = engine  # of the next save
        self._folder, self._staging = folder, staging
        self._first_on_node, self._committed = first_on_node, committed
        self._under_way: _Bringing | None = None

    def save(self, state: dict[str, Any], *, wait: bool = True) -> str | None:
        """Write a checkpoint. `state`: what state.json holds besides the RNGs; needs `step`.

        Waits for the one before it first, and with `wait` until this one is committed. Returns what became of an earlier one
        that failed after all, in one line. Raises UserError on every rank when one rank failed (a full disk, say); the hidden
        folders are then gone and earlier checkpoints are untouched.
        """
        earlier = self.settle()
        name = checkpoint_name(state["step"])
        hidden = self._folder / f".{name}.staging"
        here = hidden if self._staging is None else self._staging / hidden.name
        problem = ""
        try:
            if self._staging is not None and self._first_on_node:
                shutil.rmtree(self._staging, ignore_errors=True)
                (here / name).mkdir(parents=True)
            if dist.get_rank() == 0:
                shutil.rmtree(hidden, ignore_errors=True)
                (hidden / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = str(error)
        self._agree(name, [problem])
        self.engine.save_checkpoint(str(here), tag=name, save_latest=False)
        written = self.engine.checkpoint_engine
        mine: Files = {os.path.relpath(path, here): entry for path, entry in written.written.items()}
        reports = _gather({"files": mine, "rng": rng_state(), "failure": written.failure})
        failures = [report["failure"] for report in reports if report["failure"]]
        if not failures:
            files = {key: entry for report in reports for key, entry in report["files"].items()}
            record = {"schema_version": SCHEMA_VERSION, **state, "rng": [report["rng"] for report in reports]}
            work = _Bringing(here, hidden, list(mine), lambda: self._commit(hidden, name, files, record))
            if self._staging is None:
                work.run(files)
            else:
                work.start(files)
            self._under_way = work
            if not wait and self._staging is not None:
                return earlier
            said = self.settle()
            if said:
                raise UserError(said)
        if failures and dist.get_rank() == 0:
            shutil.rmtree(hidden, ignore_errors=True)
        self._agree(name, failures)
        return earlier

    def settle(self) -> str | None:
        """Wait for what is under way; one line when it failed, the same on every rank."""
        work, self._under_way = self._under_way, None
        if work is None:
            return None
        while not all(_gather(work.copied.wait(LOOK_S))):  # no collective waits as long as a copy may take
            pass
        problems = [said for said in _gather(work.problem) if said]
        if problems:
            work.cancel()  # rank 0's waits for files that will not come
        work.finish()
        outcome = [problems[0] if problems else work.problem]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] and dist.get_rank() == 0:
            shutil.rmtree(work.hidden, ignore_errors=True)
        return f"{work.name}: the checkpoint was not saved: {outcome[0]}" if outcome[0] else None

    def _agree(self, name: str, problems: list[str]) -> None:
        told = [said for rank in _gather(problems) for said in rank if said]
        if told:
            raise UserError(f"{self._folder / name}: the checkpoint was not saved: {told[0]}")

    def _commit(self, hidden: Path, name: str, files: Files, record: dict[str, Any]) -> None:
        data = storage.render_json(record)
        storage.publish_bytes(hidden / STATE, data)
        files = {**files, STATE: {"sha256": storage.sha256_file(hidden / STATE), "size": len(data)}}
        for path in hidden.rglob("*"):  # what DeepSpeed copies besides, with NVMe offload
            key = str(path.relative_to(hidden))
            if path.is_file() and key not in files:
                files[key] = {"sha256": storage.sha256_file(path), "size": path.stat().st_size}
        storage.publish_json(
            hidden / storage.MANIFEST, {"schema_version": SCHEMA_VERSION, "files": dict(sorted(files.items()))}
        )
        storage.publish_bytes(hidden / COMMITTED, storage.sha256_file(hidden / storage.MANIFEST).encode())
        storage.replace_dir(hidden, self._folder / name)
        self._committed(record["step"])


class _Bringing:
    """One checkpoint on its way from `here` to `hidden` (the same folder without staging), and on rank 0 its commit.

    copied: this rank's files are there, or have failed. problem: what failed, or "".
    """

    def __init__(self, here: Path, hidden: Path, names: list[str], commit: Callable[[], None]) -> None:
        self._here, self.hidden, self._names, self._commit = here, hidden, names, commit
        self._rank = dist.get_rank()
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None
        self.copied = threading.Event()
        self.problem = ""
        self.name = str(hidden.parent / hidden.name.removeprefix(".").removesuffix(".staging"))

    def start(self, files: Files) -> None:
        self._thread = threading.Thread(target=self.run, args=(files,), name="save", daemon=True)
        self._thread.start()

    def run(self, files: Files) -> None:
        try:
            if self._here != self.hidden:
                for name in self._names:
                    _copy(self._here / name, self.hidden / name)
                    (self._here / name).unlink()
            self.copied.set()
            if self._rank == 0 and self._all_there(files):
                self._commit()
        except (OSError, UserError) as error:
            self.problem = first_line(error)
        finally:
            self.copied.set()

    def _all_there(self, files: Files) -> bool:
        """Wait for the other ranks' files; False when one will not come. On one disk they are there, or cut short."""
        missing = dict(files)
        while not self._cancelled.is_set():
            missing = {name: entry for name, entry in missing.items() if not _has(self.hidden / name, entry["size"])}
            if not missing:
                return True
            if self._here == self.hidden:
                raise UserError(f"{self.hidden / next(iter(missing))}: what a rank wrote did not arrive whole")
            self._cancelled.wait(POLL_S)
        return False

    def cancel(self) -> None:
        self._cancelled.set()

    def finish(self) -> None:
        if self._thread is not None:
            self._thread.join()


def _copy(source: Path, target: Path) -> None:
    """Whole and durable under its name, or not there."""
    temporary = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reader, open(temporary, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 22)
        writer.flush()
        os.fsync(writer.fileno())
    os.replace(temporary, target)


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _gather(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
