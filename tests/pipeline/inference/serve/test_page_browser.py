"""The page in a headless Chromium: a person types, watches the text come, points at a token, and something goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.browser import Tab, open_tab
from tests.helpers.html_page import browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(browser() is None, reason="needs Chromium (apt install chromium)"),
]
Make = Callable[..., Path]
COMPLETION = "answers[{0}].completion.textContent"
FIELD = "document.getElementById('{0}')"


@contextlib.contextmanager
def started(*command: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's URL, which is in one of its lines, and its process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        yield "http://" + line.rpartition("http://")[2].strip().rstrip("/") + "/", process
    finally:
        process.kill()
        process.wait()


def with_page(folder: Path, url: str, work: Callable[[Tab], Coroutine[Any, Any, None]], **look: Any) -> None:
    """Do something with the page in a tab of its own."""

    async def run() -> None:
        async with open_tab(folder) as tab:
            await tab.look(**({"width": 1280} | look))
            await tab.open(url)
            await work(tab)

    asyncio.run(run())


async def generate(tab: Tab, prompt: str, **settings: Any) -> None:
    """Type a prompt and start, by the keyboard alone."""
    await tab.until("facts")
    for name, value in settings.items():
        await tab.value(f"{FIELD.format(name)}.value = {json.dumps(str(value))}")
    await tab.value(f"{FIELD.format('prompt')}.select()")
    await tab.type(prompt)
    await tab.key("Enter", control=True)


async def done(tab: Tab) -> None:
    await tab.until("!running")


def asked(url: str, **body: Any) -> dict[str, Any]:
    """The first choice of `/v1/completions`."""
    request = urllib.request.Request(
        f"{url}v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        choice: dict[str, Any] = json.load(answer)["choices"][0]
        return choice


def ready(url: str) -> None:
    """Wait for the engine."""
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}health", timeout=5)
            return
        time.sleep(0.2)
    raise AssertionError("not ready")


def test_a_person_types_streams_compares_and_points(make_bundle: Make, tmp_path: Path) -> None:
    """With the server that users start, cached beside live."""
    bundle = make_bundle(with_metric_learner=True)
    settings = {"max_tokens": 14, "temperature": 1, "seed": 5, "min_p": 0.01, "repetition_penalty": 1.2}
    with started("-m", "launch.cli", "serve", str(bundle), "--port", "0", "--watch", "1") as (url, _):
        ready(url)

        async def work(tab: Tab) -> None:
            await generate(tab, "the quick", **settings)
            await done(tab)
            name = await tab.value("facts.name")
            expected = asked(url, model=name, prompt="the quick", logprobs=5, **settings)
            live = asked(url, model=f"{name}:live", prompt="the quick", **settings)
            assert await tab.value(COMPLETION.format(0)) == expected["text"] != ""
            assert await tab.value(COMPLETION.format(1)) == live["text"] == expected["text"]
            await tab.value("showCurl()")
            said = await tab.value(f"{FIELD.format('curl')}.textContent")
            assert (
                'extra_body={"min_p":0.01,"repetition_penalty":1.2},' in said and '"min_p":0.01' in said.split("-d ")[1]
            )
            assert "agree on all" in await tab.value(f"{FIELD.format('compared')}.textContent")
            assert await tab.value("document.querySelectorAll('.diff').length") == 0

            await tab.point("answers[0].groups[2].span")
            await tab.until(f"!{FIELD.format('tip')}.hidden")
            tip = await tab.value(f"{FIELD.format('tip')}.textContent")
            logprobs = expected["logprobs"]
            own = await tab.value("answers[0].groups[2].tokens[0]")
            assert f"{logprobs['token_logprobs'][own]:.3f} nats" in tip and "Live G_LM: " in tip
            for name in logprobs["top_logprobs"][own]:
                assert name.replace(" ", "\N{OPEN BOX}") in tip
            await tab.screenshot(tmp_path / "wide.png", whole=False)

            await tab.value("answers[0].groups[0].span.focus()")
            await tab.key("ArrowRight")
            assert await tab.value("places.get(document.activeElement).index") == 1
            await tab.key("End")
            assert await tab.value("places.get(document.activeElement).index === answers[0].groups.length - 1")
            described = await tab.value("document.activeElement.getAttribute('aria-describedby')")
            assert described == "tip" and await tab.value(f"!{FIELD.format('tip')}.hidden")
            assert await tab.value("answers[0].completion.querySelectorAll('[tabindex=\"0\"]').length") == 1
            await tab.key("Escape")
            assert await tab.value(f"{FIELD.format('tip')}.hidden")

            await tab.value("refreshDrift()")
            drift = await tab.value("document.querySelector('dl.drift').textContent")
            assert "prompts checked" in drift and "above the allowed 1e-40" in drift
            for width in (420, 1280):
                for dark in (False, True):
                    await tab.look(width=width, dark=dark)
                    assert await tab.value("document.documentElement.scrollWidth <= innerWidth")
                    await tab.screenshot(tmp_path / f"{width}-{'dark' if dark else 'light'}.png")
            assert tab.problems == []
            assert all(one.startswith((url, "data:", "about:")) for one in tab.requested)

        with_page(tmp_path, url, work)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("wide.png", "420-light.png", "1280-dark.png"))


def test_a_model_that_is_not_invariant_shows_where_it_differs(
    make_bundle: Make, tiny: SimpleNamespace, text: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny.make_model(gain=1.0)
    bundle = make_bundle(model=model, certificate=tiny.certify(model, text), uncertified=True, with_metric_learner=True)
    with started("-m", "launch.cli", "serve", str(bundle), "--port", "0", "--watch", "1") as (url, _):
        ready(url)

        async def work(tab: Tab) -> None:
            await generate(tab, "the quick", max_tokens=12, temperature=0)
            await done(tab)
            texts = [await tab.value(COMPLETION.format(i)) for i in (0, 1)]
            assert texts[0] != texts[1]
            at = await tab.value("equal")
            assert f"differ from token {at + 1} on" in await tab.value(f"{FIELD.format('compared')}.textContent")
            marked = "answers[0].groups.filter(group => group.span.classList.contains('diff')).length"
            assert await tab.value(marked) == await tab.value("answers[0].groups.length") - at
            assert await tab.value(f"{FIELD.format('badge')}.textContent") == "not certified"
            await tab.until("(refreshDrift(), document.querySelector('dl.drift .fail'))")

        with_page(tmp_path, url, work)


@contextlib.asynccontextmanager
async def streaming(tab: Tab, least: int) -> AsyncIterator[None]:
    """While the answer comes: at least so many tokens are there, and not all of them."""
    await tab.until(f"answers.length && answers[0].tokens.length >= {least}")
    assert await tab.value("running !== null")
    yield


def test_the_text_streams_and_escape_stops_it(make_bundle: Make, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    prompt = "the <b>"
    with started("-m", "tests.helpers.page_server", str(make_bundle()), name) as (url, _):

        async def work(tab: Tab) -> None:
            await generate(tab, prompt, max_tokens=25, temperature=0)
            async with streaming(tab, 3):
                early = await tab.value(COMPLETION.format(0))
                assert await tab.value("document.querySelector('.answer').classList.contains('busy')")
            await tab.until("answers[0].tokens.length >= 6")
            await tab.key("Escape")
            await done(tab)
            stopped = await tab.value(COMPLETION.format(0))
            whole = asked(url, prompt=prompt, max_tokens=25, temperature=0)["text"]
            assert (
                0 < len(early) < len(stopped) < len(whole) and whole.startswith(stopped) and stopped.startswith(early)
            )
            assert "stopped by you" in await tab.value("answers[0].state.textContent")
            assert await tab.value(f"{FIELD.format('status')}.textContent") == "Stopped"
            assert await tab.value("document.querySelector('.given').textContent") == prompt
            assert await tab.value("document.querySelectorAll('img[src=x], .answer b').length") == 0
            assert await tab.value("document.querySelector('h1').textContent") == name
            assert tab.problems == []
            await generate(tab, prompt, max_tokens=4)  # and it can begin again
            await done(tab)
            assert await tab.value("answers[0].tokens.length") == 4

        with_page(tmp_path, url, work)


def test_what_goes_wrong_is_said(make_bundle: Make, tmp_path: Path) -> None:
    """A wrong setting, a prompt that is too long, a busy server, and one that ends in the middle of an answer."""
    problem = f"{FIELD.format('problem')}.textContent"
    with started("-m", "tests.helpers.page_server", str(make_bundle()), "slow") as (url, process):

        async def work(tab: Tab) -> None:
            await generate(tab, "the", top_p=3)
            assert (await tab.value(problem)).startswith("Top-p: ")
            assert await tab.value("document.activeElement.id") == "top_p"
            await generate(tab, "zebra " * 40, top_p=1)
            await done(tab)
            assert "The server refused this request (400): prompts[0]: " in await tab.value(problem)
            assert await tab.value("answers.length") == 0
            slow = asyncio.ensure_future(asyncio.to_thread(asked, url, prompt="the", max_tokens=25, temperature=0))
            await asyncio.sleep(0.5)
            await generate(tab, "the")
            await done(tab)
            assert "The server is busy (429): " in await tab.value(problem)
            await slow
            await generate(tab, "the", max_tokens=25, temperature=0)
            async with streaming(tab, 2):
                process.kill()
            await done(tab)
            assert "The answer broke off: the server ended" in await tab.value(problem)
            assert await tab.value("answers[0].tokens.length") >= 2  # what came stays
            await generate(tab, "the")
            await done(tab)
            assert "does not answer. It may have ended" in await tab.value(problem)

        with_page(tmp_path, url, work)


def test_a_token_is_asked_for_and_kept_in_the_tab(make_bundle: Make, tmp_path: Path) -> None:
    with started("-m", "tests.helpers.page_server", str(make_bundle()), "closed", "a-secret") as (url, _):

        async def work(tab: Tab) -> None:
            for token, accepted in (("wrong", False), ("a-secret", True)):
                await tab.until(f"!{FIELD.format('login')}.hidden")
                await tab.value(f"{FIELD.format('token')}.select()")
                await tab.type(token)
                await tab.key("Enter")
                if not accepted:
                    await tab.until(f"!{FIELD.format('problem')}.hidden")
            await generate(tab, "the", max_tokens=3)
            await done(tab)
            assert await tab.value("answers[0].tokens.length") == 3
            assert await tab.value("[Object.keys(sessionStorage).join(), localStorage.length, document.cookie]") == [
                "token",
                0,
                "",
            ]
            await tab.open(url)  # again, in the same tab
            await tab.until("facts")
            assert await tab.value(f"{FIELD.format('login')}.hidden")

        with_page(tmp_path, url, work)
