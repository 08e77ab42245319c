"""What a complete run hands to its user: an adapter that stock peft loads, and the reports."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedpipe.budget import check_spent
from fedpipe.errors import StateError
from fedpipe.files import file_digest, sweep, write_atomic, write_json, write_tensors
from fedpipe.models.factors import GlobalState, pairs
from fedpipe.models.loading import TASK_FILE
from fedpipe.models.structure import exported, of_context
from fedpipe.privacy.ledger import EVERY
from fedpipe.privacy.neighbours import adjacency_of
from fedpipe.privacy.summary import summary
from fedpipe.project import Project
from fedpipe.server.attacks import malicious
from fedpipe.state import Run
from fedpipe.steps.evaluating import final_models
from fedpipe.workspace import Workspace, open_workspace

COLUMNS = (
    "round",
    "accuracy",
    "accuracy_worst",
    "loss",
    "epsilon_max",
    "epsilon_rdp",
    "update_norm",
    "update_norm_max",
    "snr",
    "participants",
    "refused",
    "epsilon_before",
    "epsilon_after",
    "excluded",
    "skipped",
    "seconds",
    "simulated_seconds",
    "bytes_up",
    "bytes_down",
)


def round_row(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Return a round's record as flat numbers, under the names of `rounds.csv`; None where there is none."""
    hidden = EVERY in record.get("clients", {})  # who took part, and how many
    clients = record.get("clients", {}).values()
    # With secure aggregation the server knows neither of them.
    norms = [client["norm"] for client in clients if "norm" in client]
    ratios = [client["snr"] for client in clients if client.get("snr") is not None]
    row: dict[str, float | None] = {name: record.get(name) for name in COLUMNS}
    row |= {name: record["metrics"].get(name) for name in ("accuracy", "accuracy_worst", "loss")}
    row["refused"] = None
    if norms:
        row |= {"update_norm": sum(norms) / len(norms), "update_norm_max": None if hidden else max(norms)}
    if "clients" in record and not hidden:
        row |= {"participants": len(clients), "refused": len(record.get("refused", {}))}
    row |= {name: (record.get("cost") or {}).get(name) for name in ("epsilon_before", "epsilon_after")}
    if "excluded" in record:
        row |= {"excluded": len(record["excluded"]), "skipped": int(record["skipped"] is not None)}
    if ratios:
        row["snr"] = sum(ratios) / len(ratios)
    return row


def publish(run: Run, project: Project, mlflow: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `models/adapter` and `reports/` from a run whose last round is complete; return the metrics.

    Everything comes from the run's directory, so it can be written again at any time.
    """
    _, workspace = open_workspace(run.root)
    for directory in (project.adapter, project.reports):
        sweep(directory)
    if workspace.federation.canaries:
        raise StateError(f"{run.root}: was trained with the canaries of an audit; its adapter is not released")
    for number in range(1, run.plan.rounds + 1):
        check_spent(run, number)
    records = [run.round_record(number) for number in range(run.plan.rounds + 1)]
    _write_adapter(run, project, workspace)
    ledger = _ledger(run)
    metrics = _metrics(run, workspace, records)
    write_json(project.reports / "ledger.json", ledger | {"diagnostics": run.diagnostics})
    write_atomic(project.reports / "rounds.csv", _csv([round_row(record) for record in records]))
    facts = _facts(run, workspace, records, mlflow) | {"adapter": _digests(project.adapter)}
    write_json(project.reports / "run.json", facts)
    write_json(project.reports / "metrics.json", metrics)
    return metrics


def left_out(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the budget kept from taking place, by public facts only.

    `skipped`: number of a round -> why nobody trained in it. `excluded`: client -> the first round that it
    was left out of (`round`), in how many it was (`rounds`), and why (`reason`).
    """
    skipped: dict[str, str] = {}
    excluded: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.get("skipped"):
            skipped[str(record["round"])] = record["skipped"]
        for client, reason in record.get("excluded", {}).items():
            first = excluded.setdefault(client, {"round": record["round"], "rounds": 0, "reason": reason})
            first["rounds"] += 1
    return {"skipped": skipped, "excluded": excluded}


def refused_updates(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the updates that were not used: number of a round -> client -> why."""
    return {str(record["round"]): record["refused"] for record in records if record.get("refused")}


def _attack(run: Run) -> dict[str, Any] | None:
    """Return the attack that was simulated, and by whom; None where there was none."""
    attack = run.settings.federation.attack
    if attack.kind is None:
        return None
    return {**dict(attack), "clients": list(malicious(attack, run.settings.seed, list(run.plan.clients)))}


def diagnosed(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the training losses by round, which no noise protects; None where none were kept."""
    found = [{"round": record["round"], **record["diagnostics"]} for record in records if "diagnostics" in record]
    return found or None


def shown_settings(run: Run) -> dict[str, Any]:
    """Return the run's settings, flat, as they may be shown to anyone: no key, and no address of a store."""
    flat = {key: value for key, value in run.settings.flat().items() if not key.startswith("tracking.")}
    return flat | {"privacy.test_key": "set" if run.info["test_key"] else None}


def _write_adapter(run: Run, project: Project, workspace: Workspace) -> None:
    """Write the global state as an adapter, and every client's own model where the method gives them one.

    Clients' own models stay in the run's directory: they hold what was never sent.
    """
    state = run.state(run.plan.rounds)
    _write_peft(project.adapter, run, project, workspace, state)
    if not workspace.method.personal or workspace.method.initialisation.mixer:
        return  # what a mixer does to each token, no LoRA adapter can
    for client, adapter in final_models(run, workspace).items():
        # The second adapter of a client is part of its model, and a product like the first.
        second = pairs(workspace.model.specs) if workspace.method.initialisation.context else ()
        rest = {**state.rest, **{pair.name: of_context(pair, adapter) for pair in second}}
        own = GlobalState(dict(adapter), state.base, rest)
        _write_peft(run.client_dir(client) / "adapter", run, project, workspace, own)


def _write_peft(path: Path, run: Run, project: Project, workspace: Workspace, state: GlobalState) -> None:
    backbone = workspace.backbone
    base = backbone.name if backbone.origin["kind"] == "hub" else str(backbone.path)
    if backbone.path.is_relative_to(project.root):
        base = str(backbone.path.relative_to(project.root))
    model = run.settings.model
    facts = {"task": model.task, "labels": list(workspace.task.labels), "pooling": model.pooling}
    write_json(path / TASK_FILE, {**facts, "max_length": run.settings.data.max_length})
    tensors, rank, alpha = exported(workspace.model.specs, state, workspace.model.scale)
    write_tensors(path / "adapter_model.safetensors", tensors)
    write_json(path / "adapter_config.json", workspace.model.adapter_config(base, rank, alpha))


def _ledger(run: Run) -> dict[str, Any]:
    plan = run.plan
    accounted = plan.clients if plan.central is None else {EVERY: plan.central}
    return summary(
        run.ledger if plan.private else None,
        plan.delta,
        plan.accountant,
        sizes={name: None if plan.whole_clients else client.records for name, client in accounted.items()},
        dp_valid=run.dp_valid,
        unit=plan.unit,
        adjacency=adjacency_of(plan.adjacency),
        sampling_rates={name: (plan.shares or client).sampling_rate for name, client in accounted.items()},
        groups={name: client.groups for name, client in accounted.items()} if plan.unit == "group" else None,
    )


def _metrics(run: Run, workspace: Workspace, records: list[dict[str, Any]]) -> dict[str, Any]:
    kept_back = left_out(records)
    last, histogram = records[-1], workspace.federation.manifest["test"]["histogram"]
    return {
        **last["metrics"],
        "majority_share": max(histogram.values()) / sum(histogram.values()),
        "epsilon_max": last["epsilon_max"],
        "epsilon_rdp": last["epsilon_rdp"],
        "delta": run.plan.delta,
        "rounds": run.plan.rounds,
        "diagnostics": run.diagnostics,
        "rounds_skipped": len(kept_back["skipped"]),
        "clients_excluded": len(kept_back["excluded"]),
        **_hostility(run, records),
        "dp_valid": run.dp_valid,
        "unit": run.plan.unit,
        "adjacency": run.plan.adjacency,
        # None where they would tell how many took part.
        "seconds": None if run.plan.central is not None else sum(record["seconds"] for record in records[1:]),
        "bytes_up": sum(record["bytes_up"] for record in records[1:]),
        "bytes_down": sum(record["bytes_down"] for record in records[1:]),
    }


def _hostility(run: Run, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many updates were not used, where that may be told, and who attacked, where anybody did."""
    attack = _attack(run)
    found: dict[str, Any] = {"attack": attack["kind"], "attackers": len(attack["clients"])} if attack else {}
    if run.plan.central is None:
        found["updates_refused"] = sum(map(len, refused_updates(records).values()))
    return found


def _facts(
    run: Run, workspace: Workspace, records: list[dict[str, Any]], mlflow: Mapping[str, Any] | None
) -> dict[str, Any]:
    method, info = workspace.method, run.info
    return {
        "run_id": info["run_id"],
        "method": {"name": method.name, "summary": method.summary, "paper": method.paper, **method.axes},
        "personal": method.personal,
        "settings": shown_settings(run),
        "dataset_digest": info["parts"]["dataset"],
        "backbone": {"name": workspace.backbone.name, "digest": workspace.backbone.digest},
        "code_digest": info["parts"]["code"],
        "git_commit": info["git_commit"],
        "versions": info["versions"],
        "started": info["started"],
        "finished": _finished(run),
        "dp_valid": run.dp_valid,
        "budget": left_out(records),
        "refused": refused_updates(records),
        "away": {str(record["round"]): record["away"] for record in records if record.get("away")},
        "attack": _attack(run),
        "diagnostics": diagnosed(records),
        "mlflow": mlflow,
        "trainable_parameters": sum(s.numel for s in workspace.model.specs if s.name in workspace.trained),
        "clients_by_round": [
            {
                "round": record["round"],
                "update_norm": {name: client.get("norm") for name, client in record["clients"].items()},
                "snr": {name: client.get("snr") for name, client in record["clients"].items()},
            }
            for record in records[1:]
        ],
    }


def _digests(adapter: Path) -> dict[str, str]:
    """Return the sha256 of the adapter's files by name: what is evaluated and reported later must be these."""
    names = (TASK_FILE, "adapter_config.json", "adapter_model.safetensors")
    return {name: file_digest(adapter / name) for name in names}


def _finished(run: Run) -> str:
    """Return when the last round was recorded, however often the run is published."""
    recorded = (run.round_dir(run.plan.rounds) / "round.json").stat().st_mtime
    return datetime.fromtimestamp(recorded, UTC).isoformat(timespec="seconds")


def _csv(rows: list[dict[str, float | None]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
