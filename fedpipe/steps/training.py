"""The clients' part of a round, cohort by cohort."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpipe.client.curvature import Loss
from fedpipe.client.starts import ClientStart, client_start
from fedpipe.client.training import CohortWork, Update, train_cohort
from fedpipe.errors import StateError
from fedpipe.files import (
    file_digest,
    inside,
    private_directory,
    read_sealed,
    read_tensors,
    storage,
    write_sealed,
    write_tensors,
)
from fedpipe.models.factors import GlobalState
from fedpipe.models.task import Encoded
from fedpipe.server.evaluate import evaluate as metrics_of
from fedpipe.server.faults import spoilt
from fedpipe.server.initialisation import Start
from fedpipe.server.round import objective_down
from fedpipe.state import Run
from fedpipe.steps.beginning import cohort_size, decide, weight_of
from fedpipe.steps.canaries import audited
from fedpipe.steps.common import open_unchanged, readable, sent_specs
from fedpipe.steps.drawing import drawn, salt
from fedpipe.steps.failing import nothing_of, without_the_failing
from fedpipe.steps.outbox import put, take
from fedpipe.steps.sending import Trouble, as_sent, failed_attempts, lost_before_sending, records_of, trouble_of
from fedpipe.workspace import PROBE, Workspace


def train(run_dir: Path, round: int, cohort: int) -> dict[str, str]:
    """Train one cohort for one round; return the name and the sha256 of the file that lists its updates."""
    run, workspace = open_unchanged(run_dir)
    directory = run.work_dir(round)
    path = directory / f"cohort-{cohort:02d}.json"
    round_plan = read_sealed(directory / "plan.json")
    clients, query = tuple(round_plan["cohorts"][cohort]), round_plan["query"]
    if _intact(run, path, clients, round_plan):
        return {"file": path.name, "sha256": file_digest(path)}
    check_planned(run, workspace, round_plan, clients)
    started = time.monotonic()
    workspace.use_base(run.state(round - 1).base)
    updates: dict[str, Update] = {}
    attempt = 1 + failed_attempts(run, round_plan)
    trouble = trouble_of(run, workspace.method, round_plan, clients)
    # As many as were drawn may be more than fit into memory at once.
    size = cohort_size(run, workspace) if run.plan.central is not None else max(1, len(clients))
    for at in range(0, len(clients), size):
        updates |= _trained(run, workspace, round_plan, clients[at : at + size])
    listing = {client: _listed(run, round_plan, client, updates[client], trouble) for client in clients}
    seconds = time.monotonic() - started
    content = {"round": round, "cohort": cohort, "query": query, "updates": listing, "seconds": seconds}
    if attempt > 1:
        content["attempt"] = attempt
    if run.plan.central is not None:
        content["salt"] = salt(run, round, query, cohort)
    return {"file": path.name, "sha256": write_sealed(path, content)}


def _trained(
    run: Run, workspace: Workspace, round_plan: Mapping[str, Any], clients: tuple[str, ...]
) -> dict[str, Update]:
    """Train clients of one cohort together; one that fails is left out, and the others are trained."""
    workspace.records(None)  # what none of them could train with
    updates, failed = without_the_failing(
        run,
        clients,
        read=lambda client: records_of(run, workspace, client),
        train=lambda records: _together(run, workspace, round_plan, records),
    )
    sent = sent_specs(run, workspace, round_plan["round"], round_plan) if failed else []
    return updates | {client: nothing_of(run, sent, reason) for client, reason in failed.items()}


def _together(
    run: Run, workspace: Workspace, round_plan: Mapping[str, Any], records: Mapping[str, Encoded]
) -> dict[str, Update]:
    """Train these clients together."""
    round, clients = round_plan["round"], tuple(records)
    if not clients:
        return {}
    work = CohortWork(
        round=round,
        clients=clients,
        records=list(records.values()),
        starts=client_starts(run, workspace, round, round_plan, clients),
        trained=workspace.trained,
        query=round_plan["query"],
        key=run.key,
        modes=round_plan["modes"],
        diagnostics=run.diagnostics,
    )
    with workspace.engine() as usual:
        engine = audited(usual, run, workspace.federation.canaries, clients)
        ledger = run.ledger if run.plan.step_clip is not None else None
        method, optimizer = workspace.method, run.settings.optimizer
        probe = _probe(workspace) if method.schedule.probes(round, run.plan.rounds) else None
        return train_cohort(engine, workspace.model, work, run.plan, method, optimizer, ledger, probe)


def check_planned(run: Run, workspace: Workspace, round_plan: Mapping[str, Any], clients: Sequence[str]) -> None:
    """Refuse to train by a plan of the round that is not what would be decided now: its noise is for another query."""
    round = round_plan["round"]
    directory, decided = run.work_dir(round), decide(run, workspace, round)
    if round_plan["query"] != decided["query"]:
        raise StateError(f"{directory}: was planned for another start, device or key; run the same command again")
    edited = [key for key, value in decided.items() if round_plan.get(key) != value]
    allowed = set(run.plan.participants[round - 1]) - round_plan["excluded"].keys()
    if run.plan.central is not None:
        listed = sorted(client for members in round_plan["cohorts"] for client in members)
        edited += [] if listed == list(drawn(run, round, decided["query"])) else ["cohorts"]
    if edited or not allowed.issuperset(clients):
        raise StateError(
            f"{directory / 'plan.json'}: was edited: {', '.join(edited) or 'cohorts'}; delete it and run the same "
            "command again"
        )


def _probe(workspace: Workspace) -> Loss:
    """Return what measures an adapter on the public probe."""

    def loss(adapter: Mapping[str, Tensor]) -> float:
        # Always in fp32: second differences are below what bf16 resolves.
        with workspace.batched_models() as models:
            records, budget = workspace.records(PROBE), workspace.budget
            return metrics_of(models, adapter, records, workspace.device, "fp32", budget)["loss"]

    return loss


def client_starts(
    run: Run, workspace: Workspace, round: int, round_plan: Mapping[str, Any], clients: Sequence[str]
) -> list[ClientStart]:
    """Return where each client of a cohort begins; all of them received the same state."""
    (after,) = {round_plan["started"].get(client, round - 1) for client in clients}
    state = run.state(after)
    down = objective_down(workspace.method, run.memory(after), state.adapter)
    specs, ranks = workspace.model.specs, round_plan["ranks"]
    facts = [client_facts(run, workspace, round, state, client, ranks[client]) for client in clients]
    return [client_start(workspace.method, specs, workspace.trained, known, down) for known in facts]


def client_facts(run: Run, workspace: Workspace, round: int, state: GlobalState, client: str, rank: int) -> Start:
    kept_round, kept = run.kept(round - 1, client) if workspace.method.stateful else (0, {})
    raw = workspace.method.initialisation.raw_gradient and not run.plan.private
    return Start(
        round=round,
        rounds=run.plan.rounds,
        state=state,
        kept=kept,
        kept_round=kept_round,
        scale=workspace.model.scale,
        rank=rank,
        specs=workspace.model.specs,
        weight=weight_of(run, round - 1, client) if workspace.method.stateful else 0.0,
        gradient=functools.partial(workspace.raw_gradient, client) if raw else None,
    )


def _listed(run: Run, round_plan: Mapping[str, Any], client: str, update: Update, trouble: Trouble) -> dict[str, Any]:
    """Write what a client sends and what it keeps; return their names, digests and facts, or why there is nothing."""
    stale = inside(run.work_dir(round_plan["round"]) / "updates", f"{client}.safetensors")
    with storage(stale):
        stale.unlink(missing_ok=True)  # of an attempt before, in which it may have sent something
    if update.failed is not None:
        return {"failed": update.failed, "spent": update.spent}
    round, secure = round_plan["round"], run.settings.federation.secure_aggregation
    update = as_sent(run, round_plan, client, update, trouble)
    if reason := lost_before_sending(run, client, trouble):
        entry: dict[str, Any] = {"failed": reason, "spent": True}
    elif secure:
        # What else the client knows, with secure aggregation it tells nobody.
        entry = {"outbox": put(run, round, client, update.tensors)}
    else:
        entry = _sent(run, round, client, update)
        if trouble.kind(client) == "digest" and run.plan.central is None:
            # What arrives is another file than the one that was listed.
            entry |= {"announced": entry["sha256"]}
            entry |= _sent(run, round, client, replace(update, tensors=spoilt(update.tensors, "digest")))
    if update.loss is not None:
        entry["diagnostics"] = {"loss": update.loss}
    if update.kept:
        path = run.client_dir(client) / f"kept-{round:04d}.safetensors"
        private_directory(path.parent.parent)
        # Flushed: later rounds need it, and by then its cohort is not trained again.
        sha256 = write_tensors(path, update.kept)
        entry["kept"] = {"file": str(path.relative_to(run.root)), "sha256": sha256}
    return entry


def _sent(run: Run, round: int, client: str, update: Update) -> dict[str, Any]:
    """Write what a client sends where the server reads it."""
    sent = inside(run.work_dir(round) / "updates", f"{client}.safetensors")
    # Not flushed: a torn one does not have its digest, and its cohort is trained again to the same bytes.
    sha256 = write_tensors(sent, update.tensors, durable=False)
    entry: dict[str, Any] = {"file": f"updates/{sent.name}", "sha256": sha256}
    if run.plan.central is not None:
        return entry  # the rest is nobody's business, and may be no number
    entry |= {"norm": update.norm, "snr": update.snr, "rank": update.rank}
    if update.scores is not None:
        entry["scores"] = update.scores
    return entry


def _intact(run: Run, path: Path, clients: Sequence[str], round_plan: Mapping[str, Any]) -> bool:
    """Say whether a cohort's listing is there, of this query and attempt, and whole with all its updates."""
    listing = readable(path)
    if listing is None or listing.get("query") != round_plan["query"]:
        return False
    if listing.get("attempt", 1) != 1 + failed_attempts(run, round_plan):
        return False
    try:
        for client in clients:
            entry = listing["updates"][client]
            if "failed" in entry:
                pass  # nothing was sent
            elif "outbox" in entry:
                take(run, client, entry["outbox"])
            else:
                read_tensors(inside(path.parent, entry["file"]), entry["sha256"])
            if "kept" in entry:
                run.read_kept(entry["kept"])
    except (StateError, KeyError, TypeError):
        return False
    return True
