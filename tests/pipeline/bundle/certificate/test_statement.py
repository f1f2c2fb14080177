"""The statement: the verdict first, and every number in it true of what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.bundle.certificate.statement import EXACT, highest_share, rounded_up
from pipeline.config.post import PostConfig
from tests.helpers.evidence import judged_by_hand, varying

UNPROVEN = PostConfig(prove=False)


def said(post: PostConfig | None = None, **changes: Any) -> str:
    return judged_by_hand(post, {key.replace("__", "."): value for key, value in changes.items()})["statement"]


@pytest.mark.parametrize(
    ("deviating", "number", "percent"),
    [
        (0, 100, "2.95"),
        (0, 25, "11.3"),
        (0, 37, "7.78"),
        (0, 1, "95"),
        (1, 100, "4.66"),
        (3, 100, "7.57"),
        (99, 100, "99.9"),
    ],
)
def test_what_samples_rule_out(deviating: int, number: int, percent: str) -> None:
    """By Clopper and Pearson, one-sided: scipy.stats.beta.ppf(0.95, k + 1, n - k)."""
    assert f"{100 * highest_share(deviating, number):.3g}" == percent


def test_the_bound_is_where_so_few_are_found_with_five_percent() -> None:
    for number, deviating in ((10, 1), (128, 5), (4000, 40), (100_000, 3)):
        share = highest_share(deviating, number)
        chance, term = 0.0, (1 - share) ** number
        for k in range(deviating + 1):
            chance += term
            term *= share / (1 - share) * (number - k) / (k + 1)
        assert chance == pytest.approx(0.05, rel=1e-6)
        assert highest_share(deviating - 1, number) < share < highest_share(deviating + 1, number)
    assert highest_share(5, 5) == 1.0


def test_prompts_of_one_document_are_one_sample() -> None:
    sentence = (
        "0 of 128 text prompts from {} deviated by more than 1e-05: with 95 % confidence fewer than {} % of {} do"
    )
    assert sentence.format("37 documents", "7.78", "documents") in said()
    assert sentence.format("2 documents", "77.6", "documents") in said(prompts__documents=2)
    assert sentence.format("1 document", "95", "documents") in said(prompts__documents=1)
    assert sentence.format("500 documents", "2.31", "such prompts") in said(prompts__documents=500)
    unknown = (
        "0 of 128 text prompts deviated by more than 1e-05: with 95 % confidence fewer than 2.31 % of such prompts do"
    )
    assert unknown in said(prompts__documents=None)
    assert "fewer than 2.95 % of such prompts do" in said(prompts__documents=None, prompts__distinct=100)


def test_prompts_that_deviated_are_counted() -> None:
    changes = {**varying(2e-5, fp64=1e-6), "prompts.deviating": 3}
    statement = judged_by_hand(UNPROVEN, changes)["statement"]
    assert "3 of 128 text prompts from 37 documents deviated by more than 1e-05 in fp32, by up to 2.0e-05:" in statement
    assert f"fewer than {100 * highest_share(3, 37):.3g} % of documents do" in statement
    every = judged_by_hand(UNPROVEN, varying(0.3))["statement"]
    assert every.startswith("G_LM must not be cached as if it were exact; failed: relative_deviation_g, ")
    assert "128 of 128 text prompts" in every and every.endswith("nothing bounds their share") and "alive" not in every


def test_only_a_proof_speaks_of_every_input() -> None:
    proven = said()
    first = "G_LM may be cached: for every input of any length, in exact arithmetic, G_LM deviates by at most 1.2e-08 (proven);"
    assert proven.startswith(first) and "at most 1.0e-08" in proven and "that a search found by 1.1e-08" in proven
    other = said(UNPROVEN)
    assert EXACT not in other and "(proven)" not in other
    assert "It is not proven for every input: no proof was tried (post.prove)" in other
    assert "It is not proven for every input: the proof allows 3.0e-01" in said(measures__proof__bound=0.3)
    assert "It is not proven for every input: the proof does not close" in said(
        measures__proof__bound=None, measures__proof__closed=False
    )
    assert other.startswith(
        "G_LM may be cached: over prompts in fp64 it deviates by at most 1.0e-08 of its size in the worst head"
    )
    assert "at most 1.1e-08" in said(UNPROVEN, measures__relative_deviation_g=1.000001e-8)
    assert "(at round-off; allowed 1e-05), and over the worst rows that a search found by 1.1e-08" in other


def test_a_bound_is_rounded_up() -> None:
    values = (1.15e-8, 1.2e-8, 1.20000001e-8, 9.91e-5, 0.0)
    assert [rounded_up(value) for value in values] == [1.2e-8, 1.2e-8, 1.3e-8, 1e-4, 0.0]


@pytest.mark.parametrize(
    ("zero", "identity", "where", "also"),
    [
        ([0.016, 0.17], [0.019, 0.31], "layer 1 (of 2, counted from 0)", ", and so does the identity."),
        ([0.1, 0.17], [0.019, 0.31], "every layer", "; the identity does in layer 1 (of 2, counted from 0)."),
        ([0.1, 0.17], [0.0, 0.0], "every layer", "; the identity does in none."),
        ([0.03, 0.04], [0.0, 0.0], "the layers together", "."),
    ],
)
def test_alive_names_its_layers(zero: list[float], identity: list[float], where: str, also: str) -> None:
    alive = [layer for layer, value in enumerate(zero) if value >= 0.05]
    changes = {"measures.effects.per_layer.zero": zero, "measures.effects.per_layer.identity": identity}
    statement = judged_by_hand(changes={**changes, "measures.effects.alive_layers": alive})["statement"]
    costs = {0: "one layer alone nowhere costs", 1: "it alone costs", 2: "any one of them alone costs"}[len(alive)]
    assert f"Attention is alive in {where}: G = 0 in {costs} 0.05 nats or more{also}" in statement


def test_dead_attention_is_not_called_alive() -> None:
    for name in ("zero", "identity"):
        assert "alive" not in said(**{f"measures__losses__{name}": 5.0})


def test_how_much_is_more_than_plain_attention() -> None:
    words = "Replacing G_LM by the identity costs 0.385 nats, and by its part that commutes with RoPE"
    assert f"{words}, which is plain attention, 0.064" in said()
    assert "plain attention" not in said(measures__losses__plain=None)


def test_what_the_prompts_leave_out_is_named() -> None:
    assert "only" not in said() and "measured up to" not in said()
    few = said(PostConfig(prompts=16, min_prompts=16), prompts__distinct=16)
    assert "It was judged by 16 held-out prompts only, 100 are usual" in few
    assert "It was measured up to 8 of 128 tokens" in said(prompts__kinds={"text": [128, 8]})


def test_what_could_not_be_measured_is_not_stated() -> None:
    statement = said(measures__not_finite=["weight x"])
    assert statement == "G_LM must not be cached as if it were exact; failed: not_finite"
