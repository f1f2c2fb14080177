"""`pldr launch`: what is written for hosts and schedulers, and how node processes meet. Trainings: test_multinode.py."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.backends import command, nodes
from launch.backends.hosts import Host, address_of, carried, environment_file, is_private, private_file, read_hostfile
from launch.backends.job import is_rank
from launch.backends.nodes import Follower, Lead
from launch.cli import main
from pipeline.config.paths import RunPaths
from pipeline.distributed import interface_towards
from pipeline.errors import ConfigError, UserError
from pipeline.train import signals


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


def test_hostfile(tmp_path):
    (tmp_path / "hosts").write_text("# two\nnode-a slots=8\n\nuser@10.0.0.2 slots=4  # half\n")
    assert read_hostfile(tmp_path / "hosts") == [Host("node-a", 8), Host("user@10.0.0.2", 4)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no hosts"),
        ("a slots=8\nb", "line 2: 'b'; write `HOST slots=N`"),
        ("a slots=0", "line 1"),
        ("a slots=8\na slots=8", "line 2: a is there twice"),
        ("-oProxyCommand=x slots=1", "line 1"),
    ],
    ids=["empty", "no slots", "none", "twice", "option"],
)
def test_a_bad_hostfile_names_the_line(tmp_path, text, said):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_hostfile(tmp_path / "hosts")


def test_a_first_host_that_is_the_loopback_needs_an_address():
    with pytest.raises(ConfigError, match="--master-addr"):
        address_of("localhost")


def test_what_is_carried_to_the_hosts(monkeypatch, tmp_path):
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
def test_what_has_to_be_there_before_python_starts_is_public(name):
    assert not is_private(name, "eth0")


@pytest.mark.slow
def test_values_survive_deepspeeds_quoting(tmp_path):
    """DeepSpeed's own reading of the file, its own export, and a shell."""
    from types import SimpleNamespace

    from deepspeed.launcher.multinode_runner import PDSHRunner

    variables = {"PLAIN": "a/b:c", "BLANKS": "a b", "SHELL": '$(id) `id` "q" \\ \' ; #', "EMPTY": ""}
    runner = PDSHRunner(SimpleNamespace(user_args=[], user_script="x"), "")
    for line in environment_file(variables).splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    script = "".join(f"export {k}={v}; " for k, v in runner.exports.items())
    told = subprocess.run(["sh", "-c", f"{script} {sys.executable} -c 'import os, json; print(json.dumps(dict(os.environ)))'"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert variables.items() <= json.loads(told.stdout).items()


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["deepspeed", "--hostfile", "hosts", "--no-ssh"], "--no-ssh and --node-rank I go together"),
        (["deepspeed", "--hostfile", "hosts", "--no-ssh", "--node-rank", "2"], "there are 2 nodes, 0 to 1"),
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
    ],
    ids=["no rank", "rank", "address", "no ranks", "nodes", "gpus", "batch", "back", "ours", "line break"],
)
def test_mistakes_are_told_before_anything_starts(tokens, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tokens)
    Path("hosts").write_text("10.0.0.1 slots=1\n10.0.0.2 slots=1\n")
    assert main(["launch", words[0], "tiny.yaml", *words[1:]]) == 2
    assert said in capsys.readouterr().err


def test_the_batch_script_starts_a_pldr_on_each_node(tokens, capsys, monkeypatch):
    monkeypatch.chdir(tokens)
    sizes = ("--nodes", "2", "--ranks-per-node", "1", "--gpus-per-node", "0", "--time", "1:00:00")
    result = dry_run(capsys, "slurm", "tiny.yaml", "train.steps=70", *sizes, "--sbatch", "partition=gpu")
    (script,) = result["files"].values()
    assert "\n#SBATCH --partition=gpu\n" in script and "\n#SBATCH --signal=B:USR1@180\n" in script
    assert "--nodes 2" in script and '--master-addr "$MASTER_HOST"' in script and "launch torchrun" in script
    assert "gpus-per-node" not in script and f"{tokens}/tiny.yaml train.steps=70 " in script


def test_own_templates_are_told_what_they_may_use(capsys, monkeypatch, tokens):
    monkeypatch.chdir(tokens)
    Path("own.sbatch").write_text("#!/bin/bash\n{{ no_such }}\n")
    sizes = ("--nodes", "2", "--ranks-per-node", "1", "--template", "own.sbatch")
    assert main(["launch", "slurm", "tiny.yaml", *sizes, "--dry-run"]) == 2
    assert "'no_such' is undefined; it may use: arguments, " in capsys.readouterr().err


def test_torchrun_spreads_the_batch_over_all_nodes(tokens, capsys, monkeypatch):
    """8 sequences in micro-batches of 4: two ranks on one node, one on each of two."""
    monkeypatch.chdir(tokens)
    words = ("torchrun", "tiny.yaml", "train.ranks=null")
    assert "--nproc-per-node 2" in dry_run(capsys, *words)["commands"][0]
    assert "--nproc-per-node 1" in dry_run(capsys, *words, "--nodes", "2", "--master-addr", "a")["commands"][0]


@pytest.mark.parametrize("way", [["deepspeed", "--hostfile", "hosts"], ["torchrun"]], ids=["ssh", "one a node"])
def test_sigusr1_while_no_rank_runs_is_a_stop(tokens, monkeypatch, way):
    monkeypatch.chdir(tokens)
    Path("hosts").write_text("10.0.0.1 slots=1\n10.0.0.2 slots=1\n")
    monkeypatch.setattr(command, "require_tools", lambda *tools: None)

    def signalled(*words):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)  # until it is heard

    monkeypatch.setattr(command, "_train", signalled)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)  # without ours it would end the tests
    try:
        assert main(["launch", way[0], "tiny.yaml", *way[1:], "--stopped-code", "75"]) == 75
    finally:
        signal.signal(signal.SIGUSR1, before)


def in_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    return thread, results


def test_nodes_meet_start_again_and_hear_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "BEAT_S", 0.02)
    monkeypatch.setattr(nodes, "POLL_S", 0.01)
    paths = RunPaths(tmp_path)
    old = paths.logs / "nodes"
    old.mkdir(parents=True)
    (old / "node-2.json").write_text(json.dumps({"token": "of a node that died", "beat": 7}))
    (old / "end.json").write_text(
        json.dumps({"tokens": {"1": "old"}, "exit_code": 0, "message": "of an earlier start"})
    )
    lead = Lead(paths, 3, wait_s=5)
    one, two = Follower(paths, 1, wait_s=5), Follower(paths, 2, wait_s=5)
    for _ in range(2):  # a start, and another after a crash
        waiting = [in_thread(follower.wait) for follower in (one, two)]
        lead.start()
        for thread, _ in waiting:
            thread.join(5)
        assert [results for _, results in waiting] == [[None], [None]]
    lead.end(75, "by a signal", stopped=True)
    assert one.wait() == two.wait() == nodes.End(75, "by a signal", True)


def test_a_node_that_does_not_come_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "BEAT_S", 0.02)
    paths = RunPaths(tmp_path)
    with pytest.raises(UserError, match="node 1, 2 did not come within 0.3 s"):
        Lead(paths, 3, wait_s=0.3).start()
    with pytest.raises(UserError, match="node 1: node 0 said nothing for 0.3 s"):
        Follower(paths, 1, wait_s=0.3).wait()


def test_the_lifeline_carries_signals_and_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "BEAT_S", 0.02)
    noted, failed, ended = [], [], threading.Event()
    with signals.Head(tmp_path / "head.json") as head:
        signals.follow(head.file, patience_s=0.5, note=noted.append, fail=lambda why: (failed.append(why), ended.set()))
        head.pass_on(signal.SIGUSR1)
        time.sleep(0.7)  # longer than the patience: it lives
        assert noted == [signal.SIGUSR1] and not failed
    assert ended.wait(5) and "ended by the process that started it" in failed[0]


def test_ranks_end_when_the_head_gives_no_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "BEAT_S", 0.02)
    file = tmp_path / "head.json"
    file.write_text(json.dumps({"token": "a", "beat": 3, "signals": [], "over": False}))
    failed, ended = [], threading.Event()
    signals.follow(file, patience_s=0.2, note=failed.append, fail=lambda why: (failed.append(why), ended.set()))
    assert ended.wait(5) and "no sign of life" in failed[0]


def test_interface_of_the_loopback():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None


def test_a_rank_is_told_from_its_launchers():
    assert is_rank(["python", "-u", "-m", "pipeline.worker", "--local_rank=0", "job.json"])
    assert not is_rank(["python", "-u", "-m", "deepspeed.launcher.launch", "--module", "pipeline.worker", "job.json"])
    assert not is_rank(["python", "-m", "torch.distributed.run", "-m", "pipeline.worker", "job.json"])
    assert not is_rank(["python", "-m"]) and not is_rank([])
