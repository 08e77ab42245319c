"""Evaluation of a round's state, or of every client's own model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpipe.client.starts import own_model
from fedpipe.errors import TrainingError
from fedpipe.files import content_digest, digest, read_tensors, write_sealed
from fedpipe.models.factors import GlobalState
from fedpipe.server.evaluate import evaluate as metrics_of
from fedpipe.server.initialisation import Start
from fedpipe.state import Run
from fedpipe.steps.common import readable
from fedpipe.workspace import Workspace, open_workspace


def evaluate_round(run_dir: Path, round: int, aggregated: Mapping[str, Any]) -> dict[str, float]:
    """Evaluate the state that `aggregate` left; {} in rounds that the settings leave out."""
    run, workspace = open_workspace(run_dir)
    if round % run.settings.evaluation.every and round != run.plan.rounds:
        return {}
    last = run.last_trained(round)
    if last < round:
        return _again(run, workspace, last)
    state = GlobalState.of(read_tensors(run.adapter_path(round), aggregated["state"]))
    return evaluate(run, workspace, round, aggregated["state"], state, aggregated["kept"], aggregated["clients"])


def _again(run: Run, workspace: Workspace, last: int) -> dict[str, float]:
    """Return the metrics of a state that was carried over: those of the round that made it."""
    record = run.round_record(last)
    if record["metrics"]:
        return dict(record["metrics"])
    return evaluate(run, workspace, last, record["state"], run.state(last), record["kept"], record["clients"])


def evaluate(
    run: Run,
    workspace: Workspace,
    round: int,
    sha256: str,
    state: GlobalState,
    kept: Mapping[str, Any],
    clients: Mapping[str, Mapping[str, Any]],
) -> dict[str, float]:
    """Evaluate once for each state, clients' own tensors included: the result is kept beside it."""
    path = run.round_dir(round) / "evaluation.json"
    name = digest([sha256, kept]) if kept else sha256
    known = readable(path)
    if known is not None and known.get("state") == name:
        return known["metrics"]
    adapters = {"": state.adapter}
    if workspace.method.personal:
        adapters = personal_adapters(run, workspace, round, state, kept, clients)
    # Clients that took no part yet have the same model.
    names = {client: content_digest(adapter) for client, adapter in adapters.items()}
    alike = {name: adapters[client] for client, name in names.items()}
    measured = {name: _measured(run, workspace, state, adapter) for name, adapter in alike.items()}
    metrics = _mean_and_worst([measured[name] for name in names.values()])
    if not all(map(math.isfinite, metrics.values())):
        raise TrainingError(f"round {round}: the model diverged, its loss is not finite; lower optimizer.lr or lr_head")
    write_sealed(path, {"state": name, "metrics": metrics})
    return metrics


def personal_adapters(
    run: Run,
    workspace: Workspace,
    round: int,
    state: GlobalState,
    kept: Mapping[str, Any],
    clients: Mapping[str, Mapping[str, Any]],
) -> dict[str, Mapping[str, Tensor]]:
    """Return every client's own model after a round, by name; the global one for who took no part yet.

    `kept` says where each client's own tensors are, `clients` what the round recorded of its participants.
    """
    adapters = {}
    for client in run.plan.clients:
        entry, own = kept.get(client), {}
        if entry is not None:
            own = run.read_kept(entry)
        facts = Start(
            round=round + 1,
            rounds=run.plan.rounds,
            state=state,
            kept=own,
            kept_round=entry["round"] if entry else 0,
            scale=workspace.model.scale,
            rank=run.settings.lora.rank,
            specs=workspace.model.specs,
            weight=clients.get(client, {}).get("weight", 0.0),
        )
        adapters[client] = own_model(workspace.method, workspace.model.specs, workspace.trained, facts)
    return adapters


def final_models(run: Run, workspace: Workspace) -> dict[str, Mapping[str, Tensor]]:
    """Return every client's own model after the last round."""
    last = run.last_trained(run.plan.rounds)
    record = run.round_record(last)
    return personal_adapters(run, workspace, last, run.state(last), record.get("kept", {}), record.get("clients", {}))


def _measured(run: Run, workspace: Workspace, state: GlobalState, adapter: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the metrics of one adapter on the test records, on the weights that belong to it."""
    settings = run.settings
    whole = {spec.name: adapter.get(spec.name, torch.zeros(spec.shape)) for spec in workspace.model.specs}
    budget = replace(workspace.budget, records=settings.evaluation.batch_size)
    with workspace.batched_models() as models:
        records, precision = workspace.records(None), settings.runtime.precision
        workspace.use_base(state.base, state.rest)
        return metrics_of(models, whole, records, workspace.device, precision, budget)


def _mean_and_worst(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means over all clients' models, and the worst client's accuracy where there are several."""
    means = {name: sum(metrics[name] for metrics in measured) / len(measured) for name in measured[0]}
    if len(measured) > 1:
        means["accuracy_worst"] = min(metrics["accuracy"] for metrics in measured)
    return means
