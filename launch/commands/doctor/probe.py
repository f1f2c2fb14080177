"""The facts about one node, for `pldr doctor`: a question on stdin, the facts as the last line of stdout, both JSON.

    python -m launch.commands.doctor.probe < question

It runs as a rank would: the same Python, in the same way over ssh (limits there differ from those of a login shell). It decides
nothing: a check that fails gives the text of its error.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import first_line
from pipeline.io.urls import join, without_secrets

PACKAGES = ("torch", "deepspeed", "pldr", "mlflow", "fsspec", "numpy")
PARTS = ("pldr_model", "pipeline", "launch")


def facts(question: dict[str, Any]) -> dict[str, Any]:
    """question: {"run_dir", "token", "urls", "mlflow", "remote_tokens", "staging"}; the first, fourth and last may be null."""
    found: dict[str, Any] = {
        "hostname": socket.gethostname(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "code": _code(),
        "driver": _driver(),
        "accelerator": os.environ.get("DS_ACCELERATOR"),
        "rdma": any(Path("/sys/class/infiniband").glob("*")),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shm_free": _free("/dev/shm"),
        "tmp": tempfile.gettempdir(),
        "tmp_free": _free(tempfile.gettempdir()),
        "urls": {url: _attempt(partial(_write_url, url)) for url in question["urls"]},
    }
    found |= _torch()
    if question["run_dir"] is not None:
        found["run_dir"] = _attempt(lambda: _write_run_dir(Path(question["run_dir"]), question["token"]))
        found["run_dir_free"] = _free(question["run_dir"])
    if question["staging"] is not None:
        found["staging"] = _attempt(lambda: _write_beside(Path(question["staging"])))
        found["staging_free"] = _free(question["staging"])
    if question["mlflow"] is not None:
        found["mlflow"] = _attempt(lambda: _ask_mlflow(question["mlflow"]))
    if question["remote_tokens"]:
        from pipeline.data.loading.cache import node_folder

        found["cache_free"] = _free(str(node_folder()))
    return found


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def token_file(run_dir: Path, token: str) -> Path:
    """A file that the asking process has written to the run directory."""
    return nearest(run_dir) / f".pldr-doctor-{token}"


def _attempt(work: Callable[[], None]) -> str | None:
    """None, or why it failed."""
    try:
        work()
    except Exception as error:  # every error is a finding
        return without_secrets(f"{type(error).__name__}: {first_line(error)}")
    return None


def _write_run_dir(run_dir: Path, token: str) -> None:
    if not token_file(run_dir, token).exists():
        raise FileNotFoundError(f"a file written by the asking host is missing: {run_dir} is another directory here")
    _write_beside(run_dir)


def _write_beside(folder: Path) -> None:
    """Write and remove a file where a folder is or will be."""
    own = nearest(folder) / f".pldr-doctor-{uuid.uuid4().hex}"
    own.write_bytes(b"pldr")
    own.unlink()


def _write_url(url: str) -> None:
    from pipeline.io import remote, storage

    probe = join(url, f".pldr-doctor-{uuid.uuid4().hex}")
    storage.publish_bytes(probe, b"pldr")
    filesystem, path = remote.filesystem_of(probe)
    filesystem.rm_file(path)


def _ask_mlflow(uri: str) -> None:
    from pipeline.tracking.client import client

    client(uri).search_experiments(max_results=1)


def _torch() -> dict[str, Any]:
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus else None  # type: ignore[no-untyped-call]
    return {"gpus": gpus, "cuda": torch.version.cuda, "nccl": nccl}


def _driver() -> dict[str, Any] | None:
    """NVIDIA's driver and how many GPUs it sees; None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return {"error": "nvidia-smi does not finish within 30 s"}
    if done.returncode:
        return {"error": " ".join((done.stderr or done.stdout).split())[:200]}
    rows = [line.split(", ", 1) for line in done.stdout.strip().splitlines()]
    return {"version": rows[0][0] if rows else None, "gpus": len(rows)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code() -> str:
    """A hash over our source files: installed from a checkout, the version does not identify it."""
    digest = hashlib.sha256()
    for part in PARTS:
        folder = Path(__file__).parents[3] / part
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder.parent)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _free(folder: str) -> int | None:
    """Free bytes where a folder is or will be."""
    try:
        return shutil.disk_usage(nearest(Path(folder))).free
    except OSError:
        return None


if __name__ == "__main__":
    question = json.load(sys.stdin)
    os.environ.update(question.pop("environment", {}))
    os.environ.setdefault("PLDR_RETRIES", "1")  # fail fast
    print(json.dumps(facts(question)))
