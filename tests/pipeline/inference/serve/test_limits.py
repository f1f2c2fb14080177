"""What the server refuses, and that nothing is left behind: rooms, time, clients that vanish or do not read."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pipeline.inference.opened import OpenModel
from pipeline.inference.serve import completions, limits
from pipeline.inference.serve.app import Server
from pipeline.inference.serve.limits import Limits
from pipeline.inference.serve.vllm_server import VllmEngine
from pipeline.inference.source import open_model
from tests.helpers.serving import Exchange, HeldEngine, exchange, until

Work = Callable[[Server, HeldEngine], Coroutine[Any, Any, None]]


@pytest.fixture
def run(opened: OpenModel) -> Callable[..., None]:
    """Do work with a server whose engine is held; afterwards nothing is held any more."""

    def run(work: Work, *, go: bool = False, fails: str | None = None, api_key: str | None = None, **most: Any) -> None:
        async def main() -> None:
            engine = HeldEngine(go=go, fails=fails)
            server = Server({"tiny": engine}, opened, Limits(**most), api_key=api_key)
            await work(server, engine)
            await until(lambda: engine.running == 0)
            assert (server.load.sequences, server.load.requests) == (0, 0)

        asyncio.run(main())

    return run


def error_of(found: Exchange, status: int) -> Any:
    assert found.status == status and found.ended, (found.status, found.answer)
    error = found.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


def test_a_body_that_is_too_large_is_refused_before_it_is_read(run: Callable[..., None]) -> None:
    async def work(server: Server, _: HeldEngine) -> None:
        taken = 0

        async def receive() -> dict[str, Any]:
            nonlocal taken
            taken += 1
            return {"type": "http.request", "body": b" " * 1000, "more_body": True}

        with pytest.raises(limits.ApiError) as caught:
            await limits.read_body(receive, {b"content-length": b"10001"}, 10_000)
        assert caught.value.status == 413 and taken == 0
        with pytest.raises(limits.ApiError):
            await limits.read_body(receive, {}, 10_000)  # chunked: no size is declared
        assert taken == 11
        large = exchange({"user": "x" * 20_000})
        assert "10000 bytes" in error_of(await large.run(server.app), 413)["message"]
        for size in ("-1", "1e3", "9" * 50):
            declared = exchange(headers={"content-type": "application/json", "content-length": size})
            error_of(await declared.run(server.app), 413)

    run(work, max_body=10_000)


def test_a_body_that_does_not_come(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.05)

    async def work(server: Server, _: HeldEngine) -> None:
        async def never() -> Any:
            await asyncio.Event().wait()

        with pytest.raises(limits.ApiError) as caught:
            await limits.read_body(never, {}, 10)
        assert caught.value.status == 408

    run(work)


def test_sequences_over_the_limit_wait_elsewhere(run: Callable[..., None]) -> None:
    async def work(server: Server, engine: HeldEngine) -> None:
        first = asyncio.ensure_future(exchange({"n": 3}).run(server.app))
        await until(lambda: engine.running == 3)
        found = await exchange({"n": 2}).run(server.app)
        assert "try again" in error_of(found, 429)["message"] and found.answer_headers["retry-after"] == "1"
        second = asyncio.ensure_future(exchange().run(server.app))
        await until(lambda: engine.running == 4)
        error_of(await exchange().run(server.app), 429)
        engine.go.set()
        assert [(await one).status for one in (first, second)] == [200, 200]
        assert (await exchange({"n": 4}).run(server.app)).status == 200

    run(work, max_sequences=4)


def test_a_request_that_never_fits_is_a_mistake(run: Callable[..., None]) -> None:
    async def work(server: Server, engine: HeldEngine) -> None:
        for data in ({"n": 5}, {"prompt": [[5]] * 5}, {"prompt": ["a"] * 3, "n": 2}, {"n": 10**15}):
            assert "at most 4" in error_of(await exchange(data).run(server.app), 400)["message"]
        assert engine.begun == 0

    run(work, max_sequences=4)


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit(run: Callable[..., None], stream: bool) -> None:
    async def work(server: Server, _: HeldEngine) -> None:
        found = await exchange({"stream": stream}).run(server.app)
        error = error_of(found, 408)
        assert "0.2 s" in error["message"] and found.answer_headers["x-should-retry"] == "false"

    run(work, timeout_s=0.2)


def test_the_time_limit_in_a_stream_is_an_event(run: Callable[..., None]) -> None:
    async def work(server: Server, engine: HeldEngine) -> None:
        engine.pause_at = 3
        found = await exchange({"stream": True, "max_tokens": 20}).run(server.app)
        assert len(found.events) == 4
        assert found.status == 200 and found.ended and found.events[-1]["error"]["code"] == "timeout"

    run(work, go=True, timeout_s=0.5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_stops_the_engine(run: Callable[..., None], stream: bool) -> None:
    async def work(server: Server, engine: HeldEngine) -> None:
        asked = asyncio.ensure_future((found := exchange({"stream": stream, "n": 2})).run(server.app))
        await until(lambda: engine.running == 2)
        found.gone.set()
        await asked
        assert found.status is None and engine.running == 0
        assert b'pldr:request_aborted_total{model_name="tiny"} 1.0' in server.metrics.render({})

    run(work)


def test_a_reader_that_stands_still_holds_up_nobody_and_is_left(run: Callable[..., None]) -> None:
    async def work(server: Server, engine: HeldEngine) -> None:
        slow = exchange({"stream": True, "max_tokens": 20}, reads=asyncio.Event())
        asked = asyncio.ensure_future(slow.run(server.app))
        await until(lambda: engine.running == 1)
        for _ in range(3):
            assert (await exchange({"max_tokens": 20}).run(server.app)).status == 200
        await asked  # the time limit
        assert not slow.answer and not slow.ended

    run(work, go=True, timeout_s=0.5)


def test_a_slow_reader_gets_everything(run: Callable[..., None]) -> None:
    async def work(server: Server, engine: HeldEngine) -> None:
        slow = exchange({"stream": True, "max_tokens": 20, "logprobs": 0}, reads=asyncio.Event())
        asked = asyncio.ensure_future(slow.run(server.app))
        assert slow.reads is not None
        while not asked.done():
            slow.reads.set()
            await asyncio.sleep(0)
            slow.reads.clear()
            await asyncio.sleep(0.005)
        whole = (await exchange({"max_tokens": 20}).run(server.app)).json
        assert "".join(event["choices"][0]["text"] for event in slow.events) == whole["choices"][0]["text"]

    run(work, go=True)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_a_500_without_a_traceback(run: Callable[..., None], stream: bool) -> None:
    async def work(server: Server, _: HeldEngine) -> None:
        error = error_of(await exchange({"stream": stream}).run(server.app), 500)
        assert error["code"] == "engine_failed" and "Traceback" not in error["message"]

    run(work, go=True, fails="out of memory")


def test_a_bug_is_a_500_that_tells_nothing(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(completions, "count_prompts", lambda _: 1 / 0)

    async def work(server: Server, _: HeldEngine) -> None:
        found = await exchange().run(server.app)
        error_of(found, 500)
        assert b"Zero" not in found.answer and "ZeroDivisionError" in caplog.text

    run(work)


def test_draining(run: Callable[..., None]) -> None:
    async def work(server: Server, engine: HeldEngine) -> None:
        asked = asyncio.ensure_future(exchange().run(server.app))
        await until(lambda: engine.running == 1)
        server.load.draining = True
        error = error_of(await exchange().run(server.app), 503)
        health = await Exchange(b"", path="/health", method="GET").run(server.app)
        assert error["code"] == "shutting_down" and health.status == 503 and health.json["status"] == "draining"
        engine.go.set()
        assert (await asked).status == 200  # what was begun is answered

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_of_draining_cuts_what_is_left(run: Callable[..., None], stream: bool) -> None:
    async def work(server: Server, engine: HeldEngine) -> None:
        asked = asyncio.ensure_future(exchange({"stream": stream}).run(server.app))
        await until(lambda: engine.running == 1)
        server.load.cut.set()
        error_of(await asked, 503)

    run(work)


def test_the_token(run: Callable[..., None]) -> None:
    async def work(server: Server, _: HeldEngine) -> None:
        def asked(*more: str, path: str = "/v1/completions", method: str = "POST") -> Exchange:
            headers = {"content-type": "application/json"} | ({"authorization": more[0]} if more else {})
            return exchange(headers=headers, path=path, method=method)

        for wrong in ((), ("Bearer wrong",), ("Bearer",), ("secret",), ("Basic secret",), ("Bearer secretsecret",)):
            found = await asked(*wrong).run(server.app)
            assert error_of(found, 401)["code"] == "invalid_api_key" and b"secret" not in found.answer
        for path in ("/metrics", "/v1/models", "/certificate"):
            error_of(await asked(path=path, method="GET").run(server.app), 401)
        assert (await asked("Bearer secret").run(server.app)).status == 200
        assert (await asked(path="/health", method="GET").run(server.app)).status == 200

    run(work, go=True, api_key="secret")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.2", 200),
        ("LocalHost:8000", 200),
        ("pldr.localhost", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("[evil.example]", 403),
    ],
)
def test_a_foreign_name_that_means_this_machine(opened: OpenModel, host: str, status: int) -> None:
    """DNS rebinding: to a browser, a page of that name is of the server's own origin."""

    async def main() -> None:
        for only_local in (True, False):
            server = Server({"tiny": HeldEngine()}, opened, Limits(), only_local=only_local)
            found = await exchange(method="GET", path="/v1/models", headers={"host": host}).run(server.app)
            assert found.status == (status if only_local else 200)
            if found.status != 200:
                assert "--api-key-file" in error_of(found, 403)["message"]

    asyncio.run(main())


def test_a_temperature_that_vllm_does_not_take(
    opened: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the request, and no failure of the engine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def main() -> None:
        engine = VllmEngine(opened, python=Path("python"), limits=Limits(), report=print)
        engine._ready = True  # it is never asked
        server = Server({"tiny": engine}, opened, Limits())
        for stream in (True, False):
            found = error_of(await exchange({"temperature": 2.5, "stream": stream}).run(server.app), 400)
            assert found["param"] == "temperature" and "2.5" in found["message"]

    asyncio.run(main())


def test_only_json_is_read(run: Callable[..., None]) -> None:
    async def work(server: Server, _: HeldEngine) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            error_of(await exchange(headers={"content-type": kind}).run(server.app), 415)
        kind = "application/json; charset=utf-8"
        assert (await exchange(headers={"content-type": kind}).run(server.app)).status == 200

    run(work, go=True)


def test_prompts_and_stop_strings(run: Callable[..., None]) -> None:
    async def work(server: Server, engine: HeldEngine) -> None:
        bad_prompts = ("", [], [[]], [""], ["a", 1], [1, "a"], [[5], "a"], [5, True], [5, 1.5], [-1], [48], [[5], [48]], {}, 5,
                       True, [None], [[None]], [[[5]]], "a" * 40, [5] * 32)  # fmt: skip
        for prompt in bad_prompts:
            error = error_of(await exchange({"prompt": prompt}).run(server.app), 400)
            assert error["param"] == "prompt", (prompt, error)
        for stop in (5, [""], "", ["a", 1], {}, ["a"] * 65, "x" * 1001, [["a"]], True):
            error = error_of(await exchange({"stop": stop}).run(server.app), 400)
            assert error["param"] == "stop", (stop, error)
        error_of(await exchange({"stream_options": {}}).run(server.app), 400)
        assert engine.begun == 0
        assert (await exchange({"stop": "a"}).run(server.app)).status == 200
        assert (await exchange({"stop": []}).run(server.app)).status == 200

    run(work, go=True)


def test_a_long_prompt_is_refused_by_its_size(run: Callable[..., None]) -> None:
    async def work(server: Server, _: HeldEngine) -> None:
        error = error_of(await exchange({"prompt": "a" * (3 << 20)}).run(server.app), 400)
        assert "no room in the context" in error["message"]

    run(work)


def test_before_the_engine_is_ready(run: Callable[..., None]) -> None:
    async def work(server: Server, engine: HeldEngine) -> None:
        engine.ready = False
        found = await exchange().run(server.app)
        assert error_of(found, 503)["code"] == "not_ready" and "retry-after" in found.answer_headers
        health = await Exchange(b"", path="/health", method="GET").run(server.app)
        assert health.status == 503 and "loaded" in health.json["problem"]

    run(work, go=True)


def test_every_kind_of_body_gets_an_answer_in_openais_form(run: Callable[..., None]) -> None:
    async def work(server: Server, _: HeldEngine) -> None:
        for body in (b"", b"{", b"[" * 10_000, b"\xff\xfe", b"null", json.dumps({"prompt": "a", "n": 1e400}).encode()):
            for chunk in (0, 3):
                error_of(await Exchange(body, chunk=chunk).run(server.app), 400)
        error_of(await Exchange(b"", path="/nothing", method="GET").run(server.app), 404)
        error_of(await Exchange(b"", method="GET").run(server.app), 405)

    run(work)


def test_an_uncertified_bundle_says_so_everywhere(make_bundle: Callable[..., Path]) -> None:
    opened = open_model(make_bundle(uncertified=True))

    async def main() -> None:
        server = Server({"tiny": HeldEngine()}, opened, Limits())
        health = (await Exchange(b"", path="/health", method="GET").run(server.app)).json
        (model,) = (await Exchange(b"", path="/v1/models", method="GET").run(server.app)).json["data"]
        for found in (health, model):
            assert found["certified"] is False and "UNCERTIFIED" in found["caution"]

    asyncio.run(main())
