"""What a ledger amounts to: `reports/ledger.json`, per client and for the run, for those who read no chain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpipe.errors import PrivacyError
from fedpipe.privacy.accounting import epsilon, epsilon_prv, epsilon_rdp
from fedpipe.privacy.history import ADD_REMOVE
from fedpipe.privacy.ledger import Ledger
from fedpipe.privacy.neighbours import neighbours


def summary(
    ledger: Ledger | None,
    delta: float,
    accountant: str,
    sizes: Mapping[str, int | None],
    *,
    dp_valid: bool,
    unit: str = "record",
    adjacency: str = ADD_REMOVE,
    sampling_rates: Mapping[str, float] | None = None,
    groups: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return what `reports/ledger.json` holds: per client, and for the run, what was spent.

    Parameters
    ----------
    ledger
        None where `unit` is `none`; epsilons are then null.
    sizes
        Records of every client of the federation, also of those that took no step. With unit
        `client` the one entry is `EVERY`, without a number.
    dp_valid
        Whether the guarantee holds: the noise was secret, and private.
    sampling_rates
        The planned rate of each client; without it, the largest one in the ledger.
    groups
        Groups of every client, where they are the unit.

    Raises
    ------
    PrivacyError
        The ledger has a client that `sizes` has not, or another unit or adjacency.
    """
    private, words = unit != "none", neighbours(unit, adjacency)
    if private and (ledger is None or (ledger.header["unit"], ledger.header["adjacency"]) != (unit, words)):
        raise PrivacyError(f"ledger: expected one of unit '{unit}', {words}")
    strangers = sorted(set(ledger.clients() if ledger else ()) - set(sizes))
    if strangers:
        raise PrivacyError(f"ledger: has the client '{strangers[0]}', which the partition has not")
    clients: dict[str, dict[str, Any]] = {}
    for client in sorted(sizes):
        history = ledger.history(client) if ledger else ()  # each different one is accounted once, and kept
        prv = epsilon_rdp if ledger and ledger.by_renyi_only(client) else epsilon_prv
        by = "rdp" if prv is epsilon_rdp else accountant
        clients[client] = {
            "records": sizes[client],
            **({} if groups is None else {"groups": groups[client]}),
            "sampling_rate": (sampling_rates or {}).get(client, max((q for _, q, _ in history), default=None)),
            "entries": [list(entry) for entry in history],
            "participations": ledger.participations(client) if ledger else 0,
            "epsilon_prv": prv(history, delta, adjacency) if private else None,
            "epsilon_rdp": epsilon_rdp(history, delta, adjacency) if private else None,
            "epsilon": epsilon(history, delta, by, adjacency) if private else None,
        }
    return {
        "unit": unit,
        "adjacency": words,
        "delta": delta,
        "accountant": accountant,
        "epsilon_max": max((c["epsilon"] for c in clients.values()), default=0.0) if private else None,
        "epsilon_max_rdp": max((c["epsilon_rdp"] for c in clients.values()), default=0.0) if private else None,
        "dp_valid": dp_valid and private,
        "head": ledger.heads() if ledger else {},
        "clients": clients,
    }
