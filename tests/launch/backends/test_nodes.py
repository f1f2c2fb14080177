"""launch/backends/nodes.py: how the `pldr` processes of several nodes coordinate."""

import json
import threading

import pytest

from launch.backends import nodes
from launch.backends.nodes import Follower, Lead
from pipeline.config.paths import RunPaths
from pipeline.errors import UserError


def in_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    return thread, results


def test_nodes_start_restart_and_get_the_end(tmp_path, monkeypatch):
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


def test_a_missing_node_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "BEAT_S", 0.02)
    paths = RunPaths(tmp_path)
    with pytest.raises(UserError, match="node 1, 2 was not there within 0.3 s"):
        Lead(paths, 3, wait_s=0.3).start()
    with pytest.raises(UserError, match="node 1: no message from node 0 for 0.3 s"):
        Follower(paths, 1, wait_s=0.3).wait()
    assert Follower(paths, 1, wait_s=600).announcement(0.3) is None  # stopped by a signal, it does not wait for long
