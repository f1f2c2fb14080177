"""The inputs that G_LM is measured over: several kinds and lengths, all made from held-out text and one seed.

Background: G_LM depends on the input through the rotated queries of the whole sequence, so prompts of one length and one
kind are a weak test: text of one length has similar statistics everywhere. Random tokens, one token repeated, and prompts
of a few tokens are unlike anything the model was trained on; a constant G_LM does not change with them.

Decision: a batch holds prompts of one length, without padding. Padding is a kind of its own: padding queries count in the
density matrix (by the model's definition), so a constant G_LM must not depend on them either. Prompts of different lengths
are rows of one tensor, with END after the shorter ones; `equal_lengths` gives what runs together. END is no token: a model
that is given it raises an error.

Decision: random tokens are a permutation of the vocabulary, so that no id is left to chance.

Shapes: N prompts, S tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import UserError
from pldr_model.config import ModelConfig

SHORT_LENGTHS = (1, 4, 16)
END = -1  # in the places after a prompt that is shorter than the longest of its kind
EXTRA = "extra:"  # begins the name of a kind from a file


class PromptKind(NamedTuple):
    """Prompts of one kind: [N,S] token ids, END after a shorter one. `padded`: they have padding."""

    name: str
    ids_NS: Tensor
    padded: bool = False


def held_out_text(sequences_NT: Tensor, config: ModelConfig, *, limit: int) -> tuple[Tensor, int]:
    """The first `limit` sequences [n, S+1] without padding, and how many were left out because they have some.

    Raises UserError when fewer than two different ones are left: a spread over one prompt is zero for every model.
    """
    if sequences_NT.ndim != 2 or sequences_NT.shape[1] < 3:
        raise UserError(
            f"validation: sequences of shape {list(sequences_NT.shape)}, [prompts, >= 3 tokens] are needed; "
            "tokenize with the model's context_length"
        )
    if sequences_NT.shape[1] > config.context_length + 1:
        raise UserError(
            f"validation: sequences of {sequences_NT.shape[1]} tokens, but the context is {config.context_length}; "
            "tokenize with the model's context_length"
        )
    if sequences_NT.numel() and not 0 <= int(sequences_NT.min()) <= int(sequences_NT.max()) < config.vocab_size:
        raise UserError(
            f"validation: token ids outside the model's vocabulary of {config.vocab_size}; "
            "they were made with another tokenizer: tokenize again"
        )
    full_N = (sequences_NT != config.pad_id).all(dim=1)
    text_NT = sequences_NT[full_N][:limit]
    if len(text_NT) < 2:
        padded = int((~full_N).sum())
        why = f" ({padded} have padding and were left out; tokens.packing=concat makes none)" if padded else ""
        raise UserError(
            f"validation: {len(text_NT)} held-out prompts of full length{why}, at least 2 are needed; "
            "raise data.val_fraction or add more text"
        )
    if num_distinct(text_NT) < 2:
        raise UserError(
            f"validation: all {len(text_NT)} held-out prompts are the same text, at least 2 different ones are needed; "
            "add more text"
        )
    return text_NT.long(), int((~full_N).sum())


def num_distinct(text_NT: Tensor) -> int:
    """The number of distinct prompts, not counting the last token, which is a target only."""
    return len(torch.unique(text_NT[:, :-1], dim=0))


def make_kinds(
    text_NT: Tensor, config: ModelConfig, *, seed: int, extra: Mapping[str, Tensor] | None = None
) -> list[PromptKind]:
    """All kinds of prompts, from held-out text [N, S+1]: text of full, half and quarter length, short text, random tokens,
    one token repeated, half a text padded to full length, and text of random lengths between 1 and S (a quarter as many of
    the last three, at least two). The random tokens are a permutation of all ids but padding, in ceil(V/S) prompts; the last
    is filled up with its beginning. extra: more kinds by name, [N, <= S] with END. The same seed gives the same prompts."""
    num, S = text_NT.shape[0], text_NT.shape[1] - 1
    kinds = [PromptKind("text", text_NT[:, :S])]
    lengths = {S}
    for length in (S // 2, S // 4, *SHORT_LENGTHS):
        if 0 < length < S and length not in lengths:
            lengths.add(length)
            kinds.append(PromptKind(f"text_{length}", text_NT[:, :length]))
    generator = torch.Generator().manual_seed(seed)
    few = max(2, num // 4)
    real = real_ids(config)
    shuffled = real[torch.randperm(len(real), generator=generator)]
    places = torch.arange(-(-len(real) // S) * S) % len(real)
    repeated_N1 = real[torch.randperm(len(real), generator=generator)[:few]].unsqueeze(1)
    padded_NS = text_NT[:few, :S].clone()
    padded_NS[:, S // 2 :] = config.pad_id
    return [
        *kinds,
        PromptKind("random", shuffled[places].view(-1, S)),
        PromptKind("repeated", repeated_N1.repeat(1, S)),
        PromptKind("padded", padded_NS, padded=True),
        PromptKind("lengths", _of_random_lengths(text_NT[:, :S], few, generator)),
        *(PromptKind(EXTRA + name, ids_NS) for name, ids_NS in (extra or {}).items()),
    ]


def real_ids(config: ModelConfig) -> Tensor:
    """All ids of the vocabulary but padding."""
    return torch.tensor([i for i in range(config.vocab_size) if i != config.pad_id])


def _of_random_lengths(text_NS: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Text cut at random places to `count` random lengths, one from each of as many equal parts of [1, S], in random order."""
    num, S = text_NS.shape
    parts = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * S / count
    lengths = (1 + parts.long()).clamp(max=S)[torch.randperm(count, generator=generator)].tolist()
    rows = torch.randperm(num, generator=generator)[:count].tolist()
    starts = [int(torch.randint(S - length + 1, (), generator=generator)) for length in lengths]
    return joined([text_NS[row, at : at + n] for row, at, n in zip(rows, starts, lengths, strict=True)])


def joined(prompts: Sequence[Tensor]) -> Tensor:
    """Prompts of any lengths, [S] each, as [N,S]: END after the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_value=END)


def equal_lengths(ids_NS: Tensor) -> Iterator[Tensor]:
    """The prompts in order, as [B,S] of consecutive ones with the same length, without END."""
    start = 0
    for length, same in groupby((ids_NS != END).sum(dim=1).tolist()):
        stop = start + len(list(same))
        yield ids_NS[start:stop, :length]
        start = stop


def few_of(kinds: list[PromptKind], count: int) -> list[PromptKind]:
    """The first `count` prompts of every kind: for controls."""
    return [kind._replace(ids_NS=kind.ids_NS[:count]) for kind in kinds]


def sha256_kinds(kinds: list[PromptKind]) -> str:
    """Hex sha256 over every kind's name, shape and ids."""
    digest = hashlib.sha256()
    for kind in kinds:
        digest.update(f"{kind.name} {list(kind.ids_NS.shape)} ".encode())
        digest.update(kind.ids_NS.cpu().long().numpy().tobytes())
    return digest.hexdigest()
