"""What a schedule is made of: the clients' jobs, their simulated speeds, and what all schedulings share.

Everything is decided before the run, from the seed and the settings. Simulated speeds are drawn,
not measured, so they are public: the plan knows every arrival, and with it the number of noisy
steps that every client will take.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpipe.parts import Part

_SPEEDS = 1  # which of the seed's streams: rounds have streams of their own, from (seed, round)


@dataclass(frozen=True)
class Job:
    """One client's work whose result reaches the server in a round.

    Attributes
    ----------
    client : who
    start : the round whose global state it trained from; round - 1 unless it is late
    used : whether the server takes its update; a dropped one has spent privacy all the same, and
        stands in the round after `start`, where it began
    """

    client: str
    start: int
    used: bool = True


@dataclass(frozen=True)
class Schedule:
    """A run's jobs and local steps.

    Attributes
    ----------
    jobs : `jobs[t - 1]` are those of round t, in order of the clients, at most one for each; one at least is used
    steps : every client's local steps in a job
    most : how many jobs each client may ever take, which its noise is calibrated for; at least 1
    seconds : simulated duration of each round, where the median client takes 1 s for a local step
    away : clients that were asked to work for a round and were not available (`Demand.dropout`), in order
    """

    jobs: tuple[tuple[Job, ...], ...]
    steps: Mapping[str, int]
    most: Mapping[str, int]
    seconds: tuple[float, ...]
    away: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Demand:
    """What the settings ask of a schedule.

    Attributes
    ----------
    clients : all of the partition, in order of their names
    rounds : server steps
    wanted : clients sampled for a round, or at work at any time
    local_steps : `federation.local_steps`
    cap : participations that no client may exceed
    dropout : probability that a sampled client is not available
    seed : of the run
    """

    clients: tuple[str, ...]
    rounds: int
    wanted: int
    local_steps: int
    cap: int
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Sampled:
    """Each round's clients: those that take part, and those that were drawn and are not available; in order."""

    members: tuple[tuple[str, ...], ...]
    away: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Speeds:
    """Simulated seconds that each client takes for a local step, and to receive a state and send an update."""

    step: np.ndarray
    transfer: np.ndarray

    def job(self, index: int, steps: int) -> float:
        """Return the seconds of a whole job."""
        return float(self.transfer[index] + steps * self.step[index])


class Scheduling(Part):
    """A way to schedule rounds.

    `spread` is the standard deviation of the logarithm of the clients' simulated seconds, for a
    local step and for a transfer: 0 makes all equal, at 0.5 nineteen of twenty clients are within
    2.7 times the median.
    """

    # Updates may be of an older state than the last.
    stale: ClassVar[bool] = False
    # A round may have one update, so that a sum of a round's updates hides nothing.
    single: ClassVar[bool] = False

    spread: Annotated[float, Field(ge=0, le=3)] = 0.5

    @abstractmethod
    def plan(self, demand: Demand) -> Schedule:
        """Return the jobs of all rounds.

        Raises
        ------
        SettingsError
            No schedule keeps to the cap; or an option does not fit the number of clients.
        """

    def discount(self, staleness: int) -> float:
        """Return the factor on the weight of an update that is `staleness` rounds late."""
        return 1.0

    def share(self, steps: int) -> float:
        """Return the factor on the weight of an update of so many local steps."""
        return 1.0

    def speeds(self, demand: Demand) -> Speeds:
        """Draw the clients' speeds; all schedulings draw the same for one seed, so that their times compare."""
        draws = np.random.default_rng([demand.seed, 0, _SPEEDS]).normal(size=(2, len(demand.clients)))
        step, transfer = np.exp(self.spread * draws)
        return Speeds(step, transfer)

    def together(self, demand: Demand, sampled: Sampled, steps: Mapping[str, int]) -> Schedule:
        """Return the schedule in which each round waits for all its members, who start from the last state."""
        members = sampled.members
        speeds, place = self.speeds(demand), {name: index for index, name in enumerate(demand.clients)}
        jobs = tuple(tuple(Job(name, number) for name in names) for number, names in enumerate(members))
        longest = {name: speeds.job(place[name], steps[name]) for name in demand.clients}
        seconds = tuple(max(longest[name] for name in names) for names in members)
        return Schedule(jobs, steps, dict.fromkeys(demand.clients, demand.cap), seconds, sampled.away)
