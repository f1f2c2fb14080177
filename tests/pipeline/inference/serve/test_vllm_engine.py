"""vLLM's server behind ours: the same protocol, the bundle's tokens, and no process that outlives us."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.inference.runtime import Bundle
from pldr_model.generation import generate
from tests.helpers.expected import logprobs
from tests.helpers.serving import Served, serving
from tests.helpers.vllm import PYTHON, needs_vllm

openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.slow, needs_vllm, pytest.mark.timeout(1800)]
PROMPTS = ["the quick", "a", "jumps over the lazy dog and ", "pack my box with"]


@pytest.fixture(scope="module")
def served(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The last test kills it."""
    folder = tmp_path_factory.mktemp("served")
    options = ("--engine", "vllm", "--vllm-python", str(PYTHON), "--max-concurrency", "32")
    with serving(bundle_folder, folder / "log", *options, XDG_CACHE_HOME=str(folder / "cache")) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=600, max_retries=0)


def texts(client: Any, prompt: Any, **settings: Any) -> list[str]:
    settings = {"temperature": 0, "max_tokens": 12, **settings}
    return [choice.text for choice in client.completions.create(model="tiny", prompt=prompt, **settings).choices]


def test_greedy_texts_are_the_bundles(client: Any, bundle: Bundle) -> None:
    assert texts(client, PROMPTS) == bundle.generate(PROMPTS, max_new_tokens=12)
    assert texts(client, PROMPTS, stop=["e", "qu"]) == bundle.generate(PROMPTS, max_new_tokens=12, stop=["e", "qu"])
    whole = bundle.generate(PROMPTS, max_new_tokens=100)  # to the context or eos
    assert texts(client, PROMPTS, max_tokens=100) == whole
    stream = client.completions.create(model="tiny", prompt=PROMPTS[1], max_tokens=100, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole[1]


def test_its_settings_are_those_of_the_bundle(client: Any, bundle: Bundle) -> None:
    """Where nothing is left to draw: greedy with a penalty, and the best token's share as min-p."""
    penalized = bundle.generate(PROMPTS, max_new_tokens=12, repetition_penalty=1.8)
    assert texts(client, PROMPTS, extra_body={"repetition_penalty": 1.8}) == penalized
    assert penalized != bundle.generate(PROMPTS, max_new_tokens=12)
    only_best = {"temperature": 1.5, "seed": 1, "extra_body": {"min_p": 1.0}}
    assert texts(client, PROMPTS, **only_best) == bundle.generate(PROMPTS, max_new_tokens=12)


def test_log_probabilities_are_the_bundles(client: Any, bundle: Bundle) -> None:
    ids = bundle.tokenizer.encode(PROMPTS[2])
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "echo": True, "logprobs": 3}
    found = client.completions.create(model="tiny", prompt=ids, **settings).choices[0].logprobs
    new = generate(bundle.model, [ids], max_new_tokens=6)[0]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(logprobs(bundle, ids + new)[1:], abs=1e-5)
    assert all(3 <= len(best) <= 4 for best in found.top_logprobs[1:])


def test_a_seed_is_reproducible_whoever_else_is_served(client: Any) -> None:
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 3, "n": 2}
    alone = [texts(client, prompt, **drawn) for prompt in PROMPTS]
    assert alone[0][0] != alone[0][1] or alone[1][0] != alone[1][1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: texts(client, prompt, **drawn), PROMPTS * 2)) == alone * 2


def test_no_process_outlives_a_kill(served: Served) -> None:
    """The last test of this module: it kills the server."""
    children = psutil.Process(served.process.pid).children(recursive=True)
    assert len(children) >= 3  # the guard, vLLM's server and its engine
    served.signal(signal.SIGKILL)
    served.process.wait()
    end = time.monotonic() + 60
    while left := [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < end, left
        time.sleep(0.2)
