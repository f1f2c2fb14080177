"""Generation: caches against full passes, batches against single prompts, sampling by its definition."""

import re
from array import array
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pldr_model.config import ModelConfig
from pldr_model.decode.cache import KVCache
from pldr_model.decode.decoder import Decoder
from pldr_model.decode.rows import Row, Rules
from pldr_model.decode.slots import Slots
from pldr_model.generation import NotFiniteError, generate
from pldr_model.model import PLDRModel
from pldr_model.next_token import RowSettings, choose
from pldr_model.sampling import Sampling, read_sampling, seeds_of

CONFIG = ModelConfig(vocab_size=61, num_layers=2, num_heads=2, head_dim=8, context_length=40, A_dff=12, num_reslayerA=2)


@pytest.fixture(scope="module")
def model() -> PLDRModel:
    torch.manual_seed(1)
    return PLDRModel(CONFIG).double()


def argmax_by_full_passes(model, prompt, count, g_lm):
    """Greedy tokens, each from a full pass over all tokens so far."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), g_lm=g_lm, padded=False)[0, -1].argmax()))
    return ids[len(prompt) :]


prompts_of_several_lengths = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=25), min_size=1, max_size=5)


@settings(max_examples=15, deadline=None)
@given(prompts=prompts_of_several_lengths, temperature=st.sampled_from([0.0, 0.8]), use_cache=st.booleans())
def test_a_batch_gives_each_prompt_the_tokens_it_gets_alone(model, prompts, temperature, use_cache):
    prompts = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
    setting = {"max_new_tokens": 9, "temperature": temperature, "top_p": 0.9, "use_cache": use_cache, "seed": 7}
    together = generate(model, prompts, **setting)
    assert together == [generate(model, [prompt], **setting)[0] for prompt in prompts]
    assert [len(new) for new in together] == [9] * len(prompts)


@settings(max_examples=10, deadline=None)
@given(prompt=st.lists(st.integers(0, 60), min_size=1, max_size=25))
def test_cached_greedy_tokens_are_those_of_full_passes_with_the_prompts_g(model, prompt):
    with torch.no_grad():
        g_lm = model.compute_g(torch.tensor([prompt]), padded=False)
        expected = argmax_by_full_passes(model, prompt, 8, g_lm)
    assert generate(model, [prompt], max_new_tokens=8) == [expected]
    assert generate(model, [prompt], max_new_tokens=8, g_lm=g_lm[:, 0]) == [expected]


def test_without_cache_g_follows_the_sequence(model):
    """The control recomputes G from all tokens so far; a frozen G would be another model."""
    prompt = [5, 9, 30, 31, 7]
    with torch.no_grad():
        live = argmax_by_full_passes(model, prompt, 30, None)
    assert generate(model, [prompt], max_new_tokens=30, use_cache=False) == [live]
    assert generate(model, [prompt], max_new_tokens=30) != [live]


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 2.5},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
        {"temperature": 0.9, "min_p": 0.2},
    ],
)
def test_every_setting_is_that_of_each_row_wherever_it_decodes(model, changes):
    """Against a loop over full passes with one row and its own set of tokens."""
    prompts, count, eos_id, given = [[5, 6, 5], [9], [11, 30, 2, 8], [9, 9], [60, 1, 2]], 12, 17, {"seed": 3, **changes}
    g_lm = model.compute_g(torch.tensor([[7, 8]]), padded=False)[:, 0].detach()
    sampling = read_sampling(**{"max_new_tokens": 1, "temperature": 0.0, "top_k": 0, "top_p": 1.0} | given)
    one = RowSettings.of([sampling], vocab_size=61)

    @torch.no_grad()
    def alone(prompt, seed):
        ids = list(prompt)
        while len(ids) - len(prompt) < count and (ids == prompt or ids[-1] != eos_id):
            logits_1V = model(torch.tensor([ids]), g_lm=g_lm, padded=False)[:, -1]
            seen_1V = torch.tensor([[token in ids for token in range(61)]])
            number = torch.tensor([len(ids) - len(prompt)])
            ids.append(int(choose(logits_1V, one, seed_B=torch.tensor([seed]), number_B=number, seen_BV=seen_1V)))
        return ids[len(prompt) :]

    expected = [alone(prompt, seed) for prompt, seed in zip(prompts, seeds_of(prompts, 3), strict=True)]
    for how in ({}, {"block": 5}, {"memory": 1}, {"memory": 60_000, "block": 2}, {"use_cache": False}):
        assert generate(model, prompts, max_new_tokens=count, eos_id=eos_id, g_lm=g_lm, **given, **how) == expected
    without = {"temperature": given.get("temperature", 0.0), "seed": 3}
    assert generate(model, prompts, max_new_tokens=count, eos_id=eos_id, g_lm=g_lm, **without) != expected


def test_equal_copies_of_a_prompt_sample_differently_and_repeatably(model):
    setting = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    first, second = generate(model, [[5, 6], [5, 6]], **setting)
    assert first != second
    assert generate(model, [[5, 6]], **setting) == [first]
    assert generate(model, [[5, 6]], **{**setting, "seed": 4}) != [first]


def test_low_temperature_and_top_k_of_one_are_greedy(model):
    greedy = generate(model, [[5, 6, 7]], max_new_tokens=10)
    assert generate(model, [[5, 6, 7]], max_new_tokens=10, temperature=5.0, top_k=1, seed=1) == greedy
    assert generate(model, [[5, 6, 7]], max_new_tokens=10, temperature=1e-5, seed=1) == greedy


def test_rows_end_on_their_own(model):
    prompts = [[5, 6, 7], [9], [11, 30, 2, 8]]
    free = generate(model, prompts, max_new_tokens=12)
    eos_id = free[1][4]
    ended = generate(model, prompts, max_new_tokens=12, eos_id=eos_id)
    for full, row in zip(free, ended, strict=True):
        cut = full[: full.index(eos_id) + 1] if eos_id in full else full
        assert row == cut  # eos is kept as the last token
    assert len(ended[1]) <= 5


def test_stop_sequences_and_predicates(model):
    (free,) = generate(model, [[5, 6, 7]], max_new_tokens=12)
    pair = free[4:6]
    at = next(i for i in range(2, 13) if free[i - 2 : i] == pair)
    assert generate(model, [[5, 6, 7]], max_new_tokens=12, stop=[[60, 60, 60, 60], pair]) == [free[:at]]
    assert generate(model, [[5, 6, 7]], max_new_tokens=12, stop=lambda _, new: sum(new) > 100) == [
        free[: next(i for i in range(1, 13) if sum(free[:i]) > 100)]
    ]


def test_generation_ends_at_the_context(model):
    long, short = [5] * 37, [6, 7]
    rows = generate(model, [long, short], max_new_tokens=10)
    assert [len(row) for row in rows] == [3, 10]
    assert generate(model, [long], max_new_tokens=10, use_cache=False) == [
        generate(model, [long], max_new_tokens=3, use_cache=False)[0]
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: none"),
        ({"prompts": [[5], []]}, r"prompts\[1\]: empty"),
        ({"prompts": [[5], [5] * 40]}, r"prompts\[1\]: 40 tokens leave no room for a new one in the context of 40"),
        ({"prompts": [[61]]}, r"prompts\[0\]: holds ids outside the vocabulary of 61"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_k": -1}, "top_k: -1"),
        ({"top_p": 0.0}, r"top_p: 0\.0"),
        ({"top_p": 1.5}, r"top_p: 1\.5"),
        ({"min_p": 1.5}, r"min_p: 1\.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty: 0\.0"),
        ({"g_lm": torch.zeros(1)}, r"g_lm: shape \(1,\)"),
        ({"stop": [[]]}, "stop: holds an empty sequence"),
        ({"prompts": [[5], [0.5]]}, r"prompts\[1\]: token ids are integers"),
        ({"max_new_tokens": True}, "max_new_tokens: True is no integer"),
        ({"temperature": "0.8"}, "temperature: '0.8' is no number"),
        ({"seed": 2**64}, "seed: 18446744073709551616 must have at most 64 bits"),
        ({"prompts": [[5], [6]], "block": -1}, "block: -1 must be at least 1"),
    ],
)
def test_bad_requests_are_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": [[5]], "max_new_tokens": 3, **change})


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_logits_are_not_finite_ends_and_the_others_go_on(model, use_cache, temperature):
    """Token 60 has no finite embedding, in a model of its own."""
    broken = PLDRModel(CONFIG).double()
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.embedding.weight[60] = float("nan")
        broken.output.bias[60] = -1e4  # nobody chooses it
    setting = {"max_new_tokens": 9, "temperature": temperature, "seed": 3, "use_cache": use_cache}
    prompts = [[5, 6, 7], [8, 60, 2], [9], [60], [3, 4, 1]]
    with pytest.raises(NotFiniteError, match=r"prompts\[1\]: .* after 0 new tokens, and those of 1 other") as caught:
        generate(broken, prompts, **setting)
    good = [0, 2, 4]
    assert caught.value.rows == {1: 0, 3: 0}
    assert [caught.value.new[i] for i in good] == generate(broken, [prompts[i] for i in good], **setting)
    with torch.no_grad():
        broken.output.bias[60] = 1e4
    with pytest.raises(NotFiniteError) as caught:
        generate(broken, [[5, 6, 7]], **setting)
    assert caught.value.rows == {0: 1} and caught.value.new == [[60]]


def test_what_is_not_finite_does_not_stay_for_the_next_prompt(model):
    """A place is taken again where a prompt was, one whose keys and values are NaN."""
    broken = PLDRModel(CONFIG).double()
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.embedding.weight[60] = float("nan")
        broken.output.bias[60] = -1e4
    prompts = [[1, 2, 3, 60], *([i, 9] for i in range(6))]
    with pytest.raises(NotFiniteError) as caught:
        generate(broken, prompts, max_new_tokens=100, memory=150_000)
    assert caught.value.rows == {0: 0}
    assert caught.value.new[1:] == [generate(broken, [prompt], max_new_tokens=100)[0] for prompt in prompts[1:]]


@pytest.mark.parametrize("block", [1, 7, 100])
def test_a_prompt_that_ends_with_its_first_token_leaves_room_for_the_others(model, block):
    """It fills the whole cache, and the others go on beside it."""
    prompts = [*([i + 1, 9] for i in range(8)), [3] * 39]
    together = generate(model, prompts, max_new_tokens=100, block=block)
    assert together == [generate(model, [prompt], max_new_tokens=100)[0] for prompt in prompts]
    assert [len(new) for new in together] == [38] * 8 + [1]


@pytest.fixture
def caches(monkeypatch):
    """Rows and bytes of every cache that is made."""
    made = []
    real = KVCache.__init__

    def watched(self, shapes, **given):
        real(self, shapes, **given)
        made.append((given["batch_size"], given["capacity"], self.nbytes))

    monkeypatch.setattr(KVCache, "__init__", watched)
    return made


def test_rows_decode_together_as_many_as_fit_the_memory(model, caches):
    prompts = [[i % 60 + 1] * (i % 30 + 1) for i in range(40)]
    for setting in ({"max_new_tokens": 9}, {"max_new_tokens": 9, "temperature": 1.0, "seed": 3}):
        caches.clear()
        together = generate(model, prompts, **setting)
        assert caches[0][0] == 40
        caches.clear()
        assert generate(model, prompts, memory=500_000, **setting) == together
        rows = [count for count, _, _ in caches if count > 1]
        assert 1 < rows[0] < 40 and all(2 * size < 500_000 for _, _, size in caches)
        assert rows[0] > 1.5 * min(rows[-3:]) > 0, "short rows do not take the place that a long one needs"
    prompts = prompts[:12]
    for use_cache in (True, False):
        setting = {"max_new_tokens": 3, "use_cache": use_cache}
        for memory in (1, 90_000):
            assert generate(model, prompts, memory=memory, **setting) == generate(model, prompts, **setting)


prompts_that_repeat = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=9), min_size=1, max_size=7)


@settings(max_examples=12, deadline=None)
@given(
    prompts=prompts_that_repeat,
    block=st.integers(1, 20),
    memory=st.sampled_from([1, 20_000, 40_000, None]),
    temperature=st.sampled_from([0.0, 1.0]),
    penalty=st.sampled_from([1.0, 1.3]),
    eos_id=st.sampled_from([None, *range(61)]),
)
def test_blocks_and_slots_change_no_token(model, prompts, block, memory, temperature, penalty, eos_id):
    """Ends by eos and by stop inside a block, places taken by the next prompt, rows that idle: every prompt gets the same."""
    setting = {"max_new_tokens": 12, "temperature": temperature, "repetition_penalty": penalty, "seed": 7}
    setting |= {"eos_id": eos_id, "stop": lambda _, new: sum(new) % 11 == 0}
    expected = generate(model, prompts, **setting)
    assert generate(model, prompts, block=block, memory=memory, **setting) == expected


def test_a_cache_that_must_stay_keeps_rows_that_idle(model):
    """As a captured step wants it: rows that have ended are neither copied away nor written to beyond the capacity."""
    prompts = [[5, 6, 7], [9], [11, 30, 2, 8], [4, 4]]
    rows = [Row(index, array("i", prompt), 30) for index, prompt in enumerate(prompts)]
    decoder, greedy = Decoder.of(model), RowSettings.of([Sampling(30)], vocab_size=61)
    seen = set()

    def step(ids_B, cache):
        seen.add(cache)
        return decoder.step(ids_B, cache)

    def stop(index, new):
        return len(new) >= 3 * (1 + index)

    capacity = max(row.length for row in rows)
    slots = Slots(decoder, Rules(None, stop), greedy, num_slots=3, capacity=capacity, g_lm=None, block=4, step=step)
    for _ in slots.run(deque(rows)):
        pass
    assert [row.new for row in rows] == generate(model, prompts, max_new_tokens=30, stop=stop)
    assert len(seen) == 1 and [len(row.new) for row in rows] == [3, 6, 9, 12]
    with pytest.raises(ValueError, match="capture: CUDA graphs need a GPU, the model is on the CPU"):
        generate(model, prompts, max_new_tokens=2, capture=True)


def test_a_row_that_ends_is_given_to_the_next_prompt(model, monkeypatch):
    """Two places for five prompts: as many steps as the longer place needs, and not as the longest rows of three batches."""
    steps = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, ids, cache: steps.append(len(ids)) or step(self, ids, cache))
    ends = {0: 2, 1: 9, 2: 3, 3: 2, 4: 2}
    memory = 2 * (61 * 16 + 2 * 8 * (2 * 2 * 2 * 8 * 10 + 2 * 2 * 8 * 8)) + 100  # logits, keys and values, G
    new = generate(
        model, [[5 + i] for i in range(5)], max_new_tokens=10, memory=memory, stop=lambda i, new: len(new) == ends[i]
    )
    assert [len(row) for row in new] == list(ends.values())
    assert steps == [2] * 5 + [1] * 3, "8 steps for the second row; beside it 1 + 2 + 1 + 1"


def test_the_cache_is_no_larger_than_what_is_read_and_shrinks_with_its_rows(model, monkeypatch):
    """The last token is chosen, and never read."""
    seen = []
    step = Decoder.step

    def watched(self, ids_B, cache):
        seen.append((cache.batch_size, cache.capacity))
        return step(self, ids_B, cache)

    monkeypatch.setattr(Decoder, "step", watched)
    free = generate(model, [[5, 6, 7], [9], [11, 30, 2, 8]], max_new_tokens=12)
    assert seen == [(3, 15)] * 11
    seen.clear()
    ended = generate(model, [[5, 6, 7], [9], [11, 30, 2, 8]], max_new_tokens=12, eos_id=free[1][4])
    rows = [sum(len(new) > step + 1 for new in ended) for step in range(11)]
    assert [count for count, _ in seen] == [count for count in rows if count]
    seen.clear()
    generate(model, [[5] * 38], max_new_tokens=10**12)
    assert seen == [(1, 39)]


def test_a_decoder_generates_what_its_model_does(model):
    setting = {"max_new_tokens": 6, "temperature": 0.7, "seed": 2}
    assert generate(Decoder.of(model), [[5, 6], [7]], **setting) == generate(model, [[5, 6], [7]], **setting)
    with pytest.raises(ValueError, match="use_cache: False needs the model"):
        generate(Decoder.of(model), [[5]], max_new_tokens=2, use_cache=False)


def test_samples_follow_the_distribution(model):
    """500 first tokens at temperature 1 against the softmax: chi-square inside its 1e-6 quantile (more: test_next_token.py)."""
    prompt = [5, 6, 7]
    with torch.no_grad():
        logits = model(torch.tensor([prompt]), padded=False)[:, -1]
    best = logits[0].double().topk(6)
    p = torch.zeros(61, dtype=torch.float64).scatter(0, best.indices, best.values.softmax(0))
    drawn = generate(model, [prompt] * 500, max_new_tokens=1, temperature=1.0, top_k=6, seed=0)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=61).double()
    assert counts[p == 0].sum() == 0
    expected = 500 * p[p > 0]
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 36  # 5 degrees of freedom: P(> 36) ~ 1e-6


@pytest.mark.parametrize(
    ("prompts", "stop", "message"),
    [
        ("ab", None, "prompts[0]: token ids are integers"),
        (["ab"], None, "prompts[0]: token ids are integers"),
        ([3, 4], None, "prompts: holds 3"),
        ([[3.5]], None, "prompts[0]: token ids are integers"),
        ([[10**30]], None, "prompts[0]: token ids are integers"),
        ([[3]], [5], "stop: holds what is not a sequence"),
    ],
)
def test_what_are_no_token_ids_is_refused_by_name(model: PLDRModel, prompts: Any, stop: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(model, prompts, max_new_tokens=2, stop=stop)
