"""Scored requests on disk, so that an evaluation that was killed does not score them again.

One line of JSON for a chunk of requests, appended and synced when it is scored. A chunk's key is a hash of what was asked and
of whom: the model and its G_LM, live or cached, the versions. So nothing can be taken from another model, task, limit or data
set; lines of others are dropped when the file is opened, and so is a line that a kill cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from pipeline.errors import UserError
from pipeline.io.locks import lock, lock_holder
from pipeline.io.storage import publish_bytes, sha256_json

Answer = tuple[float, bool]  # log-likelihood; whether greedy decoding would give these tokens
LOCK = ".lock"


class AnswersFile:
    """A context manager: the file of an evaluation's folder, locked for this process. `of` gives a view for one asker."""

    def __init__(self, file: Path, askers: Iterable[str]) -> None:
        self._file, self._askers = file, frozenset(askers)
        self._found: dict[str, list[Answer]] = {}

    def __enter__(self) -> AnswersFile:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._file.parent / LOCK, "a+", encoding="utf-8")
        if not lock(self._lock):
            holder = lock_holder(self._lock)
            self._lock.close()
            raise UserError(
                f"{self._file.parent}: process {holder} evaluates into it; wait for it, or name another --out"
            )
        lines = self._file.read_bytes().split(b"\n") if self._file.exists() else []
        kept = [line for line in lines if self._read(line)]
        if len(kept) + 1 != len(lines):  # of others, or cut; else only what follows the last newline
            publish_bytes(self._file, b"".join(line + b"\n" for line in kept))
        self._stream: IO[bytes] = open(self._file, "ab")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._lock.close()

    def _read(self, line: bytes) -> bool:
        """Take a line in; False for one that is not ours."""
        try:
            record = json.loads(line)
            answers = [(float(logprob), bool(greedy)) for logprob, greedy in record["answers"]]
            key, asker = str(record["key"]), str(record["asker"])
        except (ValueError, KeyError, TypeError):
            return False
        if asker in self._askers:
            self._found[key] = answers
        return asker in self._askers

    def of(self, asker: str) -> Answers:
        """What was answered to one asker (a digest of model, G_LM and versions)."""
        return Answers(self, asker)

    def find(self, key: str) -> list[Answer] | None:
        """The answers under a key."""
        return self._found.get(key)

    def append(self, key: str, asker: str, answers: list[Answer]) -> None:
        """Add a line, durably."""
        self._found[key] = answers
        self._stream.write(json.dumps({"key": key, "asker": asker, "answers": answers}).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


class Answers:
    """The answers that one model with one G_LM gave. `taken` counts the requests that were not scored again."""

    def __init__(self, file: AnswersFile, asker: str) -> None:
        self._file, self._asker = file, asker
        self.taken = 0

    def get(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[Answer] | None:
        """The answers to exactly this chunk, if it was scored before."""
        found = self._file.find(self._key(requests))
        if found is None or len(found) != len(requests):
            return None
        self.taken += len(requests)
        return found

    def keep(self, requests: Sequence[tuple[list[int], list[int]]], answers: list[Answer]) -> None:
        """Write down a chunk that was scored."""
        self._file.append(self._key(requests), self._asker, answers)

    def _key(self, requests: Sequence[tuple[list[int], list[int]]]) -> str:
        return sha256_json([self._asker, requests])
