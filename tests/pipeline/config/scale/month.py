"""A month of training on nodes that fail, event by event (SimPy): what the formulas of failures.py are compared with.

Every node fails by itself, after an exponential time; it is repaired and becomes a spare. The job loses its work since the last
checkpoint that counts, takes a spare (or waits for one), restarts, and trains on. Failures also hit restarts and saves.
"""

import random
from dataclasses import dataclass

import simpy

DAY_S = 86400.0


@dataclass(frozen=True)
class Site:
    """Seconds, but for the numbers of nodes."""

    nodes: int
    node_mtbf: float
    spares: int
    repair: float
    interval: float
    stall: float
    restart: float
    commit: float = 0.0  # after the stall, until the checkpoint counts


class Month:
    """One run of the simulation. After `run`: goodput, failures, and the share of time in which the job lacked a node."""

    def __init__(self, site: Site, seed: int, days: float = 30.0) -> None:
        self.site, self.random, self.end = site, random.Random(seed), days * DAY_S
        self.env = simpy.Environment()
        self.spares, self.active, self.failures, self.lacked = site.nodes + site.spares, 0, 0, 0.0
        self.committed = self.committed_at = 0.0
        self.starts = 0
        self.repaired = self.env.event()

    def run(self) -> "Month":
        self.job = self.env.process(self._job())
        self.env.run(until=self.end)
        return self

    @property
    def goodput(self) -> float:
        return self.committed / self.committed_at if self.committed_at else 0.0

    def _job(self):
        progress = 0.0
        while True:
            try:
                yield from self._nodes()
                if self.starts:
                    yield self.env.timeout(self.site.restart)
                self.starts += 1
                progress = self.committed
                while True:
                    yield self.env.timeout(self.site.interval)
                    progress += self.site.interval
                    yield self.env.timeout(self.site.stall)
                    if self.site.commit:
                        self.env.process(self._commit(progress))
                    else:
                        self._count(progress)
            except simpy.Interrupt:
                self.starts = max(self.starts, 1) + 1  # a copy under way is lost with its node

    def _nodes(self):
        """Take spares until the job is complete; wait for repairs."""
        while self.active < self.site.nodes:
            if self.spares:
                self.spares -= 1
                self.active += 1
                self.env.process(self._node())
                continue
            waits = self.env.now
            try:
                yield self.repaired
            finally:
                self.lacked += self.env.now - waits

    def _node(self):
        yield self.env.timeout(self.random.expovariate(1 / self.site.node_mtbf))
        self.active -= 1
        self.failures += 1
        self.job.interrupt()
        yield self.env.timeout(self.random.expovariate(1 / self.site.repair))
        self.spares += 1
        self.repaired.succeed()
        self.repaired = self.env.event()

    def _commit(self, progress: float):
        start = self.starts
        yield self.env.timeout(self.site.commit)
        if self.starts == start:
            self._count(progress)

    def _count(self, progress: float) -> None:
        self.committed, self.committed_at = progress, self.env.now
