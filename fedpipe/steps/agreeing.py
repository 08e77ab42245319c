"""What the parties of a round's secure sum agree on before anything is sent, all of it public."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpipe.config import FederationSettings, Settings
from fedpipe.methods import Method
from fedpipe.models.lora import TensorSpec
from fedpipe.plan import Plan
from fedpipe.privacy.distributed import MECHANISM, Shares
from fedpipe.privacy.ledger import LedgerEntry
from fedpipe.server.masking import Terms, Whole
from fedpipe.server.summing import terms_of, threshold_of
from fedpipe.state import Run
from fedpipe.steps.common import readable
from fedpipe.workspace import Workspace

STEP = 1  # with noise in shares, a round is one noisy step of each of its clients


def checked(plan: Plan, settings: Settings, method: Method, specs: Sequence[TensorSpec]) -> Plan:
    """Return a plan whose rounds' sums 32 bits hold, of as many tensors as there are.

    Raises
    ------
    SettingsError, PrivacyError
        They do not; nothing was begun.
    """
    if settings.federation.secure_aggregation:
        for count, clients in {len(names): names for names in plan.participants}.items():
            shares = shares_of(plan, settings.federation, count, specs)
            _terms(plan, settings.federation, method, "", 1, clients, specs, shares)
    return plan


def shares_of(plan: Plan, federation: FederationSettings, clients: int, specs: Sequence[TensorSpec]) -> Shares | None:
    """Return how so many clients share the noise of a round; None where none is added to their sum."""
    if plan.shares is None:
        return None
    least, size = threshold_of(federation, clients), sum(spec.numel for spec in specs)
    return Shares(plan.clip_norm, plan.shares.noise_multiplier, clients, least, size)


def agreed(
    run: Run,
    workspace: Workspace,
    round_plan: Mapping[str, Any],
    clients: Sequence[str],
    specs: Sequence[TensorSpec],
    shares: Shares | None,
) -> Terms:
    """Return the terms of the next attempt at a round's sum; each attempt has masks of its own."""
    number, query = round_plan["round"], round_plan["query"]
    failed = [path for path in run.round_dir(number).glob("stopped-*.json") if _of(path, query)]
    name = f"{query}, attempt {len(failed) + 1}"
    return _terms(run.plan, run.settings.federation, workspace.method, name, number, clients, specs, shares)


def charge(run: Run, round_plan: Mapping[str, Any], clients: Sequence[str]) -> None:
    """Put on disk what their shares of the noise cost these clients, before one is drawn."""
    own, number, query = run.plan.shares, round_plan["round"], round_plan["query"]
    run.ledger.append(
        [
            LedgerEntry(client, number, STEP, own.noise_multiplier, own.sampling_rate, query, mechanism=MECHANISM)
            for client in clients
        ]
    )


def _terms(
    plan: Plan,
    federation: FederationSettings,
    method: Method,
    query: str,
    round: int,
    clients: Sequence[str],
    specs: Sequence[TensorSpec],
    shares: Shares | None,
) -> Terms:
    largest = max(own.records for own in plan.clients.values()) if method.weights.uses_sizes else None
    terms = terms_of(federation, query, round, clients, specs, largest)
    return terms if shares is None else replace(terms, codec=Whole(shares.unit))


def _of(path: Path, query: str) -> bool:
    return (readable(path) or {}).get("query") == query
