"""What MLflow is told of a run, from its state on disk: round by round by the flow, the rest by `fedpipe sync`.

No Prefect here: what is recorded later needs no workflow engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe.config import TrackingSettings
from fedpipe.data.federation import Federation
from fedpipe.errors import FedpipeError, SettingsError, StateError, nearest
from fedpipe.files import file_digest, read_json, read_sealed
from fedpipe.project import Project
from fedpipe.state import Run
from fedpipe.tracking import RunDescription, Tracker
from fedpipe.tracking.notes import Notes
from flows.describe import describe, round_metrics, summarise


def record_round(run: Run, number: int, tracker: Tracker, artifacts: bool = True) -> None:
    """Offer a complete round; its files too, if `artifacts`."""
    record = run.round_record(number)
    assert record is not None
    tracker.log_round(number, round_metrics(record), run.round_dir(number) if artifacts else None)


def record_adapter(run: Run, metrics: Mapping[str, Any], adapter: Path, tracker: Tracker) -> None:
    """Offer the adapter of a run whose last round is complete."""
    tracker.log_final(round_metrics(run.round_record(run.plan.rounds)), adapter, summarise(run, metrics))


@dataclass(frozen=True)
class Missing:
    """What MLflow lacks of a run, as noted beside its state. No store is asked.

    Attributes
    ----------
    wanted
        Whether the run was to be recorded: false where it was only ever trained without `tracking.uri`.
    first, last
        The rounds that wait; `first` is after `last` where none does.
    end
        Whether the end of a complete run waits.
    """

    wanted: bool
    first: int
    last: int
    end: bool

    def __bool__(self) -> bool:
        return self.first <= self.last or self.end

    def __str__(self) -> str:
        first, last = self.first, self.last
        rounds = f"round {last}" if first == last else f"rounds {first} to {last}" if first < last else ""
        return " and ".join(filter(None, (rounds, "the end" if self.end else "")))


def missing(run: Run) -> Missing:
    """Say what MLflow lacks of a run."""
    notes = Notes(run.root)
    recorded = notes.recorded
    end = run.complete and not recorded.end
    return Missing(notes.description is not None, recorded.rounds + 1, run.completed_rounds(), end)


def chosen(project: Project, names: tuple[str, ...], everything: bool) -> list[Run]:
    """Return the runs that are named, or all that were to be recorded, or, if `everything`, all there are."""
    there = {path.parent.name: Run(path.parent) for path in sorted(project.runs.glob("*/run.json"))}
    asked = [Path(name).name for name in names]
    for name in asked:
        if name not in there:
            raise StateError(f"{project.runs / name}: there is no such run; {nearest(name, there)}")
    return [run for name, run in there.items() if name in asked or (not asked and (everything or missing(run).wanted))]


def sync(run: Run, project: Project, tracking: TrackingSettings) -> str:
    """Record all that MLflow lacks of a run; return what is to be said about it.

    Doing it again adds nothing. A run that is not complete is shown as KILLED until it goes on.

    Raises
    ------
    SettingsError, StateError, StorageError
        There is no store to record in, it cannot be used, or another process drives the run.
    """
    if tracking.uri is None:
        raise SettingsError(
            "tracking.uri: null, so there is no store to record in; name one: --set tracking.uri=sqlite:///mlflow.db"
        )
    with run.lock():
        lacked, said = missing(run), ""
        if lacked.last < 0:
            return "no round is complete yet"
        tracker = Tracker.open(tracking, _description(run, project), run.root / "mlflow.json", patient=False)
        for number in range(lacked.last + 1):
            record_round(run, number, tracker, tracking.artifacts)
        if run.complete and not _record_end(run, project, tracker):
            said = "; its adapter and reports are no longer in the project: run its settings again to publish them"
        tracker.close("FINISHED" if run.complete else "KILLED")
        still = missing(run)
    if said or not still:
        return (f"recorded {lacked}" if lacked else "has all") + said
    return f"lacks {still}"


def _description(run: Run, project: Project) -> RunDescription:
    """Return what was written down when the run began; of a run that was not to be recorded, find it out."""
    found = Notes(run.root).description
    if found is not None:
        return found
    if Federation.open(project.partition).digest != run.info["parts"]["dataset"]:
        raise StateError(
            f"{run.root}: its partition is not the one in {project.partition}; "
            "run 'fedpipe partition' with the settings of this run, then 'fedpipe sync' again"
        )
    return describe(run)


def _record_end(run: Run, project: Project, tracker: Tracker) -> bool:
    """Offer the adapter and the reports of a complete run; return whether they are still there."""
    notes, published = Notes(run.root), _is_published(run, project)
    adapter = notes.kept("adapter") or (project.adapter if published else None)
    reports = notes.kept("reports") or (project.reports if published else None)
    if adapter is not None:
        record_adapter(run, read_sealed(run.root / "complete.json"), adapter, tracker)
    if reports is not None:
        tracker.log_reports(reports)
    return Notes(run.root).recorded.end or (adapter is not None and reports is not None)


def _is_published(run: Run, project: Project) -> bool:
    """Say whether the adapter and the reports in the project are those of this run."""
    try:
        facts = read_json(project.reports / "run.json")
        digests = facts["adapter"]
        return facts["run_id"] == run.info["run_id"] and all(
            file_digest(project.adapter / name) == digest for name, digest in digests.items()
        )
    except (FedpipeError, OSError, KeyError, TypeError, AttributeError):
        return False
