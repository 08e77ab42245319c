"""The steps of a run, each a function from a run's directory to files in it.

Every step takes and returns paths, digests and numbers that JSON can hold, so that any
workflow engine may call them, in any process. Every step may be called again after a crash:
what is complete is read back, what is not is computed anew with the same batches and the
same noise.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpipe.client.training import CohortWork, payload, train_cohort
from fedpipe.config import Settings
from fedpipe.errors import PrivacyError, StateError, TrainingError
from fedpipe.files import digest, file_digest, read_json, read_tensors, write_json, write_tensors
from fedpipe.identity import identify
from fedpipe.plan import make_plan
from fedpipe.privacy.accounting import epsilon_prv, epsilon_rdp
from fedpipe.privacy.noise import key_id
from fedpipe.project import Project
from fedpipe.server.aggregate import AGGREGATIONS
from fedpipe.server.checks import refuse_reason
from fedpipe.server.evaluate import evaluate
from fedpipe.state import Opened, Run, open_run
from fedpipe.workspace import Workspace, open_workspace, workspace_of

MAX_COHORT = 64  # clients; their adapters, gradients and moments are in memory at once


def prepare(project: Project, settings: Settings) -> Opened:
    """Check everything that can be checked before training, and open the run.

    Raises
    ------
    FedpipeError
        Settings, data, backbone and method do not fit together; nothing was started.
    """
    workspace = workspace_of(project, settings)
    method, federation = workspace.method, workspace.federation
    federation.check_fresh(settings)
    workspace.model  # noqa: B018 (loads the backbone: a missing target module is found here, not in round 1)
    identity = identify(settings, method, federation.digest, workspace.backbone.digest)
    opened = open_run(project.runs, identity, settings, lambda: make_plan(settings, federation.sizes))
    if not opened.run.complete:
        _start(opened.run, workspace)
    return opened


def _start(run: Run, workspace: Workspace) -> None:
    """Write the state before round 1."""
    if run.completed_rounds() < 0:
        state = write_tensors(run.adapter_path(0), workspace.model.initial)
        metrics = _evaluate(run, workspace, 0, state)
        write_json(run.round_dir(0) / "round.json", {"round": 0, "state": state, "metrics": metrics})


def begin_round(run_dir: Path, round: int) -> dict[str, Any]:
    """Decide who trains in a round and in which cohorts; return {"round", "cohorts", "query", "excluded"}."""
    run, workspace = open_workspace(run_dir)
    path = run.round_dir(round) / "plan.json"
    previous = run.round_record(round - 1)
    if previous is None:
        raise StateError(f"{run.round_dir(round - 1)}: round {round} needs round {round - 1} to be complete")
    query = digest(
        {
            "query": run.info["query"],
            "round": round,
            "start": previous["state"],
            "plan": run.info["plan_sha256"],
            "device": workspace.device.type,
            "key": key_id(run.key),
        }
    )
    if path.exists() and (known := read_json(path))["query"] == query:
        return known
    excluded = _exhausted(run, round, query)
    participants = [client for client in run.plan.participants[round - 1] if client not in excluded]
    if not participants:
        raise PrivacyError(f"round {round}: every client has spent its budget; the state of {round - 1} rounds is kept")
    size = run.settings.runtime.cohort_size
    size = MAX_COHORT if size == "auto" else size
    cohorts = [participants[start : start + size] for start in range(0, len(participants), size)]
    for stale in run.round_dir(round).glob("cohort-*.json"):
        stale.unlink()
    plan = {"round": round, "query": query, "start": previous["state"], "cohorts": cohorts, "excluded": excluded}
    write_json(path, plan)
    return plan


def _exhausted(run: Run, round: int, query: str) -> dict[str, str]:
    """Return the clients whose budget this round would exceed, each with the reason.

    A plan never asks for more steps than sigma was calibrated for; a round repeated under
    another query (another device, say) is a release of its own and can.
    """
    if not run.plan.private:
        return {}
    excluded = {}
    repeated = Counter(e.client for e in run.ledger.entries() if e.round == round and e.query != query)
    for client in run.plan.participants[round - 1]:
        before = sum(steps for _, _, steps in run.ledger.history(client, through_round=round - 1))
        spent, limit = before + repeated[client], run.plan.clients[client].max_steps
        if spent + run.plan.local_steps > limit:
            excluded[client] = f"{spent} of {limit} noisy steps are spent; a round takes {run.plan.local_steps}"
    return excluded


def train(run_dir: Path, round: int, cohort: int) -> dict[str, str]:
    """Train one cohort for one round; return the name and the sha256 of the file that lists its updates."""
    run, workspace = open_workspace(run_dir)
    directory = run.round_dir(round)
    path = directory / f"cohort-{cohort:02d}.json"
    round_plan = read_json(directory / "plan.json")
    if path.exists() and _intact(path, directory):
        return {"file": path.name, "sha256": file_digest(path)}
    clients = tuple(round_plan["cohorts"][cohort])
    work = CohortWork(
        round=round,
        clients=clients,
        records=[workspace.records(client) for client in clients],
        start=run.adapter(round - 1),
        trained=workspace.trained,
        query=round_plan["query"],
        key=run.key,
        seed=run.settings.seed,
    )
    started = time.monotonic()
    with workspace.engine() as (engine, model):
        ledger = run.ledger if run.plan.private else None
        updates = train_cohort(engine, model, work, run.plan, workspace.method, run.settings.optimizer, ledger)
    listing = {
        client: {
            "file": f"updates/{client}.safetensors",
            "sha256": write_tensors(directory / "updates" / f"{client}.safetensors", update.tensors),
            "norm": update.norm,
            "snr": update.snr,
        }
        for client, update in updates.items()
    }
    content = {"round": round, "cohort": cohort, "updates": listing, "seconds": time.monotonic() - started}
    return {"file": path.name, "sha256": write_json(path, content)}


def _intact(path: Path, directory: Path) -> bool:
    """Say whether a cohort's listing and all its updates are whole."""
    try:
        for entry in read_json(path)["updates"].values():
            read_tensors(directory / entry["file"], entry["sha256"])
    except (StateError, KeyError):
        return False
    return True


def aggregate(run_dir: Path, round: int, cohorts: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Check the updates of all cohorts and aggregate them; return {"state": sha256, "clients": {...}}."""
    run, workspace = open_workspace(run_dir)
    directory, method = run.round_dir(round), workspace.method
    updates: dict[str, Any] = {}
    for cohort in cohorts:
        updates |= read_json(directory / cohort["file"], cohort["sha256"])["updates"]
    names = sorted(updates)
    sizes = {name: run.plan.clients[name].records if method.weights == "samples" else 1 for name in names}
    start = run.adapter(round - 1)
    expected = payload(workspace.model.specs, method, workspace.trained, round, run.plan.local_steps)
    rule = AGGREGATIONS[method.aggregation](start)
    for name in names:
        update = read_tensors(directory / updates[name]["file"], updates[name]["sha256"])
        if reason := refuse_reason(update, expected):
            raise TrainingError(f"round {round}, client {name}: its update {reason}")
        rule.add(update, sizes[name] / sum(sizes.values()))
    state = write_tensors(run.adapter_path(round), rule.result())
    clients = {name: {"norm": updates[name]["norm"], "snr": updates[name]["snr"]} for name in names}
    return {"state": state, "clients": clients}


def evaluate_round(run_dir: Path, round: int, state: str) -> dict[str, float]:
    """Evaluate the global state of a round; {} in rounds that the settings leave out."""
    run, workspace = open_workspace(run_dir)
    if round % run.settings.evaluation.every and round != run.plan.rounds:
        return {}
    return _evaluate(run, workspace, round, state)


def _evaluate(run: Run, workspace: Workspace, round: int, state: str) -> dict[str, float]:
    """Evaluate once for each state: the result is kept beside it."""
    path = run.round_dir(round) / "evaluation.json"
    if path.exists() and (known := read_json(path))["state"] == state:
        return known["metrics"]
    settings = run.settings
    adapter = read_tensors(run.adapter_path(round), state)
    with workspace.batched_model() as model:
        metrics = evaluate(
            model,
            adapter,
            workspace.records(None),
            workspace.device,
            settings.runtime.precision,
            settings.runtime.tokens_per_batch,
            settings.evaluation.batch_size,
        )
    write_json(path, {"state": state, "metrics": metrics})
    return metrics


def finish_round(
    run_dir: Path, round: int, aggregated: Mapping[str, Any], metrics: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """Record a round as complete; return the record.

    Raises
    ------
    PrivacyError
        The ledger holds more than the plan allowed: the epsilon so far is above the target.
    """
    run, workspace = open_workspace(run_dir)
    record = {
        "round": round,
        "state": aggregated["state"],
        "metrics": dict(metrics),
        "clients": aggregated["clients"],
        "excluded": read_json(run.round_dir(round) / "plan.json")["excluded"],
        **_epsilon(run),
        **_traffic(run, workspace, round, len(aggregated["clients"])),
        "seconds": seconds,
    }
    write_json(run.round_dir(round) / "round.json", record)
    return record


def _epsilon(run: Run) -> dict[str, float | None]:
    if not run.plan.private:
        return {"epsilon_max": None, "epsilon_rdp": None}
    delta = run.plan.delta
    histories = {run.ledger.history(client) for client in run.ledger.clients()}
    rdp = max((epsilon_rdp(history, delta) for history in histories), default=0.0)
    prv = max((epsilon_prv(history, delta) for history in histories), default=0.0)
    reported = prv if run.plan.accountant == "prv" else rdp
    if reported > run.plan.epsilon:
        raise PrivacyError(f"the ledger's epsilon is {reported:.4f}, above the target {run.plan.epsilon:g}; stopped")
    return {"epsilon_max": reported, "epsilon_rdp": rdp}


def _traffic(run: Run, workspace: Workspace, round: int, clients: int) -> dict[str, int]:
    """Return the bytes of a round (float32), for clients that followed every round before."""
    specs, steps = workspace.model.specs, run.plan.local_steps

    def size(number: int) -> int:
        sent = payload(specs, workspace.method, workspace.trained, number, steps) if number else specs
        return 4 * sum(spec.numel for spec in sent)

    return {"bytes_up": clients * size(round), "bytes_down": clients * size(round - 1)}


def run_round(run_dir: Path, round: int) -> dict[str, Any]:
    """Run a whole round in this process; return its record."""
    started = time.monotonic()
    plan = begin_round(run_dir, round)
    cohorts = [train(run_dir, round, cohort) for cohort in range(len(plan["cohorts"]))]
    aggregated = aggregate(run_dir, round, cohorts)
    metrics = evaluate_round(run_dir, round, aggregated["state"])
    return finish_round(run_dir, round, aggregated, metrics, time.monotonic() - started)
