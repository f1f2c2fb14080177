"""torchrun on two nodes, on one, on two again: a node that is lost and comes back, at once or after the other went on alone."""

import contextlib
import os
import shutil
import signal

import pytest

from launch.cli import main
from pipeline.checkpoint.format import committed, verify
from tests.launch.end_to_end.launches import Launch, last_step, ranks, wait_for, wait_for_commit

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
TOKENS_PER_STEP = 8 * 48  # global batch x context


@pytest.fixture(scope="module")
def hosts(tmp_path_factory, make_hosts):
    with make_hosts(tmp_path_factory.mktemp("hosts"), ssh=False) as network:
        yield network


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, make_run):
    folder = tmp_path_factory.mktemp("elastic")
    config = make_run(folder, steps=4000, checkpoint_every=10, validate_every=4000, log_every=5, timeout_s=60)
    with contextlib.chdir(folder):
        for stage in ("shard", "tokenizer", "tokenize"):
            assert main([stage, str(config)]) == 0
    return folder


@pytest.fixture
def node(hosts, tokens, tmp_path):
    """`node(i, of=n)`: `pldr launch torchrun` as one of n nodes."""
    shutil.copytree(tokens, tmp_path / "work")

    def node(number: int, *, of: int, restarts: int = 0) -> Launch:
        words = ["--nodes", str(of), "--node-rank", str(number), "--master-addr", hosts.addresses[0]]
        words += ["--ranks-per-node", "1", "--stopped-code", "75", f"train.max_restarts={restarts}"]
        return Launch(hosts, number, tmp_path / "work", "launch", "torchrun", "tiny.yaml", *words)

    return node


def lose(launch: Launch, folder) -> None:
    """The node loses `pldr` and its rank at once."""
    rank = ranks(folder)[1]
    os.kill(launch.process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank, signal.SIGKILL)
    launch.process.wait()


def last(folder) -> dict:
    return verify(committed(folder / "run" / "checkpoints")[-1])


def wait_for_step_beyond(launch: Launch, step: int) -> None:
    wait_for(lambda: last_step(launch.folder) > step or launch.process.poll() is not None, 1200)
    assert launch.process.poll() is None, launch.output


def stop(first: Launch, *others: Launch) -> None:
    """SIGUSR1 to node 0: all save and stop."""
    first.process.send_signal(signal.SIGUSR1)
    assert [one.wait() for one in (first, *others)] == [75] * (1 + len(others)), first.output


def test_two_nodes_then_one_then_two(node, tmp_path):
    work = tmp_path / "work"
    with node(0, of=2) as first, node(1, of=2) as second:
        wait_for_commit(first)
        assert last(work)["world_size"] == 2
        lose(second, work)
        assert first.wait() == 1 and "training failed" in first.output
    at = last_step(work)

    with node(0, of=1) as alone:
        wait_for_step_beyond(alone, at)
        assert f"resumed at step {at} of 4000" in alone.output and last(work)["world_size"] == 1
        stop(alone)
    at = last_step(work)

    with node(0, of=2) as first, node(1, of=2) as second:
        wait_for_step_beyond(first, at)
        assert f"resumed at step {at} of 4000" in first.output and last(work)["world_size"] == 2
        stop(first, second)
    assert last(work)["tokens_consumed"] == last_step(work) * TOKENS_PER_STEP


def test_a_node_that_comes_back_is_waited_for(node, tmp_path):
    """With restarts left, node 0 waits for it (--wait): whoever watches over the node starts `pldr` there again."""
    work = tmp_path / "work"
    with node(0, of=2, restarts=1) as first:
        with node(1, of=2, restarts=1) as second:
            wait_for_commit(first)
            lose(second, work)
        at = last_step(work)
        with node(1, of=2, restarts=1) as again:
            wait_for_step_beyond(first, at)
            assert "restarted from step-" in first.output and last(work)["world_size"] == 2
            stop(first, again)
