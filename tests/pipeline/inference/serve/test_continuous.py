"""transformers' continuous batching behind the server: the answers are those of the bundle, whoever else is served."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from pipeline.errors import UserError
from pipeline.inference.opened import OpenModel
from pipeline.inference.runtime import Bundle
from pipeline.inference.serve.app import Server
from pipeline.inference.serve.continuous import ContinuousEngine
from pipeline.inference.serve.engine import DecodeRequest, EngineError, Token
from pipeline.inference.serve.limits import Limits
from pldr_model.generation import generate
from tests.helpers.expected import logprobs
from tests.helpers.serving import until

PROMPTS = ["the quick", "a", "jumps over the lazy dog and ", "pack my box with"]
DRAWN = {"temperature": 1.0, "top_p": 0.9, "seed": 5}


@pytest.fixture(scope="module")
def server(opened: OpenModel) -> Server:
    return Server({"tiny": ContinuousEngine(opened, max_sequences=64)}, opened, Limits(max_sequences=64))


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[TestClient]:
    with TestClient(server.app) as client:
        end = time.monotonic() + 120
        while client.get("/health").status_code != 200:
            assert time.monotonic() < end and server.failed is None, server.failed
            time.sleep(0.02)
        yield client


def ask(client: TestClient, prompt: Any, **settings: Any) -> Any:
    answer = client.post("/v1/completions", json={"prompt": prompt, "temperature": 0, "max_tokens": 12, **settings})
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts(answer: Any) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        DRAWN,
        {"temperature": 0.7, "top_k": 3, "seed": 1, "stop": ["e", "qu"]},
        {"repetition_penalty": 1.8},
        {"temperature": 1.5, "min_p": 0.2, "repetition_penalty": 1.3, "seed": 2},
    ],
)
def test_answers_are_those_of_the_bundle(client: TestClient, bundle: Bundle, settings: dict[str, Any]) -> None:
    expected = bundle.generate(PROMPTS, max_new_tokens=12, **settings)
    assert texts(ask(client, PROMPTS, **settings)) == expected
    assert [texts(ask(client, prompt, **settings))[0] for prompt in PROMPTS] == expected
    ids = [bundle.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert texts(ask(client, ids, **settings)) == expected
    assert texts(ask(client, ids[0], **settings)) == expected[:1]


def test_choices_of_one_prompt_differ_and_do_not_depend_on_the_others(client: TestClient, bundle: Bundle) -> None:
    several = ask(client, PROMPTS[:2], n=3, **DRAWN)
    assert [choice["index"] for choice in several["choices"]] == list(range(6))
    expected = bundle.generate([prompt for prompt in PROMPTS[:2] for _ in range(3)], max_new_tokens=12, **DRAWN)
    assert texts(several) == expected and len(set(expected[:3])) > 1
    assert texts(ask(client, PROMPTS[1], n=2, **DRAWN)) == expected[3:5]
    assert texts(ask(client, PROMPTS[1], temperature=1.0)) != texts(ask(client, PROMPTS[1], temperature=1.0)) or texts(
        ask(client, PROMPTS[1], temperature=1.0)
    ) != texts(ask(client, PROMPTS[1], temperature=1.0))  # without a seed each answer is drawn anew


def test_many_at_once_answer_as_one_after_the_other(server: Server, client: TestClient, bundle: Bundle) -> None:
    """32 sequences of different settings decode together; more than their cache has pages for at once."""
    engine = server.models.engines["tiny"]
    requests = [
        DecodeRequest(
            ids=[*bundle.tokenizer.encode(PROMPTS[index % 4]), 4 + index],
            max_tokens=8,
            temperature=(0.0, 1.0, 0.5)[index % 3],
            top_k=(0, 5)[index % 2],
            top_p=(1.0, 1.0, 0.9)[index % 3],
            min_p=(0.0, 0.1)[index % 8 == 7],
            repetition_penalty=(1.0, 1.5)[index % 5 == 4],
            seed=index,
            num_top=(None, 2)[index % 2],
        )
        for index in range(32)
    ]

    async def together() -> list[list[Token]]:
        return list(await asyncio.gather(*(decoded(engine, request) for request in requests)))

    async def one_by_one() -> list[list[Token]]:
        return [await decoded(engine, request) for request in requests]

    assert client.portal is not None
    alone = client.portal.call(one_by_one)
    crowded = client.portal.call(together)
    assert [[token.id for token in row] for row in crowded] == [[token.id for token in row] for row in alone]
    for row, other, request in zip(crowded, alone, requests, strict=True):
        if request.num_top is None:
            assert all(token.logprob is None for token in row)
        else:
            assert [token.logprob for token in row] == pytest.approx([token.logprob for token in other], abs=1e-4)
            assert all(len(token.top) == 2 for token in row)


async def decoded(engine: Any, request: DecodeRequest) -> list[Token]:
    return [token async for tokens in engine.decode(request) for token in tokens]


def test_a_stream_is_the_answer_in_pieces(client: TestClient) -> None:
    settings = {"n": 2, "logprobs": 1, "echo": True, **DRAWN}
    whole = ask(client, PROMPTS[:2], **settings)
    body = {
        "prompt": PROMPTS[:2],
        "max_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
        **settings,
    }
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1]) and len({event["id"] for event in events}) == 1
    for index, choice in enumerate(whole["choices"]):
        mine = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in mine) == choice["text"] and len(mine) > 3
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for key, values in choice["logprobs"].items():
            if key in ("tokens", "text_offset"):
                assert [value for piece in mine for value in piece["logprobs"][key]] == values


def test_log_probabilities_are_the_models(client: TestClient, bundle: Bundle) -> None:
    ids = bundle.tokenizer.encode(PROMPTS[2])
    answer = ask(client, ids, echo=True, logprobs=3, max_tokens=6)
    found = answer["choices"][0]["logprobs"]
    new = generate(bundle.model, [ids], max_new_tokens=6)[0]
    expected = logprobs(bundle, ids + new)
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected[1:], abs=1e-5)
    for name, value, best in zip(
        *(found[key][1:] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert best[name] == value and max(best.values()) >= value and len(best) in (3, 4)
    scored = ask(client, PROMPTS[2], echo=True, logprobs=0, max_tokens=0)  # only the prompt
    assert scored["choices"][0]["text"] == PROMPTS[2] and scored["usage"]["completion_tokens"] == 0
    assert scored["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected[1 : len(ids)], abs=1e-5)
    # Sampling changes what is drawn, and not how probable the model finds it.
    drawn = ask(client, ids, logprobs=0, max_tokens=6, **DRAWN)["choices"][0]["logprobs"]
    assert all(value <= 0 for value in drawn["token_logprobs"])


def test_an_answer_ends_at_the_context(client: TestClient, bundle: Bundle) -> None:
    answer = ask(client, PROMPTS[1], max_tokens=10_000)
    assert answer["usage"]["total_tokens"] == bundle.config.context_length
    assert answer["choices"][0]["finish_reason"] == "length"


def test_eos_ends_an_answer(client: TestClient, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"temperature": 1.5, "max_tokens": 30, "logprobs": 0}
    answers = [ask(client, PROMPTS[1], n=16, seed=seed, **settings) for seed in range(2)]
    ended = [choice for answer in answers for choice in answer["choices"] if choice["finish_reason"] == "stop"]
    assert ended, "no choice drew eos; take other seeds"
    assert all(choice["logprobs"]["tokens"][-1] == bundle.tokenizer.piece(3) for choice in ended)
    expected = bundle.generate([PROMPTS[1]] * 16, max_new_tokens=30, temperature=1.5, seed=0)
    assert texts(answers[0]) == expected


def test_the_live_model_is_not_what_the_certificate_is_about(opened: OpenModel) -> None:
    engine = ContinuousEngine(opened, max_sequences=4)
    app = Server({"tiny": engine, "tiny:live": engine}, opened, Limits(max_sequences=4)).app
    cached, live = TestClient(app).get("/v1/models").json()["data"]
    assert (cached["certified"], cached["caution"]) == (True, None)
    assert live["certified"] is False and "from each prompt" in live["caution"]


def test_what_identifies_the_model(client: TestClient, opened: OpenModel) -> None:
    answer = ask(client, "a", model="tiny")
    assert answer["system_fingerprint"] == opened.sha256 and answer["model"] == "tiny"
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny"] and models[0]["certified"] is True
    assert client.get("/v1/models/tiny").json() == models[0]
    assert client.get("/certificate").json() == opened.certificate
    for path in ("/v1/models/tinny", "/v1/models/"):
        assert client.get(path).status_code == 404
    refused = client.post("/v1/completions", json={"prompt": "a", "model": "tinny"})
    assert refused.status_code == 404 and "did you mean 'tiny'" in refused.json()["error"]["message"]
    chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})
    assert chat.status_code == 404 and "no chat model" in chat.json()["error"]["message"]


def test_tokens_and_back(client: TestClient, bundle: Bundle) -> None:
    text = PROMPTS[2]
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == bundle.tokenizer.encode(text) and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == bundle.config.context_length and len(found["token_strs"]) == found["count"]
    back = client.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": bundle.tokenizer.decode(found["tokens"])}
    for tokens in ([48], [-1], [True]):
        assert client.post("/detokenize", json={"tokens": tokens}).status_code == 400
    assert client.post("/tokenize", json={"prompt": "a" * (2 << 20)}).status_code == 400


def test_metrics_have_vllms_names(client: TestClient) -> None:
    ask(client, "a")
    page = client.get("/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
                 "generation_tokens_total", "request_success_total", "time_to_first_token_seconds_count",
                 "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count"):  # fmt: skip
        assert re.search(rf'^vllm:{name}{{.*model_name="tiny".*}} [0-9.]+$', page, re.MULTILINE), name


@contextlib.asynccontextmanager
async def engine_of(opened: OpenModel) -> AsyncIterator[ContinuousEngine]:
    engine = ContinuousEngine(opened, max_sequences=8)
    await engine.start()
    await until(lambda: engine.problem() is None)
    try:
        yield engine
    finally:
        await engine.stop()


def test_a_reader_that_leaves_frees_the_cache(opened: OpenModel) -> None:
    async def main() -> None:
        async with engine_of(opened) as engine:
            for _ in range(8):
                steps = engine.decode(DecodeRequest([5, 6], max_tokens=29))
                await anext(steps)
                await steps.aclose()
            waiting = asyncio.ensure_future(decoded(engine, DecodeRequest([5, 6], max_tokens=29)))
            await asyncio.sleep(0)
            waiting.cancel()
            await until(lambda: engine.load().running == engine.load().waiting == 0)
            assert not engine._choose.draws and not engine._manager.output_router.result_handlers
            assert len(await decoded(engine, DecodeRequest([5, 6], max_tokens=5))) == 5

    asyncio.run(main())


@pytest.mark.slow
def test_more_sequences_than_the_cache_holds(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine then takes some sequences back and reads them again: the tokens stay."""
    from pipeline.inference.serve import continuous

    monkeypatch.setattr(continuous, "memory_budget", lambda _: 1)

    async def main() -> None:
        async with engine_of(opened) as engine:
            requests = [
                DecodeRequest([4 + index, 9], max_tokens=29, temperature=1.0, seed=index) for index in range(12)
            ]
            crowded = await asyncio.gather(*(decoded(engine, request) for request in requests))
            assert all(row[-1].id == 3 or len(row) == 29 for row in crowded)
            assert crowded == [await decoded(engine, request) for request in requests]

    asyncio.run(main())


@pytest.mark.slow
def test_prompts_that_are_read_in_pieces(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass then holds new tokens of some sequences and pieces of other prompts."""
    from pipeline.inference.serve import continuous

    monkeypatch.setattr(continuous, "BATCH_TOKENS", 9)

    async def main() -> None:
        async with engine_of(opened) as engine:
            requests = [
                DecodeRequest([4 + index, 9, 7] * 6, max_tokens=9, temperature=index % 2, seed=index)
                for index in range(8)
            ]
            crowded = await asyncio.gather(*(decoded(engine, request) for request in requests))
            assert crowded == [await decoded(engine, request) for request in requests]
        expected = generate(opened.model, [request.ids for request in requests[::2]], max_new_tokens=9, eos_id=3)
        assert [[token.id for token in row] for row in crowded[::2]] == expected

    asyncio.run(main())


def test_prompts_are_scored_alike_beside_others(opened: OpenModel, bundle: Bundle) -> None:
    """While the engine's thread decodes."""

    async def main() -> None:
        async with engine_of(opened) as engine:
            prompts = [[4 + index, 9, 7, 30, 12, 5 + index] for index in range(20)]
            decoding = [asyncio.ensure_future(decoded(engine, DecodeRequest([5, 6], max_tokens=29))) for _ in range(16)]
            for prompt in prompts:
                found = [token.logprob for token in await engine.score(prompt, 1)]
                assert found[1:] == pytest.approx(logprobs(bundle, prompt)[1:], abs=1e-5)
            await asyncio.gather(*decoding)

    asyncio.run(main())


def test_logits_that_are_not_finite(opened: OpenModel) -> None:
    """The sequence ends with an error. Those that shared a pass with it get the tokens that they get without it."""
    damaged = replace(opened, held=copy.deepcopy(opened.model))
    with torch.no_grad():
        damaged.model.embedding.weight[40] = torch.nan

    async def main() -> None:
        requests = [DecodeRequest([4 + index, 6] * 9, max_tokens=8, temperature=1.0, seed=index) for index in range(6)]
        async with engine_of(opened) as engine:
            expected = [await decoded(engine, request) for request in requests]
        async with engine_of(damaged) as engine:
            for _ in range(3):
                bad, *good = await asyncio.gather(
                    decoded(engine, DecodeRequest([40, 5], max_tokens=4)),
                    *(decoded(engine, request) for request in requests),
                    return_exceptions=True,
                )
                assert isinstance(bad, UserError) and "NaN" in str(bad)
                assert good == expected

    asyncio.run(main())


def test_an_engine_that_dies_says_so(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with engine_of(opened) as engine:

            def fail(*_: Any) -> Any:
                raise RuntimeError("no memory")

            monkeypatch.setattr(engine._choose, "prepare_tensor_args", fail)
            with pytest.raises(EngineError, match="no memory"):
                await decoded(engine, DecodeRequest([5, 6], max_tokens=4))
            await until(lambda: engine.problem() is not None)
            with pytest.raises(EngineError):
                await decoded(engine, DecodeRequest([5, 6], max_tokens=4))

    asyncio.run(main())
