"""The server's part of a round, and its record."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpipe.budget import check_round_spent, epsilon_so_far
from fedpipe.errors import QuorumError
from fedpipe.files import inside, read_sealed, read_tensors, write_sealed, write_tensors
from fedpipe.server.ranks import numel
from fedpipe.server.round import Updates, server_round, sum_round
from fedpipe.state import Run
from fedpipe.steps.beginning import round_decision
from fedpipe.steps.common import all_listed, round_facts, sent_specs
from fedpipe.steps.diagnostics import diagnostics_of
from fedpipe.steps.drawing import forget_work
from fedpipe.steps.outbox import empty
from fedpipe.steps.releasing import expected_traffic, release
from fedpipe.steps.sending import failed_attempts, note_short, quorum_of, simulated_seconds, unread
from fedpipe.steps.skipping import carried
from fedpipe.steps.summing import read_sum
from fedpipe.workspace import Workspace, open_workspace


def aggregate(run_dir: Path, round: int, cohorts: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Check the updates of all cohorts and aggregate them; return what the round's record takes from it.

    With secure aggregation the one thing listed is what `sum_updates` returned.

    Raises
    ------
    QuorumError
        Too few updates are usable. It is noted, so that cohorts that are trained from now on are those of
        another attempt.
    """
    run, workspace = open_workspace(run_dir)
    directory, method, model = run.work_dir(round), workspace.method, workspace.model
    round_plan = read_sealed(directory / "plan.json")
    if round_plan["skipped"]:
        return carried(run, round)
    if run.plan.central is not None:
        return release(run_dir, round, cohorts)
    if run.settings.federation.secure_aggregation:
        return _aggregate_sum(run, workspace, round, round_plan, cohorts[0])
    listed = all_listed(directory, round_plan, cohorts)
    before, sent = run.state(round - 1), sent_specs(run, workspace, round, round_plan)
    facts = round_facts(run, workspace, round, sent, round_plan["ranks"], before)
    updates = _updates(run, workspace, round, round_plan, listed)
    memory, total = run.memory(round - 1), len(run.plan.clients)
    try:
        quorum = quorum_of(run, round_plan)
        result = server_round(method, facts, before, memory, updates, total, model.frozen_weight, quorum)
    except QuorumError as error:
        note_short(run, round_plan, error)
        raise
    state = write_tensors(run.adapter_path(round), result.state.tensors())
    used = {name: entry for name, entry in listed.items() if name in updates.read and name not in result.refused}
    return {
        "state": state,
        "memory": write_tensors(run.memory_path(round), result.memory) if result.memory else None,
        "clients": {
            # Of one that failed after it has spent, that is all.
            name: {key: entry[key] for key in ("norm", "snr") if key in entry}
            | {"weight": result.weights.get(name, 0.0)}
            for name, entry in listed.items()
            if entry.get("spent", True)
        },
        "refused": result.refused,
        "server": result.metrics,
        "down": result.down,
        "ranked": result.ranked,
        "decisions": _decisions(run, workspace, round, round_plan, used),
        "kept": _kept(run, round, listed) if method.stateful else {},
        **_attempts(run, round_plan, "short"),
    }


def _attempts(run: Run, round_plan: Mapping[str, Any], name: str) -> dict[str, int]:
    """Return how often a round was tried, where that is more than once."""
    failed = failed_attempts(run, round_plan, name)
    return {"attempts": 1 + failed} if failed else {}


def _aggregate_sum(
    run: Run, workspace: Workspace, round: int, round_plan: Mapping[str, Any], entry: Mapping[str, str]
) -> dict[str, Any]:
    """Aggregate the sum of a round's updates: of one client the server knows its name, and whether it is in the sum."""
    method, before = workspace.method, run.state(round - 1)
    total, found = read_sum(run.round_dir(round), round_plan, entry)
    sent = sent_specs(run, workspace, round, round_plan)
    facts = round_facts(run, workspace, round, sent, round_plan["ranks"], before)
    result = sum_round(
        method, facts, before, run.memory(round - 1), total, len(run.plan.clients), workspace.model.frozen_weight
    )
    kept = {name: {"kept": own} for name, own in found["kept"].items()}
    trained = sorted({*found["survivors"], *found["absent"]} - set(found["unspent"]))
    return {
        "state": write_tensors(run.adapter_path(round), result.state.tensors()),
        "memory": write_tensors(run.memory_path(round), result.memory) if result.memory else None,
        "clients": {name: {"weight": result.weights.get(name, 0.0)} for name in trained},
        "refused": found["absent"],
        "server": result.metrics,
        "down": result.down,
        "ranked": result.ranked,
        "decisions": _decisions(run, workspace, round, round_plan, {}),
        "kept": _kept(run, round, kept) if method.stateful else {},
        "secure_aggregation": found["protocol"],
        **_attempts(run, round_plan, "stopped"),
    }


def _updates(
    run: Run, workspace: Workspace, round: int, round_plan: Mapping[str, Any], listed: Mapping[str, Mapping[str, Any]]
) -> Updates:
    directory, rounds = run.round_dir(round), workspace.method.rounds
    missing = unread(run, workspace.method, round_plan, listed)
    names = [name for name in listed if name not in missing and name not in round_plan["unused"]]
    late = {name: after for name, after in round_plan["started"].items() if name in names}
    shares = {
        name: rounds.discount(round - 1 - late.get(name, round - 1)) * rounds.share(run.plan.clients[name].local_steps)
        for name in names
    }
    return Updates(
        read={
            name: functools.partial(read_tensors, inside(directory, listed[name]["file"]), listed[name]["sha256"])
            for name in names
        },
        started={name: run.adapter(after) for name, after in late.items()},
        shares={} if set(shares.values()) == {1.0} else shares,
        missing=missing,
    )


def _decisions(
    run: Run, workspace: Workspace, round: int, round_plan: Mapping[str, Any], used: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what the schedule and the rank policy remember for the next round."""
    method, memory = workspace.method, run.round_record(round - 1).get("decisions", {})
    scores = [entry["scores"] for entry in used.values() if entry.get("scores") is not None]
    decision = round_decision(run, workspace, round, memory)
    asked = {name: entry["rank"] for name, entry in used.items()}
    remembered = {
        "schedule": method.schedule.remember(decision, round_plan["modes"], scores),
        "ranks": method.ranks.remember(memory.get("ranks", {}), asked),
    }
    return {part: value for part, value in remembered.items() if value}


def _kept(run: Run, round: int, listed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return where each client's own tensors are: of its last round, whichever that was."""
    now = {name: {"round": round, **entry["kept"]} for name, entry in listed.items() if "kept" in entry}
    return {**run.round_record(round - 1).get("kept", {}), **now}


def finish_round(
    run_dir: Path, round: int, aggregated: Mapping[str, Any], metrics: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """Record a round as complete; return the record.

    Raises
    ------
    PrivacyError
        The ledger holds less than the round spent, or more than the plan allowed.
    """
    run, workspace = open_workspace(run_dir)
    path = run.work_dir(round) / "plan.json"
    if not path.exists() and (known := run.round_record(round)) is not None:
        return known  # and what it was made of is forgotten
    round_plan = read_sealed(path)
    if run.plan.private:
        check_round_spent(run, round, round_plan["query"], aggregated["clients"])
    record = {
        "round": round,
        "query": round_plan["query"],
        **aggregated,
        "metrics": dict(metrics),
        **{key: round_plan[key] for key in ("cost", "excluded", "skipped")},
        "away": list(run.plan.away_of(round)),
        **diagnostics_of(run, round, round_plan),
        **epsilon_so_far(run),
        **_traffic(run, workspace, round, round_plan, aggregated),
        # How long a round takes tells how many took part.
        "seconds": seconds if run.plan.central is None else None,
        "simulated_seconds": simulated_seconds(run, round),
    }
    write_sealed(run.round_dir(round) / "round.json", record)
    # Not before: without them, what the record is made of would be trained again after a crash.
    if run.settings.federation.secure_aggregation:
        empty(run, round)
    forget_work(run, round)
    return record


def _traffic(
    run: Run, workspace: Workspace, round: int, round_plan: Mapping[str, Any], aggregated: Mapping[str, Any]
) -> dict[str, int]:
    """Return the bytes of a round (float32), for clients that followed every round before.

    Secure aggregation sends integers of 32 bits, of full rank from every client, and its messages beside them.
    """
    if run.plan.central is not None:
        return expected_traffic(run, workspace, round, round_plan)
    sent, ranks = sent_specs(run, workspace, round, round_plan), round_plan["ranks"]
    extra = sum(spec.numel for spec in workspace.method.objective.extra_specs(sent))
    clients = [client for members in round_plan["cohorts"] for client in members]
    up = sum(extra + sum(numel(spec, ranks[client]) for spec in sent) for client in clients)
    before = run.round_record(round - 1)
    ranked = [spec for spec in workspace.model.specs if spec.name in before["ranked"]]
    down = sum(before["down"] - sum(spec.numel - numel(spec, ranks[client]) for spec in ranked) for client in clients)
    if protocol := aggregated.get("secure_aggregation"):
        return {"bytes_up": protocol["bytes_up"], "bytes_down": 4 * down + protocol["bytes_down"]}
    return {"bytes_up": 4 * up, "bytes_down": 4 * down}
