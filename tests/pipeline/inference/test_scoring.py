"""Scores are those of one full pass for each request, however requests are read together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pipeline.errors import UserError
from pipeline.inference.grouping import batches, groups, windows
from pipeline.inference.scoring import Request, Scored, Scorer
from pldr_model.decode.decoder import Decoder
from pldr_model.model import PLDRModel, to_constant_g
from tests.helpers.models import CONFIG, make_model

EOS, C, V = CONFIG.eos_id, CONFIG.context_length, CONFIG.vocab_size


@pytest.fixture(scope="module")
def live() -> PLDRModel:
    """Its G depends on the input; in fp64."""
    return make_model(gain=1.0).double()


@pytest.fixture(scope="module")
def constant(live: PLDRModel) -> PLDRModel:
    g_lm = live.compute_g(torch.arange(4, 20).unsqueeze(0)).mean(dim=1)
    return to_constant_g(live, g_lm.detach())


def naive(model: PLDRModel, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[float], bool]:
    """One pass by itself, all logits, log_softmax."""
    ids = [*(context or [EOS]), *continuation][-(C + 1) :]
    with torch.inference_mode():
        logits_SV = model(torch.tensor([ids[:-1]]), padded=False)[0, -len(continuation) :]
    target_S = torch.tensor(continuation)
    logprobs = logits_SV.log_softmax(dim=-1).gather(1, target_S.unsqueeze(1)).squeeze(1)
    return logprobs.tolist(), bool((logits_SV.argmax(dim=-1) == target_S).all())


def assert_same(found: list[Scored], expected: list[tuple[list[float], bool]]) -> None:
    assert [one.num_tokens for one in found] == [len(logprobs) for logprobs, _ in expected]
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]
    for one, (logprobs, _) in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(sum(logprobs), abs=1e-10)


# Few different ids, and beginnings that are used again: sequences that share much, little, everything.
token = st.integers(4, 6)
beginnings = st.lists(st.lists(token, max_size=C + 8), min_size=1, max_size=3)


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    contexts = draw(beginnings)
    continuation = st.lists(st.one_of(token, st.integers(0, V - 1)), min_size=1, max_size=C)
    short = st.lists(token, min_size=1, max_size=2)
    tail = st.lists(token, max_size=3)
    one = st.tuples(st.sampled_from(contexts), tail, st.one_of(short, continuation))
    return [(context + end, answer) for context, end, answer in draw(st.lists(one, min_size=1, max_size=12))]


@settings(max_examples=60, deadline=None)
@given(requests(), st.sampled_from([1, 40_000, 1 << 29]))
def test_together_is_alone_is_a_full_pass(
    constant: PLDRModel, live: PLDRModel, asked: list[Request], memory: int
) -> None:
    expected = [naive(constant, *request) for request in asked]
    scorer = Scorer(constant, eos_id=EOS, memory=memory)
    assert_same(scorer.score(asked), expected)
    assert_same([scorer.score([request])[0] for request in asked], expected)
    given_g = Scorer(live, g_lm=constant.constant_g(), eos_id=EOS, memory=memory)
    assert_same(given_g.score(asked), expected)


@settings(max_examples=30, deadline=None)
@given(requests(), st.sampled_from([1, 1 << 29]))
def test_a_live_model_computes_g_from_each_request(live: PLDRModel, asked: list[Request], memory: int) -> None:
    assert_same(Scorer(live, live=True, eos_id=EOS, memory=memory).score(asked), [naive(live, *one) for one in asked])


def test_a_live_g_knows_the_answer(live: PLDRModel) -> None:
    """The leak: the first token's score depends on those after it. A cached G cannot do that."""
    context, answers = [5, 6, 7, 8], ([9, 10, 11], [9, 20, 30])
    leaking = Scorer(live, live=True, eos_id=EOS)
    first = {leaking._run([(context, answer)], None, "r").logprobs[0][0] for answer in answers}
    assert len(first) == 2
    cached = Scorer(live, g_lm=live.compute_g(torch.tensor([context])).mean(dim=1), eos_id=EOS)
    runs = cached._run([(context, answer) for answer in answers], None, "r")
    assert runs.logprobs[0][0] == runs.logprobs[1][0]


def test_greedy_is_what_decoding_gives(constant: PLDRModel) -> None:
    from pldr_model.generation import generate

    contexts = [[5, 6, 7], [9], [5, 6, 7, 8, 9, 10]]
    new = generate(constant, contexts, max_new_tokens=5)
    scorer = Scorer(constant, eos_id=EOS)
    assert all(one.greedy for one in scorer.score(list(zip(contexts, new, strict=True))))
    changed = [[*answer[:-1], 4 + (answer[-1] - 3) % (V - 4)] for answer in new]
    assert not any(one.greedy for one in scorer.score(list(zip(contexts, changed, strict=True))))


def test_probabilities_of_all_answers_sum_to_one(constant: PLDRModel) -> None:
    scored = Scorer(constant, eos_id=EOS).score([([7, 8], [answer]) for answer in range(V)])
    assert math.fsum(math.exp(one.logprob) for one in scored) == pytest.approx(1, abs=1e-12)
    assert sum(one.greedy for one in scored) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, V - 1), max_size=3 * C + 3), st.sampled_from([1, 1 << 29]))
def test_a_text_of_any_length_is_scored_token_by_token(constant: PLDRModel, ids: list[int], memory: int) -> None:
    found = Scorer(constant, eos_id=EOS, memory=memory).token_logprobs(ids)
    expected = [value for pair in windows(ids, first=EOS, context_length=C) for value in naive(constant, *pair)[0]]
    assert found == pytest.approx(expected, abs=1e-10) and len(found) == len(ids)


@given(st.integers(0, 70), st.integers(1, 20))
def test_windows_are_those_of_lm_eval(length: int, context_length: int) -> None:
    """Each token is predicted once; every window but the first of a short text is full."""
    ids = list(range(100, 100 + length))
    pairs = windows(ids, first=EOS, context_length=context_length)
    assert [token for _, predicted in pairs for token in predicted] == ids
    text = [EOS, *ids]
    for context, predicted in pairs:
        whole = [*context, *predicted]
        end = text.index(predicted[-1]) + 1
        assert whole == text[end - len(whole) : end]
        assert len(whole) == min(context_length, length) + 1


def test_several_texts_keep_their_order(constant: PLDRModel) -> None:
    scorer = Scorer(constant, eos_id=EOS)
    texts = [[5, 6, 7], [], [5] * (2 * C + 3), [5, 6, 7]]
    assert scorer.rolling(texts) == [pytest.approx(scorer.token_logprobs(ids), abs=1e-10) for ids in texts]


def test_progress_counts_every_request_once(constant: PLDRModel) -> None:
    asked: list[Request] = [([5] * 12, [6]), ([5] * 12, [7, 8]), ([5] * 12, [6]), ([9], [4]), ([], [4, 5])]
    seen: list[int] = []
    Scorer(constant, eos_id=EOS, memory=1).score(asked, progress=seen.append)
    assert sum(seen) == len(asked) and len(seen) > 1
    assert Scorer(constant, eos_id=EOS).score([]) == []


def test_a_beginning_is_read_once_and_only_asked_logits_are_made(
    constant: PLDRModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, made = [], []
    pass_, logits = Decoder.read, Decoder.logits
    monkeypatch.setattr(
        Decoder, "read", lambda self, ids, *rest, **given: read.append(ids.numel()) or pass_(self, ids, *rest, **given)
    )
    monkeypatch.setattr(Decoder, "logits", lambda self, x: made.append(x.shape[0]) or logits(self, x))
    context = list(range(5, 25))
    Scorer(constant, eos_id=EOS).score([(context, [answer, 4]) for answer in (30, 31, 32, 33)])
    assert sum(read) == len(context) + 4
    assert sum(made) == 1 + 4  # after the context once, and after each answer's first token
    read.clear()
    Scorer(constant, eos_id=EOS).score([(context, [answer]) for answer in range(4, 40)])
    assert sum(read) == len(context)  # one input, many continuations


def test_memory_bounds_what_is_made_at_once(constant: PLDRModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, x: sizes.append(x.shape[0]) or logits(self, x))
    memory = 20 * 8 * V * 2 * 4  # 20 rows of logits
    Scorer(constant, eos_id=EOS, memory=memory).score([([5], list(range(4, 34)))] * 3 + [([6], [7] * 30)])
    assert max(sizes) == 20


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        (([5], []), "requests[1]: an empty continuation"),
        (([5], [6] * (C + 1)), f"requests[1]: a continuation of {C + 1} tokens is longer than the context of {C}"),
        (([5], [V]), "requests[1]: holds ids outside the vocabulary"),
        (([-1], [5]), "requests[1]: holds ids outside the vocabulary"),
    ],
)
def test_what_has_no_score_is_refused(constant: PLDRModel, request_: Request, part: str) -> None:
    with pytest.raises(UserError) as caught:
        Scorer(constant, eos_id=EOS).score([([5], [6]), request_])
    assert part in str(caught.value)


def test_logits_that_are_not_finite_are_no_score(constant: PLDRModel) -> None:
    broken = to_constant_g(constant, constant.constant_g())
    with torch.no_grad():
        broken.embedding.weight[40] = math.nan
    scorer = Scorer(broken, eos_id=EOS)
    assert math.isfinite(scorer.score([([5], [6])])[0].logprob)
    with pytest.raises(UserError, match=r"requests\[1\]: the model's logits"):
        scorer.score([([5], [6]), ([40], [6]), ([7], [8])])


def test_padding_reaches_nobody_whatever_its_embedding_is(constant: PLDRModel) -> None:
    """Masked or not: zero times NaN is NaN."""
    broken = PLDRModel(constant.config, g_lm_LHKK=constant.g_lm).double()
    broken.load_state_dict(constant.state_dict())
    with torch.no_grad():
        broken.embedding.weight[0] = float("nan")
    begun = [5, 6, 7, 8, 9]
    for asked in ([([5, 6], [7]), ([8, 9, 10], [11, 12])], [(begun, [7]), ([*begun, 4], [8]), (begun, [8, 9, 10])]):
        assert_same(Scorer(broken, eos_id=EOS).score(asked), [naive(broken, *each) for each in asked])


def test_a_live_model_must_be_asked_for(live: PLDRModel, constant: PLDRModel) -> None:
    with pytest.raises(ValueError, match="live"):
        Scorer(live, eos_id=EOS)
    with pytest.raises(ValueError, match="live"):
        Scorer(constant, live=True, eos_id=EOS)


sequences = st.lists(st.lists(token, min_size=1, max_size=12).map(tuple), min_size=1, max_size=20)


@given(sequences)
def test_groups_hold_every_sequence_once_and_share_what_they_say(found: list[tuple[int, ...]]) -> None:
    distinct = set(found)
    made = groups(distinct)
    members = [ids for group in made for ids in group.members]
    assert sorted(members) == sorted(distinct)
    for group in made:
        assert all(ids[: group.num_shared] == group.prefix for ids in group.members)
        assert (len(group.members) > 1) == (group.num_shared > 0)
    # Never more to read than one by one.
    total = sum(group.num_shared + sum(len(ids) - group.num_shared for ids in group.members) for group in made)
    assert total <= sum(map(len, distinct))


def test_questions_with_one_preamble_are_still_read_once_each() -> None:
    """Few-shot: what a question shares with its own answers is more than what all questions share."""
    preamble = tuple(range(100, 160))
    questions = [(*preamble, *range(1000 * q, 1000 * q + 40)) for q in (1, 2, 3)]
    inputs = [(*question, 7, answer) for question in questions for answer in (1, 2, 3, 4)]
    read = sum(g.num_shared + sum(len(ids) - g.num_shared for ids in g.members) for g in groups(inputs))
    assert read <= 3 * (len(preamble) + 40) + len(inputs) * 2


def cost(made: list[list[int]], pass_tokens: int) -> int:
    return sum(len(batch) * max(batch) + pass_tokens for batch in made)


@given(st.lists(st.integers(1, 900), max_size=40), st.integers(1, 5000), st.booleans())
def test_batches_hold_every_item_within_the_memory(lengths: list[int], room: int, equal: bool) -> None:
    size = lambda longest: 2 * longest  # noqa: E731
    made = batches(lengths, length=lambda one: one, size=size, room=room, pass_tokens=40, equal=equal)
    assert sorted(one for batch in made for one in batch) == sorted(lengths)
    for batch in made:
        assert batch[0] == max(batch) and (len(batch) == 1 or len(batch) * 2 * batch[0] <= room)
        assert not equal or len(set(batch)) == 1


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 100))
def test_no_other_cut_is_cheaper(lengths: list[int], pass_tokens: int) -> None:
    ordered = sorted(lengths, reverse=True)
    made = batches(lengths, length=lambda one: one, size=lambda longest: longest, room=10**9, pass_tokens=pass_tokens)
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        borders = [0, *(index + 1 for index, cut in enumerate(cuts) if cut), len(ordered)]
        other = [ordered[a:b] for a, b in itertools.pairwise(borders)]
        assert cost(made, pass_tokens) <= cost(other, pass_tokens)
