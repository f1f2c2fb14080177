"""What the loop does about a step that was skipped and about a loss spike, the same on every rank.

Policy `train.on_spike`: `warn` tells it and goes on; `stop` ends the run; `rollback` loads the newest whole checkpoint into the
running job and goes on *behind* the offending batch: the position in the data order stays where it is, so that what was seen
since that checkpoint is left out (the way the PaLM runs went on, arXiv 2204.02311, section 5.1). Steps count again from the
checkpoint's; MLflow keeps the first value of a step that is trained twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from pipeline.checkpoint.format import committed, step_of, verify
from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError, UserError
from pipeline.train.guard import MAX_ROLLBACKS, Guard
from pipeline.train.step import Outcome

log = logging.getLogger(__name__)
SHOWN_IDS = 64
Event = dict[str, Any]
Sequences = Callable[[], npt.NDArray[np.int64]]  # the sequence numbers of a batch; computing them costs


def judge(
    guard: Guard,
    train: TrainConfig,
    step: int,
    outcome: Outcome,
    validated: dict[str, float],
    ids: Sequences,
) -> Event | None:
    """The event of this step, if there is one: skipped, or a spike; `ids`: gives the batch's sequence numbers.

    Raises ConfigError when too many steps in a row were skipped, or when a spike is to stop the run: starting again would
    come to the same.
    """
    event: Event | None = None
    guard.skipped_in_a_row = guard.skipped_in_a_row + 1 if outcome.skipped else 0
    if outcome.skipped:
        event = {
            "step": step,
            "what": "skipped",
            "value": _plain(outcome.loss),
            "bound": None,
            "sequences": ids().tolist(),
        }
        text = f"step {step}: loss {outcome.loss:g} or a gradient is not finite"
        if guard.skipped_in_a_row >= train.max_skipped_steps:
            raise ConfigError(
                f"{text}, and so were the {guard.skipped_in_a_row} steps up to it; the last batch is sequences "
                f"{_shown(event['sequences'])}. Lower train.max_lr or lengthen train.warmup_steps, in a new run_dir, or look "
                "at these sequences with `pldr data show`"
            )
    bound = guard.loss(outcome.loss, window=train.spike_window, threshold=train.spike_threshold)
    if bound is not None:
        event = {"step": step, "what": "loss spike", "value": outcome.loss, "bound": bound, "sequences": ids().tolist()}
    order = validated.get("invariance/order_parameter_G", math.nan)
    bound = guard.order(order)
    if bound is not None:
        event = {"step": step, "what": "spike of G's order parameter", "value": order, "bound": bound, "sequences": []}
    if event is None:
        return None
    event["action"] = "skipped" if event["what"] == "skipped" else train.on_spike
    guard.record(event)
    if event["action"] == "stop":
        raise ConfigError(
            f"{told(event)}. train.on_spike=stop ended the run; go on from its last checkpoint with train.on_spike=warn or "
            "rollback"
        )
    return event


def told(event: Event) -> str:
    """An event in one line."""
    value = "not finite" if event["value"] is None else f"{event['value']:.4g}"
    above = "" if event["bound"] is None else f" above {event['bound']:.4g}"
    batch = f"; the batch is sequences {_shown(event['sequences'])}" if event["sequences"] else ""
    return f"step {event['step']}: {event['what']}, {value}{above}{batch}"


def checkpoint_to_go_back_to(folder: Path, guard: Guard, step: int) -> Path | None:
    """The newest whole checkpoint from before `step`, the same on all ranks; None when there is none. Collective.

    Raises ConfigError when the run has gone back to it MAX_ROLLBACKS times already.
    """
    chosen: list[Path | None] = [None]
    if dist.get_rank() == 0:
        for candidate in reversed([c for c in committed(folder) if step_of(c) < step]):
            try:
                verify(candidate)
                chosen[0] = candidate
                break
            except UserError as error:
                log.warning("not rolled back to %s: %s", candidate.name, error)
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is not None and guard.rollbacks.get(chosen[0].name, 0) >= MAX_ROLLBACKS:
        raise ConfigError(
            f"{chosen[0].name}: rolled back to {MAX_ROLLBACKS} times, and it spikes again on other data; lower train.max_lr "
            "in a new run_dir, or set train.on_spike=warn"
        )
    return chosen[0]


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _shown(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return ", ".join(str(i) for i in ids[:SHOWN_IDS]) + more
