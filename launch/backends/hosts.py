"""The hosts of a job over ssh: the hostfile, running commands on them, rank 0's address, and the environment of their ranks.

`PDSH_SSH_ARGS_APPEND` holds ssh options for pdsh; our own ssh calls use the same, so that one variable serves both. DeepSpeed
exports variables that begin with PYTHON, MLFLOW, NCCL, MV2 or UCX, and those in an environment file; both end up in command
lines, which every user of the hosts can read. So values that may be secret go through a file that only the user can read.
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

from pipeline.environment import without_other_jobs
from pipeline.errors import ConfigError

T = TypeVar("T")
SSH_ARGS = "PDSH_SSH_ARGS_APPEND"
# Never prompt; a host that is dead or becomes unreachable ends the connection instead of hanging it (rc 255 after 20 s).
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=2"
CARRIED = re.compile(
    r"(AWS|S3|FSSPEC|GOOGLE|GCSFS|GCE|AZURE|MLFLOW|NCCL|GLOO|UCX|TORCH|PYTORCH|OMP|DS|PLDR)_\w+"
    r"|(https?|no|all)_proxy|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|LD_LIBRARY_PATH|XDG_CACHE_HOME|TMPDIR|PGPASS\w+",
    re.IGNORECASE,
)
LOCAL_ONLY = {"DS_ENV_FILE", "PLDR_PARENT_PIPE", "PLDR_VISIBLE_DEVICES"}
# Only storage and MLflow read their variables, and not before the rank's own code runs: all of them can be private.
PRIVATE_NAME = re.compile(
    r"^(AWS|S3|FSSPEC|GOOGLE|GCSFS|GCE|AZURE|MLFLOW)_|_proxy$|SECRET|PASS|TOKEN|CREDENTIAL|KEY|CONNECTION_STRING|SAS",
    re.IGNORECASE,
)
PRIVATE_VALUE = re.compile(r"://[^/\s]*@|://\S*\?")  # user or token before a host; a query, which may hold a signature


@dataclass(frozen=True)
class Host:
    """A line of the hostfile: the name that ssh uses, and how many ranks run there."""

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
            raise ConfigError(f"{path}, line {number}: {match[1]} is listed twice; write one line with all its slots")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise ConfigError(f"{path}: no hosts; write a line `HOST slots=N` for each")
    return hosts


def ssh_options() -> str:
    """Options of every ssh call: the user's first, because ssh uses the first value that it gets."""
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
        output = error.stdout.decode("utf-8", "replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return subprocess.CompletedProcess(words, -1, output, f"did not finish within {timeout_s:g} s")


def on_each(hosts: Sequence[Host], work: Callable[[Host], T]) -> dict[str, T]:
    """Run `work` for all hosts in parallel; the results by host name."""
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
    """The address of rank 0's host; the loopback when it is the only host. Raises ConfigError when --master-addr is needed."""
    return "127.0.0.1" if len(hosts) == 1 else address_of(hosts[0].name)


def address_of(host: str) -> str:
    """The address at which the other hosts reach rank 0's. Raises ConfigError when --master-addr is needed."""
    name = host.rpartition("@")[2]
    if shutil.which("ssh") is not None:  # ~/.ssh/config may give it another name
        words = ["ssh", *shlex.split(ssh_options()), "-G", host]
        shown = subprocess.run(words, capture_output=True, text=True, errors="replace")
        found = re.search(r"^hostname (\S+)$", shown.stdout, re.MULTILINE)
        name = found[1] if found else name
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        raise ConfigError(f"{host}: cannot resolve {name}; give rank 0's with --master-addr") from None
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise ConfigError(
            f"{host}: {name} is {address} here, which other hosts cannot reach; give rank 0's address with --master-addr"
        )
    return address


def users_files() -> list[Path]:
    """DeepSpeed's own files of variables; the later one wins. A user without a home (in a container) has only that of the
    working directory."""
    name = ".deepspeed_env"
    try:
        return [Path.home() / name, Path(name)]
    except RuntimeError:
        return [Path(name)]


def carried(extra: Sequence[str] = ()) -> dict[str, str]:
    """The variables that ranks need: those that storage, MLflow, gloo and NCCL read, the user's `.deepspeed_env` files, and
    `extra` (NAME or NAME=VALUE). Raises ConfigError."""
    here = without_other_jobs(os.environ)
    found = {k: v for k, v in here.items() if CARRIED.fullmatch(k) and k not in LOCAL_ONLY}
    for file in users_files():
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
    """Whether a variable must not be in a command line: it may be secret, or pdsh would change it."""
    return bool(PRIVATE_NAME.search(name) or PRIVATE_VALUE.search(value) or re.search(r"[%\n]", value))


def environment_file(variables: dict[str, str]) -> str:
    """DeepSpeed's environment file. DeepSpeed puts values in double quotes, where a shell still expands these characters."""
    escaped = {name: re.sub(r'([\\$`"])', r"\\\1", value) for name, value in variables.items()}
    return "".join(f"{name}={value}\n" for name, value in sorted(escaped.items()))


def private_file(variables: dict[str, str], path: Path) -> None:
    """Write the variables that ranks read themselves (pipeline/worker.py): JSON that only this user can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        json.dump(variables, stream)


def kill_leftovers(hosts: Sequence[Host], job_file: Path, *, ssh_port: int | None = None) -> list[str]:
    """Kill the processes that a finished job left on its hosts; returns the hosts that were unreachable.

    SIGKILL, because a suspended process handles no other signal. They are found by the path of the run's job file, which no
    other job has; the brackets keep pkill from matching its own shell.
    """
    pattern = rf"[p]ipeline\.worker (--local_rank=[0-9]+ )?{re.escape(str(job_file))}"
    command = ["pkill", "-KILL", "-u", str(os.getuid()), "-f", pattern]

    def kill(host: Host) -> bool:
        return ssh(host.name, command, port=ssh_port, timeout_s=20).returncode in (0, 1)  # 1: nothing was left

    return [name for name, reached in on_each(hosts, kill).items() if not reached]
