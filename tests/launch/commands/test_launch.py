"""`pldr launch`: what is refused before anything starts, what a dry run shows, and a stop while no rank runs.
Trainings on several nodes: tests/launch/end_to_end/test_multinode.py."""

import contextlib
import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest

from launch.backends import hosts
from launch.cli import main
from pipeline.stages.runner import Pipeline


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, make_run):
    folder = tmp_path_factory.mktemp("launch")
    config = make_run(folder)
    with contextlib.chdir(folder):
        for stage in ("shard", "tokenizer", "tokenize"):
            assert main([stage, str(config)]) == 0
    return folder


def dry_run(capsys, *words: str) -> dict:
    capsys.readouterr()
    assert main(["launch", *words, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["deepspeed", "--hostfile", "hosts", "--no-ssh"], "--no-ssh and --node-rank I go together"),
        (["deepspeed", "--hostfile", "hosts", "--no-ssh", "--node-rank", "2"], "there are 2 nodes, 0 to 1"),
        (["deepspeed", "--hostfile", "hosts", "--env", "1=2"], "--env 1=2: write NAME=VALUE"),
        (
            ["deepspeed", "--hostfile", "hosts", "--no-ssh", "--node-rank", "1", "--env", "A=2"],
            "--env is only read over ssh",
        ),
        (["torchrun", "--nodes", "2"], "--master-addr"),
        (["torchrun", "--ranks-per-node", "0"], "--ranks-per-node 0: at least 1"),
        (["torchrun", "--nodes", "3", "--master-addr", "a", "train.ranks=null"], "micro_batch 4 x 3 nodes"),
        (["slurm", "--nodes", "1", "--ranks-per-node", "1", "--gpus-per-node", "-1"], "--gpus-per-node -1: at least 0"),
        (["slurm", "--nodes", "3", "--ranks-per-node", "1"], "not a multiple of micro_batch 4 x 3 ranks"),
        (
            ["slurm", "--nodes", "1", "--ranks-per-node", "1", "--resume", "runs:/abc/checkpoints/step-000010"],
            "every start",
        ),
        (["slurm", "--nodes", "1", "--ranks-per-node", "1", "--sbatch", "nodes=7"], "nodes is set by pldr"),
        (["slurm", "--nodes", "1", "--ranks-per-node", "1", "--sbatch", "x=a\nb"], "write an option of sbatch"),
        (["slurm", "--nodes", "1", "--ranks-per-node", "1", "--sbatch", "foo"], "--sbatch foo: it takes a value"),
    ],
    ids=[
        "no rank",
        "rank",
        "env",
        "env here",
        "address",
        "no ranks",
        "nodes",
        "gpus",
        "batch",
        "back",
        "ours",
        "line break",
        "no value",
    ],
)
def test_mistakes_are_reported_before_anything_starts(tokens, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tokens)
    Path("hosts").write_text("10.0.0.1 slots=1\n10.0.0.2 slots=1\n")
    assert main(["launch", words[0], "tiny.yaml", *words[1:]]) == 2
    assert message in capsys.readouterr().err


def test_an_own_template_with_an_unknown_name_lists_the_known_ones(capsys, monkeypatch, tokens):
    monkeypatch.chdir(tokens)
    Path("own.sbatch").write_text("#!/bin/bash\n{{ no_such }}\n")
    sizes = ("--nodes", "2", "--ranks-per-node", "1", "--template", "own.sbatch")
    assert main(["launch", "slurm", "tiny.yaml", *sizes, "--dry-run"]) == 2
    assert "'no_such' is undefined; it may use: again, arguments, " in capsys.readouterr().err


def test_dry_run_over_ssh(tokens, capsys, monkeypatch):
    monkeypatch.chdir(tokens)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-show")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    Path("hosts").write_text("10.0.0.1 slots=1\n10.0.0.2 slots=1\n")
    result = dry_run(capsys, "deepspeed", "tiny.yaml", "--hostfile", "hosts")
    logs = tokens / "run" / "logs"
    assert set(result["files"]) == {str(logs / "deepspeed_env"), str(logs / "environment.json")}
    assert "do-not-show" not in json.dumps(result)
    assert "--master_addr 10.0.0.1" in result["commands"][0] and "--no_ssh_check" in result["commands"][0]
    assert f"PLDR_HEAD_FILE={logs}/head.json" in result["files"][str(logs / "deepspeed_env")]
    assert not (logs / "job.json").exists() and result["written_at_start"] == [str(logs / "job.json")]
    words = shlex.split(result["commands"][0])
    assert "-u AWS_SECRET_ACCESS_KEY " in result["commands"][0] and f"DS_ENV_FILE={logs}/deepspeed_env" in words
    assert any(word.startswith("PDSH_SSH_ARGS_APPEND=") for word in words)
    one = dry_run(capsys, "deepspeed", "tiny.yaml", "--hostfile", "hosts", "--no-ssh", "--node-rank", "1")
    assert "--no_ssh --node_rank 1" in one["commands"][0]
    assert {"PLDR_PARENT_PIPE=1", "PLDR_VISIBLE_DEVICES=2,3"} <= set(shlex.split(one["commands"][0]))


def test_torchrun_spreads_the_batch_over_all_nodes(tokens, capsys, monkeypatch):
    """8 sequences in micro-batches of 4: two ranks on one node, one on each of two."""
    monkeypatch.chdir(tokens)
    words = ("torchrun", "tiny.yaml", "train.ranks=null")
    assert "--nproc-per-node 2" in dry_run(capsys, *words)["commands"][0]
    assert "--nproc-per-node 1" in dry_run(capsys, *words, "--nodes", "2", "--master-addr", "a")["commands"][0]


def test_slurms_batch_script_starts_a_pldr_on_each_node(tokens, capsys, monkeypatch):
    monkeypatch.chdir(tokens)
    sizes = ("--nodes", "2", "--ranks-per-node", "1", "--gpus-per-node", "0", "--time", "1:00:00")
    result = dry_run(capsys, "slurm", "tiny.yaml", "train.steps=70", *sizes, "--sbatch", "partition=gpu")
    (script,) = result["files"].values()
    assert "\n#SBATCH --partition=gpu\n" in script and "\n#SBATCH --signal=B:USR1@180\n" in script
    assert "--nodes 2" in script and '--master-addr "$MASTER_HOST"' in script and "launch torchrun" in script
    assert "gpus-per-node" not in script and f"{tokens}/tiny.yaml train.steps=70 " in script


@pytest.mark.parametrize("way", [["deepspeed", "--hostfile", "hosts"], ["torchrun"]], ids=["ssh", "one a node"])
def test_sigusr1_while_no_rank_runs_is_a_stop(tokens, monkeypatch, way):
    monkeypatch.chdir(tokens)
    Path("hosts").write_text("10.0.0.1 slots=1\n10.0.0.2 slots=1\n")
    monkeypatch.setattr(hosts, "require_tools", lambda *tools: None)

    def signaled(*words, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)  # until the handler runs

    monkeypatch.setattr(Pipeline, "stage", signaled)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)  # without ours it would end the tests
    try:
        assert main(["launch", way[0], "tiny.yaml", *way[1:], "--stopped-code", "75"]) == 75
    finally:
        signal.signal(signal.SIGUSR1, before)
