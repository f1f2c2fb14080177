"""Ports and interfaces of this host, for the rendezvous of ranks. Without torch: launchers need them, too."""

from __future__ import annotations

import contextlib
import os
import socket

import psutil

OUTSIDE = "192.0.2.1"  # reserved for documentation (RFC 5737): it is reached by the default route


def free_port() -> int:
    """A TCP port that is free on this host, and stays so for a minute: a port on which a connection has just ended (TIME_WAIT)
    is given to no process that asks for any port, but may be listened on with SO_REUSEADDR, as torch and gloo do."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a listener's would not be enough
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        with socket.create_connection(server.getsockname()):
            server.accept()[0].close()  # the side that closes first keeps the port waiting
            return int(server.getsockname()[1])


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME to the interface towards MASTER_ADDR, unless it is set or no interface is found."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = interface_towards(os.environ["MASTER_ADDR"])
    # On rank 0's host its own name may resolve to the loopback (Debian's /etc/hosts).
    if _several_nodes() and name == interface_towards("127.0.0.1"):
        name = interface_towards(OUTSIDE) or name
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _several_nodes() -> bool:
    """According to the launcher: DeepSpeed's CROSS_SIZE, torchrun's GROUP_WORLD_SIZE."""
    return any(int(os.environ.get(name, "1")) > 1 for name in ("CROSS_SIZE", "GROUP_WORLD_SIZE"))


def interface_towards(address: str) -> str | None:
    """The interface by which this host reaches `address` (a name or an IP); for its own address, the interface that has it."""
    with contextlib.suppress(OSError):
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # UDP: no packet is sent
            own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(a.address.partition("%")[0] == own for a in addresses):
                return name
    return None
