"""From items to scores: a task's metrics with the cached G_LM and live, their difference, and its paired standard error.

Both are scored on the same items, so the difference is taken item by item: its standard error is that of the paired
differences, not of two independent samples. For a mean it is exact (as lm-eval's `mean_stderr`); any other aggregate
(perplexity) is resampled, the same items for both.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]
Aggregate = Callable[[Sequence[Any]], float]
RESAMPLES, SEED = 200, 0
ROUND_OFF = 1e-4  # of a value or log-likelihood of one item


@dataclass(frozen=True)
class Items:
    """What lm-eval found for each item of a task, in order. metrics: metric -> a value per item; logprobs: of all answers of
    all items; cut: requests whose context lost its beginning."""

    metrics: dict[str, list[Any]]
    logprobs: list[float]
    cut: int


def compare(cached: Items, live: Items | None, aggregates: dict[str, Aggregate]) -> Tree:
    """Every metric: cached, live, difference (cached minus live), each with its standard error, n, and how many items
    `changed`."""
    return {
        metric: _compare(values, None if live is None else live.metrics[metric], aggregates[metric])
        for metric, values in cached.metrics.items()
    }


def _compare(cached: list[Any], live: list[Any] | None, aggregate: Aggregate) -> Tree:
    own, other, paired = _errors(cached, live, aggregate)
    value = float(aggregate(cached))
    live_value = None if live is None else float(aggregate(live))
    return {
        "cached": value,
        "cached_stderr": own,
        "live": live_value,
        "live_stderr": other,
        "difference": None if live_value is None else value - live_value,
        "stderr": paired,
        "n": len(cached),
        "changed": None if live is None else sum(map(_differs, cached, live)),
    }


def _differs(one: Any, other: Any) -> bool:
    """Whether an item has another value, beyond round-off."""
    if isinstance(one, tuple | list):
        return any(map(_differs, one, other))
    return abs(one - other) > ROUND_OFF if isinstance(one, int | float) else bool(one != other)


def _errors(
    cached: list[Any], live: list[Any] | None, aggregate: Aggregate
) -> tuple[float | None, float | None, float | None]:
    """Standard errors: of cached, of live, of their difference."""
    if _is_mean(aggregate):
        paired = None if live is None else mean_stderr([a - b for a, b in zip(cached, live, strict=True)])
        return mean_stderr(cached), None if live is None else mean_stderr(live), paired
    if len(cached) < 2:
        return None, None, None
    draw, drawn = random.Random(SEED), []
    for _ in range(RESAMPLES):
        chosen = [draw.randrange(len(cached)) for _ in cached]
        one = float(aggregate([cached[i] for i in chosen]))
        drawn.append((one, None if live is None else float(aggregate([live[i] for i in chosen]))))
    own = _deviation([one for one, _ in drawn])
    if live is None:
        return own, None, None
    pairs = [(one, other) for one, other in drawn if other is not None]
    return own, _deviation([other for _, other in pairs]), _deviation([one - other for one, other in pairs])


def mean_stderr(values: Sequence[float]) -> float | None:
    """Standard error of a mean; None for one item."""
    return None if len(values) < 2 else _deviation(values) / math.sqrt(len(values))


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _is_mean(aggregate: Aggregate) -> bool:
    return getattr(aggregate, "__name__", "") == "mean"


def largest_change(cached: Items, live: Items | None) -> float | None:
    """The largest difference of the log-likelihoods of one answer, cached and live, over all answers of all items."""
    if live is None:
        return None
    return max((abs(a - b) for a, b in zip(cached.logprobs, live.logprobs, strict=True)), default=0.0)


def chance(task: Any, samples: Sequence[Tree]) -> float | None:
    """The main metric of a model that knows nothing: it picks any answer with equal probability. 0 where the answer is free
    text; None where that is not defined."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0.0
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    if task.get_config("process_results") is not None:  # TruthfulQA mc2: the share of true answers
        values = [
            task.process_results(sample["doc"], [(0.0, False)] * len(sample["arguments"])).get("acc")
            for sample in samples
        ]
        return None if None in values else math.fsum(values) / len(values)
    right = [len(sample["target"]) if isinstance(sample["target"], list) else 1 for sample in samples]
    return math.fsum(number / len(sample["arguments"]) for number, sample in zip(right, samples, strict=True)) / len(
        samples
    )


def plain(value: Any) -> Any:
    """A number of numpy's as Python's."""
    return value.item() if hasattr(value, "item") else value


def finite(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: they become None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
