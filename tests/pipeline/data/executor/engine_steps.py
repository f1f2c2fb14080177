"""A pipeline for the tests of the engines, in its own module: tasks are pickled, and their processes import it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from pipeline.data.documents.spool import facts_of
from pipeline.data.executor.markers import write_record
from pipeline.data.executor.progress import advance
from pipeline.errors import UserError
from pipeline.io.storage import publish_bytes

TASKS = 3


class Unpicklable(Exception):
    """Many libraries have exceptions like this one."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class Read(PipelineStep):  # type: ignore[misc]
    """Twenty documents a task. plan: JSON file {rank: what goes wrong}; absent, nothing does."""

    type = "READER"
    name = "read"

    def __init__(self, plan: Path, seconds: float = 0) -> None:
        super().__init__()
        self.plan = plan
        self.seconds = seconds

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        wrong = json.loads(self.plan.read_text()).get(str(rank)) if self.plan.is_file() else None
        for number in range(20):
            self.stat_update("read")
            yield Document(text=f"{rank} of {world_size}: {number}\n", id=f"{rank}/{number}")
            advance(1, 10)
            time.sleep(self.seconds / 20)
            if number == 10 and wrong:
                fail(wrong)


def fail(how: str) -> None:
    """Fail in one of the ways that tasks do."""
    if how == "user":
        raise UserError("file.jsonl: line 3: not JSON; fix it", exit_code=2)
    if how == "bug":
        raise KeyError("no such thing\nand a second line")
    if how == "unpicklable":
        raise Unpicklable("first", "second")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(how)


class Publish(PipelineStep):  # type: ignore[misc]
    """A file a task, its record, and the process and the node that made it."""

    type = "WRITER"
    name = "publish"

    def __init__(self, folder: Path, work: Path) -> None:
        super().__init__()
        self.folder = folder
        self.work = work

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        name = f"{rank:03d}.txt"
        publish_bytes(self.folder / name, "".join(document.text for document in data).encode())
        write_record(self.work, rank, {"rank": rank}, {name: facts_of(self.folder / name)})
        ran = {"pid": os.getpid(), "node": os.environ.get("RAY_NODE_ID") or os.environ.get("SLURM_JOB_ID")}
        publish_bytes(self.work / "ran" / f"{rank}.json", json.dumps(ran).encode())
        yield from ()


def published(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "out").iterdir())}


def expected(tasks: int = TASKS) -> dict[str, str]:
    return {f"{rank:03d}.txt": "".join(f"{rank} of {tasks}: {n}\n" for n in range(20)) for rank in range(tasks)}
