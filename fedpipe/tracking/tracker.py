"""The tracker: what the rest of fedpipe knows about the record of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fedpipe.config import TrackingSettings
from fedpipe.tracking.description import RunDescription

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """The interface, and what stands behind it where `tracking.uri` is null: nothing is recorded.

    One tracker belongs to one process that runs the rounds, and is called by one thread at a time;
    `BackgroundTracker` does so from another one than the rounds'.
    """

    @classmethod
    def open(cls, settings: TrackingSettings, description: RunDescription, memo: Path, patient: bool = True) -> Tracker:
        """Start the record of a run, or go on with the one that an earlier process began.

        Parameters
        ----------
        settings
            Where the store is. Without a URI, a tracker is returned that does nothing.
        description
            What to tell MLflow about the run.
        memo
            A JSON file in the run's state, which remembers the MLflow run's id. Where it is
            missing, the run is found by its tag. How far MLflow has the run is noted beside it.
        patient
            Whether a store that is away is waited for while the run goes on; otherwise it is an error.

        Raises
        ------
        SettingsError, StateError, StorageError
            The URI is wrong, or the store cannot be used, now and later. Nothing was trained yet.
        """
        if settings.uri is None:
            return Tracker()
        from fedpipe.tracking.recorder import MlflowTracker

        return MlflowTracker(settings, description, memo, patient)

    def log_round(self, round: int, metrics: Mapping[str, float | None], directory: Path | None = None) -> None:
        """Record a round's metrics, and the files in `directory` as artifacts below `rounds/<round>/`.

        Done again for the same round, it adds nothing. A metric that is None or not finite is left
        out. The updates of more than 64 clients are put together in files of 64 (`tracking.updates`).
        """

    def log_final(self, metrics: Mapping[str, float | None], adapter: Path, description: str) -> None:
        """Record the end: the adapter as artifacts and as a logged model. `info` then has its `model_id`.

        Parameters
        ----------
        metrics
            Linked to the model, at the last round's step. Of a name that this round has
            recorded already, the recorded value is the one that is linked.
        adapter
            A directory in PEFT format.
        description
            Markdown, shown on the pages of the run and of the model.
        """

    def log_reports(self, directory: Path) -> None:
        """Record the files of a directory as artifacts below `reports/`."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, over those that it has."""

    def close(self, status: Status) -> dict[str, str | None]:
        """Offer once more what MLflow lacks, end the MLflow run, and return `info`; say what it still lacks."""
        return self.info

    @property
    def recorded(self) -> int | None:
        """The store has this round and all before it, -1 for none; None where nothing is recorded."""
        return None

    @property
    def info(self) -> dict[str, str | None]:
        """`uri`, `experiment_id`, `run_id` and `model_id` in MLflow; empty where nothing is recorded."""
        return {}

    @property
    def run_url(self) -> str | None:
        """The page of the run, where the store is a server."""
        return None
