"""`data.phases` as a run draws them: where each of them ends, and from where on they hold.

A checkpoint records how many sequences of each source came before it (state.json, `mixture`), and the phases that decided it.
A run that goes on with the same ones goes on in the same order. One with others, or of another length, begins them at the
checkpoint: what was drawn before is what is recorded, and the new phases decide the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from pipeline.config.batches import planned_sequences
from pipeline.config.run import RunConfig

RECORDED = "mixture"  # in state.json
DENOMINATOR = 10**9  # weights are YAML's decimal numbers


@dataclass(frozen=True)
class Begin:
    """Where the phases of a run begin: a step, its position in the order, and the sequences of each source before that."""

    step: int = 0
    position: int = 0
    drawn: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedPhase:
    """Positions up to `end` (the last phase continues beyond), and the share of each source that is drawn in them."""

    end: int
    shares: Mapping[str, Fraction]

    def recorded(self) -> dict[str, Any]:
        """For state.json."""
        return {"end": self.end, "shares": {source: str(share) for source, share in self.shares.items()}}


def planned_phases(config: RunConfig, begin: Begin) -> list[PlannedPhase]:
    """The phases of a run, without any left-out sequences."""
    total = begin.position + planned_sequences(config.train, from_step=begin.step)
    return [PlannedPhase(round(phase.until * total), shares_of(phase.weights)) for phase in config.data.phases or ()]


def begin_of(config: RunConfig, state: Mapping[str, Any]) -> Begin:
    """Where the phases of a run begin that goes on from a checkpoint. state: its state.json; empty at step 0. One that records
    no counts is continued as if this run's phases had been drawn from the beginning."""
    recorded = state.get(RECORDED)
    if recorded is None:
        return Begin()
    before = Begin(**recorded["begin"])
    if _order(phase.recorded() for phase in planned_phases(config, before)) == _order(recorded["phases"]):
        return before
    return Begin(state["step"], state["sequences_consumed"], recorded["drawn"])


def shares_of(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """The share of each source: its weight over the sum of weights."""
    exact = {source: Fraction(weight).limit_denominator(DENOMINATOR) for source, weight in weights.items()}
    return {source: weight / sum(exact.values()) for source, weight in exact.items()}


def _order(phases: Any) -> list[Any]:
    """What decides the order: where the last phase ends does not."""
    found = list(phases)
    return [(phase["end"] if phase is not found[-1] else None, phase["shares"]) for phase in found]
