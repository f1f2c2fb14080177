"""A run resumes at another world size, ZeRO stage, micro batch or precision: the same run, on real deepspeed ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.network import free_port

WORKER = "tests.pipeline.checkpoint.reshard_worker"
# By world size; the selection for the default suite. Sources: 3 of two ranks, 2 of one.
FEW = {
    1: ["fp32-2", "2-fp32-3:fp32-0:2"],
    2: ["fp32-3", "1-fp32-2:fp32-3:2:split", "2-fp32-3:fp32-2:4", "1-fp32-2:fp32-1:2:lost"],
}


def start_jobs(folder: Path, cases: dict[int, list[str]], timeout: float) -> dict[int, dict]:
    """One job for each world size, at the same time; what their ranks 0 wrote."""
    ranks = []
    for world, of_world in cases.items():
        port = str(free_port())
        for rank in range(world):
            environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world),
                           "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                           "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
            log = folder / f"w{world}-rank{rank}.log"
            with open(log, "wb") as stream:
                command = [sys.executable, "-m", WORKER, str(folder), *of_world]
                ranks.append((subprocess.Popen(command, env=environment, stdout=stream, stderr=stream), log))
    try:
        for process, log in ranks:
            assert process.wait(timeout=timeout) == 0, log.read_text()[-3000:]
    finally:
        for process, _ in ranks:
            process.kill()
    return {world: json.loads((folder / f"w{world}.json").read_text()) for world in cases}


def deviation(results: dict[int, dict], world: int, case: str) -> float:
    """How far the losses after a resume are from those of the straight run, relative, at worst."""
    source = case.split(":")[0]
    straight = results[int(source[0])][source[2:]]["losses"]
    resumed = results[world][case]["losses"]
    assert len(straight) == 6 and len(resumed) == 3
    return max(abs(a / b - 1) for a, b in zip(resumed, straight[3:], strict=True))


def resumes(cases: dict[int, list[str]]) -> list[tuple[int, str]]:
    return [(world, case) for world, of_world in cases.items() for case in of_world if ":" in case]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return start_jobs(tmp_path_factory.mktemp("few"), FEW, timeout=200)


@pytest.mark.parametrize(("world", "case"), [c for c in resumes(FEW) if not c[1].endswith("lost")])
def test_another_world_size_stage_or_micro_batch_is_the_same_run(few, world, case):
    assert deviation(few, world, case) < 1e-5
    assert few[world][case]["equal"] is True


def test_moments_that_were_lost_would_be_noticed(few):
    assert deviation(few, 2, "1-fp32-2:fp32-1:2:lost") > 1e-4


@pytest.mark.slow
def test_every_stage_and_world_size_to_every_other(tmp_path):
    cases = {world: [f"fp32-{stage}" for stage in range(4)] for world in (1, 2)}
    for world in (1, 2):
        cases[world] += [
            f"{before}-fp32-{old}:fp32-{new}:2"
            for before in (2, 1)
            for old in range(4)
            for new in range(4)
            if (before, old) != (world, new)
        ]
    assert len(resumes(cases)) == 56
    results = start_jobs(tmp_path, cases, timeout=290)
    off = {c: deviation(results, *c) for c in resumes(cases)}
    assert max(off.values()) < 1e-5, sorted(off.items(), key=lambda item: -item[1])[:5]
    assert all(results[world][case]["equal"] for world, case in resumes(cases))


@pytest.mark.slow
def test_bf16_masters_and_a_change_of_precision(tmp_path):
    """What is carried over is bit-equal. The losses are only close: in bf16 straight runs of other stages differ by 2e-3."""
    cases = {
        1: ["bf16-2", "fp32-1", "2-bf16-0:bf16-3:2", "2-bf16-3:bf16-1:2", "2-bf16-1:fp32-0:2"],
        2: ["bf16-0", "bf16-1", "bf16-3", "1-bf16-2:bf16-0:2", "2-bf16-1:bf16-3:2", "1-fp32-1:bf16-2:2"],
    }
    results = start_jobs(tmp_path, cases, timeout=290)
    for world, case in resumes(cases):
        assert results[world][case]["equal"] is True, case
        assert deviation(results, world, case) < 1e-2, case
