"""The drift sentinel: silent for a model that is what its certificate says, and not for any other."""

from __future__ import annotations

import hashlib
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bundle.read import BundleParts, read_bundle
from pipeline.errors import UserError
from pipeline.inference.serve.sentinel import WAITING, Bound, DriftCollector, Sentinel, bound_of, chosen
from pldr_model.model import PLDRModel
from tests.helpers.models import make_model

PROMPTS = [[5 + (7 * i + j) % 40 for j in range(1 + i % 20)] for i in range(60)]


@pytest.fixture
def parts(make_bundle: Callable[..., Path]) -> BundleParts:
    return read_bundle(make_bundle(with_metric_learner=True))


@pytest.fixture
def start() -> Iterator[Callable[..., Sentinel]]:
    started: list[Sentinel] = []

    def make(live: Any, g_lm: torch.Tensor, bound: Bound, rate: float = 1.0) -> Sentinel:
        started.append(Sentinel(live, g_lm, bound, rate))
        return started[-1]

    yield make
    for one in started:
        one.stop()


def test_an_honest_bundle_never_exceeds(parts: BundleParts, start: Any, caplog: pytest.LogCaptureFixture) -> None:
    bound = bound_of(parts.certificate)
    assert bound.allowed == 1e-4 and bound.measured is not None and bound.measured <= bound.allowed
    watch = start(parts.live_model(), parts.g_lm, bound)
    for ids in PROMPTS[: 4 * WAITING]:
        watch.offer(ids)
        watch.wait()
    found = watch.drift()
    assert (found.checked, found.dropped, found.failed, found.exceeded) == (60, 0, 0, 0)
    assert 0 <= found.largest <= bound.allowed and len(found.per_head) == 2 and len(found.per_head[0]) == 2
    assert caplog.records == []


@pytest.mark.parametrize("what", ["a cached G that was changed", "a model that is not invariant", "NaN"])
def test_what_is_not_as_certified_is_counted_and_logged_without_its_text(
    parts: BundleParts, start: Any, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    live, g_lm = parts.live_model(), parts.g_lm.clone()
    if what == "a cached G that was changed":
        g_lm[1, 0] *= 1.001  # relative deviation 1e-3 of one head
    elif what == "NaN":
        g_lm[1, 0, 0, 0] = float("nan")
    else:
        live = make_model(gain=1.0)
    watch = start(live, g_lm, bound_of(parts.certificate))
    for ids in PROMPTS[:5]:
        assert watch.offer(ids)
    watch.wait()
    found = watch.drift()
    assert (found.checked, found.exceeded, found.above_measured) == (5, 5, 5)
    assert found.largest == max(map(max, found.per_head)) > 1e-4
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5 and all("\n" not in line for line in lines)
    assert hashlib.sha256(struct.pack("<i", PROMPTS[0][0])).hexdigest() in lines[0]
    assert "1 tokens, sha256" in lines[0] and "allowed 0.0001" in lines[0]
    if what == "a cached G that was changed":
        assert (
            found.per_head[1][0] == found.largest == pytest.approx(1e-3, rel=1e-3) and "(layer 1, head 0)" in lines[0]
        )
        assert found.per_head[0][0] < 1e-5
    elif what == "NaN":
        assert found.largest == float("inf")


def test_which_prompts_are_checked_follows_from_their_ids_and_the_rate() -> None:
    many = [array("i", [i, 7 * i, i % 5]) for i in range(4000)]
    taken = [chosen(ids, 0.1) for ids in many]
    assert taken == [chosen(ids, 0.1) for ids in many]
    assert 320 < sum(taken) < 480  # 400 expected, standard deviation 19
    assert all(chosen(ids, 1.0) for ids in many)
    assert not any(chosen(ids, 0.05) and not chosen(ids, 0.1) for ids in many)  # a higher rate only adds prompts


def test_a_full_queue_drops_and_never_waits(start: Any, parts: BundleParts) -> None:
    gate, begun = threading.Event(), threading.Event()

    class Slow(PLDRModel):
        def compute_g(self, ids_BS: torch.Tensor, *, padded: bool | None = None) -> torch.Tensor:
            begun.set()
            gate.wait(60)
            return super().compute_g(ids_BS, padded=padded)

    live = Slow(make_model().config)
    live.load_state_dict(make_model().state_dict())
    watch = start(live, parts.g_lm, Bound(1e-4))
    assert watch.offer(PROMPTS[0]) and begun.wait(60)
    started = time.perf_counter()
    answers = [watch.offer(ids) for ids in PROMPTS]
    assert time.perf_counter() - started < 5
    assert answers == [True] * WAITING + [False] * (len(PROMPTS) - WAITING)
    assert watch.drift().dropped == len(PROMPTS) - WAITING
    gate.set()
    watch.wait()
    assert watch.drift().checked == 1 + WAITING


def test_a_prompt_that_cannot_be_checked_does_not_end_the_watch(
    start: Any, parts: BundleParts, caplog: pytest.LogCaptureFixture
) -> None:
    watch = start(parts.live_model(), parts.g_lm, Bound(1e-4))
    watch.offer([10**6])  # not in the vocabulary
    watch.offer(PROMPTS[0])
    watch.wait()
    assert (watch.drift().checked, watch.drift().failed) == (1, 1)
    assert "could not be deduced" in caplog.text


def test_stopping_ends_the_thread_and_a_full_queue_does_not_keep_it(parts: BundleParts) -> None:
    watch = Sentinel(parts.live_model(), parts.g_lm, Bound(1e-4), 1.0)  # type: ignore[arg-type]
    for ids in PROMPTS:
        watch.offer(ids)
    watch.stop()
    assert not any(thread is watch._thread for thread in threading.enumerate())
    found = watch.drift()
    assert found.checked + found.dropped == len(PROMPTS)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, float("nan")])
def test_a_rate_that_is_no_share_is_refused(parts: BundleParts, rate: float) -> None:
    with pytest.raises(UserError, match="--watch .*: the share of prompts to check; give a number above 0"):
        Sentinel(make_model(), parts.g_lm, Bound(1e-4), rate)


def test_the_bounds_are_the_certificates(parts: BundleParts, old_files: Path) -> None:
    proof = {**parts.certificate["measures"]["proof"], "closed": True, "bound": 3e-7}
    proven = {**parts.certificate, "measures": {**parts.certificate["measures"], "proof": proof}}
    assert bound_of(proven).proven == 3e-7
    open_ended = {**proven, "measures": {**proven["measures"], "proof": {**proof, "closed": False, "bound": None}}}
    assert bound_of(open_ended).proven is None
    old = bound_of(read_bundle(old_files / "bundle").certificate)
    assert old.allowed == 1e-4 and old.proven is None and old.measured is not None  # schema 3 had no fp32 threshold


def test_prometheus_reads_counts_bounds_and_heads(parts: BundleParts, start: Any) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    g_lm = parts.g_lm.clone()
    g_lm[0, 1] *= 1.01
    watch = start(parts.live_model(), g_lm, Bound(1e-4, measured=2e-7))
    registry = prometheus_client.CollectorRegistry()
    registry.register(DriftCollector(watch))
    read = registry.get_sample_value
    assert read("pldr:drift_prompts_checked_total") == 0 and read("pldr:drift_deviation_max") == 0
    watch.offer(PROMPTS[3])
    watch.wait()
    assert read("pldr:drift_prompts_checked_total") == read("pldr:drift_prompts_exceeded_total") == 1
    assert read("pldr:drift_bound", {"kind": "allowed"}) == 1e-4
    assert read("pldr:drift_bound", {"kind": "measured"}) == 2e-7
    assert read("pldr:drift_bound", {"kind": "proven"}) is None
    worst = read("pldr:drift_deviation_max_by_head", {"layer": "0", "head": "1"})
    assert worst == read("pldr:drift_deviation_max") == pytest.approx(0.01 / 1.01, rel=1e-3)
