"""Two hosts to train on: network and host-name namespaces of this machine, a cable between them, and sshd in each. Needs root.

The hosts share the machine's file system, as those of a cluster share the run directory's, and its processes.
"""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ADDRESSES = ("10.99.0.1", "10.99.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Network:
    """Two hosts, pldrPIDa and pldrPIDb. `enter(0)`: the words before a command that runs on the first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.addresses = folder, ADDRESSES
        self.names = [f"pldr{os.getpid()}{side}" for side in "ab"]
        self.servers: list[subprocess.Popen] = []

    def enter(self, host: int) -> list[str]:
        name = self.names[host]
        set_name = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", name, *set_name]

    def cable(self, state: str) -> None:
        """Cut the cable (down) or reconnect it (up), at the first host's end."""
        ip("-n", self.names[0], "link", "set", "cable", state)

    def hostfile(self, *hosts: int, slots: int = 1) -> str:
        path = self.folder / f"hosts-{'-'.join(str(h) for h in hosts)}"
        path.write_text("".join(f"{ADDRESSES[host]} slots={slots}\n" for host in hosts))
        return str(path)

    @property
    def environment(self) -> dict[str, str]:
        return {"PDSH_SSH_ARGS_APPEND": f"-F {self.folder / 'ssh_config'}"}

    def make(self) -> None:
        _remove_left_over()
        for name in self.names:
            ip("netns", "add", name)
            self._name_hosts(name)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            self.names[1],
        )
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def _name_hosts(self, name: str) -> None:
        """In a namespace, `ip netns exec` shows this file as /etc/hosts: there the hosts know each other's names."""
        folder = Path("/etc/netns") / name
        folder.mkdir(parents=True)
        lines = [f"{address} {host}" for address, host in zip(ADDRESSES, self.names, strict=True)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *lines]) + "\n")

    def serve_ssh(self) -> None:
        """sshd on both, each with its own keys; pytest's folders have permissions too open for StrictModes."""
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)], check=True)
        public = (self.folder / "host_key.pub").read_text()
        known = "".join(f"{address} {public}" for address in ADDRESSES)
        (self.folder / "known_hosts").write_text(known)
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder}/user_key\nUserKnownHostsFile {self.folder}/known_hosts\nIdentitiesOnly yes\n"
        )
        for host in (0, 1):
            self.log_in_through(host, "")
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
            "PidFile none\nPermitRootLogin yes\nPasswordAuthentication no\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        sshd = shutil.which("sshd")
        for host in (0, 1):
            command = [*self.enter(host), sshd, "-D", "-e", "-f", str(self.folder / "sshd_config")]
            command += ["-o", f"ForceCommand={self.folder}/login{host}"]
            with open(self.folder / f"sshd{host}.log", "wb") as log:
                self.servers.append(subprocess.Popen(command, stderr=log))
        end = time.monotonic() + 10
        while not all(b"listening" in (self.folder / f"sshd{host}.log").read_bytes() for host in (0, 1)):
            assert time.monotonic() < end, "sshd does not listen"
            time.sleep(0.05)

    def log_in_through(self, host: int, script: str) -> None:
        """From now on every command over ssh to a host runs after these lines of shell, in a mount namespace of its own."""
        file = self.folder / f"login{host}"
        file.write_text(f"""#!/bin/bash
if [ -z "$PLDR_MOUNTS" ]; then PLDR_MOUNTS=own exec unshare --mount "$0"; fi
{script}
exec bash -c "$SSH_ORIGINAL_COMMAND"
""")
        file.chmod(0o755)

    def close(self) -> None:
        for server in self.servers:
            server.terminate()
            server.wait()
        for name in self.names:
            remove(name)


def remove(name: str) -> None:
    """Remove a host."""
    subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
    shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _remove_left_over() -> None:
    """Remove the hosts of tests that were killed."""
    for file in Path("/run/netns").glob("pldr*"):
        found = re.fullmatch(r"pldr(\d+)[ab]", file.name)
        if found and not psutil.pid_exists(int(found[1])):
            remove(file.name)


@contextlib.contextmanager
def two_hosts(folder: Path, *, ssh: bool) -> Iterator[Network]:
    """A Network; skips the test, with the reason, where this machine is not allowed to make it."""
    for tool in ("ip", "unshare", *(("sshd", "ssh", "ssh-keygen", "pdsh") if ssh else ())):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    network = Network(folder)
    try:
        try:
            network.make()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine is not allowed to make network namespaces ({error})")
        if ssh:
            network.serve_ssh()
        yield network
    finally:
        network.close()


@pytest.fixture(scope="session")
def make_hosts():
    """`make_hosts(folder, ssh=True)`: a context with two hosts."""
    return two_hosts
