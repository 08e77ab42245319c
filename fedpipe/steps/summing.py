"""Secure aggregation of a round: all parties' messages, and what of them the server is left with.

One machine plays all parties here, so this step reads what lies at the clients. What it leaves in the
round's directory is what the server of the protocol ends with: `sum.safetensors`, the sum over those
who stayed, and `sum.json`, what is public of it. Masked uploads are added up and not kept.

Two sums over different clients of the same round would have a client's update as their difference,
so a sum that is there is never made again, whoever is back. And an attempt that failed has told
some shares: the next one has masks of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpipe.errors import PrivacyError, StateError, SumStoppedError
from fedpipe.files import (
    content_digest,
    digest,
    file_digest,
    inside,
    read_sealed,
    read_tensors,
    write_sealed,
    write_tensors,
)
from fedpipe.methods import Method
from fedpipe.models.factors import State
from fedpipe.models.lora import TensorSpec
from fedpipe.privacy.distributed import Shares
from fedpipe.privacy.noise import client_key
from fedpipe.server.faults import STAGES
from fedpipe.server.masking import Terms
from fedpipe.server.round import Total
from fedpipe.server.secure import Client, TooFewClientsError, secure_sum
from fedpipe.server.summing import by_name, flat_move, message_bytes, unfit
from fedpipe.state import Run
from fedpipe.steps.agreeing import agreed, charge, shares_of
from fedpipe.steps.common import all_listed, open_unchanged, readable, sent_specs
from fedpipe.steps.outbox import take
from fedpipe.steps.sending import silent
from fedpipe.steps.training import check_planned

_MISSING = {"keys": "sent no keys", "shares": "dealt no shares", "upload": "sent no masked update"}


@dataclass(frozen=True)
class Vanished:
    """Clients that are gone before they send their keys, their shares, their upload, or their reveal."""

    keys: frozenset[str] = frozenset()
    shares: frozenset[str] = frozenset()
    upload: frozenset[str] = frozenset()
    reveal: frozenset[str] = frozenset()

    def before(self, *messages: str) -> set[str]:
        """Return who is gone before one of these messages."""
        return set().union(*(getattr(self, message) for message in messages))


def sum_updates(
    run_dir: Path, round: int, cohorts: Sequence[Mapping[str, str]], vanished: Vanished | None = None
) -> dict[str, str]:
    """Run the protocol for a round's clients; return the name and the sha256 of the file that describes the sum.

    Who is `vanished` is a simulated fault, if it is not given.

    Raises
    ------
    SumStoppedError
        Too few clients stayed. Nothing was opened; what they trained is kept for another attempt.
    """
    run, workspace = open_unchanged(run_dir)
    directory = run.round_dir(round)
    path, round_plan = directory / "sum.json", read_sealed(directory / "plan.json")
    listed = all_listed(directory, round_plan, cohorts)
    inputs = digest([round_plan["query"], listed])
    known = _known(path, inputs)
    if known is not None and _intact(path, known):
        return {"file": path.name, "sha256": file_digest(path)}
    check_planned(run, workspace, round_plan, list(listed))
    specs, start = sent_specs(run, workspace, round, round_plan), run.state(round - 1).adapter
    shares = shares_of(run.plan, run.settings.federation, len(listed), specs)
    terms = agreed(run, workspace, round_plan, list(listed), specs, shares)
    if shares is not None:
        charge(run, round_plan, list(listed))  # all who trained: nobody knows yet who will be in the sum
    gone, told = _gone(run, workspace.method, round_plan, listed, vanished)
    there = {name: entry for name, entry in listed.items() if name not in gone.keys}
    moves = _moves(run, workspace.method, there, specs, start)
    clients, refused = _clients(run, terms, round_plan["query"], moves, shares)
    try:
        total = secure_sum(terms, clients, gone.shares, gone.upload, gone.reveal)
    except TooFewClientsError as error:
        raise _stopped(directory, round_plan["query"], refused, error) from None
    values = by_name(total.values, specs)
    if known is not None and content_digest(values) != known["sum"]:
        raise PrivacyError(
            f"{directory}: the sum was opened for other clients before; their difference would open an update: "
            "restore sum.safetensors"
        )
    unsent = {name: why for message, why in _MISSING.items() for name in sorted(getattr(gone, message))}
    absent = {name: told.get(name, why) for name, why in unsent.items()} | refused
    coded = {"levels": terms.codec.levels} if shares is None else {"unit": shares.unit, "scale": shares.scale}
    record = {
        "round": round,
        "query": round_plan["query"],
        "inputs": inputs,
        "sum": write_tensors(directory / "sum.safetensors", values),
        "weight": total.weight,
        "survivors": [name for name in listed if name not in absent],
        "absent": {name: absent[name] for name in sorted(absent)},
        "unspent": [name for name, entry in listed.items() if not entry.get("spent", True)],
        "protocol": {
            "chosen": len(listed),
            "survivors": total.clients,
            "threshold": terms.threshold,
            **coded,
            **message_bytes(terms, _counts(clients, gone)),
        },
        "kept": {name: entry["kept"] for name, entry in listed.items() if "kept" in entry},
    }
    return {"file": path.name, "sha256": write_sealed(path, record)}


def read_sum(directory: Path, round_plan: Mapping[str, Any], entry: Mapping[str, str]) -> tuple[Total, dict[str, Any]]:
    """Return the sum that a round's file describes, and the file's content; all that the server has of the updates."""
    path = inside(directory, entry["file"])
    found = read_sealed(path)
    if file_digest(path) != entry["sha256"] or found["query"] != round_plan["query"]:
        raise StateError(f"{path}: is of an earlier plan of this round; run again")
    moves = read_tensors(directory / "sum.safetensors", found["sum"])
    return Total(moves, found["weight"], tuple(found["survivors"])), found


def _gone(
    run: Run,
    method: Method,
    round_plan: Mapping[str, Any],
    listed: Mapping[str, Mapping[str, Any]],
    vanished: Vanished | None,
) -> tuple[Vanished, dict[str, str]]:
    """Return who stops sending, and before what; and the reasons of those that have one of their own."""
    stages: dict[str, set[str]] = {stage: set() for stage in STAGES}
    told: dict[str, str] = {}
    if vanished is None:
        for client, (stage, reason) in silent(run, method, round_plan, listed).items():
            stages[stage].add(client)
            told[client] = reason
    else:
        stages = {stage: set(getattr(vanished, stage)) for stage in STAGES}
    for client, entry in listed.items():
        if "failed" in entry:
            stages["keys"].add(client)
            told[client] = entry["failed"]
    return Vanished(**{stage: frozenset(names) for stage, names in stages.items()}), told


def _known(path: Path, inputs: str) -> dict[str, Any] | None:
    found = readable(path)
    return found if found is not None and found.get("inputs") == inputs else None


def _intact(path: Path, known: Mapping[str, Any]) -> bool:
    try:
        read_tensors(path.parent / "sum.safetensors", known["sum"])
    except StateError:
        return False
    return True


def _moves(
    run: Run,
    method: Method,
    listed: Mapping[str, Mapping[str, Any]],
    specs: Sequence[TensorSpec],
    start: State,
) -> Iterator[tuple[str, np.ndarray]]:
    """Read how far each client moved, one after the other."""
    for name, entry in listed.items():
        update = take(run, name, entry["outbox"])
        yield name, flat_move(method.aggregation.bounded(update, start), start, specs)


def _clients(
    run: Run, terms: Terms, query: str, moves: Iterable[tuple[str, np.ndarray]], shares: Shares | None
) -> tuple[list[Client], dict[str, str]]:
    """Return the clients that begin the protocol, and why others keep their update to themselves."""
    clients, refused = [], {}
    for name, move in moves:
        key, weight = client_key(run.key, name), None
        if shares is not None:
            move = shares.share(move, key, query, terms.round)
        elif reason := unfit(move, terms.codec.clip):
            refused[name] = reason
            continue
        elif terms.codec.max_weight:
            weight = run.plan.clients[name].records
        clients.append(Client(name, key, terms, move, weight))
    return clients, refused


def _counts(clients: Sequence[Client], gone: Vanished) -> dict[str, int]:
    """Return how many clients sent each message."""
    names, order = {client.name for client in clients}, ("shares", "upload", "reveal")
    later = {message: len(names - gone.before(*order[: at + 1])) for at, message in enumerate(order)}
    return {"keys": len(names), **later}


def _stopped(directory: Path, query: str, refused: Mapping[str, str], error: TooFewClientsError) -> SumStoppedError:
    """Note the attempt, whose masks must not be used again; return the error to raise."""
    number = len(list(directory.glob("stopped-*.json"))) + 1
    write_sealed(directory / f"stopped-{number:02d}.json", {"query": query, "reason": str(error)})
    why = "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:3])
    return SumStoppedError(
        f"{error}{why}. No sum was opened, and what the clients trained is kept: run the same command again when "
        "enough of them are back" + ("; a larger federation.secure_range lets more into the sum" if refused else "")
    )
