"""The federated experiment as a Prefect flow: what runs in which order.

data and backbone -> partition -> plan -> rounds (cohorts -> aggregate -> evaluate -> record)
-> publish. Every step leaves files behind and can be repeated, so a run that was killed goes
on when the flow is started again, by whatever means.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, runtime
from prefect.task_runners import ThreadPoolTaskRunner

from fedpipe.config import TrackingSettings, load_settings
from fedpipe.errors import FedpipeError
from fedpipe.project import Project
from fedpipe.publish import round_row
from fedpipe.state import Run
from fedpipe.steps import forget_rounds, tried
from fedpipe.terminal import Progress, make_progress
from fedpipe.tracking import BackgroundTracker, Tracker
from flows import embedded
from flows.artifacts import begin_bar, move_bar, show_table
from flows.describe import describe, exclusions, header, places, skipped_rounds
from flows.recording import record_adapter, record_round
from tasks import data, rounds


def _flow_run_name() -> str:
    """Name the flow run by its method; a mistake in the settings is reported by the plan, not here."""
    given = runtime.flow_run.parameters
    try:
        settings = load_settings(Path(given["params_file"]), given["overrides"] or {})
    except FedpipeError:
        return "federated"
    count = settings.federation.rounds
    return f"{settings.method.name} / {count} round{'' if count == 1 else 's'} / seed {settings.seed}"


@flow(
    name="federated",
    flow_run_name=_flow_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=2),
    persist_result=True,
    result_serializer="json",
)
def federated(
    params_file: str = "params.yaml", overrides: dict[str, Any] | None = None, standalone: bool = True
) -> dict[str, Any]:
    """Run the experiment of a settings file; run again after a crash, it goes on.

    Parameters
    ----------
    params_file : the settings; everything that the run leaves behind is beside this file
    overrides : `section.key` -> value, laid over the settings
    standalone : obtain data and backbone, partition the records where that is missing or stale,
        and write the report; under DVC, which has stages for these, they are left to it
    """
    path, overrides = str(Path(params_file).resolve()), overrides or {}
    project, tracking = Project(Path(path).parent), load_settings(Path(path), overrides).tracking
    progress = make_progress()
    with progress.getting_ready("data, backbone, plan and the model's first evaluation"):
        if standalone:
            data.fetch(path, overrides)
            data.partition(path, overrides)
        opened = rounds.plan(path, overrides)
    run = Run(Path(opened["run_dir"]))
    with run.lock():
        try:
            return _experiment(run, project, opened, tracking, progress, standalone)
        finally:
            progress.close()


def _experiment(
    run: Run,
    project: Project,
    opened: Mapping[str, Any],
    tracking: TrackingSettings,
    progress: Progress,
    standalone: bool,
) -> dict[str, Any]:
    progress.start(header(run))
    for note in opened["notes"]:
        progress.note(note)
    if opened["changes"]:
        progress.note(f"a new run; since {opened['previous']}: " + "; ".join(opened["changes"]))
    tracker = BackgroundTracker(Tracker.open(tracking, describe(run), run.root / "mlflow.json"))
    status = "FAILED"
    try:
        all_rounds(run, tracker, progress, tracking.artifacts)
        metrics = _publish(run, project, tracker, standalone)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        info = tracker.close(status)
    forget_rounds(run.root, run.plan.rounds, tracker.recorded if tracking.artifacts else None)
    run.finish(metrics)
    summary = {**metrics, **places(run, project), "skipped": skipped_rounds(run), "mlflow": info or None}
    progress.finish(summary)
    embedded.done.set()
    return summary


def all_rounds(run: Run, tracker: Tracker, progress: Progress, artifacts: bool = True) -> None:
    """Do the rounds that are not done, and record all of them; their files too, if `artifacts`.

    Tensors that are to be recorded are not deleted before they are.
    """
    done = run.completed_rounds()
    bar = begin_bar(100 * done / run.plan.rounds, run.root.name)
    for number in range(done + 1):
        # What was recorded just before a crash may not have been logged.
        record_round(run, number, tracker, artifacts)
    forget_rounds(run.root, done, tracker.recorded if artifacts else None)
    told: set[str] = set()
    for number in range(done + 1, run.plan.rounds + 1):
        record = _round(run, number, progress, told)
        record_round(run, number, tracker, artifacts)
        forget_rounds(run.root, number, tracker.recorded if artifacts else None)
        progress.round_done(number, round_row(record))
        move_bar(bar, 100 * number / run.plan.rounds)
    rows = [round_row(run.round_record(number)) for number in range(run.plan.rounds + 1)]
    show_table(rows, "rounds", run.root.name)


def _publish(run: Run, project: Project, tracker: Tracker, standalone: bool) -> dict[str, Any]:
    run_dir = str(run.root)
    metrics = rounds.publish(run_dir, None)
    record_adapter(run, metrics, project.adapter, tracker)
    if tracker.info:
        # Once more, now that the logged model has an id that the reports can name.
        rounds.publish(run_dir, tracker.info)
    if standalone:
        rounds.report(run_dir)
    tracker.log_reports(project.reports)
    return metrics


def _round(run: Run, number: int, progress: Progress, told: set[str]) -> dict[str, Any]:
    started = time.monotonic()
    run_dir = str(run.root)
    plan = rounds.begin_round(run_dir, number)
    cohorts = plan["cohorts"]
    for note in exclusions(number, plan, told):
        progress.note(note)
    if cohorts and plan["cost"]:
        progress.round_begins(number, plan["cost"]["epsilon_before"], plan["cost"]["epsilon_after"])
    aggregated = tried(
        run.settings.federation,
        lambda: _attempt(run, number, cohorts, progress),
        told=lambda reason: progress.note(f"tried again: {reason}"),
    )
    metrics = rounds.evaluate(run_dir, number, aggregated)
    return rounds.record(run_dir, number, aggregated, metrics, time.monotonic() - started)


def _attempt(run: Run, number: int, cohorts: Sequence[Sequence[str]], progress: Progress) -> dict[str, Any]:
    """Train the cohorts of a round that are not trained, and aggregate."""
    run_dir, total, clients = str(run.root), sum(map(len, cohorts)), 0
    futures = [rounds.train_cohort.submit(run_dir, number, cohort) for cohort in range(len(cohorts))]
    listed = []
    for future, members in zip(futures, cohorts, strict=True):
        listed.append(future.result())
        clients += len(members)
        progress.clients_done(number, clients, total)
    if listed and run.settings.federation.secure_aggregation:
        listed = [rounds.sum_updates(run_dir, number, listed)]
    return rounds.aggregate(run_dir, number, listed)
