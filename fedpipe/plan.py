"""The plan of a run: sampling, clipping, noise, schedule and accounting, decided once and together.

What is sampled can then never disagree with what is accounted. The plan is made of public
facts (settings, and the clients' numbers of records, which are treated as public where
they set a sampling rate) and never of anything learnt in training.

Guarantee: with unit `record`, every client's records are protected by (epsilon, delta)
differential privacy under adding or removing one record of that client, against all who
see every update, over all rounds that the client took part in. No amplification by the
sampling of clients is claimed: the server knows who took part.

With unit `client` and noise of the server it is every client, with all its records, that is protected, against
all but the server, which is trusted: it draws who takes part by secret coins and releases one noisy sum a round
(`fedpipe.server.central`). All clients have one history then, and that is the run's.
With noise in shares (`fedpipe.privacy.distributed`) the server is not trusted, and knows who takes part: each
client has a history of the rounds that it took part in, and what is hidden is what it holds.

Noise is calibrated for the most jobs that a client may ever take, times its own local steps. In
rounds that wait for their clients that is the cap, `federation.max_participations` or all rounds.
Rounds that do not wait have their jobs played through beforehand, so that it is the number of jobs
that the client will have, those included whose update comes too late to be used.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedpipe.config import Settings
from fedpipe.errors import PrivacyError, SettingsError
from fedpipe.privacy.accounting import Entry, calibrate, delta_auto, epsilon
from fedpipe.privacy.ledger import EVERY
from fedpipe.privacy.neighbours import ZERO_OUT, adjacency_of, neighbours
from fedpipe.server.scheduling import Demand, Job, Schedule, Synchronous

if TYPE_CHECKING:
    from fedpipe.methods.method import Method

MOST_RATES = 64  # calibrations of one plan; each takes a few tenths of a second
MOST_LEVELS = 8  # of these, for different numbers of steps, where there are too many of both


@dataclass(frozen=True)
class ClientPlan:
    """One client's private step; or, with unit `client`, the server's, for which read clients instead of records.

    Attributes
    ----------
    records : number of training records
    sampling_rate : probability q with which each unit enters a Poisson batch
    expected_batch : q * units; what a sum of gradients is divided by, never the realised size
    noise_multiplier : sigma, the noise's standard deviation on the sum over the clip norm; None where none is added
    max_steps : noisy steps that sigma was calibrated for, or fewer; the client takes no more
    local_steps : noisy steps of one job
    groups : number of groups that the records are of, with unit `group`
    """

    records: int
    sampling_rate: float
    expected_batch: float
    noise_multiplier: float | None
    max_steps: int
    local_steps: int
    groups: int | None = None

    @property
    def units(self) -> int:
        """How many are drawn from: the records, or with unit `group` the groups."""
        return self.records if self.groups is None else self.groups

    @property
    def history_at_cap(self) -> tuple[Entry, ...]:
        """The composition when the client takes every step that it may take."""
        return ((self.noise_multiplier, self.sampling_rate, self.max_steps),) if self.noise_multiplier else ()


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first round. Rounds and steps count from 1.

    Attributes
    ----------
    adjacency : how neighbours differ, in the words of `privacy.neighbours`; what is printed is what is accounted
    local_steps : the most that a client takes in one job
    jobs : `jobs[t - 1]` are those of round t, in order of the clients; they depend on the seed and settings only.
        With unit `client` there are none: who takes part is drawn when a round begins, and is secret
    seconds : simulated duration of each round, where the median client takes 1 s for a local step
    away : clients that were asked to work for a round and are not available, by `federation.dropout`; empty
        where nobody ever is, and with unit `client`, where who takes part is secret
    """

    unit: str
    adjacency: str | None
    epsilon: float | None
    delta: float | None
    accountant: str
    clip_norm: float | None
    rounds: int
    local_steps: int
    clients: Mapping[str, ClientPlan]
    jobs: tuple[tuple[Job, ...], ...]
    seconds: tuple[float, ...]
    central: ClientPlan | None = None
    shares: ClientPlan | None = None
    away: tuple[tuple[str, ...], ...] = ()

    @property
    def private(self) -> bool:
        return self.unit != "none"

    @property
    def whole_clients(self) -> bool:
        """Whether clients are the unit: their steps are plain, and what is clipped and noised are their moves."""
        return self.central is not None or self.shares is not None

    @property
    def step_clip(self) -> float | None:
        """The clip norm of a local step, which is then noised; None where local steps are plain."""
        return None if self.whole_clients else self.clip_norm

    @property
    def sigmas(self) -> list[float]:
        """The noise multipliers of all who add noise; none without privacy."""
        together = self.central or self.shares
        adding = self.clients.values() if together is None else [together]
        return [own.noise_multiplier for own in adding if own.noise_multiplier is not None]

    def jobs_of(self, round: int) -> tuple[Job, ...]:
        """Return a round's jobs; with unit `client`, those of all who may be drawn."""
        if self.central is not None:
            return tuple(Job(client, round - 1) for client in self.participants[round - 1])
        return self.jobs[round - 1]

    def charged(self, round: int) -> dict[str, ClientPlan]:
        """Return whom the ledger charges for a round, in order: its clients, or with unit `client` all in one."""
        if self.central is not None:
            return {EVERY: self.central}
        return {client: self.shares or self.clients[client] for client in self.participants[round - 1]}

    def accounted(self, history: Iterable[Entry], accountant: str | None = None) -> float:
        """Return what a history spends at the plan's delta and adjacency, by its accountant or another one.

        Of noise in shares there is a bound by RDP only, which any other accountant's name then stands for.
        """
        by = "rdp" if self.shares is not None else accountant or self.accountant
        return epsilon(history, self.delta, by, adjacency_of(self.adjacency))

    @cached_property
    def participants(self) -> tuple[tuple[str, ...], ...]:
        """Who works for each round, in order of the names; also those whose update is not used.

        With unit `client`, who may: all of them.
        """
        if self.central is not None:
            return (tuple(sorted(self.clients)),) * self.rounds
        return tuple(tuple(sorted(job.client for job in jobs)) for jobs in self.jobs)

    def away_of(self, round: int) -> tuple[str, ...]:
        """Return who should have worked for a round and is not available."""
        return self.away[round - 1] if self.away else ()

    @cached_property
    def started_until(self) -> dict[int, int]:
        """The rounds from whose states late jobs start, each with the last round that such a job is of."""
        late = {}
        for round, jobs in enumerate(self.jobs, start=1):
            late |= {job.start: round for job in jobs if job.start != round - 1}
        return late

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON; a job is the client's name where it is used and not late, else a list."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        jobs = [[_job_to_json(job, before) for job in jobs] for before, jobs in enumerate(self.jobs)]
        clients = {name: _client_to_json(client) for name, client in self.clients.items()}
        values |= {name: _client_to_json(own) for name in _TOGETHER if (own := getattr(self, name)) is not None}
        away = [list(names) for names in self.away]
        return {**values, "clients": clients, "jobs": jobs, "seconds": list(self.seconds), "away": away}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        clients = {name: ClientPlan(**client) for name, client in values["clients"].items()}
        known = {name: name for name in clients}  # one string a client, however many rounds name it
        jobs = tuple(
            tuple(Job(known[name], start, used) for name, start, used in _jobs_from_json(listed, before))
            for before, listed in enumerate(values["jobs"])
        )
        values = {**values, **{name: ClientPlan(**values[name]) for name in _TOGETHER if values.get(name) is not None}}
        away = tuple(map(tuple, values["away"]))
        return cls(**{**values, "clients": clients, "jobs": jobs, "seconds": tuple(values["seconds"]), "away": away})


_TOGETHER = ("central", "shares")


def _client_to_json(client: ClientPlan) -> dict[str, Any]:
    values = asdict(client)
    if client.groups is None:
        del values["groups"]
    return values


def _job_to_json(job: Job, before: int) -> str | list[Any]:
    return job.client if job.used and job.start == before else [job.client, job.start, job.used]


def _jobs_from_json(listed: Iterable[str | list[Any]], before: int) -> Iterable[list[Any]]:
    return ([job, before, True] if isinstance(job, str) else job for job in listed)


def make_plan(
    settings: Settings,
    sizes: Mapping[str, int],
    method: Method | None = None,
    groups: Mapping[str, int] | None = None,
) -> Plan:
    """Decide a run for clients of these sizes, in the rounds of this method; without one, in synchronous rounds.

    With unit `group`, `groups` are the clients' numbers of groups, and batches and rates count these.
    Each client's noise is calibrated for its own sampling rate; where there are more than
    `MOST_RATES` different ones, for the largest of its class (see `calibration_rates`).

    Raises
    ------
    PrivacyError
        Epsilon cannot be reached with these settings, or delta is too large to mean anything.
    SettingsError
        The rounds need more participations than the cap allows, or do not fit the number of clients.
    """
    federation, privacy = settings.federation, settings.privacy
    schedule = _schedule(settings, tuple(sorted(sizes)), method)
    units = sampled(settings, sizes, groups)
    population = [len(sizes)] if privacy.unit == "client" else list(units.values())
    delta = _delta(settings, population) if settings.private else None
    steps = {name: schedule.most[name] * own for name, own in schedule.steps.items()}
    batches = {name: min(federation.batch_size, units[name]) for name in sorted(sizes)}
    rates = {name: batch / units[name] for name, batch in batches.items()}
    whole = privacy.unit == "client"
    central = _central(settings, len(sizes), delta) if whole and privacy.noise == "central" else None
    shares = _shares(settings, delta) if whole and central is None else None
    sigmas: Mapping[str, float | None] = dict.fromkeys(rates)
    if delta is not None and not whole:
        sigmas = _calibrated(rates, steps, privacy.epsilon, delta, privacy.accountant, privacy.adjacency)
    clients = {
        name: ClientPlan(
            records=sizes[name],
            sampling_rate=rates[name],
            expected_batch=float(batch),
            noise_multiplier=sigmas[name],
            max_steps=steps[name],
            local_steps=schedule.steps[name],
            groups=units[name] if privacy.unit == "group" else None,
        )
        for name, batch in batches.items()
    }
    return Plan(
        unit=privacy.unit,
        adjacency=neighbours(privacy.unit, ZERO_OUT if shares is not None else privacy.adjacency),
        epsilon=privacy.epsilon if settings.private else None,
        delta=delta,
        accountant=privacy.accountant,
        clip_norm=privacy.clip_norm if settings.private else None,
        rounds=federation.rounds,
        local_steps=max(schedule.steps.values()),
        clients=clients,
        jobs=() if central is not None else schedule.jobs,
        seconds=schedule.seconds * (federation.rounds if central is not None else 1),
        central=central,
        shares=shares,
        away=schedule.away if central is None and any(schedule.away) else (),
    )


def sampled(settings: Settings, sizes: Mapping[str, int], groups: Mapping[str, int] | None) -> Mapping[str, int]:
    """Return how many each client draws its batches from: its records, or with unit `group` its groups.

    Raises
    ------
    PrivacyError
        Groups are the unit, and the partition has none.
    """
    if settings.privacy.unit != "group":
        return sizes
    if groups is None:
        raise PrivacyError("privacy.unit: the partition has no groups; set privacy.group and partition again")
    return groups


def _central(settings: Settings, clients: int, delta: float) -> ClientPlan:
    """Decide the server's private step: a round of clients that each take part with one probability."""
    federation, privacy = settings.federation, settings.privacy
    expected = federation.clients_per_round or clients
    rate, rounds = expected / clients, federation.rounds
    try:
        sigma = calibrate(privacy.epsilon, delta, rate, rounds, privacy.accountant, privacy.adjacency)
    except PrivacyError as error:
        cure = "raise privacy.epsilon, or lower federation.clients_per_round or federation.rounds"
        raise PrivacyError(f"{str(error).partition('; ')[0]}; {cure}") from None
    return ClientPlan(clients, rate, float(expected), sigma, rounds, 1)


def _shares(settings: Settings, delta: float) -> ClientPlan:
    """Decide each client's private step with noise in shares: a round that it takes part in, which is known."""
    federation, privacy = settings.federation, settings.privacy
    most = min(federation.max_participations or federation.rounds, federation.rounds)
    try:
        sigma = calibrate(privacy.epsilon, delta, 1.0, most, "rdp")
    except PrivacyError as error:
        cure = "raise privacy.epsilon, or lower federation.max_participations or federation.rounds"
        raise PrivacyError(f"{str(error).partition('; ')[0]}; {cure}") from None
    return ClientPlan(1, 1.0, 1.0, sigma, most, 1)


def _schedule(settings: Settings, clients: tuple[str, ...], method: Method | None) -> Schedule:
    federation = settings.federation
    wanted = federation.clients_per_round or len(clients)
    if wanted > len(clients):
        raise SettingsError(
            f"federation.clients_per_round: found {wanted}; the partition has {len(clients)} clients, expected no more"
        )
    # Where who takes part is drawn later: anybody may, in every round, of which one is like another.
    everybody = settings.privacy.unit == "client" and settings.privacy.noise == "central"
    demand = Demand(
        clients=clients,
        rounds=1 if everybody else federation.rounds,
        wanted=len(clients) if everybody else wanted,
        local_steps=federation.local_steps,
        cap=min(federation.max_participations or federation.rounds, federation.rounds),
        dropout=federation.dropout,
        seed=settings.seed,
    )
    schedule = (method.rounds if method else Synchronous()).plan(demand)
    alone = next((number for number, jobs in enumerate(schedule.jobs, start=1) if len(jobs) < 2), None)
    if federation.secure_aggregation and alone is not None:
        raise SettingsError(
            f"federation.secure_aggregation: round {alone} has one client, whose update is the sum; raise "
            "federation.clients_per_round, or lower federation.dropout"
        )
    return schedule


def _calibrated(
    rates: Mapping[str, float], steps: Mapping[str, int], epsilon: float, delta: float, accountant: str, adjacency: str
) -> dict[str, float]:
    """Return each client's noise multiplier, calibrated at its class's rate and steps, never below its own.

    Each pair of a rate and a number of steps is calibrated for itself, up to `MOST_RATES`. Beyond,
    numbers of steps are put into classes first, and then the rates of each of these.
    """
    pairs = {(rates[name], steps[name]) for name in rates}
    levels = MOST_RATES if len(pairs) <= MOST_RATES else MOST_LEVELS
    level = calibration_rates(steps.values(), levels)
    alike: dict[float, dict[str, float]] = defaultdict(dict)
    for name, rate in rates.items():
        alike[level[steps[name]]][name] = rate
    most = MOST_RATES if len(pairs) <= MOST_RATES else MOST_RATES // len(alike)
    sigmas = {}
    for count, members in sorted(alike.items()):
        classes = calibration_rates(members.values(), most)
        chosen = sorted(set(classes.values()))
        at = {rate: calibrate(epsilon, delta, rate, int(count), accountant, adjacency) for rate in chosen}
        sigmas |= {name: at[classes[rate]] for name, rate in members.items()}
    return {name: sigmas[name] for name in rates}


def calibration_rates(rates: Iterable[float], most: int) -> dict[float, float]:
    """Return, for each distinct sampling rate, the rate that its noise is calibrated at.

    Up to `most` distinct rates: itself. Beyond, a geometric grid between the smallest and the
    largest cuts them into at most `most` classes, and a class is calibrated at its largest rate.
    Epsilon grows with the rate, so all others of a class stay below the target; their noise is
    more than needed by at most the ratio of neighbouring grid points, which is a few percent
    where rates differ tenfold. Rates follow from the clients' sizes, which are public here.
    """
    distinct = sorted(set(rates))
    if len(distinct) <= most:
        return {rate: rate for rate in distinct}
    low, width = math.log(distinct[0]), math.log(distinct[-1] / distinct[0]) / most
    place = {rate: min(int((math.log(rate) - low) / width), most - 1) for rate in distinct}
    largest = {place[rate]: rate for rate in distinct}  # ascending, so the last one of a class stays
    return {rate: largest[place[rate]] for rate in distinct}


def _delta(settings: Settings, units: Sequence[int]) -> float:
    """Return delta, given how many units each population has: a client's records, or the clients."""
    largest, unit = max(units), settings.privacy.unit
    delta = delta_auto(units) if settings.privacy.delta == "auto" else float(settings.privacy.delta)
    if delta >= 1 / largest:
        population = f"{largest} clients" if unit == "client" else f"{largest} {unit}s at a client"
        raise PrivacyError(
            f"privacy.delta: found {delta:g}; with {population} expected less than {1 / largest:.2g}, "
            f"since a mechanism that publishes one random {unit} would pass; use auto"
        )
    return delta
