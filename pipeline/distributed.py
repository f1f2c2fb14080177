"""What a process has to know about its ranks: the network interface for gloo, this rank's share of the work, and collectives
over plain values."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError, first_line

T = TypeVar("T")
M = TypeVar("M")
OUTSIDE = "192.0.2.1"  # reserved for documentation (RFC 5737): it is reached by the default route


def end_with_parent() -> None:
    """From now on, end this process when the one that started it is gone: the other end of our stdin, a pipe, closes. A killed
    run leaves no orphans that go on writing."""

    def watch() -> None:
        while os.read(0, 4096):  # unbuffered: a thread inside sys.stdin cannot be left at interpreter shutdown
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


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


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def bounds(count: int) -> tuple[int, int]:
    """First and last (exclusive) of this rank's part of `count` prompts; empty when there are more ranks than prompts."""
    rank, world = rank_and_world()
    return count * rank // world, count * (rank + 1) // world


def share(prompts_NS: Tensor) -> Tensor:
    """This rank's prompts."""
    start, stop = bounds(len(prompts_NS))
    return prompts_NS[start:stop]


def gathered(mine: T) -> list[T]:
    """The values of all ranks, in the order of ranks. Collective."""
    _, world = rank_and_world()
    if world == 1:
        return [mine]
    everyone: list[T | None] = [None] * world
    dist.all_gather_object(everyone, mine)
    return [one for one in everyone if one is not None]


def merged(mine: M) -> M:
    """The accumulators of all ranks merged into one, the same on every rank. Collective."""
    first, *others = gathered(mine)
    for other in others:
        first.merge(other)  # type: ignore[attr-defined]
    return first


def on_every_rank(work: Callable[[], T]) -> T:
    """The result of `work` on this rank, if it succeeded on all ranks. Collective.

    Otherwise raises UserError on every rank, naming the ranks that failed and why: before training, instead of a hang in it.
    """
    problem: tuple[int, str] | None = None
    try:
        result = work()
    except (UserError, OSError) as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        problem = (code, f"rank {dist.get_rank()} on {socket.gethostname()}: {first_line(error)}")
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found = [p for p in problems if p is not None]
    if found:
        raise UserError("; ".join(dict.fromkeys(text for _, text in found)), exit_code=max(code for code, _ in found))
    return result


def agreement(timeout_s: float) -> Callable[[list[bool]], list[bool]]:
    """A function that gives, for each of its booleans, whether any rank passed True. Collective.

    It has its own group, so that a thread can use it during training, on the CPU, so that it does not wait for the GPU's queue.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def agree(verdicts: list[bool]) -> list[bool]:
        votes = torch.tensor(verdicts, dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
        return [bool(vote) for vote in votes.tolist()]

    return agree
