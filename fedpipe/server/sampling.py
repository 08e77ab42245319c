"""Sampling of clients: who takes part in each round, uniformly, by the seed, and under a cap."""

from __future__ import annotations

import numpy as np

from fedpipe.errors import SettingsError
from fedpipe.server.jobs import Demand, Sampled

_DROPOUT = 2  # which of a round's streams


def sample(demand: Demand) -> Sampled:
    """Choose each round's clients uniformly, by the seed, among those below the cap.

    A client that is not available has not taken part: it has spent nothing, and the cap does not
    count it. Of each round one client at least is available.

    Raises
    ------
    SettingsError
        All clients together may take part less often than the rounds need.
    """
    _check(demand)
    left = np.full(len(demand.clients), demand.cap)
    members, away = [], []
    for number in range(1, demand.rounds + 1):
        drawn = _draw(demand, number, left)
        chosen = _available(demand, number, drawn)
        left[chosen] -= 1
        members.append(tuple(demand.clients[index] for index in chosen))
        away.append(tuple(demand.clients[index] for index in np.setdiff1d(drawn, chosen)))
    return Sampled(tuple(members), tuple(away))


def _check(demand: Demand) -> None:
    needed, capacity = demand.rounds * demand.wanted, len(demand.clients) * demand.cap
    if needed > capacity:
        raise SettingsError(
            f"federation.max_participations: with {demand.cap} a client, {len(demand.clients)} clients take part "
            f"{capacity} times at most, and {demand.rounds} rounds of {demand.wanted} need {needed}; "
            f"raise it to {-(-needed // len(demand.clients))}, or lower federation.rounds or clients_per_round"
        )


def _draw(demand: Demand, number: int, left: np.ndarray) -> np.ndarray:
    """Draw a round's clients so that all later rounds can still be filled.

    Of the `after` rounds to come each client can fill as many as it has participations left. Who
    has more of these than rounds to come loses nothing by taking part now; some of these, at least
    `forced`, must be among the chosen, or the others would be missing in the end. A draw that has
    too few is drawn again with that many of them.
    """
    generator = np.random.default_rng([demand.seed, number])
    after = demand.rounds - number
    drawn = generator.choice(np.flatnonzero(left > 0), size=demand.wanted, replace=False)
    spare = left > after
    forced = demand.wanted - (int(np.minimum(left, after).sum()) - after * demand.wanted)
    if int(spare[drawn].sum()) < forced:
        first = generator.choice(np.flatnonzero(spare), size=forced, replace=False)
        others = np.setdiff1d(np.flatnonzero(left > 0), first)
        drawn = np.concatenate([first, generator.choice(others, size=demand.wanted - forced, replace=False)])
    return np.sort(drawn)


def _available(demand: Demand, number: int, drawn: np.ndarray) -> np.ndarray:
    if not demand.dropout:
        return drawn
    luck = np.random.default_rng([demand.seed, number, _DROPOUT]).random(len(drawn))
    return drawn[luck >= min(demand.dropout, luck.max())]
