"""`train.g_from` and `train.share_g_below`: whose G a sequence is trained with.

With `own` (the papers) each sequence deduces its G. With `neighbor` sequence i of a micro batch uses the G of sequence i + 1,
the last that of the first. With `batch` only the first sequence of a micro batch deduces a G, for all of them: the metric
learner costs 1 / micro_batch. Micro batches are consecutive sequences of the data order (pipeline/data/loading/loader.py), so
which sequence lends its G follows from the position and `micro_batch`; ranks, accumulation and resumes do not change it.

`share_g_below` switches to `batch` after the first validation whose order parameter of G is below it, where all are nearly the
same function. The step is `shared` in state.json: a run that resumes later shares at once, a rollback to before undoes it.
Validation, the mean of a freeze, and every later stage use each sequence's own G.
"""

from __future__ import annotations

from pipeline.config.train import TrainConfig
from pipeline.train.state import TrainState
from pldr_model.config import GFrom, ModelConfig


def g_in_use(settings: TrainConfig, state: TrainState) -> GFrom:
    """Where the G of the next step comes from; a frozen one has no choice."""
    if state.frozen is not None:
        return "own"
    return settings.g_from if state.shared is None else "batch"


def training_flops(model: ModelConfig, settings: TrainConfig, state: TrainState) -> float:
    """Floating-point operations of a token of the next step."""
    shared = g_in_use(settings, state) == "batch"
    return model.flops_per_token(training=True, sequences_per_g=settings.micro_batch if shared else 1)


def share(settings: TrainConfig, state: TrainState, order_parameter: float | None) -> str | None:
    """Begin to share G when this validation's order parameter of G (None: not measured) asks for it; what to announce then."""
    threshold = settings.share_g_below
    if threshold is None or order_parameter is None or state.shared is not None or not order_parameter < threshold:
        return None
    state.shared = state.step
    return (
        f"G is shared after step {state.step}: order parameter {order_parameter:.1e} is below {threshold:g}; one sequence of "
        f"each {settings.micro_batch} deduces it"
    )
