"""pipeline/network.py: the network interface that gloo uses, and a port."""

import os
import socket

import pytest
import torch.distributed as dist

from pipeline import network
from pipeline.network import free_port, interface_towards


def test_interface_of_the_loopback():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None


@pytest.mark.parametrize(
    ("nodes", "default", "chosen"),
    [({}, "eth0", "lo"), ({"CROSS_SIZE": "2"}, "eth0", "eth0"), ({"GROUP_WORLD_SIZE": "2"}, "eth0", "eth0"),
     ({"CROSS_SIZE": "1"}, "eth0", "lo"), ({"CROSS_SIZE": "2"}, None, "lo")],
    ids=["one", "deepspeed", "torchrun", "deepspeed's one", "no default route"],
)  # fmt: skip
def test_several_nodes_do_not_talk_through_the_loopback(monkeypatch, nodes, default, chosen):
    """On rank 0's host its own name may be a loopback address, 127.0.1.1."""
    for name in ("CROSS_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in nodes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.1.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "taken back after the test")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(
        network, "interface_towards", {"127.0.1.1": "lo", "127.0.0.1": "lo", network.OUTSIDE: default}.get
    )
    network.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == chosen


def test_a_free_port_is_reserved_and_may_be_listened_on_by_torch():
    port = free_port()
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))  # as the kernel would not choose it for a bind to port 0
    with socket.socket() as reusing:
        reusing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reusing.bind(("0.0.0.0", port))
    for libuv in (True, False):
        dist.TCPStore("127.0.0.1", free_port(), is_master=True, use_libuv=libuv, wait_for_workers=False)
