"""What a run may spend and what it has spent: the plan and the ledger held against each other.

The plan promises an epsilon; the ledger says what was taken. Before a round, no client may
go past what its noise was calibrated for. After it, the ledger must hold the whole round:
not less, which would understate epsilon, and not more than the plan allows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedpipe.errors import PrivacyError
from fedpipe.plan import Plan
from fedpipe.privacy.accounting import Entry, merge
from fedpipe.state import Run

MOST_HISTORIES = 64  # accounted one by one before a round; PRV takes a few hundredths of a second for each


def check_spent(run: Run, round: int) -> None:
    """Check that the ledger holds what a complete round spent.

    The chain in the ledger shows every change but one: that its end was cut off, or an older
    copy put back. Epsilon would then be smaller than the truth.

    Raises
    ------
    PrivacyError
        Entries of the round are missing.
    """
    record = run.round_record(round)
    if record is not None and round > 0 and run.plan.private:
        check_round_spent(run, round, record["query"], record["clients"])


def check_round_spent(run: Run, round: int, query: str, clients: Iterable[str]) -> None:
    """Check that the ledger holds what these clients spent in a round of this query.

    Raises
    ------
    PrivacyError
        Entries are missing.
    """
    taken, plans = run.ledger.taken(round, query), run.plan.charged(round)
    lost = [client for client in clients if taken[client] < plans[client].local_steps]
    if lost:
        client = lost[0]
        raise PrivacyError(
            f"{run.ledger_path}: holds {taken[client]} of the {plans[client].local_steps} noisy steps that {client} "
            f"took in round {round}, so epsilon is not known; restore the file from a newer copy"
        )


@dataclass(frozen=True)
class Price:
    """What a round would cost its clients.

    Attributes
    ----------
    clients : client -> epsilon at the run's delta, by the run's accountant, without the round and with it
    excluded : client -> why it cannot take part: its budget would be exceeded
    """

    clients: Mapping[str, tuple[float, float]]
    excluded: Mapping[str, str]

    def to_json(self) -> dict[str, Any] | None:
        """Return the clients' epsilons, and the largest of those that take part; None without privacy."""
        if not self.clients:
            return None
        present = [both for client, both in self.clients.items() if client not in self.excluded]
        before, after = map(max, zip(*present, strict=True)) if present else (None, None)
        clients = {client: list(both) for client, both in self.clients.items()}
        return {"epsilon_before": before, "epsilon_after": after, "clients": clients}


def price_of(run: Run, round: int, query: str) -> Price:
    """Return what a round of this query would cost each of its clients, and who cannot afford it.

    Two things leave a client out: epsilon of its history and the round, by the run's accountant,
    above the target; and, as a cap that no accountant moves, more noisy steps than sigma was
    calibrated for. A plan asks for neither by itself; a round repeated under another query
    (another device, say) is a release of its own and can. What the ledger holds of this very
    query is not counted twice, so a round that is begun again decides as it did before.
    """
    if not run.plan.private:
        return Price({}, {})
    # Later rounds count too: they may have been taken before this one was deleted and begun again.
    run.ledger.verify()
    now, before, after = run.ledger.taken(round, query), {}, {}
    plans = run.plan.charged(round)
    for client, own in plans.items():
        step = own.noise_multiplier, own.sampling_rate
        before[client] = _without(run.ledger.history(client), step, now[client])
        after[client] = merge([*before[client], (*step, own.local_steps)])
    known = _epsilons(run.plan, {*before.values(), *after.values()})
    costs = {client: (known[before[client]], known[after[client]]) for client in before}
    excluded = {}
    for client, (first, then) in costs.items():
        own, spent = plans[client], sum(steps for _, _, steps in before[client])
        if spent + own.local_steps > own.max_steps:
            excluded[client] = f"{spent} of {own.max_steps} noisy steps are spent; a round takes {own.local_steps}"
        elif then > run.plan.epsilon:
            excluded[client] = f"epsilon {first:.4g} would become {then:.4g}; the target is {run.plan.epsilon:g}"
    return Price(costs, excluded)


def _without(history: Iterable[Entry], step: tuple[float, float], count: int) -> tuple[Entry, ...]:
    """Return a history less `count` steps of these noise multiplier and rate."""
    left = {(sigma, q): steps for sigma, q, steps in history}
    if count:
        left[step] -= count
    return merge((sigma, q, steps) for (sigma, q), steps in left.items())


def _epsilons(plan: Plan, histories: Collection[tuple[Entry, ...]]) -> dict[tuple[Entry, ...], float]:
    """Return epsilon of each history; beyond `MOST_HISTORIES`, of the largest rate of its class of clients.

    A class are the clients of one noise multiplier and one cap, which were calibrated together. Epsilon
    grows with the rate, so what is returned then is above a client's own, and still within its target.
    """
    covers = {history: history for history in histories}
    if len(histories) > MOST_HISTORIES:
        largest: dict[tuple[float, int], float] = defaultdict(float)
        classes = defaultdict(list)
        for own in plan.clients.values():  # with unit `client` there is one history, and no need of classes
            key = own.noise_multiplier, own.max_steps
            largest[key] = max(largest[key], own.sampling_rate)
            classes[own.noise_multiplier, own.sampling_rate].append(key)
        for history in (history for history in histories if len(history) == 1):
            ((sigma, q, steps),) = history
            fitting = [key for key in classes[sigma, q] if key[1] >= steps]
            covers[history] = ((sigma, min((largest[key] for key in fitting), default=q), steps),)
    at = {cover: plan.accounted(cover) for cover in set(covers.values())}
    return {history: at[cover] for history, cover in covers.items()}


def epsilon_so_far(run: Run) -> dict[str, float | None]:
    """Return the largest client's epsilon by the run's accountant and by RDP, of all that the ledger holds.

    Raises
    ------
    PrivacyError
        It is above the target.
    """
    if not run.plan.private:
        return {"epsilon_max": None, "epsilon_rdp": None}
    run.ledger.verify()
    candidates = undominated(run.ledger.histories())
    by_rdp = sorted(((run.plan.accounted(history, "rdp"), history) for history in candidates), reverse=True)
    rdp = by_rdp[0][0] if by_rdp else 0.0
    prv = 0.0
    for bound, history in by_rdp:
        if bound <= prv:  # epsilon by PRV is never above that by RDP, so none of the rest is larger
            break
        prv = max(prv, run.plan.accounted(history, "prv"))
    reported = prv if run.plan.accountant == "prv" else rdp
    if reported > run.plan.epsilon:
        raise PrivacyError(f"the ledger's epsilon is {reported:.4f}, above the target {run.plan.epsilon:g}; stopped")
    return {"epsilon_max": reported, "epsilon_rdp": rdp}


def undominated(histories: Iterable[tuple[Entry, ...]]) -> list[tuple[Entry, ...]]:
    """Return the histories that can have the largest epsilon.

    At one noise multiplier epsilon grows with the rate and with the steps. So of the histories
    with one `(sigma, q, steps)` those are left out for which another has the same sigma and at
    least their rate and their steps. Epsilon is then computed for a few classes of clients, and
    not for every client.
    """
    kept, single = [], defaultdict(list)
    for history in histories:
        if len(history) == 1:
            sigma, rate, steps = history[0]
            single[sigma].append((steps, rate))
        elif history:
            kept.append(history)
    for sigma, members in single.items():
        largest = 0.0
        for steps, rate in sorted(members, reverse=True):
            if rate > largest:
                kept.append(((sigma, rate, steps),))
                largest = rate
    return sorted(kept)
