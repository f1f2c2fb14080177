"""`pldr serve` with many clients, bad clients, kills and signals: nothing hangs, and answers equal sequential ones."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.inference.runtime import Bundle
from pipeline.inference.serve.protocol import NEUTRAL, CompletionRequest
from tests.helpers.serving import Served, serving

openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
PROMPTS = ["the quick", "a", "jumps over the lazy dog and ", "pack my box with"]


@pytest.fixture(scope="module")
def served(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    with serving(bundle_folder, log) as served:
        yield served
        assert served.stop() == 0 and "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=600, max_retries=0)


def requests(count: int) -> list[dict[str, Any]]:
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.7, "stop": ["e"], "extra_body": {"min_p": 0.05, "repetition_penalty": 1.2}},
        {"logprobs": 2},
    ]
    return [
        {"model": "tiny", "prompt": PROMPTS[i % 4], "max_tokens": 12, "seed": i, "n": 1 + i % 2, **kinds[i // 4 % 4]}
        for i in range(count)
    ]


def ask(client: Any, request: dict[str, Any]) -> list[tuple[str, str]]:
    return [(choice.text, choice.finish_reason) for choice in client.completions.create(**request).choices]


def streamed(client: Any, request: dict[str, Any]) -> list[tuple[str, str]]:
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in client.completions.create(**request, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        reasons[choice.index] = choice.finish_reason
    return [(texts[index], reasons[index]) for index in sorted(texts)]


def running(served: Served) -> float:
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=60) as answer:
        (found,) = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found)


def wait_idle(served: Served) -> None:
    end = time.monotonic() + 120
    while running(served):
        assert time.monotonic() < end, "sequences of clients that are gone still run"
        time.sleep(0.05)


def test_64_clients_at_once_get_the_sequential_answers(client: Any, bundle: Bundle) -> None:
    wanted = requests(64)
    alone = [ask(client, request) for request in wanted]
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(lambda request: ask(client, request), wanted)) == alone
        assert list(pool.map(lambda request: streamed(client, request), wanted)) == alone
    greedy = bundle.generate(PROMPTS, max_new_tokens=12)
    assert [alone[i][0][0] for i in range(4)] == greedy


def raw_request(served: Served, body: dict[str, Any]) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(120)
    connection.connect(("127.0.0.1", served.port))
    data = json.dumps({"prompt": "the quick", **body}).encode()
    head = f"{HEAD}Content-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_clients_that_vanish(served: Served, client: Any) -> None:
    wanted = requests(4)
    alone = [ask(client, request) for request in wanted]
    for stream in (True, False):
        for delay in (0.0, 0.02, 0.1):
            gone = [raw_request(served, {"stream": stream, "n": 4, "max_tokens": 25}) for _ in range(16)]
            time.sleep(delay)
            for connection in gone:
                connection.close()
            assert [ask(client, request) for request in wanted] == alone
    wait_idle(served)


def test_readers_that_stand_still(served: Served, client: Any) -> None:
    """Their answers wait in small buffers; others are answered, and memory does not grow with them."""
    alone = [ask(client, request) for request in requests(8)]
    process = psutil.Process(served.process.pid)
    body = {"stream": True, "n": 8, "max_tokens": 25, "logprobs": 20, "echo": True}
    for connection in [raw_request(served, body) for _ in range(8)]:  # memory that is used once
        connection.close()
    wait_idle(served)
    before = process.memory_info().rss
    still = [raw_request(served, body) for _ in range(24)]
    time.sleep(1)
    assert [ask(client, request) for request in requests(8)] == alone
    assert process.memory_info().rss - before < 100 << 20
    whole = b""
    while b"[DONE]" not in whole:  # who reads again gets everything
        whole += still[0].recv(512)
    for connection in still:
        connection.close()
    wait_idle(served)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
GOOD = {
    "prompt": st.text(max_size=20)
    | st.lists(st.integers(-1, 50), max_size=5)
    | st.lists(st.text(max_size=5), max_size=3),
    "max_tokens": st.integers(0, 4),
    "temperature": st.floats(0, 2),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "logprobs": st.integers(0, 5),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=2),
}
KEYS = [*CompletionRequest.model_fields, *NEUTRAL]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.fixed_dictionaries({}, optional=GOOD) | st.dictionaries(st.sampled_from(KEYS), ANY, max_size=5) | ANY,
    damage=st.integers(0, 40),
)
def test_any_json_is_answered_and_never_with_a_500(served: Served, body: Any, damage: int) -> None:
    data = json.dumps(body).encode()
    data = data[:-damage] if damage > 35 else data
    request = urllib.request.Request(f"{served.url}/v1/completions", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = answer.read()
            assert answer.status == 200 and (b"[DONE]" in found or json.loads(found)["choices"])
            assert b'"error"' not in found
    except urllib.error.HTTPError as error:
        message = json.load(error)["error"]["message"]
        assert error.code in (400, 404, 413) and "\n" not in message and "Traceback" not in message


def test_kill_and_start_again(bundle_folder: Path, tmp_path: Path) -> None:
    """On the same port, while clients are connected; the answers stay."""
    with serving(bundle_folder, tmp_path / "first") as first:
        client = openai.OpenAI(base_url=f"{first.url}/v1", api_key="none", timeout=300, max_retries=0)
        alone = [ask(client, request) for request in requests(8)]
        left = [raw_request(first, {"stream": True, "n": 4}) for _ in range(8)]
        first.signal(signal.SIGKILL)
        first.process.wait()
        second = Served(bundle_folder, tmp_path / "second", port=first.port)
        try:
            second.wait_ready()
            assert [ask(client, request) for request in requests(8)] == alone
            assert second.stop() == 0
        finally:
            second.process.kill()
        for connection in left:
            connection.close()


def test_sigterm_drains(bundle_folder: Path, tmp_path: Path) -> None:
    """What was begun is answered in full; what comes later is refused; then it ends with 0."""
    with serving(bundle_folder, tmp_path / "log", "--drain", "120") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=300, max_retries=0)
        request = {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": 28, "n": 16, "seed": 1}
        alone = ask(client, request)
        with ThreadPoolExecutor(8) as pool:
            begun = [pool.submit(streamed if i % 2 else ask, client, request) for i in range(8)]
            while running(served) < 100:
                assert not all(one.done() for one in begun), "too fast to be seen"
            served.signal()
            statuses = set()
            while not all(one.done() for one in begun):
                statuses.add(served.health()[0])
            assert [one.result() for one in begun] == [alone] * 8
        assert statuses <= {503, 200, 0} and 503 in statuses
        assert served.process.wait(timeout=60) == 0


def test_a_second_signal_ends_at_once(bundle_folder: Path, tmp_path: Path) -> None:
    with serving(bundle_folder, tmp_path / "log", "--drain", "600") as served:
        with socket.create_connection(("127.0.0.1", served.port)) as never:
            never.sendall(HEAD.encode() + b"Content-Length: 9\r\n\r\n{")
            time.sleep(0.5)
            served.signal()
            while served.health()[0] != 503:
                time.sleep(0.05)
            time.sleep(1)
            assert served.process.poll() is None, "it waits for the request that has begun"
            served.signal()
            assert served.process.wait(timeout=60) == 0
        assert "a second signal" in (tmp_path / "log").read_text()
