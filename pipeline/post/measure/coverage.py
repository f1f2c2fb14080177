"""Does every id of the vocabulary give finite logits? One id with a huge embedding gives NaN to whoever types it, and no other
prompt shows it: the weight is finite, and so is every other answer.

Every live pass is looked at, those of the random tokens with every id among them. Only where some logits are not finite, the
ids of the first such prompts are run one by one, each as a prompt of a single token.

Shapes: N prompts, B of them in a batch, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from pipeline.distributed import gathered
from pipeline.post.measure.downstream import logits
from pipeline.post.measure.observe import batches
from pipeline.post.measure.passes import LivePass
from pipeline.post.measure.prompts import PromptKind, real_ids
from pldr_model.model import PLDRModel

NAMED = 4  # ids that are named, and prompts whose ids are tried one by one
Piece = Callable[[int], str]


def coverage(model: PLDRModel, kind: PromptKind) -> dict[str, int]:
    """`ids`: of the vocabulary without padding; `seen`: those of them that occur in prompts of this kind."""
    ids = real_ids(model.config)
    return {"ids": len(ids), "seen": int(torch.isin(ids, kind.ids_NS.cpu()).sum())}


class FiniteLogits:
    """Watches live passes: what is not finite in their logits, "logits of id 17 ('▁x')", a few at most.

    An id of the prompt makes all scores NaN after it, a row of the output matrix only the score of one id ("score of id 17").
    Where no id does it alone, the number of prompts of each kind is all that is known.
    """

    def __init__(self, model: PLDRModel, piece: Piece | None) -> None:
        self._model, self._piece = model, piece
        self._failing: list[Tensor] = []
        self._scores: set[int] = set()
        self._counts: Counter[str] = Counter()

    def __call__(self, live: LivePass) -> None:
        """Look at one batch."""
        if live.logits_BSV.sum().isfinite():  # then all are
            return
        bad_BSV = ~live.logits_BSV.isfinite()
        everywhere_BS1 = bad_BSV.all(dim=-1, keepdim=True)
        self._scores |= set((bad_BSV & ~everywhere_BS1).flatten(0, 1).any(dim=0).nonzero().flatten().tolist())
        failing = live.ids_BS[everywhere_BS1.flatten(1).any(dim=1)]
        self._counts[live.kind.name] += len(failing)
        self._failing = [*self._failing, *failing.cpu()][:NAMED]

    def merge_ranks(self) -> tuple[list[str], list[str]]:
        """What all ranks have seen, by ids, and where no id's logits are not finite alone, by prompts. Collective."""
        names = [f"score of id {_name(i, self._piece)}" for i in sorted(self._scores)[:NAMED]]
        names += [f"logits of id {_name(i, self._piece)}" for i in islice(_alone(self._model, self._failing), NAMED)]
        everyone, counts = gathered(names), gathered(self._counts)
        found = list(dict.fromkeys(name for names in everyone for name in names))[: 2 * NAMED]
        if any(name.startswith("logits") for name in found):
            return found, []
        return found, [f"logits of {count} prompts {kind}" for kind, count in sum(counts, Counter[str]()).items()]


@torch.inference_mode()
def _alone(model: PLDRModel, prompts: list[Tensor]) -> Iterator[int]:
    """The ids of these prompts whose logits are not finite when they are the prompt."""
    if not prompts:
        return
    ids_N1 = torch.unique(torch.cat(prompts)).unsqueeze(1)
    for ids_B1 in batches(ids_N1[ids_N1[:, 0] != model.config.pad_id], model):
        bad_B = ~logits(model, ids_B1).isfinite().flatten(1).all(dim=1)
        yield from ids_B1[bad_B, 0].tolist()


def _name(token: int, piece: Piece | None) -> str:
    return f"{token}" if piece is None else f"{token} ({piece(token)!r})"
