"""Save committed checkpoints (the format: format.py; which are kept: retention.py). Every rank has a Saver.

All ranks write into a hidden folder; each hashes and fsyncs what it writes (load.py), rank 0 checks that every file is there
in its full length, commits, and renames the folder. DeepSpeed's `latest` is neither written nor read: it is written before
the other ranks' data. The bytes themselves are read and hashed again by the publisher, during training, and by every load.

Decision: without `train.staging` the hidden folder is in the run directory, which all nodes see, and training stops for the
write. With it, training stops only for a write to the node's own disk: a thread of each rank then copies its files to the run
directory, and rank 0's commits once all are there. The next save waits for that, as does the end of training. Threads use no
collectives; the ranks exchange the outcome in `finish`.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint.format import COMMITTED, MANIFEST_SCHEMA_VERSION, STATE, STATE_SCHEMA_VERSION, checkpoint_name
from pipeline.checkpoint.load import rng_state
from pipeline.errors import UserError, first_line
from pipeline.io import storage

POLL_S = 0.1  # for the other ranks' files
CHECK_S = 1.0
Files = dict[str, dict[str, Any]]  # name in the checkpoint -> {sha256, size}, as a manifest has it


class Saver:
    """Saves an engine's checkpoints into `folder`, which all ranks see; collective throughout.

    staging: a folder on each node's own disk, or None. first_on_node: whether this rank clears it. committed: called on rank
    0 with the step of each committed checkpoint; with `staging` in another thread.
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
        self._pending: _Transfer | None = None

    def save(self, state: dict[str, Any], *, wait: bool = True) -> str | None:
        """Write a checkpoint. `state`: what state.json holds besides the RNGs; needs `step`.

        Waits for the previous one first, and with `wait` until this one is committed. Returns one line when the previous
        one failed in the meantime. Raises UserError on every rank when one rank failed (a full disk, say); the hidden
        folders are then removed and earlier checkpoints are untouched.
        """
        earlier = self.finish()
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
            record = {"schema_version": STATE_SCHEMA_VERSION, **state, "rng": [report["rng"] for report in reports]}
            work = _Transfer(here, hidden, list(mine), lambda: self._commit(hidden, name, files, record))
            if self._staging is None:
                work.run(files)
            else:
                work.start(files)
            self._pending = work
            if not wait and self._staging is not None:
                return earlier
            problem = self.finish() or ""
            if problem:
                raise UserError(problem)
        if failures and dist.get_rank() == 0:
            shutil.rmtree(hidden, ignore_errors=True)
        self._agree(name, failures)
        return earlier

    def finish(self) -> str | None:
        """Wait for a pending checkpoint; one line when it failed, the same on every rank."""
        work, self._pending = self._pending, None
        if work is None:
            return None
        while not all(_gather(work.copied.wait(CHECK_S))):  # no collective waits as long as a copy may take
            pass
        problems = [problem for problem in _gather(work.problem) if problem]
        if problems:
            work.cancel()  # rank 0 waits for files that will not come
        work.join()
        outcome = [problems[0] if problems else work.problem]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] and dist.get_rank() == 0:
            shutil.rmtree(work.hidden, ignore_errors=True)
        return f"{work.name}: the checkpoint was not saved: {outcome[0]}" if outcome[0] else None

    def _agree(self, name: str, problems: list[str]) -> None:
        """Raise UserError on every rank when any of them has a problem."""
        found = [problem for of_rank in _gather(problems) for problem in of_rank if problem]
        if found:
            raise UserError(f"{self._folder / name}: the checkpoint was not saved: {found[0]}")

    def _commit(self, hidden: Path, name: str, files: Files, record: dict[str, Any]) -> None:
        data = storage.render_json(record)
        storage.publish_bytes(hidden / STATE, data)
        files = {**files, STATE: {"sha256": storage.sha256_file(hidden / STATE), "size": len(data)}}
        for path in hidden.rglob("*"):  # what DeepSpeed copies in addition, with NVMe offload
            key = str(path.relative_to(hidden))
            if path.is_file() and key not in files:
                files[key] = {"sha256": storage.sha256_file(path), "size": path.stat().st_size}
        storage.publish_json(
            hidden / storage.MANIFEST, {"schema_version": MANIFEST_SCHEMA_VERSION, "files": dict(sorted(files.items()))}
        )
        storage.publish_bytes(hidden / COMMITTED, storage.sha256_file(hidden / storage.MANIFEST).encode())
        storage.replace_dir(hidden, self._folder / name)
        self._committed(record["step"])


class _Transfer:
    """The copy of one checkpoint from `here` to `hidden` (the same folder without staging), and on rank 0 its commit.

    copied: this rank's files are there, or the copy has failed. problem: what failed, or "".
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
        """Wait for the other ranks' files; False when cancelled. Without staging they are there already, or incomplete."""
        missing = dict(files)
        while not self._cancelled.is_set():
            missing = {name: entry for name, entry in missing.items() if not _has(self.hidden / name, entry["size"])}
            if not missing:
                return True
            if self._here == self.hidden:
                raise UserError(f"{self.hidden / next(iter(missing))}: what a rank wrote is incomplete")
            self._cancelled.wait(POLL_S)
        return False

    def cancel(self) -> None:
        self._cancelled.set()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()


def _copy(source: Path, target: Path) -> None:
    """Copy and fsync; the target has its name only when it is complete."""
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
