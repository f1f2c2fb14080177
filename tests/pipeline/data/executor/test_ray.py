"""Tasks on a real Ray cluster of two nodes, each with processes of its own on this machine."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.shard import shard_documents
from pipeline.data.executor.ray import RayExecutor

MakeConfig = Callable[..., RunConfig]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'pldr[ray]'"),
]
ROOT = Path(__file__).resolve().parents[4]
CLEAN = {"exact_duplicates": True, "near_duplicates": True, "paragraph_duplicates": True, "unicode": "nfc"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes of one core; the address of their head."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the nodes' processes import the package and these tests
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            found.add_node(num_cpus=1)
            yield str(found.address)
        finally:
            found.shutdown()


def run_apart(module: str, *arguments: str) -> tuple[int, str]:
    """(exit code, stdout) of a module in a process of its own; it prints a UserError as the command line does."""
    command = [sys.executable, "-m", f"tests.pipeline.data.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_the_stage_gives_the_bytes_of_a_local_run(
    cluster: str, tmp_path: Path, corpus: Path, make_config: MakeConfig, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    data = {"tasks": 4, "clean": CLEAN}
    local = make_config(tmp_path / "local", f"{corpus}/*.jsonl", data=data)
    shard_documents(local, RunPaths(local.run_dir))
    ray = make_config(
        tmp_path / "ray", f"{corpus}/*.jsonl", data={**data, "executor": "ray", "ray_address": cluster, "workers": 2}
    )
    assert run_apart("run_stage", "shard", json.dumps(ray.as_dict())) == (0, "")
    assert contents(RunPaths(ray.run_dir).documents) == contents(RunPaths(local.run_dir).documents)


def test_mistakes_and_killed_tasks_are_reported_and_after_a_fix_it_finishes(cluster: str, tmp_path: Path) -> None:
    outcomes = []
    for wrong in ({1: "user"}, {1: "killed"}, {}):
        (tmp_path / "plan.json").write_text(json.dumps(wrong))
        outcomes.append(run_apart("executor.run_ray_job", str(tmp_path), cluster))
    assert outcomes[0] == (1, "file.jsonl: line 3: not JSON; fix it\n")
    assert outcomes[1][0] == 1 and "ended with -9" in outcomes[1][1] and "finished work is kept" in outcomes[1][1]
    assert outcomes[2] == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{rank:03d}.txt" for rank in range(4)]


def test_an_address_where_nobody_listens_is_reported_at_once(tmp_path: Path) -> None:
    code, output = run_apart("executor.run_ray_job", str(tmp_path), f"127.0.0.1:{free_port()}")
    assert code == 1 and "unreachable" in output and "ray start --head" in output


def test_it_is_datatroves_executor() -> None:
    from datatrove.executor.ray import RayPipelineExecutor

    assert issubclass(RayExecutor, RayPipelineExecutor)
