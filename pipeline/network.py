"""Which network interface a rank talks to the others through.

gloo takes the interface that this host's own name resolves to, which on many machines is the loopback: ranks of other hosts
are then given an address that is their own. The interface that packets to rank 0 leave by is the right one, on every host for
itself (their names differ from host to host, so one GLOO_SOCKET_IFNAME for all cannot be right everywhere).
"""

from __future__ import annotations

import contextlib
import os
import socket

import psutil

OUTSIDE = "192.0.2.1"  # of nobody (RFC 5737): the way there is the default route


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME for the rank's environment (MASTER_ADDR), unless it is set or nothing can be found out."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = interface_towards(os.environ["MASTER_ADDR"])
    if _several_nodes() and name == interface_towards(
        "127.0.0.1"
    ):  # rank 0's host has its own name there (Debian's hosts)
        name = interface_towards(OUTSIDE) or name
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _several_nodes() -> bool:
    """As the launcher has told: DeepSpeed's CROSS_SIZE, torchrun's GROUP_WORLD_SIZE."""
    return any(int(os.environ.get(name, "1")) > 1 for name in ("CROSS_SIZE", "GROUP_WORLD_SIZE"))


def interface_towards(address: str) -> str | None:
    """The interface by which this host reaches `address` (a name or an IP); of its own address, the one that has it."""
    with contextlib.suppress(OSError):
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # UDP: no packet is sent
            own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(a.address.partition("%")[0] == own for a in addresses):
                return name
    return None
