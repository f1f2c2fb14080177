"""launch/commands/doctor/collect.py: the network over all hosts. Over two hosts: tests/launch/end_to_end/test_multinode.py."""

import subprocess

from launch.backends.hosts import Host
from launch.commands.doctor import collect, connect

OPTIONS = {"gradient_bytes": None, "master_addr": None, "master_port": 29500, "all_ok": True}


def test_a_loopback_name_of_rank_0_is_a_finding_and_not_an_error():
    hosts = [Host("localhost", 1), Host("b", 1)]
    (found,) = collect.bandwidth(hosts, connect.Runner(None), **OPTIONS)
    assert (found.check, found.status) == ("all-reduce", "FAIL") and "localhost" in found.found
    assert found.fix == "give rank 0's address with --master-addr"


def test_one_host_uses_the_loopback_and_a_limit_on_the_host(monkeypatch):
    commands = []

    def ssh(host, command, **options):
        commands.append(" ".join(command))
        return subprocess.CompletedProcess(command, 1, "", "RuntimeError: no")

    monkeypatch.setattr(connect, "ssh", ssh)
    (found,) = collect.bandwidth([Host("localhost", 2)], connect.Runner(None), **OPTIONS)
    assert found.found == "localhost: RuntimeError: no"
    assert "--master-addr 127.0.0.1" in commands[0] and "timeout -k 5 140 " in commands[0]


def test_the_host_that_failed_first_is_named_with_its_reason():
    torchrun = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n  traceback : To enable\n"
    answers = {
        "a": (9.0, subprocess.CompletedProcess([], 1, "", "[rank0]: RuntimeError: peer is gone\n" + torchrun)),
        "b": (3.0, subprocess.CompletedProcess([], 1, "", "[rank1]: OSError: no such device eth9\n" + torchrun)),
    }
    assert collect.first_failure(answers) == "b: OSError: no such device eth9"
    late = {"a": (140.0, subprocess.CompletedProcess([], 124, "", ""))}
    assert collect.first_failure(late) == "a: did not finish within 140 s"
