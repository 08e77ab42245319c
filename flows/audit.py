"""An audit as a Prefect flow: the experiment with canaries, and then the attacks on it.

data and backbone -> partition -> plan audit -> rounds, the ordinary ones -> score canaries
-> infer membership -> conclude -> write audit. A refuted epsilon fails the flow run, after all
is written and logged. Like a run, an audit that was killed goes on when it is started again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from fedpipe.audits.verdict import check, measures
from fedpipe.config import TrackingSettings, load_settings
from fedpipe.files import read_sealed
from fedpipe.listing.audit import rows, shown
from fedpipe.listing.overview import printed
from fedpipe.state import Run
from fedpipe.terminal import Progress, make_progress
from fedpipe.tracking import BackgroundTracker, RunDescription, Tracker
from flows import embedded
from flows.artifacts import show_table
from flows.describe import describe, header
from flows.federated import all_rounds
from tasks import audits, data


@flow(
    name="audit",
    task_runner=ThreadPoolTaskRunner(max_workers=2),
    persist_result=True,
    result_serializer="json",
)
def audit(
    params_file: str = "params.yaml",
    overrides: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Audit the experiment of a settings file; run again after a crash, it goes on.

    Parameters
    ----------
    params_file : the settings; the result is in `reports/audit.json` beside this file
    overrides : `section.key` -> value, laid over the settings
    options : of the audit: `canaries`, `clients`, `kind`, `guesses`, `seed`, `confidence`
    """
    path, overrides = str(Path(params_file).resolve()), overrides or {}
    tracking, progress = load_settings(Path(path), overrides).tracking, make_progress()
    with progress.getting_ready("data, backbone, canaries, plan and the model's first evaluation"):
        data.fetch(path, overrides)
        data.partition(path, overrides)
        opened = audits.plan(path, overrides, options or {})
    run = Run(Path(opened["run_dir"]))
    with run.lock():
        try:
            result = _audited(run, tracking, progress)
        finally:
            progress.close()
    print(printed(lambda width: shown(result)), flush=True)
    check(result)
    embedded.done.set()
    return result


def _audited(run: Run, tracking: TrackingSettings, progress: Progress) -> dict[str, Any]:
    progress.start(header(run))
    progress.note(f"an audit: this run has canaries, and its adapter is not released ({_place(run)})")
    tracker = BackgroundTracker(Tracker.open(tracking, _described(run), run.root / "mlflow.json"))
    status = "FAILED"
    try:
        # The states and updates of a run with canaries are nobody's to download.
        all_rounds(run, tracker, progress, artifacts=False)
        result = read_sealed(run.root / "complete.json") if run.complete else _concluded(run)
        _log(run, tracker, result)
        status = "FAILED" if result["violated"] else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)
    if not run.complete:
        run.finish(result)
    return result


def _concluded(run: Run) -> dict[str, Any]:
    """Make both attacks; only then are the coins revealed."""
    run_dir = str(run.root)
    scored, inferred = audits.score(run_dir), audits.infer(run_dir)
    return audits.conclude(run_dir, scored, inferred)


def _log(run: Run, tracker: Tracker, result: dict[str, Any]) -> None:
    reports = Path(audits.write(str(run.root), result))
    show_table([dict(zip(("what", "value"), row, strict=True)) for row in rows(result)], "audit")
    tracker.log_round(run.plan.rounds, measures(result))
    tracker.tag({"fedpipe.audit": "violated" if result["violated"] else "passed"})
    tracker.log_reports(reports)


def _described(run: Run) -> RunDescription:
    """Return what MLflow is told: the audited run under a name and a tag that nobody takes for an ordinary one."""
    usual = describe(run)
    name, tags = f"audit-{usual.run_id}", {**usual.tags, "fedpipe.audit": "under way"}
    return dataclasses.replace(usual, run_id=name, tags=tags, again="fedpipe audit, with the same options")


def _place(run: Run) -> str:
    return str(run.root.relative_to(run.root.parents[4]))
