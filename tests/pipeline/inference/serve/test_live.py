"""The live model as an engine: its tokens are those of `generate` with the prompt's own G_LM, one sequence at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.inference.serve.engine import DecodeRequest, EngineError, Token
from pipeline.inference.serve.live import LiveEngine
from pldr_model.decode.decoder import Decoder
from pldr_model.generation import generate
from pldr_model.model import PLDRModel
from pldr_model.sampling import seeds_of
from tests.helpers.models import make_model

PROMPT = [5, 9, 17, 30]


@pytest.fixture(scope="module")
def model() -> PLDRModel:
    """Not invariant: that G_LM is the prompt's own can be seen."""
    return make_model(gain=1.0).requires_grad_(False)


def with_engine(model: PLDRModel, work: Callable[[LiveEngine], Coroutine[Any, Any, Any]], eos_id: int = 3) -> Any:
    async def run() -> Any:
        engine = LiveEngine(model, eos_id=eos_id)
        assert engine.problem() is not None
        await engine.start()
        assert engine.problem() is None
        try:
            return await work(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


async def all_of(engine: LiveEngine, **settings: Any) -> list[Token]:
    settings = {"ids": PROMPT, "max_tokens": 12} | settings
    return [token for step in [step async for step in engine.decode(DecodeRequest(**settings))] for token in step]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.1, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.7},
        {"repetition_penalty": 1.8},
        {"temperature": 1.5, "min_p": 0.1, "repetition_penalty": 1.3},
    ],
)
def test_it_decodes_what_generate_does_with_the_prompts_own_G(model: PLDRModel, settings: dict[str, Any]) -> None:
    expected = generate(model, [PROMPT], max_new_tokens=12, seed=4, eos_id=3, **settings)[0]
    (seed,) = seeds_of([PROMPT], 4)
    found = with_engine(model, lambda engine: all_of(engine, seed=seed, **settings))
    assert [token.id for token in found] == expected
    cached = generate(model, [PROMPT], max_new_tokens=12, seed=4, g_lm=model.compute_g(torch.tensor([[7]]))[:, 0])[0]
    assert cached != expected or settings  # another G gives another text: the test can fail


def test_log_probabilities_are_those_of_the_live_model(model: PLDRModel) -> None:
    found = with_engine(model, lambda engine: all_of(engine, num_top=3, max_tokens=1))
    expected_V = model(torch.tensor([PROMPT]), padded=False)[0, -1].double().log_softmax(-1)
    best = expected_V.topk(3)
    assert found[0].id == int(best.indices[0]) and found[0].logprob == pytest.approx(float(best.values[0]), abs=1e-5)
    assert [id for id, _ in found[0].top] == best.indices.tolist()
    assert [p for _, p in found[0].top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert with_engine(model, lambda engine: all_of(engine, num_top=0))[0].top == ()
    assert with_engine(model, all_of)[0].logprob is None


def test_a_prompt_is_scored_with_its_complete_G(model: PLDRModel) -> None:
    found = with_engine(model, lambda engine: engine.score(PROMPT, 2))
    log_p_SV = model(torch.tensor([PROMPT]), padded=False)[0].double().log_softmax(-1)
    assert [token.id for token in found] == PROMPT and found[0].logprob is None
    for place, token in enumerate(found[1:]):
        assert token.logprob == pytest.approx(float(log_p_SV[place, PROMPT[place + 1]]), abs=1e-5)
        assert len(token.top) == 2


def test_one_decodes_at_a_time_and_the_others_get_their_turn(model: PLDRModel) -> None:
    async def work(engine: LiveEngine) -> None:
        alone = await all_of(engine)
        first, most = engine.decode(DecodeRequest(PROMPT, 12)), 0
        step = await anext(first)
        assert engine.load().running == 1
        tasks = [asyncio.ensure_future(all_of(engine)) for _ in range(3)]
        await asyncio.sleep(0.05)
        most = engine.load().waiting
        assert most == 3 and not any(task.done() for task in tasks)
        await first.aclose()  # the client is gone: the next one decodes
        assert [await task for task in tasks] == [alone] * 3 and step[0] == alone[0]
        assert engine.load().running == engine.load().waiting == 0

    with_engine(model, work)


def test_it_ends_with_eos_and_with_the_context(model: PLDRModel) -> None:
    all_12 = with_engine(model, all_of)
    eos = all_12[4].id
    found = with_engine(model, all_of, eos_id=eos)
    assert [t.id for t in found] == [t.id for t in all_12][: [t.id for t in all_12].index(eos) + 1]
    room = model.config.context_length - len(PROMPT)
    assert len(with_engine(model, lambda engine: all_of(engine, max_tokens=room), eos_id=-1)) == room


def test_logits_that_are_not_finite_are_the_clients_to_know(model: PLDRModel) -> None:
    broken = make_model()
    with torch.no_grad():
        broken.output.bias[5] = float("inf")
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        with_engine(broken, all_of)
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        with_engine(broken, lambda engine: engine.score(PROMPT, 1))


def test_stopping_ends_what_is_being_decoded(model: PLDRModel) -> None:
    async def work(engine: LiveEngine) -> None:
        decoding = engine.decode(DecodeRequest(PROMPT, 12))
        await anext(decoding)
        await engine.stop()
        with pytest.raises(EngineError, match="was stopped"):
            await anext(decoding)

    with_engine(model, work)


def test_what_torch_raises_is_one_line_of_the_engine(model: PLDRModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(Decoder, "prefill", fail)
    with pytest.raises(EngineError, match="^the live model failed: out of memory$"):
        with_engine(model, all_of)
