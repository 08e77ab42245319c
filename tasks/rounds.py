"""Tasks of a run: plan, and for each round train, aggregate, evaluate and record; then publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from fedpipe import steps
from fedpipe.config import load_settings
from fedpipe.data.federation import Federation
from fedpipe.methods import compose, warnings_for
from fedpipe.project import Project
from fedpipe.publish import publish as publish_run
from fedpipe.report import write_report
from fedpipe.report.final import evaluate_adapter
from fedpipe.state import Run
from tasks.policy import RETRIED, STEP


@task(name="plan", task_run_name="plan", **STEP)
def plan(params_file: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Check everything, decide the run, and open its directory."""
    path = Path(params_file)
    project, settings = Project(path.parent), load_settings(path, overrides)
    federation = Federation.open(project.partition)
    federation.check_fresh(settings, project.raw)
    federation.verify()
    opened = steps.prepare(project, settings)
    return {
        "run_dir": str(opened.run.root),
        "resumed": opened.resumed,
        "changes": list(opened.changes),
        "previous": opened.previous,
        "notes": warnings_for(compose(settings), settings),
    }


@task(name="begin round", task_run_name="round {round} / begin", **STEP)
def begin_round(run_dir: str, round: int) -> dict[str, Any]:
    return steps.begin_round(Path(run_dir), round)


@task(name="train cohort", task_run_name="round {round} / cohort {cohort}", **RETRIED)
def train_cohort(run_dir: str, round: int, cohort: int) -> dict[str, str]:
    """Train a cohort. Trying again is safe: the same batches, the same noise, no second ledger entry."""
    return steps.train(Path(run_dir), round, cohort)


@task(name="secure sum", task_run_name="round {round} / secure sum", **RETRIED)
def sum_updates(run_dir: str, round: int, cohorts: list[dict[str, str]]) -> dict[str, str]:
    """Add the updates up so that the server sees their sum only. Trying again is safe: the same sum, or none."""
    return steps.sum_updates(Path(run_dir), round, cohorts)


@task(name="aggregate", task_run_name="round {round} / aggregate", **RETRIED)
def aggregate(run_dir: str, round: int, cohorts: list[dict[str, str]]) -> dict[str, Any]:
    return steps.aggregate(Path(run_dir), round, cohorts)


@task(name="evaluate", task_run_name="round {round} / evaluate", **RETRIED)
def evaluate(run_dir: str, round: int, aggregated: dict[str, Any]) -> dict[str, float]:
    return steps.evaluate_round(Path(run_dir), round, aggregated)


@task(name="record", task_run_name="round {round} / record", **STEP)
def record(
    run_dir: str, round: int, aggregated: dict[str, Any], metrics: dict[str, float], seconds: float
) -> dict[str, Any]:
    return steps.finish_round(Path(run_dir), round, aggregated, metrics, seconds)


@task(name="publish", task_run_name="publish", **RETRIED)
def publish(run_dir: str, mlflow: dict[str, Any] | None) -> dict[str, Any]:
    """Write the adapter and the reports from the run's state."""
    run = Run(Path(run_dir))
    return publish_run(run, Project(run.root.parents[1]), mlflow)


@task(name="report", task_run_name="report", **RETRIED)
def report(run_dir: str) -> str:
    """Evaluate the adapter as a user would load it, and write the page; return its path."""
    project = Project(Run(Path(run_dir)).root.parents[1])
    evaluate_adapter(project)
    return str(write_report(project))
