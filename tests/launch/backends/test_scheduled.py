"""`pldr launch slurm | kubernetes`: what is checked before a scheduler gets it, and what it gets."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from launch.backends import kubernetes, slurm
from launch.cli import main
from pipeline.config.load import load_config
from pipeline.errors import ConfigError, UserError

SIZES = ("--nodes", "1", "--ranks-per-node", "1", "--gpus-per-node", "0")


@pytest.fixture
def run(tmp_path, make_run, monkeypatch):
    """A YAML whose run directory holds folders named as checkpoints."""
    config = make_run(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-000100").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return str(config)


@pytest.mark.parametrize(
    ("cwd", "given"),
    [
        (".", "run/checkpoints/step-000100"),
        ("run/checkpoints", "./step-000100"),
        ("run/checkpoints", "step-000100"),
        ("run", "../run/checkpoints/step-000100/"),
    ],
    ids=["relative", "inside", "bare", "up"],
)
def test_slurm_would_go_back_at_every_start(run, capsys, cwd, given):
    with contextlib.chdir(cwd):
        assert main(["launch", "slurm", run, *SIZES, "--resume", given, "--dry-run"]) == 2
    assert f"--resume {given}: would go back there at every start" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["tiny/checkpoints/step-000100", "/runs/tiny/checkpoints/step-000100"])
def test_kubernetes_would_go_back_at_every_start(run, capsys, given):
    words = ["--image", "i", "--volume", "claim:/runs", "run_dir=/runs/tiny", "--resume", given, "--dry-run"]
    assert main(["launch", "kubernetes", run, *SIZES, *words]) == 2
    assert "would go back there at every start" in capsys.readouterr().err


def test_another_runs_checkpoint_is_no_going_back(run, capsys):
    words = ["--image", "i", "--volume", "claim:/runs", "run_dir=/runs/tiny", "--dry-run"]
    given = "/runs/other/checkpoints/step-000100"
    assert main(["launch", "kubernetes", run, *SIZES, *words, "--resume", given]) == 0
    assert Path(given).name in capsys.readouterr().out


def script_of(config: str, **changes) -> str:
    options = {"nodes": 2, "ranks_per_node": 1, "gpus_per_node": 0, "cpus_per_rank": 1, "time": None, "signal_s": 180,
               "options": [], "arguments": [config]}  # fmt: skip
    return slurm.render(load_config(config), **{**options, **changes})


# Stand-ins for Slurm's commands, which are not here: srun ends with CODE, or commits what SAVES says and ends with 75.
SRUN = """#!/bin/bash
trap '[ -z "$SAVES" ] || { mkdir -p "$SAVES"; touch "$SAVES/COMMITTED"; }; exit 75' USR1
touch listening
for _ in $(seq $TENTHS); do sleep 0.1; done
exit $CODE
"""
SCONTROL = """#!/bin/bash
case $1 in show) echo n1; echo n2;; *) echo "$@" >> scontrol.log; exit $REFUSES;; esac
"""


@pytest.mark.parametrize(
    ("signalled", "code", "saves", "refuses", "ended", "requeued", "said"),
    [
        (True, "0", True, "0", 75, True, "saved, queued again"),
        (True, "0", False, "0", 75, False, "not queued again, it would be so for ever; raise --time"),
        (True, "0", True, "1", 75, True, "do it by hand: sbatch "),
        (False, "0", False, "0", 0, False, ""),
        (False, "2", False, "0", 2, False, ""),
        (False, "75", False, "0", 75, False, ""),
    ],
    ids=["time is up", "no progress", "scontrol fails", "done", "failed", "scancel"],
)
def test_the_batch_script_queues_itself_again_only_when_the_time_was_up_and_it_got_on(
    run, tmp_path, signalled, code, saves, refuses, ended, requeued, said
):
    (tmp_path / "run" / "checkpoints" / "step-000100" / "COMMITTED").touch()
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    script = script_of(run).replace("export PATH=", f"export PATH={tmp_path}/bin:")
    step = str(tmp_path / "run" / "checkpoints" / "step-1000000")
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "CODE": code, "REFUSES": refuses,
                   "SAVES": step if saves else "", "TENTHS": "100" if signalled else "2"}  # fmt: skip
    job = subprocess.Popen(["bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    if signalled:
        end = time.monotonic() + 10
        while not (tmp_path / "listening").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=20)
    assert job.returncode == ended and said in out, out
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else "") == ("requeue 7\n" if requeued else "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172800), ("1-1:30", 91800), ("1-00:00:01", 86401)],
)
def test_slurms_time_limits(text, seconds):
    assert slurm.seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("time", "said"),
    [("5", "give more than 300 s"), ("00:03:00", "leaves no time to train"), ("tomorrow", "write Slurm's form")],
)
def test_a_limit_that_the_signal_comes_before_is_refused(run, time, said):
    with pytest.raises(ConfigError, match=said):
        script_of(run, time=time)
    assert "--time=6" in script_of(run, time="6") and "--time=0" in script_of(run, time="0")


@pytest.mark.parametrize("verdict", ["created", "unchanged", "configured"])
def test_a_trainjob_that_is_there_already_is_not_taken_for_started(tmp_path, monkeypatch, verdict):
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
    assert there.train.deepspeed == str(tmp_path / "pod" / "deepspeed.json")
    assert json.loads((tmp_path / "pod" / "deepspeed.json").read_text()) == {"zero_optimization": {}}
    assert there.model_copy(update={"train": here.train}) == here
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = jobs[0]["template"]["spec"]["template"]["spec"]["containers"]
    assert "--resume abc" in container["args"][0] and "--stopped-code 75" in container["args"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_kubernetes_refuses_a_run_directory_outside_the_volume(capsys, tmp_path, make_run):
    sizes = ("--nodes", "2", "--ranks-per-node", "1", "--image", "i", "--volume", "claim:/runs")
    assert main(["launch", "kubernetes", str(make_run(tmp_path)), *sizes, "--dry-run"]) == 2
    assert "set run_dir=/runs/tiny" in capsys.readouterr().err
