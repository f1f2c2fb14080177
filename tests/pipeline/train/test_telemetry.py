"""Readings of many ranks become the metrics of one run (pipeline/train/telemetry.py)."""

import math
import time
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from pipeline.train.telemetry import Reading, Stopwatch, node_names, summary

TYPICAL = Reading(
    first_on_node=0, data_s=0.01, forward_s=0.20, rss_gb=2, gpu_peak_gb=math.nan, gpu_percent=math.nan, cpu_percent=50,
    memory_gb=10, disk_free_gb=100, received_mb_s=1, sent_mb_s=2,
)  # fmt: skip


def test_two_nodes_of_two_ranks_and_one_slow_one():
    rows = [
        replace(TYPICAL, first_on_node=1),
        TYPICAL,
        replace(TYPICAL, first_on_node=1, cpu_percent=90, gpu_percent=80, disk_free_gb=7),
        replace(TYPICAL, forward_s=0.50, rss_gb=3, gpu_percent=60, cpu_percent=1),
    ]
    values = summary(np.array([astuple(row) for row in rows]))
    assert values["system/rank_seconds_min"] == pytest.approx(0.21)
    assert values["system/rank_seconds_median"] == pytest.approx(0.21)
    assert values["system/rank_seconds_max"] == pytest.approx(0.51)
    assert values["system/slowest_rank"] == 3 and values["system/rss_gb"] == 3
    assert values["system/node-0/cpu_percent"] == 50
    assert values["system/node-1/cpu_percent"] == 90 and values["system/node-1/disk_free_gb"] == 7  # its first rank's
    assert values["system/node-1/gpu_percent"] == 70
    # What no rank knows is not a metric.
    assert "system/node-0/gpu_percent" not in values and "system/gpu_peak_gb" not in values
    assert not any(name.startswith("system/node-2") for name in values)


def test_a_stopwatch_counts_what_is_inside_once():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.running():
            time.sleep(0.02)
    time.sleep(0.05)
    assert 0.04 <= watch.read() < 0.09
    assert watch.read() == 0


def test_nodes_are_counted_in_the_order_of_their_ranks():
    assert node_names([("a", True), ("a", False), ("b", True), ("b", False)]) == "node-0 a, node-1 b"
