"""`pldr doctor` on this machine."""

import json

import pytest

from launch.cli import main


def test_without_ssh_the_fix_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "hosts").write_text("a slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--hostfile", str(tmp_path / "hosts")]) == 2
    assert "ssh is not installed here; apt install openssh-client" in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine(capsys, tmp_path, make_run):
    """The real thing on one host, all-reduce included; then with a store and an MLflow that are unreachable."""
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
