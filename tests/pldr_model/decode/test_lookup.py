"""Drafts are what followed the last time, and what tries of them may cost is bounded; a row gets the tokens that it gets
without them."""

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pldr_model.config import ModelConfig
from pldr_model.decode.decoder import Decoder
from pldr_model.decode.lookup import COSTS, GRAMS, INCOME, MOST, START, Drafts, Pace
from pldr_model.generation import NotFiniteError, generate, generate_steps
from pldr_model.model import PLDRModel


def naive(tokens: list[int], count: int) -> list[int]:
    """By looking at every place in the row."""
    for size in GRAMS:
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[-size:]:
                found = list(tokens)
                for _ in range(count):
                    found.append(found[place])
                    place += 1
                return found[len(tokens) :]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 20))
def test_a_draft_is_what_followed_the_last_time(tokens: list[int], count: int) -> None:
    drafts = Drafts(tokens[:7])
    for token in tokens[7:]:
        drafts.find(count)
        drafts.append(token)
    assert drafts.find(count) == naive(tokens, count)


def test_a_period_goes_on_and_new_tokens_have_no_draft() -> None:
    assert Drafts([9, 5, 6, 7, 5, 6, 7]).find(7) == [5, 6, 7, 5, 6, 7, 5]
    assert Drafts([1, 1, 1]).find(4) == [1, 1, 1, 1]
    assert Drafts([1, 2, 3, 4]).find(4) == [] == Drafts().find(4)
    assert Drafts([7, 1, 2, 8, 9, 1, 2]).find(2) == [8, 9]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 31), st.booleans()), max_size=80))
def test_losses_are_bounded_whatever_is_kept(passes: list[tuple[int, bool]]) -> None:
    """Of any run of passes, the cost in steps is at most its tokens, INCOME of them, and what may be kept of earlier gains."""
    pace, costs, tokens = Pace(), [0.0], [0]
    for kept, found in passes:
        drafted = pace.count() if found else 0
        kept = min(kept, drafted)
        pace.passed(drafted, kept)
        costs.append(costs[-1] + (next(cost for width, cost in COSTS if drafted < width) if drafted else 1.0))
        tokens.append(tokens[-1] + kept + 1)
        for first in range(len(costs)):
            spent, got = costs[-1] - costs[first], tokens[-1] - tokens[first]
            assert spent <= got * (1 + INCOME) + (START if first == 0 else MOST) + 1e-9


def test_drafts_grow_while_they_are_kept_and_end_when_they_fail() -> None:
    pace, widths = Pace(), []
    for _ in range(4):
        widths.append(pace.count())
        pace.passed(widths[-1], widths[-1])
    assert widths == [2, 15, 31, 31]
    failed = 0
    while pace.count():
        pace.passed(pace.count(), 0)
        failed += 1
    assert failed < 8
    waits = 0
    while not pace.count():
        pace.passed(0, 0)
        waits += 1
    assert pace.count() == 2 and 0 < waits <= (COSTS[0][1] - 1) / INCOME + 1


CONFIG = ModelConfig(
    vocab_size=24, num_layers=2, num_heads=2, head_dim=8, context_length=96, A_dff=4, num_reslayerA=1, num_denseA=1
)
PROMPTS = [[5], [7, 8, 9, 7, 8, 9, 7, 8], list(range(4, 24)) * 2, [4, 4, 4, 4, 4]]
LIKING = 0.8
GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 0.25, "seed": 3}


@pytest.fixture(scope="module", params=["random", pytest.param("learned", marks=pytest.mark.slow)])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """Of a model in fp64 that likes to repeat itself."""
    return Decoder.of(repeating(request.param))


def repeating(g_source: Any) -> PLDRModel:
    """After most tokens it likes the next one best, 4 after 23; what was read before decides, too."""
    torch.manual_seed(1)
    model = PLDRModel(replace(CONFIG, g_source=g_source)).double().eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.output.weight.mul_(3)
        likes_VD = torch.nn.functional.layer_norm(model.embedding.weight, (CONFIG.d_model,))
        model.output.weight[4:] += LIKING * likes_VD[4:].roll(1, 0)
    return model


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The width of each pass that reads more than one token."""
    read, widths = Decoder.read, []

    def spy(self: Decoder, ids_BS: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        widths.append(ids_BS.shape[1])
        return read(self, ids_BS, *arguments, **options)

    monkeypatch.setattr(Decoder, "read", spy)
    return widths


@pytest.mark.parametrize(
    "how",
    [
        GREEDY,
        SAMPLED,
        {**SAMPLED, "temperature": 1.0, "top_k": 3},
        {**SAMPLED, "top_p": 0.9, "min_p": 0.01},
        {**SAMPLED, "repetition_penalty": 1.1},
        {**GREEDY, "repetition_penalty": 1.01},
    ],
    ids=str,
)
def test_tokens_are_those_without_drafts(decoder: Decoder, passes: list[int], how: dict[str, Any]) -> None:
    """In fp64, where one pass over many tokens gives the numbers of single steps. To the end of the context."""
    widest = 0
    for prompt in PROMPTS:
        plain = generate(decoder, [prompt], max_new_tokens=100, speculate=False, **how)
        passes.clear()
        assert generate(decoder, [prompt], max_new_tokens=100, speculate=True, **how) == plain
        assert len(prompt) + len(plain[0]) == CONFIG.context_length
        assert passes[0] == len(prompt)
        widest = max(widest, *passes[1:])
    assert widest >= (16 if how is GREEDY else 3)


def test_a_row_ends_inside_a_draft(decoder: Decoder) -> None:
    for how, prompt in ((GREEDY, PROMPTS[3]), (SAMPLED, PROMPTS[1])):
        (new,) = generate(decoder, [prompt], max_new_tokens=70, speculate=False, **how)
        for count in (1, 7, 18, 29):
            ended = {
                "max_new_tokens": {"max_new_tokens": count},
                "eos": {"max_new_tokens": 70, "eos_id": new[count]},
                "stop": {"max_new_tokens": 70, "stop": [new[count : count + 3]]},
                "predicate": {"max_new_tokens": 70, "stop": lambda _, so_far, count=count: len(so_far) == count},
            }
            for name, rule in ended.items():
                found = [generate(decoder, [prompt], speculate=on, **how, **rule) for on in (True, False)]
                assert found[0] == found[1], (name, count)


def test_each_token_is_handed_out_when_it_comes(decoder: Decoder, passes: list[int]) -> None:
    lengths = [len(new) for (new,) in generate_steps(decoder, [PROMPTS[1]], max_new_tokens=60, speculate=True)]
    assert lengths == list(range(1, 61)) and len(passes) > 1


def test_the_default_reads_ahead_for_one_row_and_never_for_several(decoder: Decoder, passes: list[int]) -> None:
    alone = [generate(decoder, [prompt], max_new_tokens=40)[0] for prompt in PROMPTS]
    assert len(passes) > len(PROMPTS)
    passes.clear()
    assert generate(decoder, PROMPTS, max_new_tokens=40) == alone and sorted(passes) == sorted(map(len, PROMPTS))
    assert generate(decoder, PROMPTS, max_new_tokens=40, memory=1) == alone  # one after another
    assert len(passes) > 2 * len(PROMPTS)


def test_logits_that_are_not_finite_end_a_row_where_they_come() -> None:
    model = repeating("random")
    (new,) = generate(model, [PROMPTS[1]], max_new_tokens=70, speculate=False)
    first = next(token for token in new if token not in PROMPTS[1])
    with torch.no_grad():
        model.embedding.weight[first] = torch.nan
    found = []
    for on in (True, False):
        with pytest.raises(NotFiniteError) as caught:
            generate(model, [PROMPTS[1]], max_new_tokens=70, speculate=on)
        found.append((caught.value.rows, caught.value.new))
    assert found[0] == found[1] == ({0: new.index(first) + 1}, [new[: new.index(first) + 1]])
