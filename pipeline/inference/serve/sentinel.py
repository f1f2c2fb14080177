"""The drift sentinel (`pldr serve BUNDLE --watch 0.01`): G_LM of a share of the served prompts, deduced by the live model in
the background and compared with the cached one that answered them.

What is compared: relative deviation of each head, the certificate's measure (RMS of the difference over the head's RMS), in the
model's own precision, fp32, against the cached G_LM. `exceeded` counts prompts above what the certificate allows there
(`max_relative_deviation_g_fp32`). A proven bound is of exact arithmetic, and rounding alone may cross it, so nothing is judged
by it here. It stands beside the counts, and so does the largest deviation of the certificate's own prompts. Prompts above that
are counted too: they are further from the constant than anything that was validated.

Decisions. Whether a prompt is checked follows from its ids alone (the first 64 bits of their sha256, as a fraction, are below
the rate): the same traffic is checked the same way by every server, and a prompt that comes again is checked again. A full
queue drops prompts and never delays one. The log names a prompt by length and sha256 of its ids (int32, little-endian), never
by its text.

Shapes: L layers, H heads, K head dim, S tokens.
"""

from __future__ import annotations

import hashlib
import logging
import math
import queue
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.bundle.metric_learner import certified_deviation, relative_deviation
from pipeline.errors import UserError
from pipeline.inference.opened import OpenModel
from pldr_model.model import PLDRModel

WAITING = 16  # prompts in the queue
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bound:
    """What the certificate says of the relative deviation of G_LM. allowed: in fp32. measured: the largest of its prompts, in
    fp32. proven: in exact arithmetic, over every input there is. None: it says nothing of that."""

    allowed: float
    measured: float | None = None
    proven: float | None = None


def bound_of(certificate: Mapping[str, Any]) -> Bound:
    """The bounds of a certificate of any schema."""
    measures = certificate["measures"]
    proof = measures.get("proof") or {}
    g_lm = measures["deviations"].get("fp32", {}).get("G_LM") or {}
    return Bound(certified_deviation(certificate), g_lm.get("max"), proof.get("bound") if proof.get("closed") else None)


def watch(opened: OpenModel, rate: float) -> Sentinel:
    """A sentinel for an opened model. Raises UserError for one without a metric learner or certificate."""
    if opened.live is None:
        raise UserError(
            f"--watch: {opened.path} holds no metric learner to deduce G_LM with; make the bundle with "
            "`pldr bundle CONFIG --with-metric-learner`, or leave out --watch"
        )
    if opened.certificate is None:
        raise UserError(
            f"--watch: {opened.path} has no certificate to compare with; run `pldr validate`, or leave out --watch"
        )
    return Sentinel(opened.live, opened.g_lm, bound_of(opened.certificate), rate)


@dataclass(frozen=True)
class Drift:
    """Counts of prompts since the start, and the largest deviation [L][H] among them; a head that was not finite is infinite.
    above_measured: above the largest of the certificate's prompts. failed: could not be worked out."""

    checked: int = 0
    dropped: int = 0
    failed: int = 0
    exceeded: int = 0
    above_measured: int = 0
    per_head: tuple[tuple[float, ...], ...] = ()

    @property
    def largest(self) -> float:
        """Of all heads; 0 before the first check."""
        return max((value for row in self.per_head for value in row), default=0.0)


class Sentinel:
    """`offer` prompts from any thread; one background thread checks a share `rate` of them, between 0 and 1."""

    def __init__(self, live: PLDRModel, g_LHKK: Tensor, bound: Bound, rate: float) -> None:
        if not 0 < rate <= 1:
            raise UserError(f"--watch {rate:g}: the share of prompts to check; give a number above 0 and at most 1")
        self.bound, self.rate = bound, rate
        self._live, self._g_LHKK = live, g_LHKK
        self._waiting: queue.Queue[array[int] | None] = queue.Queue(WAITING)
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("checked", "dropped", "failed", "exceeded", "above_measured"), 0)
        self._largest_LH = torch.zeros(g_LHKK.shape[:2], dtype=torch.float64)
        self._thread = threading.Thread(target=self._run, name="drift-sentinel", daemon=True)
        self._thread.start()

    def offer(self, prompt_ids: Sequence[int]) -> bool:
        """Whether this prompt will be checked. Returns at once."""
        ids = array("i", prompt_ids)
        if not chosen(ids, self.rate):
            return False
        try:
            self._waiting.put_nowait(ids)
        except queue.Full:
            self._count("dropped")
            return False
        return True

    def drift(self) -> Drift:
        """What has been found so far."""
        with self._lock:
            return Drift(**self._counts, per_head=tuple(tuple(row) for row in self._largest_LH.tolist()))

    def wait(self) -> None:
        """Until every prompt that was taken is checked."""
        self._waiting.join()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the prompt that it works on; the others are dropped."""
        while True:
            try:
                self._waiting.put_nowait(None)
                break
            except queue.Full:
                self._drop_one()
        self._thread.join(timeout_s)

    def _drop_one(self) -> None:
        try:
            self._waiting.get_nowait()
        except queue.Empty:
            return
        self._waiting.task_done()
        self._count("dropped")

    def _run(self) -> None:
        while (ids := self._waiting.get()) is not None:
            try:
                self._check(ids)
            except Exception as error:  # watching must not end by one prompt, whatever is wrong with it
                self._count("failed")
                log.error("drift: G_LM of %s could not be deduced: %s", named(ids), _one_line(error))
            finally:
                self._waiting.task_done()
        self._waiting.task_done()

    @torch.inference_mode()
    def _check(self, ids: array[int]) -> None:
        ids_1S = torch.tensor([ids.tolist()])
        found_LH = relative_deviation(self._live.compute_g(ids_1S, padded=False)[:, 0], self._g_LHKK)
        found_LH = found_LH.nan_to_num(nan=math.inf)
        largest = float(found_LH.max())
        with self._lock:
            self._counts["checked"] += 1
            self._counts["exceeded"] += largest > self.bound.allowed
            self._counts["above_measured"] += self.bound.measured is not None and largest > self.bound.measured
            self._largest_LH = torch.maximum(self._largest_LH, found_LH)
        if largest > self.bound.allowed:
            layer, head = divmod(int(found_LH.argmax()), found_LH.shape[1])
            log.warning(
                "drift: G_LM of %s deviates by %.3g from the cached one (layer %d, head %d), allowed %.3g: its answer may "
                "differ from the model's",
                *(named(ids), largest, layer, head, self.bound.allowed),
            )

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def chosen(ids: array[int], rate: float) -> bool:
    """Whether a prompt is checked at this rate; of its ids alone."""
    return int.from_bytes(_digest(ids)[:8], "big") < rate * 2**64


def named(ids: array[int]) -> str:
    """A prompt in a log: how long it is, and which."""
    return f"a prompt of {len(ids)} tokens, sha256 {_digest(ids).hex()}"


def _digest(ids: array[int]) -> bytes:
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).digest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class DriftCollector:
    """A sentinel's numbers as Prometheus reads them: `registry.register(DriftCollector(sentinel))`."""

    def __init__(self, sentinel: Sentinel) -> None:
        self._sentinel = sentinel

    def collect(self) -> Iterator[Any]:
        """The metrics, each time that they are asked for."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        drift, bound = self._sentinel.drift(), self._sentinel.bound
        for name, value, meaning in (
            ("checked", drift.checked, "Served prompts whose G_LM was deduced and compared with the cached one"),
            ("dropped", drift.dropped, "Served prompts that were to be checked and were not: the queue was full"),
            ("failed", drift.failed, "Served prompts whose G_LM could not be deduced"),
            ("exceeded", drift.exceeded, "Checked prompts above the deviation that the certificate allows"),
            ("above_measured", drift.above_measured, "Checked prompts above the largest that the certificate measured"),
        ):
            yield CounterMetricFamily(f"pldr:drift_prompts_{name}", meaning, value=value)
        yield GaugeMetricFamily("pldr:drift_rate", "Share of the served prompts to check", value=self._sentinel.rate)
        meaning = (
            "Relative deviation of G_LM in the certificate: allowed and measured in fp32, proven in exact arithmetic"
        )
        bounds = GaugeMetricFamily("pldr:drift_bound", meaning, labels=["kind"])
        for kind, limit in vars(bound).items():
            if limit is not None:
                bounds.add_metric([kind], limit)
        yield bounds
        yield GaugeMetricFamily(
            "pldr:drift_deviation_max",
            "Largest relative deviation of G_LM among the checked prompts",
            value=drift.largest,
        )
        heads = GaugeMetricFamily("pldr:drift_deviation_max_by_head", "The same of each head", labels=["layer", "head"])
        for layer, row in enumerate(drift.per_head):
            for head, largest in enumerate(row):
                heads.add_metric([str(layer), str(head)], largest)
        yield heads
