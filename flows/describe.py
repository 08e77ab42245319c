"""What a run is called and how its numbers are named where people look at them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpipe.methods import Method
from fedpipe.project import Project
from fedpipe.publish import left_out, round_row, shown_settings
from fedpipe.report.summary import RunHeader
from fedpipe.state import Run
from fedpipe.steps.diagnostics import PREFIX
from fedpipe.tracking import RunDescription
from fedpipe.workspace import open_workspace

# A round's numbers under MLflow's names; the steps are rounds.
_METRICS = {
    "accuracy": "eval/accuracy",
    "accuracy_worst": "eval/accuracy_worst",
    "loss": "eval/loss",
    "epsilon_max": "privacy/epsilon_max",
    "epsilon_rdp": "privacy/epsilon_rdp",
    "update_norm": "train/update_norm",
    "update_norm_max": "train/update_norm_max",
    "snr": "train/snr",
    "participants": "train/participants",
    "refused": "train/refused",
    "epsilon_before": "privacy/epsilon_before",
    "epsilon_after": "privacy/epsilon_after",
    "excluded": "privacy/excluded",
    "skipped": "privacy/skipped",
    "seconds": "time/round_s",
    "simulated_seconds": "time/simulated_round_s",
    "bytes_up": "traffic/bytes_up",
    "bytes_down": "traffic/bytes_down",
}


NONPRIVATE = "nonprivate/"  # what no noise protects has this before its name in MLflow


def round_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Return a round's record as MLflow metrics, those of its aggregation rule included."""
    row, losses = round_row(record), record.get("diagnostics", {}).get("metrics", {})
    return {
        **{name: row[column] for column, name in _METRICS.items()},
        **record.get("server", {}),
        **{name.replace(PREFIX, NONPRIVATE): value for name, value in losses.items()},
    }


def exclusions(number: int, plan: Mapping[str, Any], told: set[str]) -> list[str]:
    """Return what a person is told of a round's plan, each client once in a process; `told` grows by them."""
    notes, why = [], {c: reason for c, reason in plan["excluded"].items() if c not in told}
    told.update(why)
    if why:
        named = ", ".join(list(why)[:5]) + (f" and {len(why) - 5} more" if len(why) > 5 else "")
        first, reason = next(iter(why.items()))
        which = reason if len(why) == 1 else f"{first}: {reason}"
        notes.append(f"round {number}: left out, since their budget would be exceeded: {named} ({which})")
    if plan["skipped"]:
        notes.append(f"round {number}: skipped: {plan['skipped']}; the state is carried over")
    return notes


def header(run: Run) -> RunHeader:
    """Return what a person is told before the first round."""
    _, workspace = open_workspace(run.root)
    return RunHeader(
        run_id=run.info["run_id"],
        method=workspace.method.name,
        clients=len(run.plan.clients),
        rounds=run.plan.rounds,
        completed_rounds=run.completed_rounds(),
        epsilon_target=run.plan.epsilon,
        adjacency=run.plan.adjacency,
        device=str(workspace.device),
        dp_valid=run.dp_valid,
        diagnostics=run.diagnostics,
    )


def describe(run: Run) -> RunDescription:
    """Return what MLflow is told before the first round."""
    _, workspace = open_workspace(run.root)
    info, plan, source = run.info, run.plan, workspace.federation.manifest["source"]
    resolved = {
        "plan.delta": plan.delta,
        "plan.sigma_min": min(plan.sigmas, default=None),
        "plan.sigma_max": max(plan.sigmas, default=None),
        "plan.trainable_parameters": sum(s.numel for s in workspace.model.specs if s.name in workspace.trained),
        **_method_params(workspace.method),
    }
    return RunDescription(
        run_id=info["run_id"],
        params=shown_settings(run) | resolved,
        tags={
            "method": workspace.method.name,
            "unit": plan.unit,
            "adjacency": plan.adjacency or "none",
            "dp_valid": str(run.dp_valid).lower(),
            "fedpipe.diagnostics": str(run.diagnostics).lower(),
            "fedpipe.backbone_digest": workspace.backbone.digest,
            "fedpipe.code_digest": info["parts"]["code"],
            **({"fedpipe.attack": attack} if (attack := run.settings.federation.attack.kind) else {}),
            **({"mlflow.source.git.commit": info["git_commit"]} if info["git_commit"] else {}),
        },
        dataset_name=run.settings.data.source,
        dataset_source=str(source.get("origin") or source["source"]),
        dataset_digest=info["parts"]["dataset"],
    )


def _method_params(method: Method) -> dict[str, Any]:
    """Return `method.AXIS` and `method.AXIS.OPTION` for every part of the method, defaults included."""
    params: dict[str, Any] = {}
    for axis, choice in method.axes.items():
        options = dict(choice)
        params[f"method.{axis}"] = options.pop("name")
        params |= {f"method.{axis}.{option}": value for option, value in options.items()}
    return params


def summarise(run: Run, metrics: Mapping[str, Any]) -> str:
    """Return the Markdown that MLflow shows on the run's page."""
    method = open_workspace(run.root)[1].method
    lines = [f"**{method.name}**: {method.summary} ({method.paper})", ""]
    lines.append(
        f"Accuracy {metrics['accuracy']:.4f} on test records; the majority share is {metrics['majority_share']:.4f}."
    )
    if not run.plan.private:
        lines.append("Trained without differential privacy.")
    elif not run.dp_valid:
        lines.append("NOT PRIVATE: the noise is fixed by `privacy.test_key`.")
    else:
        lines.append(
            f"Every client: ({metrics['epsilon_max']:.3f}, {metrics['delta']:.1e}) differential privacy at the most, "
            f"when neighbours differ by: {run.plan.adjacency}."
        )
    if run.diagnostics:
        lines.append(f"Training losses (`{NONPRIVATE}...`) are recorded here, and epsilon does not cover them.")
    return "\n".join(lines)


def places(run: Run, project: Project) -> dict[str, str]:
    """Return where a run left what."""
    found = {
        "adapter": project.adapter,
        "report": project.reports / "report.html",
        "ledger": project.reports / "ledger.json",
        "run_directory": run.root,
    }
    return {name: _short(path, project) for name, path in found.items()} | {"run_id": run.info["run_id"]}


def skipped_rounds(run: Run) -> dict[str, str]:
    """Return the rounds in which nobody trained, each with the reason."""
    return left_out(run.round_record(number) for number in range(1, run.plan.rounds + 1))["skipped"]


def _short(path: Any, project: Project) -> str:
    return str(path.relative_to(project.root))
