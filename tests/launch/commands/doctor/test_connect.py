"""launch/commands/doctor/connect.py: ssh and the clocks of the hosts."""

import os
import subprocess
import time

import pytest

from launch.backends.hosts import Host
from launch.commands.doctor import connect


@pytest.mark.parametrize(
    ("message", "status"), [("{now}\n", "ok"), ("Welcome to b\n{now}\n", "ok"), ("", "warn"), ("1234.%N", "warn")]
)
def test_a_clock_that_cannot_be_read_is_a_warning(monkeypatch, message, status):
    def ssh(host, command, **options):
        return subprocess.CompletedProcess(command, 0, message.format(now=time.time()), "")

    monkeypatch.setattr(connect, "ssh", ssh)
    found = [f for f in connect.check_connections([Host("b", 1)], connect.Runner(None)) if f.check == "clock"]
    assert [f.status for f in found] == [status] and bool(found[0].fix) == (status == "warn")


def test_the_output_of_ssh_need_not_be_utf8(monkeypatch, tmp_path):
    (tmp_path / "ssh").write_bytes(b"#!/bin/sh\nprintf 'd\\351fense' >&2\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (found,) = connect.check_connections([Host("b", 1)], connect.Runner(None))
    assert found.status == "FAIL" and found.found == "d\ufffdfense"
