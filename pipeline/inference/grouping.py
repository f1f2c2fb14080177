"""Which token sequences are read together: those with a common beginning, and batches of similar length.

Pure functions of lists of ids, without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Ids = tuple[int, ...]
T = TypeVar("T")
WORTH = 4  # a beginning is shared when it is at least this part (1/WORTH) of a sequence


@dataclass
class Group:
    """Sequences that begin with the same `num_shared` tokens; one by itself shares nothing."""

    members: list[Ids]
    num_shared: int

    @property
    def prefix(self) -> Ids:
        """What they share."""
        return self.members[0][: self.num_shared]


def groups(sequences: Iterable[Ids]) -> list[Group]:
    """Distinct sequences, in groups whose beginning is read once.

    In alphabetical order those with a long common beginning are neighbors. A neighbor joins where what it shares is worth it,
    and where the group does not lose more by its shorter beginning than it gains.
    """
    found: list[Group] = []
    for ids in sorted(sequences):
        if found:
            group = found[-1]
            common = min(_common(group.members[-1], ids), group.num_shared if len(group.members) > 1 else len(ids))
            saved_before = (len(group.members) - 1) * group.num_shared
            if common * WORTH >= len(ids) and len(group.members) * common >= saved_before:
                group.members.append(ids)
                group.num_shared = common
                continue
        found.append(Group([ids], 0))
    return found


def batches(
    items: Iterable[T],
    *,
    length: Callable[[T], int],
    size: Callable[[int], int],
    room: int,
    pass_tokens: int,
    equal: bool = False,
) -> list[list[T]]:
    """Items in batches, longest first. In a batch all are as long as the longest, and take `size(longest)` each; together no
    more than `room` (one item always). With `equal` there is no padding.

    Of all ways to cut the items, sorted by length, the one that costs least: tokens with padding, and `pass_tokens` for each
    batch, which is what a pass costs beside its tokens.
    """
    ordered = sorted(items, key=length, reverse=True)
    lengths = [length(item) for item in ordered]
    least, ends = (
        [0] * (len(ordered) + 1),
        [0] * len(ordered),
    )  # cost of the items from each on, and where its batch ends
    for start in reversed(range(len(ordered))):
        longest = lengths[start]
        last = min(len(ordered), start + max(1, room // size(longest)))
        least[start], ends[start] = min(
            ((end - start) * longest + pass_tokens + least[end], end)
            for end in range(start + 1, last + 1)
            if not equal or lengths[end - 1] == longest
        )
    found, start = [], 0
    while start < len(ordered):
        found.append(ordered[start : ends[start]])
        start = ends[start]
    return found


def windows(ids: Sequence[int], *, first: int, context_length: int) -> list[tuple[list[int], list[int]]]:
    """A text of any length as (context, continuation) pairs of at most `context_length` tokens each, in which every token is
    predicted once: the first after `first`. The cuts are lm-eval's for rolling log-likelihoods: each window but the last is
    full of predicted tokens, the last reaches back as far as the context does."""
    ids = list(ids)
    pairs = [([first], ids[:context_length])] if ids else []
    for start in range(context_length, len(ids), context_length):
        end = min(start + context_length, len(ids))
        pairs.append((ids[end - context_length - 1 : start], ids[start:end]))
    return pairs


def _common(one: Ids, other: Ids) -> int:
    """How many tokens two sequences have in common at their beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
