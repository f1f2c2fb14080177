"""pipeline/sweep/compare.py: which children run, and what their results say of the variants."""

import math
import random
import statistics

import pytest

from pipeline.sweep.compare import as_json, compared, from_json, in_order, interval, is_wanted, to_come
from tests.helpers.comparisons import PLAIN, RATES, TUNED, children, row


def by_name(*rows):
    return {one["child"]: one for one in rows}


def named(every, name):
    return next(child for child in every if child.name == name)


def test_intervals_are_students():
    """Gosset's own data, the sleep of ten patients (1908): 0.75 +- 1.2798, and 2.33 +- 1.4323."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    found = interval(first)
    assert found.n == 10 and found.mean == pytest.approx(0.75) and found.half == pytest.approx(1.2798, abs=2e-4)
    found = interval([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    assert (found.mean, found.half) == (pytest.approx(2.33), pytest.approx(1.4323, abs=2e-4))
    two = interval([1.0, 2.0])
    assert two.half == pytest.approx(12.706 * math.sqrt(0.5) / math.sqrt(2))
    assert interval([3.0]).half is None and interval([3.0]).mean == 3.0
    with pytest.raises(statistics.StatisticsError):
        interval([])


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_intervals_cover_the_truth_as_often_as_they_say(n):
    """1000 draws of n normal numbers: 95 % +- 2.8 (four standard deviations)."""
    draw = random.Random(n)
    hits = 0
    for _ in range(1000):
        found = interval([draw.gauss(0.3, 2.0) for _ in range(n)])
        hits += abs(found.mean - 0.3) <= found.half
    assert abs(hits / 1000 - 0.95) < 0.028


def test_without_tune_every_child_is_wanted():
    every = children("sdpa", "paper")
    assert all(is_wanted(child, every, {}, None) and is_wanted(child, every, {}, PLAIN) for child in every)
    assert to_come(every, {}, PLAIN) == 6 and to_come(every, by_name(row(every[0], 1.0)), None) == 5


def test_the_first_seed_runs_first_and_at_every_rate_the_others_where_it_is_best():
    every = children("sdpa", "paper", rates=RATES)
    order = [every[number - 1] for number in in_order(every, TUNED)]
    assert [child.values["seed"] for child in order] == [1] * 8 + [2] * 8 + [3] * 8
    assert all(is_wanted(child, every, {}, TUNED) is True for child in order[:8])
    assert all(is_wanted(child, every, {}, TUNED) is None for child in order[8:])
    assert to_come(every, {}, TUNED) == 8 + 4  # and of each variant, two seeds at a rate

    losses = {"sdpa": (4.3, 4.1, 4.2, 4.4), "paper": (4.3, 4.2, 4.15, 9.0)}
    first = by_name(*(row(c, losses[c.values["variant"]][RATES.index(c.values["train.max_lr"])]) for c in order[:8]))
    some = {name: one for name, one in first.items() if name != "paper.max_lr-0.012.seed-1"}
    wanted = {child.name: is_wanted(child, every, some, TUNED) for child in order[8:]}
    assert [name for name, is_it in wanted.items() if is_it] == ["sdpa.max_lr-0.003.seed-2", "sdpa.max_lr-0.003.seed-3"]
    assert all(is_it is None for name, is_it in wanted.items() if name.startswith("paper"))
    assert to_come(every, some, TUNED) == 1 + 2 + 2

    best = [child.name for child in order[8:] if is_wanted(child, every, first, TUNED)]
    assert best == ["sdpa.max_lr-0.003.seed-2", "paper.max_lr-0.006.seed-2", "sdpa.max_lr-0.003.seed-3",
                    "paper.max_lr-0.006.seed-3"]  # fmt: skip
    assert to_come(every, first, TUNED) == 4


@pytest.mark.parametrize(
    ("results", "best"),
    [
        ([("failed", None), ("finished", 4.2), ("finished", 4.3)], 3e-3),
        ([("finished", math.nan), ("finished", 4.4), ("finished", 4.3)], 6e-3),
        ([("finished", math.inf), ("finished", None), ("finished", 4.3)], 6e-3),
        ([("failed", 4.0), ("finished", 4.2), ("failed", None)], 3e-3),  # a failed child's last loss is no result
        ([("finished", 0.0), ("finished", 0.0), ("finished", 0.0)], 1e-3),  # of equal ones the first
        ([("failed", None), ("failed", None), ("finished", math.nan)], None),
    ],
)
def test_what_failed_or_diverged_is_never_the_best(results, best):
    every = children("sdpa", rates=RATES[:3])
    first = [child for child in every if child.values["seed"] == 1]
    rows = by_name(*(row(child, value, status=status) for child, (status, value) in zip(first, results, strict=True)))
    wanted = [is_wanted(child, every, rows, TUNED) for child in every if child.values["seed"] == 2]
    assert wanted == [rate == best for rate in RATES[:3]]
    assert to_come(every, rows, TUNED) == (0 if best is None else 2)
    lines = compared(every, rows, TUNED)
    assert [line.best for line in lines] == ([] if best is None else [best])


def test_a_run_that_mlflow_did_not_show_decides_nothing():
    """An outage: the child finished, its loss is not known, and the others must not be run at a worse rate for it."""
    every = children("sdpa", rates=RATES[:2])
    rows = by_name(row(named(every, "sdpa.max_lr-0.001.seed-1"), 4.3))
    unread = row(named(every, "sdpa.max_lr-0.003.seed-1"), None, run_id=None)
    later = [child for child in every if child.values["seed"] == 2]
    assert [is_wanted(child, every, rows | by_name(unread), TUNED) for child in later] == [None, None]
    assert [is_wanted(child, every, rows | by_name(unread | {"run_id": "r"}), TUNED) for child in later] == [
        True,
        False,
    ]


def tuned():
    """Two variants and three seeds, by hand: sdpa is best at 3e-3, paper at the largest rate that did not fail."""
    every = children("sdpa", "paper", rates=RATES)
    values = {
        "sdpa.max_lr-0.001.seed-1": 4.30, "sdpa.max_lr-0.003.seed-1": 4.10, "sdpa.max_lr-0.006.seed-1": 4.15,
        "sdpa.max_lr-0.012.seed-1": 4.20, "sdpa.max_lr-0.003.seed-2": 4.20, "sdpa.max_lr-0.003.seed-3": 4.00,
        "paper.max_lr-0.001.seed-1": 4.40, "paper.max_lr-0.003.seed-1": 4.20, "paper.max_lr-0.006.seed-1": 4.12,
        "paper.max_lr-0.006.seed-2": 4.23, "paper.max_lr-0.006.seed-3": 4.01,
    }  # fmt: skip
    rows = by_name(
        *(
            row(named(every, name), value, train_seconds=60.0, order_parameter=value / 100)
            for name, value in values.items()
        )
    )
    failed = named(every, "paper.max_lr-0.012.seed-1")
    return every, rows | by_name(row(failed, None, status="failed"))


def test_a_comparison_by_hand():
    every, rows = tuned()
    sdpa, paper = compared(every, rows, TUNED)
    assert (sdpa.variant, sdpa.best, sdpa.at_edge, sdpa.missing, sdpa.difference) == ("sdpa", 3e-3, False, (), None)
    assert sdpa.value.n == 3 and sdpa.value.mean == pytest.approx(4.1)
    assert sdpa.value.half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert (paper.best, paper.pairs, paper.values) == (6e-3, (1, 2, 3), (4.12, 4.23, 4.01))
    assert paper.at_edge, "of the rates with a result it is the largest"
    assert dict(paper.tried) == {1e-3: 4.40, 3e-3: 4.20, 6e-3: 4.12, 1.2e-2: None}
    differences = [0.02, 0.03, 0.01]  # paired: each with its own seed
    assert paper.difference.mean == pytest.approx(0.02)
    assert paper.difference.half == pytest.approx(4.303 * statistics.stdev(differences) / math.sqrt(3))
    assert paper.order_parameter == 4.23 / 100 and paper.train_seconds == 60.0
    assert from_json(as_json([sdpa, paper])) == [sdpa, paper]


def test_the_order_in_which_children_end_changes_nothing():
    every, rows = tuned()
    expected, draw = compared(every, rows, TUNED), random.Random(0)
    for _ in range(20):
        items = list(rows.items())
        draw.shuffle(items)
        shuffled = dict(items)
        assert compared(every, shuffled, TUNED) == expected
        assert [is_wanted(c, every, shuffled, TUNED) for c in every] == [
            is_wanted(c, every, rows, TUNED) for c in every
        ]


def test_seeds_at_a_rate_that_is_no_longer_the_best_do_not_count():
    """A rate is added to a finished sweep, and is better: the other seeds run there, and those of the old one are left out."""
    every, rows = tuned()
    rows["sdpa.max_lr-0.012.seed-1"] = row(named(every, "sdpa.max_lr-0.012.seed-1"), 4.05)
    sdpa, paper = compared(every, rows, TUNED)
    assert (sdpa.best, sdpa.values, sdpa.at_edge, sdpa.value.half) == (1.2e-2, (4.05,), True, None)
    assert (paper.difference.n, paper.difference.half) == (1, None)
    wanted = [child.name for child in every if child.name not in rows and is_wanted(child, every, rows, TUNED)]
    assert wanted == ["sdpa.max_lr-0.012.seed-2", "sdpa.max_lr-0.012.seed-3"]


def test_a_seed_that_failed_is_named_and_its_pair_left_out():
    every, rows = tuned()
    rows["sdpa.max_lr-0.003.seed-2"] |= {"status": "failed"}
    rows["paper.max_lr-0.006.seed-3"] |= {"val_loss_cached": math.nan}
    sdpa, paper = compared(every, rows, TUNED)
    assert (sdpa.pairs, sdpa.missing) == ((1, 3), ("sdpa.max_lr-0.003.seed-2",))
    assert (paper.pairs, paper.missing) == ((1, 2), ("paper.max_lr-0.006.seed-3",))
    assert (paper.difference.n, paper.difference.mean) == (1, pytest.approx(0.02))  # seed 1 is all they share


def test_without_tune_and_without_the_baseline():
    every = children("sdpa", "paper")
    rows = by_name(*(row(child, 4.0 + place, train_seconds=None) for place, child in enumerate(every)))
    sdpa, paper = compared(every, rows, PLAIN)
    assert (sdpa.best, sdpa.at_edge, sdpa.tried, sdpa.values) == (None, False, (), (4.0, 5.0, 6.0))
    assert (paper.difference.mean, paper.difference.half, paper.train_seconds) == (3.0, 0.0, None)
    without = {name: one for name, one in rows.items() if not name.startswith("sdpa")}
    assert [(line.variant, line.difference) for line in compared(every, without, PLAIN)] == [("paper", None)]
    assert compared(every, {}, PLAIN) == []


def test_rates_that_are_no_numbers_have_no_edge():
    every = children("sdpa", rates=("cosine", "linear"), seeds=(1,))
    rows = by_name(*(row(child, 4.0 + place) for place, child in enumerate(every)))
    (line,) = compared(every, rows, TUNED)
    assert (line.best, line.at_edge) == ("cosine", False)
    every = children("sdpa", rates=(1e-3,), seeds=(1,))
    (line,) = compared(every, by_name(*(row(child, 4.0) for child in every)), TUNED)
    assert not line.at_edge, "nothing else was tried"
    every = children("sdpa", rates=(1e-3, "auto"), seeds=(1,))
    (line,) = compared(every, by_name(*(row(child, 4.0) for child in every)), TUNED)
    assert line.best == 1e-3 and not line.at_edge
