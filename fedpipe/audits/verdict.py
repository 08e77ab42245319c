"""The verdict of an audit: guesses about the canaries' coins, and what right ones say of the claimed epsilon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedpipe.audits.preparing import project_of
from fedpipe.audits.scores import black_box, white_box
from fedpipe.data.federation import AUDIT
from fedpipe.errors import AuditError
from fedpipe.files import read_sealed, write_json, write_sealed
from fedpipe.privacy.audit import OneRunVerdict, one_run_audit
from fedpipe.project import Project
from fedpipe.state import Run
from fedpipe.steps.canaries import coins_of
from fedpipe.workspace import Workspace, open_workspace

FILE = "audit.json"
SCORES = {"black-box": black_box, "white-box": white_box}


def score(run_dir: Path) -> dict[str, str]:
    """Write the canaries' scores, made without a look at their coins; return the name and sha256 of the file."""
    run, workspace = open_workspace(run_dir)
    path = run.root / "scores.json"
    sha256 = write_sealed(path, {name: make(run, workspace).tolist() for name, make in SCORES.items()})
    return {"file": path.name, "sha256": sha256}


def conclude(run_dir: Path, scored: Mapping[str, str], inferred: Mapping[str, Any]) -> dict[str, Any]:
    """Reveal the coins, hold the guesses against them, and return the result.

    Parameters
    ----------
    scored : what `score` returned
    inferred : what `membership` returned

    Notes
    -----
    The claim is the largest epsilon of the clients that hold canaries, from their lines in the
    ledger, at the run's delta. Each of the scores that are tried is held to a confidence that makes
    up for the choice of the best one (Bonferroni).
    """
    run, workspace = open_workspace(run_dir)
    asked = workspace.federation.manifest[AUDIT]
    scores = read_sealed(run.root / scored["file"], scored["sha256"])
    coins = np.concatenate(list(coins_of(run, workspace.federation.canaries).values()))
    claimed, each = claimed_epsilon(run, workspace), 1 - (1 - asked["confidence"]) / len(SCORES)
    options, delta = [(asked["guesses"], asked["guesses"])], run.plan.delta
    verdicts = {
        name: one_run_audit(scores[name], coins, options, claimed=claimed, delta=delta, confidence=each)
        for name in SCORES
    }
    write_sealed(run.root / "canaries.json", {"coins": coins.tolist(), "scores": scores})
    return _result(run, workspace, asked, claimed, verdicts) | {"membership": dict(inferred)}


def claimed_epsilon(run: Run, workspace: Workspace) -> float:
    """Return the largest epsilon that the ledger gives for a client with canaries."""
    run.ledger.verify()
    return max(run.plan.accounted(run.ledger.history(client)) for client in workspace.federation.canaries)


def _result(
    run: Run, workspace: Workspace, asked: Mapping[str, Any], claimed: float, verdicts: Mapping[str, OneRunVerdict]
) -> dict[str, Any]:
    lower = max(verdict.bound for verdict in verdicts.values())
    return {
        "run_id": run.info["run_id"],
        "method": workspace.method.name,
        "unit": run.plan.unit,
        "adjacency": run.plan.adjacency,
        "dp_valid": run.dp_valid,
        "violated": lower > claimed,
        "epsilon_lower": lower,
        "epsilon_claimed": claimed,
        "epsilon_target": run.plan.epsilon,
        "ceiling": max(verdict.ceiling for verdict in verdicts.values()),
        "delta": run.plan.delta,
        "confidence": asked["confidence"],
        "canaries": {
            "count": asked["canaries"],
            "kind": asked["kind"],
            "seed": asked["seed"],
            "clients": {client: count for client, (_, count) in asked["slots"].items()},
        },
        "scores": {
            name: {
                "guesses": verdict.k_plus + verdict.k_minus,
                "correct": verdict.correct,
                "bound": verdict.bound,
                "p_value": min(1.0, len(SCORES) * verdict.p_value),
            }
            for name, verdict in verdicts.items()
        },
    }


def write_result(run_dir: Path, result: Mapping[str, Any]) -> Path:
    """Write the result beside the reports of the project, and beside the audited run; return the latter's directory."""
    inner = Project(run_dir.parents[1])
    for project in (project_of(inner), inner):
        write_json(project.reports / FILE, dict(result))
    return inner.reports


def check(result: Mapping[str, Any]) -> None:
    """Raise an `AuditError` where the claim is refuted."""
    if result["violated"]:
        raise AuditError(
            f"audit: epsilon is above {result['epsilon_lower']:.4f} with confidence {result['confidence']:g}, but "
            f"{result['epsilon_claimed']:.4f} is claimed at delta {result['delta']:g}: the noise, the clipping, the "
            "sampling or the accounting is wrong; results of these settings and this code must not be called private"
        )


def measures(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of a result under MLflow's names."""
    named: dict[str, float | None] = {
        "audit/epsilon_lower": result["epsilon_lower"],
        "audit/epsilon_claimed": result["epsilon_claimed"],
        "audit/ceiling": result["ceiling"],
        "mia/auc": result["membership"]["auc"]["value"],
    }
    for name, found in result["scores"].items():
        short = name.replace("-", "_")
        named |= {f"audit/{short}_lower": found["bound"], f"audit/{short}_correct": found["correct"]}
    for fpr, found in result["membership"]["tpr"].items():
        named[f"mia/tpr_at_{fpr}"] = found["value"]
    return named
