"""`pldr doctor` over two hosts, one thing being wrong with the second, and real: packages of another version, a full
disk, a folder that may not be written, a clock that is ahead, no way to MLflow, a slow link.

Needs root and `apt install openssh-server iproute2 faketime`; skips where it may not.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
NO_OVERRIDE = "exec setpriv --bounding-set=-dac_override,-dac_read_search"  # what keeps root from ignoring permissions


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A disk of 1 MB. It must be there before the hosts are: their sshd sees no later mount."""
    folder = tmp_path_factory.mktemp("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def hosts(small, tmp_path_factory, make_hosts):
    with make_hosts(tmp_path_factory.mktemp("hosts"), ssh=True) as network:
        yield network


@pytest.fixture
def doctor(hosts, make_run, tmp_path):
    """`doctor(script, …)`: what is wrong, where the second host is logged in to through a script; (check, host) -> finding."""
    make_run(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "tmp").mkdir()

    def doctor(script: str = "", *words: str) -> dict[tuple[str, str], dict]:
        hosts.log_in_through(1, script)
        done = subprocess.run(
            [*hosts.enter(0), sys.executable, "-m", "launch.cli", "doctor", "tiny.yaml", "--hostfile",
             hosts.hostfile(0, 1), "--json", f"run_dir={tmp_path / 'run'}", *words],
            cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, **hosts.environment, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")},
        )  # fmt: skip
        result = json.loads(done.stdout.splitlines()[-1])
        wrong = {(f["check"], f["host"]): f for f in result["findings"] if f["status"] != "ok"}
        assert done.returncode == (1 if any(f["status"] == "FAIL" for f in wrong.values()) else 0), done.stderr
        assert all(f["fix"] for f in wrong.values())
        return wrong

    yield doctor
    hosts.log_in_through(1, "")


def test_nothing_is_wrong(doctor):
    assert doctor("", "--quick") == {}


def test_a_package_of_another_version(doctor, hosts, tmp_path):
    files = importlib.metadata.distribution("fsspec")._path
    shutil.copytree(files, tmp_path / "other")
    text = (tmp_path / "other" / "METADATA").read_text()
    version = importlib.metadata.version("fsspec")
    (tmp_path / "other" / "METADATA").write_text(text.replace(f"\nVersion: {version}", "\nVersion: 2020.1.0", 1))
    wrong = doctor(f"mount --bind {tmp_path / 'other'} {files}", "--quick")
    assert list(wrong) == [("packages", hosts.addresses[1])]
    assert wrong["packages", hosts.addresses[1]]["found"] == f"fsspec 2020.1.0 ({hosts.addresses[0]}: {version})"


def test_a_full_disk(doctor, hosts, tmp_path, small):
    """The second host's own disk for temporary files; then the one that both share."""
    there = tmp_path / "tmp"
    full = f"mount -t tmpfs -o size=1m tmpfs {there} && head -c 1000000 /dev/zero > {there}/data"
    wrong = doctor(full, "--quick")
    assert list(wrong) == [("disk", hosts.addresses[1])]
    assert str(there) in wrong["disk", hosts.addresses[1]]["found"]
    wrong = doctor("", "--quick", f"run_dir={small / 'run'}")
    assert sorted(wrong) == [("disk", address) for address in hosts.addresses]
    assert all("needed for checkpoints" in finding["found"] for finding in wrong.values())


@pytest.mark.parametrize("how", ["permissions", "read-only"])
def test_a_run_directory_that_may_not_be_written(doctor, hosts, tmp_path, how):
    run = tmp_path / "run"
    if how == "permissions":
        run.chmod(0o555)
        script = f'{NO_OVERRIDE} bash -c "$SSH_ORIGINAL_COMMAND"'
    else:
        script = f"mount --bind {run} {run} && mount -o remount,ro,bind {run}"
    wrong = doctor(script, "--quick")
    assert list(wrong) == [("run_dir", hosts.addresses[1])]
    error = "PermissionError" if how == "permissions" else "Read-only file system"
    assert error in wrong["run_dir", hosts.addresses[1]]["found"]


def test_a_clock_that_is_five_minutes_ahead(doctor, hosts):
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    if library is None:
        pytest.skip("libfaketime is not installed (apt install faketime)")
    wrong = doctor(f"export LD_PRELOAD={library} FAKETIME=+300s", "--quick")
    assert list(wrong) == [("clock", hosts.addresses[1])]
    ahead = float(wrong["clock", hosts.addresses[1]]["found"].partition(" s ")[0])
    assert 290 < ahead < 310


def test_an_mlflow_that_is_unreachable(doctor, hosts):
    wrong = doctor("", "--quick", "tracking.uri=http://10.99.0.9:5000")
    assert sorted(wrong) == [("MLflow", address) for address in hosts.addresses]


def test_a_slow_link(doctor, hosts):
    shape = ["tc", "-n", hosts.names[0], "qdisc"]
    limit = ["tbf", "rate", "200mbit", "burst", "256k", "latency", "100ms"]
    subprocess.run([*shape, "add", "dev", "cable", "root", *limit], check=True)
    try:
        wrong = doctor()
    finally:
        subprocess.run([*shape, "del", "dev", "cable", "root"], check=True)
    (found,) = wrong.values()
    assert (found["check"], found["status"]) == ("all-reduce", "warn") and "GB/s bus bandwidth" in found["found"]
    assert float(found["found"].split(": ")[1].split()[0]) < 0.05  # 200 Mbit/s are 0.025
