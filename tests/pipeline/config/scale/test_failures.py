"""Young's and Daly's formulas against a month of 512 nodes, simulated; and spares."""

import statistics
from dataclasses import replace

import pytest

from pipeline.config.scale.failures import Failures, spares

NODES, PER_NODE, MONTHS = 512, 8, 20
HOUR = 3600.0


def simulated(
    failures: Failures, *, nodes: int = NODES, extra: int | None = None, commit: float = 0.0, repair=24 * HOUR
):
    """Goodput, its standard error, and the share of time without a full set of nodes, over many months."""
    pytest.importorskip("simpy", reason="the simulation needs SimPy (pip install -e .[dev])")
    from tests.pipeline.config.scale.month import DAY_S, Month, Site

    number = spares(1 / failures.mtbf, repair) if extra is None else extra
    site = Site(
        nodes=nodes,
        node_mtbf=failures.mtbf * nodes,
        spares=number,
        repair=repair,
        interval=failures.best_interval(),
        stall=failures.stall,
        restart=failures.restart - commit,
        commit=commit,
    )
    months = [Month(site, seed).run() for seed in range(MONTHS)]
    goodputs = [month.goodput for month in months]
    return (
        statistics.mean(goodputs),
        statistics.stdev(goodputs) / MONTHS**0.5,
        sum(month.lacked for month in months) / (MONTHS * 30 * DAY_S),
    )


@pytest.mark.parametrize(
    ("mtbf_hours", "stall", "restart", "commit"),
    [
        (50_000, 60.0, 600.0, 0.0),  # Llama 3's machine: a failure in 12 hours
        (10_000, 120.0, 900.0, 0.0),  # a bad one: a failure in 2.4 hours
        (20_000, 5.0, 900.0, 300.0),  # train.staging: a short stop, and a long copy until the checkpoint counts
    ],
)
def test_the_goodput_of_a_simulated_month(mtbf_hours, stall, restart, commit):
    failures = Failures(mtbf_hours * HOUR / (NODES * PER_NODE), stall, restart)
    predicted = failures.goodput(failures.best_interval())
    mean, error, _ = simulated(failures, commit=commit)
    assert mean == pytest.approx(predicted, rel=0.05)
    # That alone would hold for many a wrong formula: what is lost, too, is within 5 % and the simulation's own error.
    assert 1 - mean == pytest.approx(1 - predicted, rel=0.05, abs=3 * error)
    assert 3 * error < 0.15 * (1 - predicted)
    no_restart = replace(failures, restart=0.0)
    assert abs(1 - no_restart.goodput(failures.best_interval()) - (1 - mean)) > 0.15 * (1 - mean)  # the test can fail


def test_without_spares_the_job_waits_for_repairs():
    failures = Failures(50_000 * HOUR / (NODES * PER_NODE), 60.0, 600.0)
    predicted = failures.goodput(failures.best_interval())
    with_spares, _, lacked = simulated(failures)
    without, _, waiting = simulated(failures, extra=0)
    assert lacked < 2e-3 < 0.5 < waiting
    assert without < 0.7 * predicted and with_spares > 0.95 * predicted


def test_dalys_interval_is_the_best_one():
    for mtbf, stall in ((44_000.0, 60.0), (3600.0, 60.0), (1800.0, 300.0)):
        failures = Failures(mtbf, stall, 600.0)
        best = failures.goodput(failures.best_interval())
        there = max(failures.goodput(failures.best_interval() * factor / 100) for factor in range(30, 300))
        assert best == pytest.approx(there, rel=1e-3)
        assert failures.goodput(failures.best_interval() * 3) < best > failures.goodput(failures.best_interval() / 3)
    rare = Failures(1e7, 10.0, 600.0)
    assert rare.best_interval() == pytest.approx(rare.young_interval(), rel=1e-3)


def test_a_machine_on_which_nothing_gets_done():
    hopeless = Failures(60.0, 200.0, 600.0)
    assert hopeless.best_interval() == 60.0
    assert hopeless.goodput(60.0) < 1e-3 and hopeless.goodput(60_000.0) == 0.0


def test_spares_cover_the_nodes_in_repair():
    assert spares(0.0, 1.0) == 0
    # Poisson with mean 2: P(X <= 7) = 0.9989, P(X <= 8) = 0.99976.
    assert spares(2 / HOUR, HOUR) == 8
