"""vLLM's OpenAI server with an export, asked by the official client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.inference.runtime import Bundle
from pldr_model.generation import generate
from tests.helpers.expected import FIRST, Case
from tests.helpers.vllm import needs_vllm, server

openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.slow, needs_vllm, pytest.mark.timeout(1800)]
TOLERANCE = 1e-5
ROUNDING = 1e-6  # of a log-probability's own size: the tiny, untrained model has some of -30
IDS = {"return_token_ids": True}  # vLLM's extension


@pytest.fixture(scope="module")
def client(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with server(export, tmp_path_factory.mktemp("server") / "server.log", "--trust-remote-code") as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300)


@pytest.fixture(scope="module")
def new(cases: list[Case]) -> int:
    return max(len(case.new) for case in cases)


def ask(client: Any, prompt: Any, **settings: Any) -> Any:
    return client.completions.create(model="pldr", prompt=prompt, **{"temperature": 0, **settings})


def test_prompts_in_one_request(client: Any, cases: list[Case], new: int) -> None:
    answer = ask(client, [case.prompt for case in cases], max_tokens=new, logprobs=0, extra_body=IDS)
    assert [choice.token_ids for choice in answer.choices] == [case.new for case in cases]
    for choice, case in zip(answer.choices, cases, strict=True):
        assert choice.logprobs.token_logprobs == pytest.approx(
            case.logprobs[len(case.prompt) :], abs=TOLERANCE, rel=ROUNDING
        )
    assert answer.usage.prompt_tokens == sum(len(case.prompt) for case in cases)


def test_streaming(client: Any, cases: list[Case], new: int) -> None:
    whole = ask(client, cases[0].prompt, max_tokens=new).choices[0]
    chunks = list(ask(client, cases[0].prompt, max_tokens=new, stream=True))
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.text and sum(map(bool, pieces)) > 3
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_echo_gives_the_prompts_log_probabilities(client: Any, cases: list[Case]) -> None:
    for case in cases[:4]:
        choice = ask(client, case.prompt, max_tokens=4, echo=True, logprobs=0).choices[0]
        end = len(case.prompt) + min(4, len(case.new))
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(case.logprobs[1:end], abs=TOLERANCE, rel=ROUNDING)


def test_stop(client: Any, cases: list[Case], new: int) -> None:
    text = ask(client, cases[0].prompt, max_tokens=new).choices[0].text
    stop = text[len(text) // 2 :][:3]
    choice = ask(client, cases[0].prompt, max_tokens=new, stop=[stop]).choices[0]
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"


def test_seed_and_n(client: Any, cases: list[Case], new: int) -> None:
    def drawn(**settings: Any) -> list[list[int]]:
        answer = ask(client, cases[0].prompt, max_tokens=new, extra_body=IDS, **{"temperature": 1.5, **settings})
        return [choice.token_ids for choice in answer.choices]

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    three = drawn(seed=1, n=3)
    assert len(three) == 3 and len(set(map(tuple, three))) > 1
    with pytest.raises(openai.BadRequestError, match="n must be 1 when using greedy"):
        drawn(n=2, temperature=0)


def test_eight_clients_at_once(client: Any, cases: list[Case], new: int) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda case: ask(client, case.prompt, max_tokens=new, extra_body=IDS), cases * 2))
    assert [answer.choices[0].token_ids for answer in answers] == [case.new for case in cases * 2]


def test_a_text_is_continued_as_by_the_bundle(client: Any, bundle: Bundle, cases: list[Case], new: int) -> None:
    """Up to the first special token, which is written differently: an untrained model emits them, a trained one does not."""
    compared = 0
    for text in (bundle.tokenizer.decode(case.prompt) for case in cases):
        prompt = bundle.tokenizer.encode(text)
        (ids,) = generate(bundle.model, [prompt], max_new_tokens=new)
        plain = next((at for at, token in enumerate(ids) if token < FIRST), len(ids))
        if plain == 0:
            continue
        answer = ask(client, text, max_tokens=plain)
        assert answer.usage.prompt_tokens == len(prompt)
        assert [answer.choices[0].text] == bundle.generate([text], max_new_tokens=plain)
        compared += plain
    assert compared > 20


def test_a_prompt_over_the_context_is_refused(client: Any, bundle: Bundle) -> None:
    with pytest.raises(openai.BadRequestError, match="context length|max_model_len|maximum"):
        ask(client, [4] * (bundle.config.context_length + 1), max_tokens=1)


def test_two_data_parallel_processes(export: Path, cases: list[Case], new: int, tmp_path: Path) -> None:
    with server(export, tmp_path / "server.log", "--trust-remote-code", "--data-parallel-size", "2") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda case: ask(client, case.prompt, max_tokens=new, extra_body=IDS), cases))
    assert [answer.choices[0].token_ids for answer in answers] == [case.new for case in cases]
    assert all(f"EngineCore_DP{rank}" in (tmp_path / "server.log").read_text() for rank in range(2))
