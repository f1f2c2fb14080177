"""Several ranks give the numbers of one process; statistics are merged, never gathered."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import distributed
from pipeline.post.measure.observe import Observation, observe
from pipeline.post.measure.prompts import make_kinds

VALIDATOR = "tests.pipeline.post.measure.rank_validator"


def start(out: Path, gain: float, rank: int, port: int) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[4])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, "-m", VALIDATOR, str(out), str(gain)], env=environment)


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in numbers(inner, f"{path}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in numbers(inner, f"{path}[{i}]").items()}
    return {path: value}


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path, tiny: SimpleNamespace) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(tmp_path, 0.05, rank, port) for rank in (0, 1)]
    model = tiny.make_model(gain=0.05)
    alone = tiny.certify(model, tiny.sample_text(model), seed=3)
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    ranked = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranked[0] == ranked[1]  # every rank knows everything
    ours, theirs = numbers(alone), numbers(ranked[0])
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, float):
            assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
        elif not name.startswith((".statement", ".failed", ".checks")):
            assert theirs[name] == value, name
    assert alone["failed"] and [f["measure"] for f in alone["failed"]] == [f["measure"] for f in ranked[0]["failed"]]


@pytest.mark.parametrize("world", [1, 3, 7])
def test_every_prompt_belongs_to_one_rank_also_with_more_ranks_than_prompts(
    monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    for count in (0, 2, 5, 12):
        prompts, parts = torch.arange(count).unsqueeze(1), []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank_and_world", lambda r=rank: (r, world))
            parts.append(distributed.share(prompts))
        assert torch.equal(torch.cat(parts), prompts)


def held(observation: Observation) -> int:
    """How many numbers an observation keeps."""
    found = 0
    for spreads in observation.spreads.values():
        for spread in spreads.values():
            found += sum(v.numel() for v in vars(spread).values() if isinstance(v, torch.Tensor))
    for scalars in (*observation.log_abs_det.values(), *observation.rank.values(), observation.row_variance):
        found += sum(v.numel() for v in vars(scalars).values() if isinstance(v, torch.Tensor))
    return found


def test_what_is_kept_does_not_grow_with_prompts(
    tiny: SimpleNamespace, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = tiny.make_model(gain=1.0), []
    largest: list[int] = []
    update = Observation.update

    def watched(self: Observation, name: str, kind: str, x: torch.Tensor, **rest: Any) -> None:
        largest.append(len(x))
        update(self, name, kind, x, **rest)

    monkeypatch.setattr(Observation, "update", watched)
    monkeypatch.setattr("pipeline.post.measure.observe.BATCH_ENTRIES", 8 * 2 * 2 * 64)  # eight prompts
    for count in (12, 48):
        many = text.repeat(2, 1)[:count]
        sizes.append(held(observe(model, make_kinds(many, tiny.config, seed=0))))
    assert sizes[0] == sizes[1] and max(largest) == 8


@pytest.mark.slow
def test_the_process_does_not_grow_with_prompts(tmp_path: Path) -> None:
    """Peak memory of complete validations, 200 prompts against 4,000: only their ids are held, 33 x 8 bytes each."""
    program = """
import resource, sys, torch
import pipeline.post.measure.observe as o
from tests.helpers import models as h
o.BATCH_ENTRIES = 64 * 2 * 2 * 64
model = h.make_model(gain=1.0)
n = int(sys.argv[1])
text = torch.randint(4, 48, (n, 33), generator=torch.Generator().manual_seed(0))
h.certify(model, text, post=h.POST.model_copy(update={"prompts": n}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    root = str(Path(__file__).resolve().parents[4])
    peaks = []
    for count in (200, 4000):
        command = [sys.executable, "-c", program, str(count)]
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        peaks.append(int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 12_000, peaks  # KB
