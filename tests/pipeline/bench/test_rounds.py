"""Work in turn: the order changes, and medians are of rounds."""

from __future__ import annotations

import pytest
import torch

from pipeline.bench import rounds
from pipeline.bench.rounds import Memory, in_rounds, speed_ratio

CPU = torch.device("cpu")


def test_every_round_has_all_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])

    def work(name: str, costs: list[float]) -> rounds.Work:
        def run() -> None:
            order.append(name)
            now[0] += costs.pop(0)

        return run

    times = in_rounds({"a": work("a", [1.0, 5.0, 2.0]), "b": work("b", [3.0, 5.0, 4.0])}, 3, CPU)
    assert times["a"].seconds == [1.0, 5.0, 2.0] and times["b"].seconds == [3.0, 5.0, 4.0]
    assert speed_ratio(times["a"].seconds, times["b"].seconds) == 2.0  # of 3, 1 and 2
    assert [order[i : i + 2] for i in (0, 2, 4)] == [["a", "b"], ["b", "a"], ["b", "a"]]


def test_what_a_work_measures_itself_counts() -> None:
    times = in_rounds({"own": lambda: 0.25, "other": lambda: torch.zeros(1)}, 2, CPU)
    assert times["own"].seconds == [0.25, 0.25] and times["other"].seconds[0] < 0.25


def test_memory_reads_what_it_says() -> None:
    memory = Memory(1 << 20, CPU)
    assert memory.nbytes == 1 << 20
    memory()
    assert memory.read_bandwidth() > 0 and memory.copy_bandwidth() > 0
