"""`pldr doctor`: what the facts mean, and this machine's. Over two hosts: test_multinode.py."""

import argparse
import copy
import json
import os
import subprocess
import time

import pytest

from launch.backends.hosts import Host
from launch.cli import main
from launch.commands.doctor import command as doctor
from launch.commands.doctor import reach
from launch.commands.doctor.findings import judge, judge_bandwidth, judge_clock, table
from launch.commands.doctor.probe import facts, token_file

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


def judged(**changes):
    other = copy.deepcopy(NODE) | changes
    return judge({"a": copy.deepcopy(NODE), "b": other}, slots={"a": 2, "b": 2}, needs=NEEDS)


def test_two_good_nodes():
    found = judged()
    assert {f.status for f in found} == {"ok"} and not any(f.mend for f in found)
    lines = table(found, 2)
    assert all("all 2" in line for line in lines[1:]) and len(lines) == 1 + len(found) // 2


@pytest.mark.parametrize(
    ("changes", "check", "status", "said"),
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
        ({"run_dir": "FileNotFoundError: another one"}, "run_dir", "FAIL", "another one"),
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
def test_what_is_not_well_is_named_with_its_mend(changes, check, status, said):
    bad = [f for f in judged(**changes) if f.status != "ok"]
    assert [(f.check, f.host, f.status) for f in bad] == [(check, "b", status)]
    assert said in bad[0].found and bad[0].mend
    lines = table(bad, 2)
    assert bad[0].mend in lines[-1] and lines[1].startswith(status)


def on_cpu(**changes):
    return copy.deepcopy(NODE) | {"gpus": [], "driver": None, "nccl": None} | changes


def test_a_cuda_torch_that_sees_no_gpu_is_a_warning_unless_the_cpu_is_wanted():
    for changes, status in ({}, "warn"), ({"accelerator": "cpu"}, "ok"), ({"cuda": None}, "ok"):
        found = judge({"a": on_cpu(**changes), "b": on_cpu(**changes)}, slots={"a": 2, "b": 2}, needs=NEEDS)
        assert [f.status for f in found if f.check == "GPUs"] == [status] * 2, changes


def test_hosts_are_compared_with_the_first_that_has_gpus_and_a_driver():
    silent = copy.deepcopy(NODE) | {"driver": {"error": "nvidia-smi does not answer"}}
    nodes = {"a": on_cpu(), "b": silent, "c": copy.deepcopy(NODE), "d": copy.deepcopy(NODE)}
    found = judge(nodes, slots=dict.fromkeys(nodes, 2), needs=NEEDS)
    bad = [(f.check, f.host) for f in found if f.status != "ok"]
    assert bad == [("GPUs", "a"), ("GPUs", "b")]
    assert [f.host for f in found if f.check == "driver"] == ["c", "d"]


@pytest.mark.parametrize(
    ("said", "status"), [("{now}\n", "ok"), ("Welcome to b\n{now}\n", "ok"), ("", "warn"), ("1234.%N", "warn")]
)
def test_a_clock_that_cannot_be_read_is_told(monkeypatch, said, status):
    def ssh(host, command, **options):
        return subprocess.CompletedProcess(command, 0, said.format(now=time.time()), "")

    monkeypatch.setattr(reach, "ssh", ssh)
    found = [f for f in reach.reach([Host("b", 1)], reach.Runner(None)) if f.check == "clock"]
    assert [f.status for f in found] == [status] and bool(found[0].mend) == (status == "warn")


def test_what_ssh_says_need_not_be_utf8(monkeypatch, tmp_path):
    (tmp_path / "ssh").write_bytes(b"#!/bin/sh\nprintf 'd\\351fense' >&2\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (found,) = reach.reach([Host("b", 1)], reach.Runner(None))
    assert found.status == "FAIL" and found.found == "d\ufffdfense"


def test_without_ssh_the_mend_is_told(monkeypatch, tmp_path, capsys):
    (tmp_path / "hosts").write_text("a slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--hostfile", str(tmp_path / "hosts")]) == 2
    assert "ssh is not installed here; apt install openssh-client" in capsys.readouterr().err


MASTER = argparse.Namespace(master_addr=None, master_port=29500)


def test_a_loopback_name_of_rank_0_is_a_finding_and_not_the_end():
    hosts = [Host("localhost", 1), Host("b", 1)]
    (found,) = doctor._bandwidth(MASTER, None, hosts, reach.Runner(None), all_well=True)
    assert (found.check, found.status) == ("all-reduce", "FAIL") and "localhost" in found.found
    assert found.mend == "give rank 0's address with --master-addr"


def test_one_host_meets_itself_at_the_loopback_and_under_a_limit_of_its_own(monkeypatch):
    commands = []

    def ssh(host, command, **options):
        commands.append(" ".join(command))
        return subprocess.CompletedProcess(command, 1, "", "RuntimeError: no")

    monkeypatch.setattr(reach, "ssh", ssh)
    (found,) = doctor._bandwidth(MASTER, None, [Host("localhost", 2)], reach.Runner(None), all_well=True)
    assert found.found == "localhost: RuntimeError: no"
    assert "--master-addr 127.0.0.1" in commands[0] and "timeout -k 5 140 " in commands[0]


def test_the_host_that_failed_first_is_named_with_its_reason():
    torchrun = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n  traceback : To enable\n"
    answers = {
        "a": (9.0, subprocess.CompletedProcess([], 1, "", "[rank0]: RuntimeError: peer is gone\n" + torchrun)),
        "b": (3.0, subprocess.CompletedProcess([], 1, "", "[rank1]: OSError: no such device eth9\n" + torchrun)),
    }
    assert doctor.first_failure(answers) == "b: OSError: no such device eth9"
    late = {"a": (140.0, subprocess.CompletedProcess([], 124, "", ""))}
    assert doctor.first_failure(late) == "a: no end within 140 s"


def test_clocks():
    found = judge_clock({"a": (0.3, 0.2), "b": (-7.0, 0.2), "c": (2.5, 1.0)})
    assert [f.status for f in found] == ["ok", "FAIL", "ok"] and "-7.0 s" in found[1].found


def test_bandwidth():
    measured = {"backend": "nccl", "ranks": 16, "bytes": 1 << 28, "seconds": 0.01, "bus_gb_per_s": 50.0}
    assert judge_bandwidth(measured, hosts=2, gradient_bytes=1 << 30).status == "ok"
    assert "0.04 s for one step" in judge_bandwidth(measured, hosts=2, gradient_bytes=1 << 30).found
    slow = judge_bandwidth({**measured, "bus_gb_per_s": 0.1}, hosts=2, gradient_bytes=None)
    assert slow.status == "warn" and "NCCL_SOCKET_IFNAME" in slow.mend
    assert judge_bandwidth("timed out", hosts=2, gradient_bytes=None).status == "FAIL"


def test_a_probe_looks_for_the_asking_hosts_file(tmp_path):
    question = {"run_dir": str(tmp_path / "run"), "token": "abc", "urls": [f"file://{tmp_path}/store"], "mlflow": None,
                "remote_tokens": False, "staging": str(tmp_path / "staging" / "run")}  # fmt: skip
    assert "is another one here" in facts(question)["run_dir"]
    token_file(tmp_path / "run", "abc").touch()
    found = facts(question)
    assert found["staging"] is None and found["staging_free"] > 0 and not (tmp_path / "staging").exists()
    assert found["run_dir"] is None and found["urls"] == {f"file://{tmp_path}/store": None}
    assert list((tmp_path / "store").iterdir()) == [] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_this_machine(capsys, tmp_path, make_run):
    """The real thing on one host, all-reduce included; then with a store and an MLflow that nobody can reach."""
    config = str(make_run(tmp_path))
    assert main(["doctor", config, f"run_dir={tmp_path}/run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {"packages", "GPUs", "run_dir", "disk", "ulimit -n", "all-reduce"} <= {
        f["check"] for f in result["findings"]
    }
    broken = ("train.publish_to=s3://no-such-bucket/x", "tracking.uri=http://127.0.0.1:9", "--quick", "--json")
    assert main(["doctor", config, f"run_dir={tmp_path}/run", *broken]) == 1
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {f["check"] for f in result["findings"] if f["status"] == "FAIL"} == {"storage", "MLflow"}
