"""Factors of G_LM: what they multiply to, their groups, and ranks by energy."""

import torch

from pldr_model.decode.low_rank import factor_g, ranks_by_energy, round_ranks, truncate_g

RANKS = torch.tensor([[8, 3, 8, 3, 1], [2, 2, 2, 2, 2]])


def a_g() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 8, 8, dtype=torch.float64, generator=generator)


def test_the_factors_of_a_head_multiply_to_its_truncated_g() -> None:
    g_LHKK = a_g()
    truncated = truncate_g(g_LHKK, RANKS)
    for layer in range(2):
        for group in factor_g(g_LHKK[layer], RANKS[layer]):
            key = torch.eye(8, dtype=torch.float64) if group.key_factor is None else group.key_factor
            for index, head in enumerate(group.heads):
                product = group.query_factor[index] @ (key if group.key_factor is None else key[index]).T
                assert (product - truncated[layer, head]).abs().max() < 1e-13
                assert torch.linalg.matrix_rank(truncated[layer, head]) == RANKS[layer, head] == group.rank


def test_heads_of_one_rank_are_one_group() -> None:
    groups = factor_g(a_g()[0], RANKS[0])
    assert [(group.rank, group.heads) for group in groups] == [(1, (4,)), (3, (1, 3)), (8, (0, 2))]
    assert groups[1].query_factor.shape == (2, 8, 3)


def test_full_rank_is_g_itself() -> None:
    g_LHKK = a_g().float()
    full = torch.full((2, 5), 8)
    assert truncate_g(g_LHKK, full).equal(g_LHKK)
    (group,) = factor_g(g_LHKK[0], full[0])
    assert group.query_factor.equal(g_LHKK[0]) and group.key_factor is None


def test_truncation_is_the_closest_of_that_rank() -> None:
    g_LHKK = a_g()
    error = (truncate_g(g_LHKK, RANKS) - g_LHKK).square().sum((-1, -2))
    S_LHK = torch.linalg.svdvals(g_LHKK)
    for layer, head in ((0, 1), (0, 4), (1, 0)):
        assert (error[layer, head] - S_LHK[layer, head, RANKS[layer, head] :].square().sum()).abs() < 1e-12


def test_ranks_by_energy_drop_no_more_than_allowed_and_no_rank_less_would() -> None:
    g_LHKK = a_g()
    S_LHK = torch.linalg.svdvals(g_LHKK).square()
    rank_LH = ranks_by_energy(g_LHKK, 0.1)
    for layer in range(2):
        for head in range(5):
            rank, values = int(rank_LH[layer, head]), S_LHK[layer, head]
            assert values[rank:].sum() <= 0.1 * values.sum() < values[rank - 1 :].sum()
    assert ranks_by_energy(torch.zeros(1, 1, 8, 8), 1e-3).item() == 1
    assert ranks_by_energy(g_LHKK, 1e-40).eq(8).all()


def test_rounding_goes_up_and_not_over_the_full_size() -> None:
    assert round_ranks(torch.tensor([1, 4, 5, 10]), 10, multiple=4).tolist() == [4, 4, 8, 10]
