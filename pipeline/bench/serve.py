"""How much a running server answers: `pldr bench serve --url URL --bundle BUNDLE`, beside the bundle itself in this process.

Any OpenAI-compatible server can be asked. N clients ask one request after the other, greedy, of the same prompts: token ids
drawn at random, half of the context, so that no two share a beginning. New tokens are counted as the server reports them.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import UserError

FIRST_ID = 4  # those below are special
SMALLEST = 16  # requests that one measurement has at least
ROUNDS = 4  # requests of each client


def bench(*, url: str, bundle: str, clients: Sequence[int], report: Callable[[str], None]) -> dict[str, Any]:
    """{"clients": {N: {"requests_s", "tokens_s", "median_s", "slowest_s"}}, "bundle": {"one", "together"} (tokens/s)}.

    Raises UserError if the server does not answer.
    """
    from pipeline.inference.runtime import Bundle

    loaded = Bundle.load(bundle)
    length = loaded.config.context_length // 2
    rng = random.Random(0)
    prompts = [[rng.randrange(FIRST_ID, loaded.config.vocab_size) for _ in range(length // 2)] for _ in range(64)]
    result: dict[str, Any] = {"url": url, "prompt_tokens": length // 2, "max_tokens": length, "clients": {}}
    for count in clients:
        found = asyncio.run(_ask_all(url, count, prompts, max_tokens=length))
        result["clients"][count] = found
        report(
            f"{count:>4} clients: {found['requests_s']:8.1f} requests/s {found['tokens_s']:9.0f} tokens/s   "
            f"median {found['median_s']:.3f} s, slowest {found['slowest_s']:.3f} s"
        )
    one, together = (_generate(loaded, prompts[:count], length) for count in (1, len(prompts)))
    result["bundle"] = {"one": one, "together": together}
    report(
        f"the bundle in this process: one prompt {one:.0f} tokens/s, {len(prompts)} together {together:.0f} tokens/s"
    )
    return result


def _generate(loaded: Any, prompts: list[list[int]], max_tokens: int) -> float:
    """New tokens a second."""
    from pldr_model.generation import generate

    began = time.perf_counter()
    new = generate(loaded.model, prompts, max_new_tokens=max_tokens, eos_id=loaded.generation["eos_id"])
    return sum(map(len, new)) / (time.perf_counter() - began)


async def _ask_all(url: str, clients: int, prompts: list[list[int]], *, max_tokens: int) -> dict[str, float]:
    import aiohttp

    key = os.environ.get("PLDR_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    rounds = max(ROUNDS, SMALLEST // clients)
    seconds: list[float] = []
    tokens = 0

    async def client(session: Any, number: int) -> None:
        nonlocal tokens
        for index in range(rounds):
            prompt = prompts[(number * rounds + index) % len(prompts)]
            body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
            asked = time.perf_counter()
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    raise UserError(f"{url}: answered {answer.status}: {(await answer.text())[:200]}")
                new = (await answer.json())["usage"]["completion_tokens"]
            tokens += new
            seconds.append(time.perf_counter() - asked)

    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:
            async with session.get(f"{url}/v1/models") as answer:
                model = (await answer.json())["data"][0]["id"]
            await client(session, 0)  # not timed
            seconds.clear()
            tokens, began = 0, time.perf_counter()
            await asyncio.gather(*(client(session, number) for number in range(clients)))
            whole = time.perf_counter() - began
    except (aiohttp.ClientError, KeyError, OSError) as error:
        raise UserError(f"--url {url}: no OpenAI-compatible server answers there ({type(error).__name__})") from None
    return {
        "requests_s": len(seconds) / whole,
        "tokens_s": tokens / whole,
        "median_s": statistics.median(seconds),
        "slowest_s": max(seconds),
    }
