"""Two hosts made of network namespaces of this machine, with a cable between them. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

from pipeline.errors import UserError

ADDRESSES = ("10.99.1.1", "10.99.1.2")
INTERFACE = "cable"


class TwoHosts:
    """A context. Raises UserError where this machine may not make them."""

    def __init__(self) -> None:
        self.names = [f"pldrscale{os.getpid()}{side}" for side in "ab"]

    def __enter__(self) -> TwoHosts:
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise UserError(f"{tool} is not installed: apt install iproute2")
        try:
            self._make()
        except UserError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)

    def enter(self, host: int) -> list[str]:
        """The words before a command that runs on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def _make(self) -> None:
        first, second = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for device in (INTERFACE, "lo"):
                _ip("-n", name, "link", "set", device, "up")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"ip {' '.join(words)}: {done.stderr.strip()}: network namespaces need root (CAP_NET_ADMIN)")
