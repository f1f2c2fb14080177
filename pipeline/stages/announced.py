"""What `train` says when it starts of settings that do less, or other things, than one might think."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.config.leak import around_the_circle
from pipeline.config.phases import RECORDED, begin_of, planned_phases
from pipeline.config.run import RunConfig

if TYPE_CHECKING:
    from pipeline.data.tokens.index import TokenIndex


def about_recipe(config: RunConfig, index: TokenIndex) -> list[str]:
    """What is rounded, what document masks do not do and `tokens.sources` cannot, and where G comes back to its sequence."""
    lines = []
    if config.train.precision == "bf16" and config.train.zero_stage == 0:
        fix = "Muon has no other stage" if config.train.optimizer == "muon" else "use train.zero_stage=1"
        lines.append(
            f"bf16 at ZeRO stage 0: gradients are accumulated in bf16, and a resumed run is not bit-equal; {fix}"
        )
    if config.train.document_masks and config.model.g_source == "learned":
        lines.append(
            "train.document_masks keeps attention within a document, but a learned G_LM sums over all documents of a sequence: "
            "they are apart only once G_LM is invariant, or frozen (train.freeze_g)"
        )
    if config.tokens.sources and not index.sources:
        lines.append("val/loss/SOURCE is not logged: these tokens are of a single source, or were made without it")
    if (leak := around_the_circle(config)) is not None:
        lines.append(f"warning     {leak}")
    return lines


def about_phases(config: RunConfig, state: dict[str, Any]) -> list[str]:
    """What becomes of the order of the data where a run goes on from one with other phases, or of another length. state: the
    checkpoint's state.json."""
    saved, now = state["config"], config.as_dict()
    before = saved.get("data", {}).get("phases")
    if config.data.phases is None:
        again = "in the order without data.phases, from the same position on: some are drawn again, others left out"
        return [] if before is None else [f"phases      this run has none: sequences are drawn {again}"]
    if state.get(RECORDED) is not None:
        return _recorded(config, state)
    of_length = ("steps", "global_batch", "batch_warmup")
    if before == now["data"]["phases"] and all(saved["train"].get(key) == now["train"][key] for key in of_length):
        return []
    return [
        "phases      the checkpoint does not say how many sequences of each source it was trained on: they are counted by the "
        "phases of this run, over its own length; some may be drawn again, and others be left out"
    ]


def _recorded(config: RunConfig, state: dict[str, Any]) -> list[str]:
    begin = begin_of(config, state)
    if begin.step != state["step"]:
        return []
    ends = [phase.end for phase in planned_phases(config, begin)]
    number = 1 + sum(end <= begin.position for end in ends[:-1])
    drawn = ", ".join(f"{source} {count:,}" for source, count in begin.drawn.items())
    return [
        f"phases      those of this run decide from step {begin.step:,} on, in phase {number} of {len(ends)} (sequence "
        f"{begin.position:,} of {ends[-1]:,}); drawn before: {drawn}"
    ]
