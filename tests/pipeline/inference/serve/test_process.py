"""`pldr serve` as a process, asked by the official client and by sockets that misbehave."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.inference.opened import OpenModel
from pipeline.inference.runtime import Bundle
from pipeline.inference.serve.connection import bind
from tests.helpers.serving import Served, serving

openai = pytest.importorskip("openai")
KEY = "a-secret-of-this-test"


@pytest.fixture(scope="module")
def served(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "key").write_text(f"{KEY}\n")
    with serving(bundle_folder, folder / "log", "--api-key-file", str(folder / "key"), "--max-body-mib", "1") as served:
        yield served
        assert served.process.poll() is None
        assert served.stop() == 0  # SIGTERM: done, not failed
        log = (folder / "log").read_text()
        assert "Traceback" not in log and KEY not in log and "the quick" not in log


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, timeout=120, max_retries=0)


def test_the_official_client_gets_what_the_bundle_says(client: Any, bundle: Bundle, opened: OpenModel) -> None:
    (expected,) = bundle.generate(["the quick"], max_new_tokens=12)
    answer = client.completions.create(model="tiny", prompt="the quick", max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected and answer.system_fingerprint == opened.sha256
    stream = client.completions.create(model="tiny", prompt="the quick", max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    (drawn,) = bundle.generate(["the quick"], max_new_tokens=12, temperature=0.9, top_k=7, seed=3)
    settings: dict[str, Any] = {"temperature": 0.9, "seed": 3, "extra_body": {"top_k": 7}}
    assert (
        client.completions.create(model="tiny", prompt="the quick", max_tokens=12, **settings).choices[0].text == drawn
    )
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_the_official_client_understands_refusals(served: Served, client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.NotFoundError, match="no chat model"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    stranger = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="a" * (1 << 20))
    assert caught.value.status_code == 413


def test_sockets_that_misbehave(served: Served, client: Any) -> None:
    """Each is answered or closed, and the next request works."""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    raw = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"X" * 70_000,
        head.encode() + b"Content-Length: 10\r\nContent-Length: 11\r\n\r\n{}",
        head.encode() + b"Content-Length: -5\r\n\r\n",
        head.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        head.encode() + b"Content-Length: 1000\r\n\r\n{",  # and goes
        head.encode() + b"Content-Length: 999999999999\r\n\r\n",
    ]
    for data in raw:
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while answer := connection.recv(65536):
                assert b"Traceback" not in answer and not answer.startswith(b"HTTP/1.1 5")
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens > 0


def test_the_benchmark(
    served: Served, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.bench.serve import bench

    monkeypatch.setenv("PLDR_API_KEY", KEY)
    found = bench(url=served.url, bundle=str(bundle_folder), clients=[2], report=print)
    assert found["clients"][2]["requests_s"] > 0 and found["clients"][2]["tokens_s"] > 0
    assert "2 clients" in capsys.readouterr().out
    with pytest.raises(UserError, match="no OpenAI-compatible server"):
        bench(url="http://127.0.0.1:9", bundle=str(bundle_folder), clients=[1], report=print)


def test_a_port_that_is_taken(served: Served, bundle_folder: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "serve", str(bundle_folder), "--port", str(served.port)]
    other = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "--port" in other.stderr


def test_a_port_that_is_taken_by_a_server_that_still_starts() -> None:
    first = bind("127.0.0.1", 0)
    with first, pytest.raises(UserError, match="in use"):
        bind("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--max-concurrency", "0"], "--max-concurrency"),
        (["--timeout", "-1"], "--timeout"),
        (["--port", "99999"], "--port"),
        (["--engine", "vllm"], "--vllm-python"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere: No such file"),
        (["--api-key-file", sys.executable], "holds no token"),  # bytes that are no text
        (["--max-body-mib", "1e-9"], "--max-body-mib"),
        (["--vllm-python", "/nowhere"], "--vllm-python /nowhere"),
        (["--host", "192.0.2.1"], "--host"),
    ],
)
def test_wrong_usage_is_one_line(
    bundle_folder: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.cli import main

    assert main(["serve", str(bundle_folder), "--port", "0", *options]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and problem in error
    assert os.environ.get("PLDR_API_KEY") is None and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
