"""Does every id of the vocabulary give finite logits? One id with a huge embedding gives NaN to whoever types it, and no other
prompt shows it: the weight is finite, and so is every other answer.

Cost: one pass with logits over the given prompts; random tokens are ceil(V/S) of them (32 for 4,096 ids and a context of 128,
beside 128 of text). Only where some are not finite, the ids of the first such prompts are run one by one, each as a prompt of
a single token.

Shapes: N prompts, B of them in a batch, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from pipeline.distributed import gathered, share
from pipeline.post.measure.observe import batches
from pipeline.post.measure.prompts import PromptKind, real_ids
from pldr_model.model import PLDRModel

NAMED = 4  # ids that are named, and prompts whose ids are tried one by one
Piece = Callable[[int], str]


def coverage(model: PLDRModel, kind: PromptKind) -> dict[str, int]:
    """`ids`: of the vocabulary without padding; `seen`: those of them that occur in prompts of this kind."""
    ids = real_ids(model.config)
    return {"ids": len(ids), "seen": int(torch.isin(ids, kind.ids_NS.cpu()).sum())}


@torch.inference_mode()
def check_finite(model: PLDRModel, kind: PromptKind, piece: Piece | None = None) -> list[str]:
    """What is not finite in the logits over these prompts, "logits of id 17 ('▁x')", a few at most; empty if all is finite.

    Collective where there are several ranks. An id of the prompt makes all scores NaN after it, a row of the output matrix only
    the score of one id ("score of id 17"). Where no id does it alone, the number of prompts is given.
    """
    failing: list[Tensor] = []
    scores: set[int] = set()
    for ids_BS in batches(share(kind.ids_NS), model):
        bad_BSV = ~_logits(model, ids_BS, padded=kind.padded).isfinite()
        if not bad_BSV.any():
            continue
        everywhere_BS1 = bad_BSV.all(dim=-1, keepdim=True)
        scores |= set((bad_BSV & ~everywhere_BS1).flatten(0, 1).any(dim=0).nonzero().flatten().tolist())
        failing += [row_S.cpu() for row_S in ids_BS[everywhere_BS1.flatten(1).any(dim=1)]]
    names = [f"score of id {_name(i, piece)}" for i in sorted(scores)[:NAMED]]
    names += [f"logits of id {_name(i, piece)}" for i in islice(_alone(model, failing[:NAMED]), NAMED)]
    everyone, counts = gathered(names), gathered(len(failing))
    found = list(dict.fromkeys(name for names in everyone for name in names))[: 2 * NAMED]
    if sum(counts) and not any(name.startswith("logits") for name in found):
        found.append(f"logits of {sum(counts)} of {len(kind.ids_NS)} prompts {kind.name}")
    return found


def _alone(model: PLDRModel, prompts: list[Tensor]) -> Iterator[int]:
    """The ids of these prompts whose logits are not finite when they are the prompt."""
    if not prompts:
        return
    ids_N1 = torch.unique(torch.cat(prompts)).unsqueeze(1)
    for ids_B1 in batches(ids_N1[ids_N1[:, 0] != model.config.pad_id], model):
        bad_B = ~_logits(model, ids_B1).isfinite().flatten(1).all(dim=1)
        yield from ids_B1[bad_B, 0].tolist()


def _logits(model: PLDRModel, ids_BS: Tensor, *, padded: bool = False) -> Tensor:
    logits_BSV = model(ids_BS, padded=padded)
    assert isinstance(logits_BSV, Tensor)
    return logits_BSV


def _name(token: int, piece: Piece | None) -> str:
    return f"{token}" if piece is None else f"{token} ({piece(token)!r})"
