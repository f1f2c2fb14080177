"""launch/backends/kubernetes.py: what is checked before kubectl gets a job, and what is in the manifests."""

import json
import os
from pathlib import Path

import pytest
import yaml

from launch.backends import kubernetes
from launch.cli import main
from pipeline.config.load import load_config
from pipeline.errors import UserError

SIZES = ("--nodes", "1", "--ranks-per-node", "1", "--gpus-per-node", "0")


@pytest.fixture
def run(tmp_path, make_run, monkeypatch):
    """A YAML whose run directory holds folders named as checkpoints."""
    config = make_run(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-000100").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return str(config)


@pytest.mark.parametrize("given", ["tiny/checkpoints/step-000100", "/runs/tiny/checkpoints/step-000100"])
def test_kubernetes_would_go_back_at_every_start(run, capsys, given):
    words = ["--image", "i", "--volume", "claim:/runs", "run_dir=/runs/tiny", "--resume", given, "--dry-run"]
    assert main(["launch", "kubernetes", run, *SIZES, *words]) == 2
    assert "would go back to it at every start" in capsys.readouterr().err


def test_another_runs_checkpoint_does_not_go_back(run, capsys):
    words = ["--image", "i", "--volume", "claim:/runs", "run_dir=/runs/tiny", "--dry-run"]
    given = "/runs/other/checkpoints/step-000100"
    assert main(["launch", "kubernetes", run, *SIZES, *words, "--resume", given]) == 0
    assert Path(given).name in capsys.readouterr().out


@pytest.mark.parametrize("verdict", ["created", "unchanged", "configured"])
def test_a_trainjob_that_already_exists_does_not_count_as_started(tmp_path, monkeypatch, verdict):
    kinds = (f"configmap/pldr-a created\ntrainjob.trainer.kubeflow.org/pldr-a {verdict}\n").splitlines()
    (tmp_path / "kubectl").write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in kinds))
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if verdict == "created":
        assert "trainjob" in kubernetes.submit(Path("pldr-a.yaml"))
        return
    with pytest.raises(UserError, match="nothing was started .*: kubectl delete -f pldr-a.yaml, then launch again"):
        kubernetes.submit(Path("pldr-a.yaml"))


def test_the_trainjob_brings_its_configuration(capsys, monkeypatch, tmp_path, make_run):
    config = make_run(tmp_path)
    (tmp_path / "own.json").write_text('{\n "zero_optimization": {}\n}\n')
    monkeypatch.chdir(tmp_path)
    overrides = ("run_dir=/runs/tiny", "train.steps=70", "train.deepspeed=own.json")
    sizes = ("--nodes", "2", "--ranks-per-node", "1", "--image", "reg/pldr:1", "--volume", "claim:/runs")
    words = (*overrides, *sizes, "--secret", "s3", "--resume", "abc", "--dry-run", "--json")
    assert main(["launch", "kubernetes", str(config), *words]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    (text,) = result["files"].values()
    configmap, runtime, job = yaml.safe_load_all(text)
    for name, content in configmap["data"].items():
        (tmp_path / "pod").mkdir(exist_ok=True)
        (tmp_path / "pod" / name).write_text(content)
    there, here = load_config(tmp_path / "pod" / "run.yaml"), load_config(config, list(overrides))
    assert there == here and there.train.deepspeed == {"zero_optimization": {}}
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = jobs[0]["template"]["spec"]["template"]["spec"]["containers"]
    assert "--resume abc" in container["args"][0] and "--stopped-code 75" in container["args"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_kubernetes_refuses_a_run_directory_outside_the_volume(capsys, tmp_path, make_run):
    sizes = ("--nodes", "2", "--ranks-per-node", "1", "--image", "i", "--volume", "claim:/runs")
    assert main(["launch", "kubernetes", str(make_run(tmp_path)), *sizes, "--dry-run"]) == 2
    assert "set run_dir=/runs/tiny" in capsys.readouterr().err
