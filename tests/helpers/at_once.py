"""Several processes that do the same at the same moment."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import pytest

PROCESSES = 5
LIMIT_S = 240
fork = multiprocessing.get_context("fork")
AtOnce = Callable[..., list[Any]]


def _work(work: Callable[..., Any], number: int, rounds: int, barrier: Any, results: Any) -> None:
    try:
        for turn in range(rounds):
            barrier.wait(LIMIT_S)
            results.put((turn, number, work(turn, number)))
    except BaseException:
        results.put((-1, number, traceback.format_exc()))
        barrier.abort()


@pytest.fixture
def at_once() -> AtOnce:
    """`at_once(work, rounds=20)`: `work(turn, number)` in each of 5 processes, which begin each turn together. Returns what it
    returned, in order of (turn, number). The processes are forked: what the test has imported and opened, they have too."""

    def run(work: Callable[[int, int], Any], *, rounds: int = 1, processes: int = PROCESSES) -> list[Any]:
        forkserver._forkserver._stop()  # an earlier test's, which forked processes would take for their own
        barrier, results = fork.Barrier(processes), fork.Queue()
        started = [fork.Process(target=_work, args=(work, n, rounds, barrier, results)) for n in range(processes)]
        for process in started:
            process.start()
        found = []
        try:
            while len(found) < processes * rounds:
                turn, number, value = results.get(timeout=LIMIT_S)
                assert turn >= 0, value
                found.append((turn, number, value))
            for process in started:
                process.join(LIMIT_S)
        finally:
            for process in started:
                process.kill()
        return [value for _, _, value in sorted(found, key=lambda one: one[:2])]

    return run
