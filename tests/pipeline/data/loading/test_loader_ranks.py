"""Ranks with disks of their own, one of them damaged: all ranks leave out the same, with real gloo processes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.loading.loader import TrainLoader, evenly_spread
from pipeline.data.loading.reader import TokenReader
from pipeline.data.tokens.index import TokenIndex

SIZES = [37, 20, 8, 1, 30]
BATCHES = 20
ROOT = Path(__file__).resolve().parents[4]


def run_ranks(tmp_path: Path, folders: list[Path], position: int, batches: int) -> list[dict[str, Any]]:
    """What each rank reports."""
    results = [tmp_path / f"result-{rank}.json" for rank in range(len(folders))]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    module, meeting = "tests.pipeline.data.loading.loader_rank", tmp_path / f"meeting-{position}"
    ranks = [
        subprocess.Popen(
            [
                sys.executable, "-m", module, str(rank), str(len(folders)), str(meeting), str(folder), str(position),
                str(batches), str(results[rank]),
            ],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), outputs
    return [json.loads(result.read_text()) for result in results]


def test_two_ranks_leave_out_what_either_cannot_read(tmp_path: Path, write_tokens: Callable[..., None]) -> None:
    """Equal to one process whose folder lacks both; also when two ranks continue where one stopped."""
    whole, folders = tmp_path / "whole", [tmp_path / "a", tmp_path / "b"]
    write_tokens(whole, train=SIZES, val=[9, 9])
    for folder in folders:
        shutil.copytree(whole, folder)
    damaged = bytearray((folders[1] / "train-000001.tar").read_bytes())
    damaged[700] ^= 1
    (folders[1] / "train-000001.tar").write_bytes(damaged)
    (folders[0] / "train-000002.tar").unlink()
    (folders[0] / "val-000000.tar").unlink()
    for name in ("train-000001.tar", "train-000002.tar", "val-000000.tar"):
        (whole / name).unlink()

    index = TokenIndex.load(whole)
    one = TrainLoader(
        TokenReader(index, "train"),
        seed=5, global_batch=12, micro_batch=12, rank=0, world_size=1, on_bad_shard="skip",
    )  # fmt: skip
    expected = [(parts[0][:, 0].tolist(), behind) for parts, behind in one.micro_batches(0, limit=BATCHES)]
    half = BATCHES // 2
    held_out = evenly_spread(TokenReader(index, "val"), np.arange(18), 5, skip=True).tolist()

    for position, count, wanted in ((0, BATCHES, expected), (expected[half - 1][1], half, expected[half:])):
        found = run_ranks(tmp_path, folders, position, count)
        for number, parts in enumerate(zip(*(rank["batches"] for rank in found), strict=True)):
            assert list(itertools.chain(*(ids for ids, _ in parts))) == wanted[number][0]
            assert {behind for _, behind in parts} == {wanted[number][1]}
        for rank in found:
            assert rank["held_out"] == held_out and min(held_out) == 9
            assert rank["left_out"]["shards"] == ["train-000001.tar", "train-000002.tar"]
            assert rank["left_out"]["sequences"] == wanted[-1][1] - position - 12 * count > 0
