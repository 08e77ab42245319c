"""What becomes of an update between its training and the server: attacks and faults that are simulated, and lateness.

All of it is decided from public facts (`fedpipe.server.faults`, `fedpipe.server.attacks`), after the client
has trained: it has spent, whatever comes of it. Where the unit is the client and the server adds the noise, nobody may
be told what became of one: there each of these ends as an update that no server takes, and counts as no move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedpipe.client.training import Update
from fedpipe.errors import ShortRoundError
from fedpipe.files import write_sealed
from fedpipe.methods import Method
from fedpipe.models.task import Encoded
from fedpipe.server.attacks import attacked, length, malicious, with_wrong_labels
from fedpipe.server.faults import SIMULATED, Fault, faults_of, job_seconds, spoilt, unusable
from fedpipe.state import Run
from fedpipe.steps.common import readable
from fedpipe.workspace import Workspace


@dataclass(frozen=True)
class Trouble:
    """What is wrong with the clients of an attempt at a round: simulated faults, and who misses the deadline."""

    faults: Mapping[str, Fault] = field(default_factory=dict)
    late: Mapping[str, str] = field(default_factory=dict)

    def kind(self, client: str) -> str | None:
        """Return the kind of fault of a client that has one."""
        return self.faults[client].kind if client in self.faults else None


def failed_attempts(run: Run, round_plan: Mapping[str, Any], name: str = "short") -> int:
    """Return how often a round of this query was tried in vain."""
    paths = run.round_dir(round_plan["round"]).glob(f"{name}-*.json")
    return sum((readable(path) or {}).get("query") == round_plan["query"] for path in paths)


def note_short(run: Run, round_plan: Mapping[str, Any], error: ShortRoundError) -> None:
    """Note that an attempt at a round had too few updates, so that the next one is another."""
    directory = run.round_dir(round_plan["round"])
    number = len(list(directory.glob("short-*.json"))) + 1
    write_sealed(directory / f"short-{number:02d}.json", {"query": round_plan["query"], "reason": str(error)})


def trouble_of(
    run: Run, method: Method, round_plan: Mapping[str, Any], clients: Iterable[str], failed: int | None = None
) -> Trouble:
    """Return what is wrong with these clients in the attempt that follows so many failed ones."""
    federation, seed, clients = run.settings.federation, run.settings.seed, list(clients)
    attempt = 1 + (failed_attempts(run, round_plan) if failed is None else failed)
    faults = faults_of(federation.faults, seed, round_plan["round"], attempt, clients)
    late: dict[str, str] = {}
    if federation.deadline is not None:
        seconds = job_seconds(method.rounds, {n: own.local_steps for n, own in run.plan.clients.items()}, seed)
        for client in clients:
            if client in faults and faults[client].kind == "straggle":
                late[client] = f"came after the deadline {SIMULATED}"
            elif seconds[client] > federation.deadline:
                late[client] = f"came after the deadline: it takes {seconds[client]:.3g} simulated seconds"
    return Trouble(faults, late)


def quorum_of(run: Run, round_plan: Mapping[str, Any]) -> int:
    """Return how many updates of a round must be usable; 0 where there is no quorum."""
    planned = {client for members in round_plan["cohorts"] for client in members} - set(round_plan["unused"])
    return math.ceil(run.settings.federation.quorum * len(planned) - 1e-9)


def records_of(run: Run, workspace: Workspace, client: str) -> Encoded:
    """Return the records that a client trains on."""
    records, attack = workspace.records(client), run.settings.federation.attack
    if attack.kind == "label-flip" and client in malicious(attack, run.settings.seed, list(run.plan.clients)):
        return with_wrong_labels(records, len(workspace.task.labels))
    return records


def as_sent(run: Run, round_plan: Mapping[str, Any], client: str, update: Update, trouble: Trouble) -> Update:
    """Return a client's update as it leaves the client: what it makes of it, and what happens to it there."""
    settings, tensors = run.settings, update.tensors
    attack = settings.federation.attack
    if attack.kind is not None and client in malicious(attack, settings.seed, list(run.plan.clients)):
        number = round_plan["round"]
        start = run.adapter(round_plan["started"].get(client, number - 1))
        tensors = attacked(attack, tensors, start, settings.seed, number, client)
        update = replace(update, tensors=tensors, norm=length(tensors, start))
    if run.plan.central is not None:
        hit = client in trouble.faults or client in trouble.late
        return replace(update, tensors=unusable(tensors)) if hit else update
    kind = trouble.kind(client)
    if kind in ("nan", "norm") or (kind == "shape" and not settings.federation.secure_aggregation):
        return replace(update, tensors=spoilt(tensors, kind))
    return update


def lost_before_sending(run: Run, client: str, trouble: Trouble) -> str | None:
    """Say why nothing of a client that has trained reaches the server; None where something does, or nobody may know.

    In a secure sum it stops sending there (`silent`).
    """
    if run.plan.central is not None or run.settings.federation.secure_aggregation:
        return None
    reasons = {"exception": "its training failed", "vanish": "sent nothing"}
    kind = trouble.kind(client)
    return f"{reasons[kind]} {SIMULATED}" if kind in reasons else None


def silent(
    run: Run, method: Method, round_plan: Mapping[str, Any], clients: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """Return who falls silent in a secure sum: client -> the message that it does not send, and why."""
    trouble = trouble_of(run, method, round_plan, clients, failed_attempts(run, round_plan, "stopped"))
    found = {client: ("upload", reason) for client, reason in trouble.late.items()}
    for client, fault in trouble.faults.items():
        if fault.kind == "vanish":
            found[client] = (fault.stage, f"vanished before its {fault.stage} {SIMULATED}")
        elif fault.kind == "exception":
            found[client] = ("keys", f"its training failed {SIMULATED}")
        elif fault.kind in ("shape", "digest"):
            found[client] = ("upload", f"what it sent is not what was agreed on {SIMULATED}")
    return found


def unread(
    run: Run, method: Method, round_plan: Mapping[str, Any], listed: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Return whose update is not read, with the reason: it failed, it is late, or is not what its client listed."""
    late = trouble_of(run, method, round_plan, listed).late
    found = {}
    for client, entry in listed.items():
        if "failed" in entry:
            found[client] = entry["failed"]
        elif client in late:
            found[client] = late[client]
        elif entry.get("announced", entry.get("sha256")) != entry.get("sha256"):
            found[client] = f"what arrived is not what it listed: another sha256 {SIMULATED}"
    return found


def simulated_seconds(run: Run, round: int) -> float:
    """Return how long a round takes by the clients' simulated speeds; it waits no longer than to the deadline."""
    usual, deadline = run.plan.seconds[round - 1], run.settings.federation.deadline
    return usual if deadline is None else min(usual, deadline)
