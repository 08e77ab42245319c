"""Epsilon from the ledger alone: the chain is checked, and what was spent is composed anew.

It takes no data, no partition and no key. The run's plan, if it lies beside the ledger, says which
delta and accountant were promised; the ledger itself says everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe.errors import PrivacyError, StateError
from fedpipe.files import file_digest, read_sealed
from fedpipe.privacy.accounting import Entry, epsilon_prv, epsilon_rdp
from fedpipe.privacy.ledger import Ledger, open_ledger


@dataclass(frozen=True)
class Spent:
    """What one client has spent: merged (sigma, q, steps), and epsilon by both accountants."""

    client: str
    history: tuple[Entry, ...]
    prv: float
    rdp: float

    @property
    def steps(self) -> int:
        return sum(steps for _, _, steps in self.history)


@dataclass(frozen=True)
class Verified:
    """A ledger whose chain holds.

    Attributes
    ----------
    delta : that epsilon is for
    promised : the plan's epsilon and the accountant that it is by; None where there is no plan
    heads : the last hash of each client's chain, to be compared with a copy kept elsewhere
    """

    path: Path
    run_id: str
    unit: str
    adjacency: str
    delta: float
    promised: tuple[float, str] | None
    entries: int
    clients: tuple[Spent, ...]
    heads: dict[str, str]

    @property
    def largest(self) -> tuple[float, float]:
        """The largest client's epsilon by PRV, and by RDP."""
        return max((c.prv for c in self.clients), default=0.0), max((c.rdp for c in self.clients), default=0.0)

    @property
    def kept(self) -> bool:
        """Whether the promised epsilon holds; True where none is known."""
        if self.promised is None:
            return True
        epsilon, accountant = self.promised
        return self.largest[accountant == "rdp"] <= epsilon


def verify_ledger(path: Path, delta: float | None = None) -> Verified:
    """Check a ledger's chain and compute what it adds up to.

    Parameters
    ----------
    path : `ledger.jsonl`, or the directory of a run
    delta : of the guarantee; None for that of the plan beside the ledger

    Raises
    ------
    StateError
        There is no ledger, or it cannot be read.
    PrivacyError
        A line was changed, left out or moved; or delta is neither given nor known.
    """
    path = path / "ledger.jsonl" if path.is_dir() else path
    if not path.exists():
        raise StateError(f"{path}: there is no ledger; expected a run's ledger.jsonl, or its directory")
    ledger, plan = open_ledger(path), _plan(path.parent / "plan.json")
    ledger.verify()
    delta = plan.get("delta") if delta is None else delta
    if delta is None:
        raise PrivacyError(
            f"{path}: delta is not known without the run's plan.json beside it; give --delta, such as 1e-5"
        )
    clients = tuple(_spent(ledger, client, delta) for client in sorted(ledger.clients()))
    return Verified(
        path=path,
        run_id=ledger.header["run_id"],
        unit=ledger.header["unit"],
        adjacency=ledger.header["adjacency"],
        delta=delta,
        promised=(plan["epsilon"], plan["accountant"]) if delta == plan.get("delta") else None,
        entries=len(ledger.entries()),
        clients=clients,
        heads=ledger.heads(),
    )


def _plan(path: Path) -> dict[str, Any]:
    """Return the plan that lies beside a ledger, which must be the one that its run began with."""
    if not path.exists():
        return {}
    info, found = path.with_name("run.json"), read_sealed(path)
    if info.exists() and read_sealed(info).get("plan_sha256") != file_digest(path):
        raise PrivacyError(f"{path}: is not the plan that the run began with; what was promised is not known")
    return found


def _spent(ledger: Ledger, client: str, delta: float) -> Spent:
    """Return what a client spent; where a mechanism is known by its Rényi divergences only, by RDP in both places."""
    history = ledger.history(client)
    rdp = epsilon_rdp(history, delta, ledger.adjacency)
    return Spent(
        client, history, rdp if ledger.by_renyi_only(client) else epsilon_prv(history, delta, ledger.adjacency), rdp
    )
