"""How the next token is chosen: the distribution against transformers', draws against the distribution, rows against rows."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers.generation import logits_process as hf

from pldr_model import next_token
from pldr_model.next_token import RowSettings, choose, token_probabilities, uniform
from pldr_model.sampling import read_sampling

V = 301
SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "temperature": 2.5},
    {"top_k": 40, "top_p": 0.7},
    {"top_p": 0.95, "min_p": 0.1, "temperature": 1.7},
    {"repetition_penalty": 1.2, "temperature": 0.8, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.5, "top_k": 3, "top_p": 0.1},
]


def sampling(**changes):
    given = {"max_new_tokens": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    return read_sampling(**given | changes)


def row_settings(*rows, vocab_size=V, device="cpu"):
    return RowSettings.of([sampling(**row) for row in rows], vocab_size=vocab_size, device=device)


def random_rows(count, *, vocab_size=V, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits_BV = 3 * torch.randn(count, vocab_size, generator=generator, dtype=dtype)
    ids_BS = torch.randint(0, vocab_size, (count, vocab_size // 6), generator=generator)
    return logits_BV, ids_BS, torch.zeros(count, vocab_size, dtype=torch.bool).scatter_(1, ids_BS, True)


def by_transformers(logits_BV, ids_BS, given):
    """Their processors, in the order of their `_get_logits_processor`."""
    steps = []
    if "repetition_penalty" in given:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(given["repetition_penalty"]))
    if given.get("temperature"):
        steps.append(hf.TemperatureLogitsWarper(given["temperature"]))
        steps += [hf.TopKLogitsWarper(given["top_k"])] if "top_k" in given else []
        steps += [hf.TopPLogitsWarper(given["top_p"])] if "top_p" in given else []
        steps += [hf.MinPLogitsWarper(given["min_p"])] if "min_p" in given else []
    return hf.LogitsProcessorList(steps)(ids_BS, logits_BV.clone())


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(changes):
    logits_BV, ids_BS, seen_BV = random_rows(20)
    theirs_BV = by_transformers(logits_BV, ids_BS, {"temperature": 1.0} | changes)
    ours = row_settings(changes)
    if not ours.draws:
        assert choose(logits_BV, ours, seen_BV=seen_BV).equal(theirs_BV.argmax(dim=-1))
        return
    p_BV, q_BV = token_probabilities(logits_BV, ours, seen_BV=seen_BV), theirs_BV.softmax(dim=-1)
    assert (p_BV > 0).equal(q_BV > 0)
    assert (p_BV - q_BV).abs().max() < 1e-12


@pytest.mark.parametrize("over", ["seeds", "numbers"])
@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.9, "temperature": 2.0}, {"min_p": 0.05}], ids=str)
def test_draws_follow_the_distribution(changes, over):
    """40,000 draws: those of neighboring seeds, and those of one seed. The chi-square is far inside its 1e-6 quantile."""
    logits_1V, _, _ = random_rows(1, vocab_size=30)
    ours, count = row_settings(changes, vocab_size=30), 40_000
    p_V = token_probabilities(logits_1V, ours)[0]
    many, one = torch.arange(count), torch.full((count,), 5)
    seed_B, number_B = (many, one) if over == "seeds" else (one, many)
    drawn_B = choose(logits_1V.expand(count, -1), ours, seed_B=seed_B, number_B=number_B)
    found_V = torch.bincount(drawn_B, minlength=30)
    assert found_V[p_V == 0].sum() == 0
    common_V = p_V * count > 10
    expected, found = p_V[common_V] * count, found_V[common_V]
    statistic, degrees = ((found - expected) ** 2 / expected).sum(), len(expected) - 1
    assert degrees >= 3 and statistic < degrees + 5 * math.sqrt(2 * degrees) + 12


def test_numbers_are_those_of_splitmix64():
    """Against Python's integers, for seeds and numbers of any size."""
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF]
    numbers = [0, 1, 2, 1023, 2**31]
    mask = 2**64 - 1

    def plain(seed, number):
        x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return ((x ^ (x >> 31)) >> 11) / 2**53

    found = uniform(torch.tensor(seeds)[:, None], torch.tensor(numbers))
    assert found.tolist() == [[plain(seed, number) for number in numbers] for seed in seeds]
    # The first output of seed 0 in the reference implementation (https://prng.di.unimi.it/splitmix64.c): 0xE220A8397B1DCDAF.
    assert found[0, 0].item() == (0xE220A8397B1DCDAF >> 11) / 2**53


def test_numbers_of_neighboring_seeds_and_indices_are_independent():
    """160,000 numbers: every bit, cells in one and two dimensions, and correlations, each within five standard deviations."""
    size = 400
    u_SN = uniform(torch.arange(size)[:, None], torch.arange(size))
    bits = ((u_SN * 2**53).long()[..., None] >> torch.arange(53)) & 1
    assert (bits.double().mean(dim=(0, 1)) - 0.5).abs().max() < 5 * 0.5 / size

    def check_cells(index, cells):
        found = torch.bincount(index.flatten(), minlength=cells).double()
        expected = index.numel() / cells
        statistic = ((found - expected) ** 2 / expected).sum()
        assert abs(statistic - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))

    check_cells((u_SN * 1024).long(), 1024)
    for a, b in [
        (u_SN[:-1], u_SN[1:]),
        (u_SN[:, :-1], u_SN[:, 1:]),
        (u_SN[:-1, 1:], u_SN[1:, :-1]),
        (u_SN[::2], u_SN[1::2]),
        (u_SN, u_SN.T),
    ]:
        off = ~torch.eye(size, dtype=torch.bool) if a is u_SN else torch.ones_like(a, dtype=torch.bool)
        a, b = a[off], b[off]
        check_cells((a * 32).long() * 32 + (b * 32).long(), 1024)
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 5 / math.sqrt(len(a))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_gets_its_token_in_any_batch_beside_rows_that_are_not_finite(dtype):
    logits_BV, _, seen_BV = random_rows(len(SETTINGS) * 3, dtype=dtype)
    rows = SETTINGS * 3
    seed_B, number_B = torch.arange(len(rows)) ** 5, torch.arange(len(rows)) % 7

    def chosen(index):
        return choose(
            logits_BV[index],
            row_settings(*(rows[i] for i in index)),
            seed_B=seed_B[index],
            number_B=number_B[index],
            seen_BV=seen_BV[index],
        )

    alone_B = torch.cat([chosen([i]) for i in range(len(rows))])
    order = torch.randperm(len(rows)).tolist()
    assert chosen(order).equal(alone_B[order])
    for i, bad in enumerate([math.nan, math.inf, -math.inf]):
        logits_BV[5 * i, 3:9] = bad
        logits_BV[5 * i + 1] = bad
    good = [i for i in range(len(rows)) if logits_BV[i].isfinite().all()]
    beside_B = chosen(list(range(len(rows))))
    assert beside_B[good].equal(alone_B[good]) and len(good) < len(rows)
    assert ((beside_B >= 0) & (beside_B < V)).all(), "some token"


def test_settings_of_one_row_are_those_of_all():
    logits_BV, _, seen_BV = random_rows(9)
    given = {"seed_B": torch.arange(9), "number_B": torch.zeros(9, dtype=torch.int64), "seen_BV": seen_BV}
    for changes in SETTINGS:
        one, each = row_settings(changes), row_settings(*[changes] * 9)
        assert choose(logits_BV, one, **given).equal(choose(logits_BV, each, **given))


def test_a_nucleus_larger_than_the_window_is_found(monkeypatch):
    """Sharp and flat rows, one of equal logits, and ties."""
    logits_BV, _, _ = random_rows(6)
    logits_BV *= torch.tensor([[0.0], [0.01], [0.3], [1.0], [3.0], [1.0]])
    logits_BV[5] = logits_BV[5].round()
    for changes in ({"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 1 - 1e-12}):
        weights = []
        for window in (2, 40, V):
            monkeypatch.setattr(next_token, "WINDOW", window)
            weights.append(token_probabilities(logits_BV, row_settings(changes)))
        assert weights[0].equal(weights[2]) and weights[1].equal(weights[2])


def kept(probabilities, **changes):
    logits = torch.tensor([probabilities]).log()
    p = token_probabilities(logits, row_settings(changes, vocab_size=len(probabilities)))
    assert p.sum().item() == pytest.approx(1)
    return [round(value, 4) for value in p[0].tolist()]


def test_top_p_keeps_the_token_that_crosses():
    assert kept([0.15, 0.5, 0.05, 0.3], top_p=0.4) == [0, 1, 0, 0]
    assert kept([0.15, 0.5, 0.05, 0.3], top_p=0.6) == [0, 0.625, 0, 0.375]
    assert kept([0.15, 0.5, 0.05, 0.3], top_p=0.9) == [0.1579, 0.5263, 0, 0.3158]
    assert kept([0.15, 0.5, 0.05, 0.3], top_p=1.0) == [0.15, 0.5, 0.05, 0.3]
    assert kept([0.15, 0.5, 0.05, 0.3], top_p=1e-9) == [0, 1, 0, 0]


def test_top_k_comes_before_top_p_and_min_p_last():
    assert kept([0.15, 0.5, 0.05, 0.3], top_k=2) == [0, 0.625, 0, 0.375]
    # Of the two best, 0.5 alone is already 62.5 %.
    assert kept([0.15, 0.5, 0.05, 0.3], top_k=2, top_p=0.6) == [0, 1, 0, 0]
    assert kept([0.15, 0.5, 0.05, 0.3], top_k=9) == [0.15, 0.5, 0.05, 0.3]
    # Were min-p first, 0.5 would be 62.5 % of what it leaves, and all of the nucleus.
    assert kept([0.15, 0.5, 0.05, 0.3], top_p=0.6, min_p=0.5) == [0, 0.625, 0, 0.375]
    assert kept([0.15, 0.5, 0.05, 0.3], min_p=1.0) == [0, 1, 0, 0]


def test_of_equally_probable_tokens_the_first_ones_are_kept():
    assert kept([0.25] * 4, top_k=3) == [0.3333, 0.3333, 0.3333, 0]
    assert kept([0.25] * 4, top_p=0.5) == [0.5, 0.5, 0, 0]
    assert kept([0.1, 0.4, 0.4, 0.1], top_k=1) == [0, 1, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8), min_size=1, max_size=12),
    top_p=st.floats(0.01, 0.99),
    temperature=st.floats(0.2, 3),
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(logits, top_p, temperature):
    p = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1)
    ours = row_settings({"temperature": temperature, "top_p": top_p}, vocab_size=len(logits))
    chosen = token_probabilities(torch.tensor([logits]), ours)[0] > 0
    assert p[chosen].sum() >= top_p - 1e-6
    assert p[chosen].sum() - p[chosen].min() < top_p + 1e-6
    assert p[~chosen].max() <= p[chosen].min() + 1e-6 if (~chosen).any() else True


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-300, 1e300, 1.7e308])
def test_any_setting_in_range_gives_a_distribution(temperature):
    logits = torch.tensor([[3e38, -3e38, 1.0, 3e38], [1.0, 2.0, 3.0, -1e-30], [0.0, 0.0, 0.0, 0.0]])
    seen = torch.tensor([[True, True, False, False], [False, False, True, True], [True] * 4])
    limits = [{}, {"top_k": 2}, {"top_k": 10**5000}, {"top_p": 1e-320}, {"top_k": 3, "top_p": 0.5}, {"min_p": 1e-320}]
    for changes, penalty in product(limits, [1.0, 5e-324, 1e300]):
        ours = row_settings(
            {"temperature": temperature, "repetition_penalty": penalty} | changes, vocab_size=logits.shape[-1]
        )
        p = token_probabilities(logits, ours, seen_BV=seen)
        assert p.isfinite().all() and (p.sum(dim=-1) - 1).abs().max() < 1e-12
    if temperature < 1e-100:
        p = token_probabilities(logits, row_settings({"temperature": temperature}, vocab_size=4))
        assert p[:2].tolist() == [[0.5, 0, 0, 0.5], [0, 0, 1, 0]]


WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "equal", "bincount", "__iter__"}
WAITS |= {"__bool__", "__int__", "__float__", "__index__", "__contains__", "__len__"}


class NothingRead(TorchFunctionMode):
    """Refuses what waits for a device, or has a shape that depends on values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in WAITS, func.__name__
        assert func.__name__ not in {"__getitem__", "__setitem__"} or not isinstance(args[1], torch.Tensor), "an index"
        return func(*args, **kwargs or {})


def test_nothing_is_read_on_the_host():
    logits_BV, _, seen_BV = random_rows(2)
    with pytest.raises(AssertionError), NothingRead():
        bool(seen_BV.any())
    for changes in SETTINGS:
        ours = row_settings(changes)
        with NothingRead():
            choose(logits_BV, ours, seed_B=torch.arange(2), number_B=torch.arange(2), seen_BV=seen_BV)


@pytest.mark.slow
def test_it_compiles_in_one_graph_and_chooses_the_same():
    logits_BV, _, seen_BV = random_rows(len(SETTINGS))
    given = {"number_B": torch.arange(len(SETTINGS)), "seen_BV": seen_BV}
    compiled = torch.compile(choose, fullgraph=True)
    for ours in (row_settings(*SETTINGS), row_settings(SETTINGS[0]), row_settings(SETTINGS[9])):
        for seed in range(3):
            seed_B = torch.arange(len(SETTINGS)) + 100 * seed
            expected = choose(logits_BV, ours, seed_B=seed_B, **given)
            assert compiled(logits_BV, ours, seed_B=seed_B, **given).equal(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_a_gpu_chooses_the_same_in_a_graph_without_synchronization(changes):
    logits_BV, _, seen_BV = (tensor.cuda() for tensor in random_rows(32))
    seed_B, number_B = torch.arange(32).cuda(), torch.zeros(32, dtype=torch.int64).cuda()
    ours = row_settings(changes, device="cuda")

    def step():
        return choose(logits_BV, ours, seed_B=seed_B, number_B=number_B, seen_BV=seen_BV)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen_B = step()
    for number in range(5):
        number_B.fill_(number)
        graph.replay()
        on_cpu = {"seed_B": seed_B.cpu(), "number_B": number_B.cpu(), "seen_BV": seen_BV.cpu()}
        assert chosen_B.cpu().equal(choose(logits_BV.cpu(), row_settings(changes), **on_cpu))
