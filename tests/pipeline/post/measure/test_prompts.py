"""The kinds of prompts: every id is among the random tokens, lengths vary, and prompts of different lengths stay apart."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.post.measure.observe import batches, observe
from pipeline.post.measure.prompts import (
    END,
    PromptKind,
    equal_lengths,
    few_of,
    joined,
    make_kinds,
    sha256_kinds,
)
from pldr_model.model import PLDRModel


def named(kinds: list[PromptKind], name: str) -> Tensor:
    return next(kind.ids_NS for kind in kinds if kind.name == name)


@pytest.mark.parametrize(("vocab_size", "num"), [(48, 2), (32, 1), (33, 2), (20, 1), (500, 17)])
@pytest.mark.parametrize("pad_id", [0, 7])
def test_every_id_but_padding_is_among_the_random_tokens(
    tiny: SimpleNamespace, text: Tensor, vocab_size: int, num: int, pad_id: int
) -> None:
    config = replace(tiny.config, vocab_size=vocab_size, pad_id=pad_id)
    random_NS = named(make_kinds(text, config, seed=1), "random")
    assert random_NS.shape == (num, 31)  # ceil((V - 1) / 31)
    flat = random_NS.flatten().tolist()
    everything = sorted(set(range(vocab_size)) - {pad_id})
    assert sorted(flat[: vocab_size - 1]) == everything and flat[: vocab_size - 1] != everything
    assert flat[vocab_size - 1 :] == (flat * 2)[: len(flat) - vocab_size + 1]  # filled up from the beginning
    assert random_NS.tolist() != named(make_kinds(text, config, seed=2), "random").tolist()


def test_random_lengths_vary_over_the_context_and_are_cut_from_the_text(tiny: SimpleNamespace, text: Tensor) -> None:
    many = text.repeat(4, 1)
    lengths_NS = named(make_kinds(many, tiny.config, seed=5), "lengths")
    found = (lengths_NS != END).sum(dim=1)
    assert len(lengths_NS) == len(many) // 4 and lengths_NS.shape[1] == int(found.max())
    assert 1 <= int(found.min()) <= 2 and 29 <= int(found.max()) <= 31 and len(found.unique()) > 15
    assert found.tolist() != sorted(found.tolist())  # so that the first few are of all lengths
    inside = [row.tolist() for row in text[:, :-1]]
    places = set()
    for row, length in zip(lengths_NS.tolist(), found.tolist(), strict=True):
        assert row[length:] == [END] * (len(row) - length)
        places |= {at for whole in inside for at in range(32 - length) if whole[at : at + length] == row[:length]}
        assert any(whole[at : at + length] == row[:length] for whole in inside for at in range(32 - length))
    assert len(places) > 5
    assert named(make_kinds(many, tiny.config, seed=5), "lengths").equal(lengths_NS)
    assert not named(make_kinds(many, tiny.config, seed=6), "lengths").equal(lengths_NS)
    assert len(named(make_kinds(text[:2], tiny.config, seed=5), "lengths")) == 2  # at least two
    short = named(make_kinds(text[:, :3].repeat(4, 1), tiny.config, seed=5), "lengths")
    assert sorted(set((short != END).sum(dim=1).tolist())) == [1, 2]


def test_prompts_of_one_length_run_together_and_in_order(tiny: SimpleNamespace, invariant: PLDRModel) -> None:
    prompts = [torch.arange(4, 4 + n) for n in (3, 3, 5, 1, 3)]
    ids_NS = joined(prompts)
    assert ids_NS.shape == (5, 5) and int(ids_NS.min()) == END
    assert [tuple(part.shape) for part in equal_lengths(ids_NS)] == [(2, 3), (1, 5), (1, 1), (1, 3)]
    rows = [row for part in batches(ids_NS, invariant) for row in part]
    assert all(row.equal(prompt) for row, prompt in zip(rows, prompts, strict=True))
    assert list(equal_lengths(ids_NS[:0])) == []
    with pytest.raises((IndexError, RuntimeError)):  # END is no token
        invariant(ids_NS, padded=False)


def test_what_follows_the_end_of_a_prompt_is_not_measured(tiny: SimpleNamespace) -> None:
    model = tiny.make_model(gain=1.0)
    prompts = [torch.arange(4, 4 + n) for n in (3, 9, 5)]
    together = observe(model, [PromptKind("x", joined(prompts))]).spreads["G_LM"]["x"]
    alone = observe(model, [PromptKind(str(i), prompt.unsqueeze(0)) for i, prompt in enumerate(prompts)])
    mean = torch.stack([spread.mean_LHKK for spread in alone.spreads["G_LM"].values()]).mean(dim=0)
    assert together.count == 3 and torch.allclose(together.mean_LHKK, mean, rtol=1e-5, atol=1e-6)


def test_extra_kinds_are_measured_and_in_the_hash(tiny: SimpleNamespace, text: Tensor) -> None:
    usual = make_kinds(text, tiny.config, seed=1)
    extra = joined([torch.arange(4, 9), torch.arange(5, 8)])
    kinds = make_kinds(text, tiny.config, seed=1, extra={"code": extra})
    assert [kind.name for kind in kinds] == [*(kind.name for kind in usual), "extra:code"]
    assert sha256_kinds(kinds) != sha256_kinds(usual)
    other = make_kinds(text, tiny.config, seed=1, extra={"code": joined([torch.arange(4, 9), torch.arange(5, 9)])})
    assert sha256_kinds(other) != sha256_kinds(kinds)
    assert few_of(kinds, 1)[-1].ids_NS.tolist() == [[4, 5, 6, 7, 8]]
