"""launch/backends/environment.py and the command lines of DeepSpeed: a local training takes nothing of other jobs."""

import base64
import json
import os
from pathlib import Path

import pytest

from launch.backends import deepspeed
from launch.backends.environment import rank_environment
from pipeline.errors import UserError


def test_ranks_get_no_variables_of_another_job_or_another_start(monkeypatch):
    for name in ("RANK", "TORCHELASTIC_USE_AGENT_STORE", "PLDR_ENVIRONMENT_FILE", "PLDR_HEAD_FILE", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    environment = rank_environment(2)
    assert not {
        "RANK",
        "TORCHELASTIC_USE_AGENT_STORE",
        "PLDR_ENVIRONMENT_FILE",
        "PLDR_HEAD_FILE",
        "SLURM_PROCID",
    } & set(environment)
    assert environment["NCCL_DEBUG"] == "INFO" and environment["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize("value", ["", "abc", "0"])
def test_ranks_on_a_cpu_share_its_cores_when_the_number_of_threads_is_none(monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert int(rank_environment(1)["OMP_NUM_THREADS"]) == os.cpu_count()


@pytest.mark.parametrize(
    ("gpus", "visible", "devices"),
    [
        (True, "4,5,6", [4, 5]),
        (True, "GPU-8932f937,MIG-1f", ["GPU-8932f937", "MIG-1f"]),
        (True, "", [0, 1]),
        (False, "4,5,6", [0, 1]),
    ],
    ids=["chosen", "by UUID", "all", "CPU"],
)
def test_ranks_of_one_node_get_the_chosen_devices(monkeypatch, gpus, visible, devices):
    """And no runner, which would take the hostfile of a cloud image."""
    monkeypatch.setattr(deepspeed, "has_gpu", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    words = deepspeed.command(Path("job.json"), 2)
    [world] = [word.removeprefix("--world_info=") for word in words if word.startswith("--world_info=")]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": devices}
    assert "deepspeed.launcher.runner" not in words


def test_ranks_on_other_hosts_find_modules_where_this_process_does(monkeypatch, tmp_path):
    """DeepSpeed's own PYTHONPATH begins with the working directory; what its environment file says comes later."""
    monkeypatch.setenv("PYTHONPATH", "/x")
    monkeypatch.setenv("MLFLOW_RUN_ID", "another")
    job = deepspeed.SshJob("hosts", [], address="a", port=1, ssh_port=None, env=())
    public, private = job.files(tmp_path).values()
    assert (public["PYTHONPATH"], public["PYTHONSAFEPATH"]) == ("/x", "1")
    assert "MLFLOW_RUN_ID" not in {**public, **private, **job.environment(tmp_path)}


def test_a_port_that_was_taken_in_between_is_tried_again_once(monkeypatch, make_run, tmp_path):
    from pipeline.config.load import load_config

    ports, said = [], []

    def run_job(command, **options):
        assert options["environment"]["GLOO_SOCKET_IFNAME"] == "lo"
        ports.append(command[command.index("--master_port") + 1])
        if len(ports) == 1:
            raise UserError("training failed: rank 0: DistNetworkError: port: 29500, code: -98, name: EADDRINUSE")

    monkeypatch.setattr(deepspeed, "run_job", run_job)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    deepspeed.launch(load_config(make_run(tmp_path)), tmp_path / "job.json", 2, report=said.append)
    assert len(set(ports)) == 2 and "another port" in said[0]

    def taken(command, **options):
        ports.append(command)
        raise UserError(deepspeed.PORT_TAKEN)

    ports.clear()
    monkeypatch.setattr(deepspeed, "run_job", taken)
    with pytest.raises(UserError, match=deepspeed.PORT_TAKEN):
        deepspeed.launch(load_config(make_run(tmp_path)), tmp_path / "job.json", 2, report=said.append)
    assert len(ports) == 2
