"""`train.deterministic` and `train.flight_recorder`: the environment of a rank, and what it leaves when a collective fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.config.train import TrainConfig
from pipeline.network import free_port
from pipeline.train.backend import set_up, variables

TRAIN = TrainConfig(steps=10, warmup_steps=1)


def test_by_default_nothing_is_set(tmp_path):
    before = dict(os.environ)
    set_up(TRAIN, tmp_path / "recordings")
    assert variables(TRAIN, tmp_path) == {} and dict(os.environ) == before
    assert not (tmp_path / "recordings").exists()


def test_what_cublas_reads_is_set_before_cuda_begins():
    train = TRAIN.model_copy(update={"deterministic": True})
    assert variables(train, Path("/x")) == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def test_what_the_flight_recorder_reads():
    train = TRAIN.model_copy(update={"flight_recorder": 500})
    found = variables(train, Path("/run/logs/flight-recorder"))
    assert found == {
        "TORCH_FR_BUFFER_SIZE": "500",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "500",
        "TORCH_FR_DUMP_TEMP_FILE": "/run/logs/flight-recorder/nccl-rank-",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/run/logs/flight-recorder/nccl-rank-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
    }


def test_torch_still_knows_these_variables():
    """Their names are strings in torch's libraries and headers, without an interface that could be asked."""
    import torch

    root = Path(torch.__file__).parent
    library = (root / "lib" / "libtorch_cpu.so").read_bytes()
    for name in (b"TORCH_FR_BUFFER_SIZE", b"TORCH_FR_DUMP_TEMP_FILE", b"TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        assert name in library
    header = (root / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp").read_text()
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT" in header and "TORCH_NCCL_ENABLE_MONITORING" in header


def test_a_deterministic_run_on_a_cpu_is_the_run_without_bit_for_bit(recipe_runs):
    assert recipe_runs["kernels"] is True
    straight = recipe_runs["growing"]["straight"]
    assert recipe_runs["deterministic"].keys() == straight.keys()
    for step, values in recipe_runs["deterministic"].items():
        for key, value in values.items():
            if key != "train/tokens_per_second" and not key.startswith("system/"):
                assert value == straight[step][key], (step, key)


def test_a_rank_whose_collective_times_out_leaves_its_last_ones_as_json(tmp_path):
    """Two ranks; the second stops taking part. The first has done more collectives than are kept."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.train.recorder_worker", str(tmp_path)],
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank),
                 "GLOO_SOCKET_IFNAME": "lo"},
            cwd=Path(__file__).parents[3],
        )
        for port in [str(free_port())]
        for rank in (0, 1)
    ]  # fmt: skip
    assert [rank.wait(timeout=280) for rank in ranks] == [0, 0]
    assert [path.name for path in sorted((tmp_path / "flight-recorder").iterdir())] == ["rank-0.json"]
    entries = json.loads((tmp_path / "flight-recorder" / "rank-0.json").read_text())["entries"]
    assert len(entries) == 4 and all(entry["profiling_name"] == "gloo:all_reduce" for entry in entries)
    assert entries[-1]["input_sizes"] == [[5]] and entries[-2]["input_sizes"] == [[3]]
