"""launch/backends/hosts.py: the hostfile, rank 0's address, and which variables ranks on other hosts get."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.backends.hosts import Host, address_of, carried, environment_file, is_private, private_file, read_hostfile
from pipeline.errors import ConfigError


def test_hostfile(tmp_path):
    (tmp_path / "hosts").write_text("# two\nnode-a slots=8\n\nuser@10.0.0.2 slots=4  # half\n")
    assert read_hostfile(tmp_path / "hosts") == [Host("node-a", 8), Host("user@10.0.0.2", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no hosts"),
        ("a slots=8\nb", "line 2: 'b'; write `HOST slots=N`"),
        ("a slots=0", "line 1"),
        ("a slots=8\na slots=8", "line 2: a is listed twice"),
        ("-oProxyCommand=x slots=1", "line 1"),
    ],
    ids=["empty", "no slots", "none", "twice", "option"],
)
def test_a_bad_hostfile_names_the_line(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_first_host_that_is_the_loopback_needs_an_address():
    with pytest.raises(ConfigError, match="--master-addr"):
        address_of("localhost")


def test_variables_for_the_hosts(monkeypatch, tmp_path):
    """Storage's, MLflow's, gloo's and NCCL's variables; secrets and what pdsh would mangle go through a private file."""
    monkeypatch.chdir(tmp_path)
    Path(".deepspeed_env").write_text("\nGLOO_SOCKET_IFNAME=eth1\n")
    given = {"AWS_REGION": "eu", "AWS_SECRET_ACCESS_KEY": "k", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0",
             "MLFLOW_TRACKING_PASSWORD": "p", "MY_FLAG": "1", "https_proxy": "http://me:pw@proxy", "FSSPEC_S3_KEY": "k",
             "OTHER": "x", "NCCL_SOCKET_IFNAME": "=eth%d", "OMP_NUM_THREADS": "4"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = carried(["MY_FLAG", "NEW=a b"])
    assert {"MY_FLAG": "1", "NEW": "a b", "GLOO_SOCKET_IFNAME": "eth1", "AWS_REGION": "eu"}.items() <= found.items()
    assert "OTHER" not in found
    private = {name for name, value in found.items() if is_private(name, value)} & given.keys()
    assert private == {
        "AWS_REGION", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "https_proxy", "FSSPEC_S3_KEY", "NCCL_SOCKET_IFNAME"
    }  # fmt: skip
    private_file({"A": "b"}, tmp_path / "private.json")
    assert (tmp_path / "private.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="--env MISSING"):
        carried(["MISSING"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AZURE_STORAGE_ACCOUNT_KEY", "k"),
        ("AZURE_STORAGE_KEY", "k"),
        ("AZURE_STORAGE_SAS_TOKEN", "k"),
        ("S3_KEY", "k"),
        ("https_proxy", "http://TOKEN@proxy"),
        ("HTTPS_PROXY", "TOKEN@proxy:3128"),
        ("PLDR_STORE", "https://account.blob.core.windows.net/c?sv=1&sig=abc"),
        ("GIT_REMOTE", "https://TOKEN@host/repository"),
    ],
)
def test_secrets_are_private(name, value):
    assert is_private(name, value)


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "UCX_TLS"])
def test_variables_needed_before_python_starts_are_public(name):
    assert not is_private(name, "eth0")


@pytest.mark.slow
def test_values_survive_deepspeeds_quoting(tmp_path):
    """DeepSpeed's own reading of the file, its own export, and a shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    variables = {"PLAIN": "a/b:c", "BLANKS": "a b", "SHELL": '$(id) `id` "q" \\ \' ; #', "EMPTY": ""}
    runner = PDSHRunner(SimpleNamespace(user_args=[], user_script="x"), "")
    for line in environment_file(variables).splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    script = "".join(f"export {k}={v}; " for k, v in runner.exports.items())
    shown = subprocess.run(["sh", "-c", f"{script} {sys.executable} -c 'import os, json; print(json.dumps(dict(os.environ)))'"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert variables.items() <= json.loads(shown.stdout).items()


def test_a_user_without_a_home_has_the_variables_of_the_working_directory(tmp_path, monkeypatch):
    """A container's user id without an entry in /etc/passwd, and no HOME: asked for late, and done without."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("FROM_HERE=1\n")
    assert carried()["FROM_HERE"] == "1"
    program = "import pathlib\ndef no(): raise RuntimeError\npathlib.Path.home = no\nimport launch.cli"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
