"""The hosts of a job over ssh: the hostfile, talking to them, rank 0's address, and what environment their ranks get.

`PDSH_SSH_ARGS_APPEND` holds ssh options for pdsh; our own ssh calls take the same, so that one variable serves both. DeepSpeed
carries to the hosts what begins with PYTHON, MLFLOW, NCCL, MV2 or UCX, and what an environment file names; both end up in
command lines, which everybody on the hosts can read. So what may be secret goes through a file that only the user can read.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.errors import ConfigError

T = TypeVar("T")
SSH_ARGS = "PDSH_SSH_ARGS_APPEND"
# Never ask; a host that is dead or goes away ends the connection instead of hanging it (rc 255 after 20 s).
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=2"
USERS_FILES = (Path.home() / ".deepspeed_env", Path(".deepspeed_env"))  # DeepSpeed's own, the later one wins
CARRIED = re.compile(
    r"(AWS|S3|FSSPEC|GOOGLE|GCSFS|GCE|AZURE|MLFLOW|NCCL|GLOO|UCX|TORCH|PYTORCH|OMP|DS|PLDR)_\w+"
    r"|(https?|no|all)_proxy|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|LD_LIBRARY_PATH|XDG_CACHE_HOME|TMPDIR|PGPASS\w+",
    re.IGNORECASE,
)
LOCAL_ONLY = {"DS_ENV_FILE", "PLDR_PARENT_PIPE", "PLDR_VISIBLE_DEVICES"}
# What storage and MLflow read is theirs alone, and nothing reads it before the rank's own code runs: all of it is private.
PRIVATE_NAME = re.compile(
    r"^(AWS|S3|FSSPEC|GOOGLE|GCSFS|GCE|AZURE|MLFLOW)_|_proxy$|SECRET|PASS|TOKEN|CREDENTIAL|KEY|CONNECTION_STRING|SAS",
    re.IGNORECASE,
)
PRIVATE_VALUE = re.compile(r"://[^/\s]*@|://\S*\?")  # user or token before a host; a query, where signatures stand


@dataclass(frozen=True)
class Host:
    """A line of the hostfile: how ssh calls it, and how many ranks it takes."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts, in the order of their ranks. Raises ConfigError naming the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read ({error}); name a file of lines `HOST slots=N`") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9][\w.@:-]*)\s+slots=([1-9]\d*)(?:\s*#.*)?", text)
        if match is None:
            raise ConfigError(f"{path}, line {number}: {text!r}; write `HOST slots=N`, N the ranks on that host")
        if match[1] in (host.name for host in hosts):
            raise ConfigError(f"{path}, line {number}: {match[1]} is there twice; write one line with all its slots")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise ConfigError(f"{path}: no hosts; write a line `HOST slots=N` for each")
    return hosts


def ssh_options() -> str:
    """Options of every ssh call: the user's first, because ssh takes the first value that it is given."""
    return f"{os.environ.get(SSH_ARGS, '')} {SSH_OPTIONS}".strip()


def ssh(
    host: str, command: Sequence[str], *, port: int | None = None, timeout_s: float | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command on a host; return code 255 when ssh failed, -1 when it took longer than timeout_s."""
    where = ["-p", str(port)] if port is not None else []
    words = ["ssh", *shlex.split(ssh_options()), *where, host, shlex.join(command)]
    try:
        return subprocess.run(words, input=stdin, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode("utf-8", "replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return subprocess.CompletedProcess(words, -1, said, f"no end within {timeout_s:g} s")


def on_each(hosts: Sequence[Host], work: Callable[[Host], T]) -> dict[str, T]:
    """`work` for every host at once; its results by name."""
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        return dict(zip([h.name for h in hosts], pool.map(work, hosts), strict=True))


def require_tools(*tools: str) -> None:
    """Raises ConfigError without one of ssh, pdsh."""
    for tool in tools:
        if shutil.which(tool) is None:
            raise ConfigError(
                f"{tool} is not installed here; apt install {'openssh-client' if tool == 'ssh' else 'pdsh'}, or start one "
                "process a node with --no-ssh --node-rank I"
            )


def rendezvous_address(hosts: Sequence[Host]) -> str:
    """The address of rank 0's host; when there is no other host, the loopback. Raises ConfigError where it must be given."""
    return "127.0.0.1" if len(hosts) == 1 else address_of(hosts[0].name)


def address_of(host: str) -> str:
    """The address at which rank 0's host is reached by the others. Raises ConfigError where it must be given."""
    name = host.rpartition("@")[2]
    if shutil.which("ssh") is not None:  # ~/.ssh/config may call it otherwise
        words = ["ssh", *shlex.split(ssh_options()), "-G", host]
        told = subprocess.run(words, capture_output=True, text=True, errors="replace")
        found = re.search(r"^hostname (\S+)$", told.stdout, re.MULTILINE)
        name = found[1] if found else name
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        raise ConfigError(f"{host}: no address is known for {name}; give rank 0's with --master-addr") from None
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise ConfigError(
            f"{host}: {name} is {address} here, which other hosts cannot reach; give rank 0's address with --master-addr"
        )
    return address


def carried(extra: Sequence[str] = ()) -> dict[str, str]:
    """Variables that the ranks need: those that storage, MLflow, gloo and NCCL read, the user's `.deepspeed_env` files, and
    `extra` (NAME or NAME=VALUE). Raises ConfigError."""
    found = {k: v for k, v in os.environ.items() if CARRIED.fullmatch(k) and k not in LOCAL_ONLY}
    for file in USERS_FILES:
        if file.is_file():
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
            found |= {name.strip(): value.strip() for name, _, value in pairs}
    for given in extra:
        name, equals, value = given.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or not (equals or name in os.environ):
            raise ConfigError(f"--env {given}: write NAME=VALUE, or the NAME of a variable that is set here")
        found[name] = value if equals else os.environ[name]
    return found


def is_private(name: str, value: str) -> bool:
    """Whether a variable must not stand in a command line: it may be secret, or pdsh would not pass it on as it is."""
    return bool(PRIVATE_NAME.search(name) or PRIVATE_VALUE.search(value) or re.search(r"[%\n]", value))


def environment_file(variables: dict[str, str]) -> str:
    """DeepSpeed's environment file. DeepSpeed puts values between double quotes, in which a shell still reads these."""
    escaped = {name: re.sub(r'([\\$`"])', r"\\\1", value) for name, value in variables.items()}
    return "".join(f"{name}={value}\n" for name, value in sorted(escaped.items()))


def private_file(variables: dict[str, str], path: Path) -> None:
    """What the ranks read themselves (pipeline.worker): JSON for this user's eyes only."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        json.dump(variables, stream)


def sweep(hosts: Sequence[Host], job_file: Path, *, ssh_port: int | None = None) -> list[str]:
    """Kill what a job that has ended left on its hosts: a stopped rank hears nothing else. Returns hosts it could not reach.

    By the name of the run's job file, which is no other job's; the brackets keep pkill from finding its own shell.
    """
    pattern = rf"[p]ipeline\.worker (--local_rank=[0-9]+ )?{re.escape(str(job_file))}"
    command = ["pkill", "-KILL", "-u", str(os.getuid()), "-f", pattern]

    def kill(host: Host) -> bool:
        return ssh(host.name, command, port=ssh_port, timeout_s=20).returncode in (0, 1)  # 1: nothing was left

    return [name for name, reached in on_each(hosts, kill).items() if not reached]
