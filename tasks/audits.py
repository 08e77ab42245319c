"""Tasks of an audit: open its run; when the rounds are done, score canaries, infer membership, conclude."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from fedpipe.audits.membership import attacked, membership
from fedpipe.audits.preparing import prepare_audit
from fedpipe.audits.verdict import conclude as conclude_audit
from fedpipe.audits.verdict import score as score_canaries
from fedpipe.audits.verdict import write_result
from fedpipe.config import load_settings
from fedpipe.data.canaries import parse_audit
from fedpipe.data.federation import AUDIT, Federation
from fedpipe.project import Project
from fedpipe.workspace import open_workspace
from tasks.policy import RETRIED, STEP


@task(name="plan audit", task_run_name="plan audit", **STEP)
def plan(params_file: str, overrides: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Check everything, deal the canaries, and open the audited run's directory."""
    path = Path(params_file)
    project, settings = Project(path.parent), load_settings(path, overrides)
    federation = Federation.open(project.partition)
    federation.check_fresh(settings, project.raw)
    federation.verify()
    opened = prepare_audit(project, settings, parse_audit(options))
    return {"run_dir": str(opened.run.root), "resumed": opened.resumed}


@task(name="score canaries", task_run_name="score canaries", **RETRIED)
def score(run_dir: str) -> dict[str, str]:
    return score_canaries(Path(run_dir))


@task(name="infer membership", task_run_name="infer membership", **RETRIED)
def infer(run_dir: str) -> dict[str, Any]:
    """Attack the ordinary run of these settings, or the audited one where there is none."""
    run, workspace = open_workspace(Path(run_dir))
    asked = workspace.federation.manifest[AUDIT]
    return membership(*attacked(run, workspace), seed=asked["seed"], confidence=asked["confidence"])


@task(name="conclude", task_run_name="conclude", **RETRIED)
def conclude(run_dir: str, scored: dict[str, str], inferred: dict[str, Any]) -> dict[str, Any]:
    return conclude_audit(Path(run_dir), scored, inferred)


@task(name="write audit", task_run_name="write audit", **RETRIED)
def write(run_dir: str, result: dict[str, Any]) -> str:
    """Write the result; return the directory whose content MLflow is given."""
    return str(write_result(Path(run_dir), result))
