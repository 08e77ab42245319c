"""Rounds that do not wait: the server steps whenever enough updates have arrived.

`clients_per_round` clients work at any time, each on one job at a time. Whoever is done is
replaced by a client drawn among those that rest, who starts from the newest state. An update is
late by the number of steps that the server took since its start; how late it may be decides
whether it is used. Arrivals follow from simulated speeds, so the whole run is played through
here, before it begins, and who spends how much is known.

What all of these bound is the largest distance between the state where an update was computed and
the one where it is applied, on which their rates of convergence depend (Birch SGD,
arXiv 2505.09218).
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpipe.config import PositiveInt
from fedpipe.errors import SettingsError
from fedpipe.server.jobs import Demand, Job, Schedule, Scheduling, Speeds

_DRAWS, _DROPOUT = 3, 4  # which of the seed's streams


class Asynchronous(Scheduling):
    """A scheduling whose rounds do not wait for all who are at work."""

    stale: ClassVar[bool] = True

    @abstractmethod
    def needed(self, demand: Demand) -> int:
        """Return how many updates make a server step; at most one of each client."""

    @abstractmethod
    def accepts(self, staleness: int, demand: Demand) -> bool:
        """Say whether an update that is so many steps late is used; one that is not late always is."""

    def plan(self, demand: Demand) -> Schedule:
        needed = self.needed(demand)
        if needed > len(demand.clients):
            raise SettingsError(
                f"method.rounds.size: found {needed}; a round takes one update of a client, and the partition has "
                f"{len(demand.clients)} clients, expected no more"
            )
        return Simulation(self, demand, needed, self.speeds(demand)).run()


class Buffered(Asynchronous):
    """A server step when `size` updates have arrived (FedBuff, arXiv 2106.06639; Rennala, arXiv 2305.12387).

    `size` is half of the clients at work, rounded up, where it is null. An update more than
    `max_staleness` steps late is dropped (null: none is); with `ignore_stale`, any that is late
    (Rennala). The weight of one that is s steps late is divided by (1 + s)^`exponent`.
    """

    name = "buffered"
    size: PositiveInt | None = None
    ignore_stale: bool = False
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    exponent: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5

    @property
    def single(self) -> bool:
        return self.size == 1

    def needed(self, demand: Demand) -> int:
        return self.size or -(-demand.wanted // 2)

    def accepts(self, staleness: int, demand: Demand) -> bool:
        bound = 0 if self.ignore_stale else self.max_staleness
        return bound is None or staleness <= bound

    def discount(self, staleness: int) -> float:
        return (1 + staleness) ** -self.exponent


class Ringmaster(Asynchronous):
    """A server step for every update that is less than `threshold` steps late; others are dropped (arXiv 2501.16168).

    `threshold` is the number of clients at work where it is null: with equal speeds none is dropped.
    """

    name = "ringmaster"
    single = True
    threshold: PositiveInt | None = None

    def needed(self, demand: Demand) -> int:
        return 1

    def accepts(self, staleness: int, demand: Demand) -> bool:
        return staleness < (self.threshold or demand.wanted)


class Simulation:
    """One run, played through on simulated speeds."""

    def __init__(self, rule: Asynchronous, demand: Demand, needed: int, speeds: Speeds) -> None:
        self.rule, self.demand, self.needed, self.speeds = rule, demand, needed, speeds
        self.clock = 0.0
        self.steps_at: list[float] = []
        self._left = np.full(len(demand.clients), demand.cap)
        self._free = np.ones(len(demand.clients), dtype=bool)  # neither at work, nor in the buffer, nor away
        self._working: list[tuple[float, int, int, int]] = []  # (arrival, order of starting, client, start)
        self._buffer: list[tuple[int, int]] = []  # (client, start)
        self._away: list[int] = []
        self._jobs: list[list[Job]] = [[] for _ in range(demand.rounds)]
        self._missed: list[list[int]] = [[] for _ in range(demand.rounds)]
        self._started = 0
        self._draws = np.random.default_rng([demand.seed, 0, _DRAWS])
        self._luck = np.random.default_rng([demand.seed, 0, _DROPOUT])

    @property
    def state(self) -> int:
        """The newest global state: how many steps the server has taken."""
        return len(self.steps_at)

    def run(self) -> Schedule:
        """Play until the last step; what is still being worked on then is never sent, and spends nothing."""
        while self.state < self.demand.rounds:
            self._hire()
            if not self._working:
                self._refuse()
            self.clock = self._working[0][0]
            # Who arrives at the same moment is heard before anyone starts again.
            while self._working and self._working[0][0] == self.clock and self.state < self.demand.rounds:
                self._arrive()
        return self._schedule()

    def _hire(self) -> None:
        """Fill the free places with clients drawn among those that rest and may go on."""
        while len(self._working) < self.demand.wanted:
            candidates = np.flatnonzero(self._free & (self._left > 0))
            if not len(candidates):
                break
            client = int(self._draws.choice(candidates))
            self._free[client] = False
            if self.demand.dropout and self._luck.random() < self.demand.dropout:
                self._away.append(client)
                self._missed[self.state].append(client)
            else:
                self._start(client)
        if not self._working and self._away:
            client = self._away.pop(0)
            self._missed[self.state].remove(client)
            self._start(client)

    def _start(self, client: int) -> None:
        self._left[client] -= 1
        arrival = self.clock + self.speeds.job(client, self.demand.local_steps)
        heapq.heappush(self._working, (arrival, self._started, client, self.state))
        self._started += 1

    def _arrive(self) -> None:
        """Hear the next client: put its update into the buffer, or drop it; step if the buffer is full."""
        _, _, client, start = heapq.heappop(self._working)
        if not self.rule.accepts(self.state - start, self.demand):
            self._jobs[start].append(Job(self.demand.clients[client], start, used=False))
            self._free[client] = True
            return
        self._buffer.append((client, start))
        if len(self._buffer) == self.needed:
            self._jobs[self.state] += [Job(self.demand.clients[who], began) for who, began in self._buffer]
            self.steps_at.append(self.clock)
            # A client is in a round once, so whoever is in the buffer rests until the step.
            self._free[[who for who, _ in self._buffer] + self._away] = True
            self._buffer, self._away = [], []

    def _schedule(self) -> Schedule:
        demand = self.demand
        jobs = tuple(tuple(sorted(members, key=lambda job: job.client)) for members in self._jobs)
        taken = dict.fromkeys(demand.clients, 0)
        for job in (job for members in jobs for job in members):
            taken[job.client] += 1
        return Schedule(
            jobs,
            steps=dict.fromkeys(demand.clients, demand.local_steps),
            most={name: max(1, number) for name, number in taken.items()},
            seconds=tuple(np.diff([0.0, *self.steps_at]).tolist()),
            away=tuple(tuple(demand.clients[client] for client in sorted(missed)) for missed in self._missed),
        )

    def _refuse(self) -> None:
        raise SettingsError(
            f"federation.max_participations: with {self.demand.cap} a client, method.rounds {self.rule} has no client "
            f"left that may fill round {self.state + 1} of {self.demand.rounds}; raise it, or lower federation.rounds"
        )
