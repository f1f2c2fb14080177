"""launch/commands/doctor/findings.py: what the facts of the nodes mean."""

import copy

import pytest

from launch.commands.doctor.findings import check_bandwidth, check_clock, check_nodes, table

NODE = {
    "hostname": "n", "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "pldr": "0.1.0"},
    "code": "abc", "driver": {"version": "580.1", "gpus": 2}, "rdma": True, "open_files": 65536, "locked_memory": -1,
    "shm_free": 8 << 30, "tmp": "/tmp", "tmp_free": 50 << 30, "gpus": ["H100", "H100"], "cuda": "13.0", "nccl": "2.28.1",
    "urls": {"s3://bucket/tokens": None}, "run_dir": None, "run_dir_free": 500 << 30, "mlflow": None,
    "cache_free": 100 << 30, "accelerator": None, "staging": None, "staging_free": 50 << 30,
}  # fmt: skip


NEEDS = {
    "run_dir": "/runs/x",
    "run_dir_bytes": 10 << 30,
    "staging_bytes": 40 << 30,
    "cache_bytes": 50 << 30,
    "mlflow": "http://mlflow",
}


def findings(**changes):
    other = copy.deepcopy(NODE) | changes
    return check_nodes({"a": copy.deepcopy(NODE), "b": other}, slots={"a": 2, "b": 2}, needs=NEEDS)


def test_two_good_nodes():
    found = findings()
    assert {f.status for f in found} == {"ok"} and not any(f.fix for f in found)
    lines = table(found, 2)
    assert all("all 2" in line for line in lines[1:]) and len(lines) == 1 + len(found) // 2


@pytest.mark.parametrize(
    ("changes", "check", "status", "message"),
    [
        ({"versions": {**NODE["versions"], "torch": "2.12.0"}}, "packages", "FAIL", "torch 2.12.0 (a: 2.13.0)"),
        ({"versions": {**NODE["versions"], "deepspeed": None}}, "packages", "FAIL", "deepspeed missing"),
        ({"code": "def"}, "pldr's code", "FAIL", "sha256 def (a: abc)"),
        ({"gpus": []}, "GPUs", "FAIL", "nvidia-smi sees 2, torch none"),
        ({"gpus": ["H100"]}, "GPUs", "FAIL", "1 for 2 ranks"),
        ({"gpus": ["A100", "A100"]}, "GPUs", "FAIL", "A100 (a: H100)"),
        ({"gpus": [], "driver": None}, "GPUs", "FAIL", "none (a: H100)"),
        ({"driver": {"error": "driver/library mismatch"}}, "GPUs", "FAIL", "mismatch"),
        ({"driver": {"version": "570.9", "gpus": 2}}, "driver", "FAIL", "570.9"),
        ({"run_dir": "FileNotFoundError: another directory"}, "run_dir", "FAIL", "another directory"),
        ({"staging": "PermissionError: no"}, "staging", "FAIL", "train.staging: PermissionError: no"),
        ({"staging_free": 1 << 30}, "staging", "FAIL", "1.1 GB free, 21.5 GB needed for this host's part"),
        ({"run_dir_free": 1 << 30}, "disk", "FAIL", "1.1 GB free, 10.7 GB needed"),
        ({"urls": {"s3://bucket/tokens": "UserError: no"}}, "storage", "FAIL", "s3://bucket/tokens: UserError: no"),
        ({"mlflow": "ConnectionError: refused"}, "MLflow", "FAIL", "refused"),
        ({"cache_free": 1 << 30}, "disk", "warn", "cache of remote tokens"),
        ({"tmp_free": 1 << 20}, "disk", "FAIL", "/tmp"),
        ({"open_files": 256}, "ulimit -n", "FAIL", "256 open files"),
        ({"open_files": 2048}, "ulimit -n", "warn", "2048 open files"),
        ({"locked_memory": 8 << 20}, "ulimit -l", "FAIL", "8.4 MB with RDMA devices"),
        ({"shm_free": 64 << 20}, "/dev/shm", "FAIL", "67.1 MB free"),
    ],
    ids=["torch", "missing", "code", "cuda", "slots", "kind", "no gpu", "mismatch", "driver", "run_dir", "staging",
         "staged full", "full",
         "store", "mlflow", "cache", "tmp", "nofile", "few files", "memlock", "shm"],
)  # fmt: skip
def test_a_problem_is_named_with_its_fix(changes, check, status, message):
    bad = [f for f in findings(**changes) if f.status != "ok"]
    assert [(f.check, f.host, f.status) for f in bad] == [(check, "b", status)]
    assert message in bad[0].found and bad[0].fix
    lines = table(bad, 2)
    assert bad[0].fix in lines[-1] and lines[1].startswith(status)


def on_cpu(**changes):
    return copy.deepcopy(NODE) | {"gpus": [], "driver": None, "nccl": None} | changes


def test_a_cuda_torch_without_a_visible_gpu_is_a_warning_unless_the_cpu_is_wanted():
    for changes, status in ({}, "warn"), ({"accelerator": "cpu"}, "ok"), ({"cuda": None}, "ok"):
        found = check_nodes({"a": on_cpu(**changes), "b": on_cpu(**changes)}, slots={"a": 2, "b": 2}, needs=NEEDS)
        assert [f.status for f in found if f.check == "GPUs"] == [status] * 2, changes


def test_hosts_are_compared_with_the_first_that_has_gpus_and_a_driver():
    silent = copy.deepcopy(NODE) | {"driver": {"error": "nvidia-smi does not finish"}}
    nodes = {"a": on_cpu(), "b": silent, "c": copy.deepcopy(NODE), "d": copy.deepcopy(NODE)}
    found = check_nodes(nodes, slots=dict.fromkeys(nodes, 2), needs=NEEDS)
    bad = [(f.check, f.host) for f in found if f.status != "ok"]
    assert bad == [("GPUs", "a"), ("GPUs", "b")]
    assert [f.host for f in found if f.check == "driver"] == ["c", "d"]


def test_clocks():
    found = check_clock({"a": (0.3, 0.2), "b": (-7.0, 0.2), "c": (2.5, 1.0)})
    assert [f.status for f in found] == ["ok", "FAIL", "ok"] and "-7.0 s" in found[1].found


def test_bandwidth():
    measured = {"backend": "nccl", "ranks": 16, "bytes": 1 << 28, "seconds": 0.01, "bus_gb_per_s": 50.0}
    assert check_bandwidth(measured, hosts=2, gradient_bytes=1 << 30).status == "ok"
    assert "0.04 s for one step" in check_bandwidth(measured, hosts=2, gradient_bytes=1 << 30).found
    slow = check_bandwidth({**measured, "bus_gb_per_s": 0.1}, hosts=2, gradient_bytes=None)
    assert slow.status == "warn" and "NCCL_SOCKET_IFNAME" in slow.fix
    assert check_bandwidth("timed out", hosts=2, gradient_bytes=None).status == "FAIL"
