"""`train.profile_steps: [first, last]`: what the CPU and the GPU did in these steps, traced on every rank.

`logs/profile/steps-000010-000012/rank-N.json.gz` opens in https://ui.perfetto.dev or chrome://tracing; `rank-N.txt` is a table
of the operators that cost most. Tracing makes these steps slower and changes no number of the training.
"""

from __future__ import annotations

import logging
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.distributed import has_gpu
from pipeline.errors import first_line

log = logging.getLogger(__name__)
TABLE_ROWS = 60


class StepProfiler:
    """Traces the steps from `first` to `last`; nothing when `steps` is None or they are over already."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int) -> None:
        self._first, self._last = steps or (0, -1)
        self._target = folder / f"steps-{self._first:06d}-{self._last:06d}"
        self._rank = rank
        self._profile: profile | None = None
        self._tracing = False
        self._span: record_function | None = None

    def begin(self, step: int) -> None:
        """A step begins. The one before the first traced one warms the tracer up."""
        self._end_span()
        if step > self._last:
            self.close()
            return
        if step >= self._first - 1 and self._profile is None:
            gpu = [ProfilerActivity.CUDA] if has_gpu() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self._profile.prepare_trace()
        if step >= self._first and self._profile is not None:
            if not self._tracing:
                self._profile.start_trace()
                self._tracing = True
            self._span = record_function(f"train step {step}")
            self._span.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Write what was traced, if anything; no more is traced."""
        self._end_span()
        traced, self._profile, self._last = self._profile, None, -1
        if traced is None or not self._tracing:
            return
        self._tracing = False
        traced.stop_trace()
        try:
            self._target.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(self._target / f"rank-{self._rank}.json.gz"))
            table = traced.key_averages().table(
                sort_by="self_cuda_time_total" if has_gpu() else "self_cpu_time_total", row_limit=TABLE_ROWS
            )
            (self._target / f"rank-{self._rank}.txt").write_text(table)
        except (OSError, RuntimeError) as error:  # a full disk must not end a run
            log.warning("the trace of rank %d was not written: %s", self._rank, first_line(error))

    def _end_span(self) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None
