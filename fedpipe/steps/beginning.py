"""The beginning of a round: who trains, from which states, in which cohorts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpipe.budget import check_spent, price_of
from fedpipe.client.schedule import Decision
from fedpipe.errors import StateError
from fedpipe.files import digest, write_sealed
from fedpipe.privacy.noise import key_id
from fedpipe.state import Run
from fedpipe.steps.common import open_unchanged, readable
from fedpipe.steps.drawing import drawn_cohorts, open_work, shown
from fedpipe.steps.skipping import skip_reason
from fedpipe.workspace import Workspace

# Of a cohort's clients, adapters, sums, gradients and moments are in memory at once.
MAX_COHORT = 64
COHORT_BYTES = 2**31


def begin_round(run_dir: Path, round: int) -> dict[str, Any]:
    """Decide who trains in a round, from which states, and in which cohorts; return the plan of the round.

    Its keys: `round`, `cohorts` (lists of clients), `query`, `cost` (epsilon before and after, of each
    client), `excluded` (client -> reason), `skipped` (why there are no cohorts), `modes` (of the factor
    schedule), `ranks`, `started` (client -> the round it starts after, where that is not the last one),
    `unused` (clients whose update comes too late), and `kept` (client -> digest of what it goes on with)
    and `weights` (client -> how much it counted in the last round).
    """
    run, workspace = open_unchanged(run_dir)
    path = run.work_dir(round) / "plan.json"
    known = readable(path)
    if known is not None and run.round_record(round) is not None:
        return shown(run, known)
    decided = decide(run, workspace, round)
    check_spent(run, round - 1)
    if known is not None and known.get("query") == decided["query"]:
        return shown(run, known)
    open_work(run, round)
    price, planned = price_of(run, round, decided["query"]), list(run.plan.charged(round))
    # With unit `client` those planned are one budget, and how many clients a sum has is drawn.
    summed = run.settings.federation.secure_aggregation and run.plan.central is None
    skipped = skip_reason(workspace.method, planned, price.excluded, decided["unused"], summed)
    participants = [] if skipped else [client for client in planned if client not in price.excluded]
    if run.plan.central is None:
        cohorts = _cohorts(run, workspace, participants, decided["started"])
    else:
        cohorts = [] if skipped else drawn_cohorts(run, round, decided["query"], cohort_size(run, workspace))
    for stale in path.parent.glob("cohort-*.json"):
        stale.unlink()
    plan = {
        "round": round,
        **decided,
        "cohorts": cohorts,
        "cost": price.to_json(),
        "excluded": dict(price.excluded),
        "skipped": skipped,
    }
    write_sealed(path, plan)
    return shown(run, plan)


def _cohorts(
    run: Run, workspace: Workspace, participants: Sequence[str], started: Mapping[str, int]
) -> list[list[str]]:
    """Divide a round's clients into cohorts; those of one start from one state and take equally many local steps."""
    size = cohort_size(run, workspace)
    alike: dict[tuple[int, int], list[str]] = {}
    for client in participants:
        alike.setdefault((started.get(client, -1), run.plan.clients[client].local_steps), []).append(client)
    return [group[at : at + size] for _, group in sorted(alike.items()) for at in range(0, len(group), size)]


def cohort_size(run: Run, workspace: Workspace) -> int:
    """Return how many clients are trained together at the most."""
    size = run.settings.runtime.cohort_size
    if size == "auto":
        size = max(1, min(MAX_COHORT, COHORT_BYTES // (32 * sum(spec.numel for spec in workspace.model.specs))))
    return size


def decide(run: Run, workspace: Workspace, round: int) -> dict[str, Any]:
    """Decide, from what is public, all that defines the private queries of a round, and digest it."""
    previous = run.round_record(round - 1)
    if previous is None:
        raise StateError(f"{run.round_dir(round - 1)}: round {round} needs round {round - 1} to be complete")
    method, plan, memory = workspace.method, run.plan, previous.get("decisions", {})
    jobs = plan.jobs_of(round)
    decision = round_decision(run, workspace, round, memory)
    ranks = method.ranks.ranks(tuple(plan.clients), round, plan.rounds, run.settings.lora.rank, memory.get("ranks", {}))
    started = {job.client: job.start for job in jobs if job.start != round - 1}
    decided = {
        "start": previous["state"],
        "started": started,
        "unused": [job.client for job in jobs if not job.used],
        "modes": method.schedule.modes(decision),
        "ranks": {job.client: ranks[job.client] for job in jobs},
        "kept": {job.client: _kept_entry(run, round - 1, job.client) for job in jobs} if method.stateful else {},
        "weights": {job.client: weight_of(run, round - 1, job.client) for job in jobs} if method.stateful else {},
    }
    states = {client: run.round_record(after)["state"] for client, after in started.items()}
    memories = previous.get("memory") if workspace.method.objective.stateful else None
    query = digest(
        {
            "query": run.info["query"],
            "round": round,
            "plan": run.info["plan_sha256"],
            "device": workspace.device.type,
            "key": key_id(run.key),
            "decided": decided,
            "states": states,
            "memory": memories,
        }
    )
    return {"query": query, **decided}


def round_decision(run: Run, workspace: Workspace, round: int, memory: Mapping[str, Any]) -> Decision:
    specs = [spec for spec in workspace.model.specs if spec.name in workspace.trained]
    return Decision(round, run.plan.rounds, run.settings.seed, specs, memory.get("schedule", {}))


def weight_of(run: Run, round: int, client: str) -> float:
    """Return how much a client counted in the last aggregation up to a round; 0 where it took no part."""
    record = run.round_record(run.last_trained(round))
    return record.get("clients", {}).get(client, {}).get("weight", 0.0)


def _kept_entry(run: Run, round: int, client: str) -> Any:
    return run.round_record(round).get("kept", {}).get(client)
