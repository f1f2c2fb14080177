"""vLLM in a virtual environment of its own (`make vllm-venv`), for tests that run exports in it."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.network import free_port

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("PLDR_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
# What a CPU needs, and what keeps vLLM from calling home.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# For fp32 on a CPU; the context is the export's.
OPTIONS = [
    "--model-impl",
    "transformers",
    "--dtype",
    "float32",
    "--enforce-eager",
    "--block-size",
    "32",
    "--max-num-seqs",
    "32",
]

needs_vllm = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"no vLLM at {PYTHON}; make vllm-venv, or name its Python in PLDR_VLLM_PYTHON"
)


def environment(**more: str) -> dict[str, str]:
    """Without PYTHONPATH: what is in the virtual environment, and no code of ours."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **SETTINGS, **more}


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, as a person would; vLLM ends its engine itself."""
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def server(folder: Path, log: Path, *options: str, **variables: str) -> Iterator[str]:
    """vLLM's OpenAI server for an export as the model `pldr`; its address, when it answers."""
    port = free_port()
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "pldr",
               *OPTIONS, "--host", "127.0.0.1", "--port", str(port), *options]  # fmt: skip
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, env=environment(**variables), cwd=log.parent, stdout=stream, stderr=stream)
    try:
        for _ in range(2400):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        else:
            raise AssertionError(f"the server did not start: {log.read_text()[-4000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)
