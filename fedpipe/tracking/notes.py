"""What is noted beside a run's state about its record in MLflow.

```
runs/<run id>/
  mlflow-described.json   what MLflow is told of the run; with it, the run is one that is recorded
  mlflow-recorded.json    how far MLflow has it
  mlflow-kept/            the adapter and the reports, while MLflow lacks them
```
What MLflow lacks follows from these and from the run's own state, so a killed process loses
nothing. The adapter and the reports are kept because the next run writes its own over them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe.errors import StateError, StorageError
from fedpipe.files import read_json, storage, write_json
from fedpipe.tracking.description import RunDescription

PRODUCTS = ("adapter", "reports")


@dataclass(frozen=True)
class Recorded:
    """How far MLflow has a run.

    Attributes
    ----------
    run_id
        MLflow's own id. What is said here holds for that MLflow run only.
    rounds
        This round and all before it are recorded; -1 is none.
    end
        So are the adapter, the reports and the status of a complete run.
    """

    run_id: str | None = None
    rounds: int = -1
    end: bool = False


class Notes:
    """The files about the record of the run in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._described = directory / "mlflow-described.json"
        self._recorded = directory / "mlflow-recorded.json"
        self._kept = directory / "mlflow-kept"

    @property
    def recorded(self) -> Recorded:
        """A damaged or missing file says that MLflow has nothing; what it has is then found there."""
        with contextlib.suppress(StateError, TypeError, ValueError):
            found = read_json(self._recorded)
            return Recorded(str(found["run_id"]), int(found["rounds"]), bool(found["end"]))
        return Recorded()

    def note(self, recorded: Recorded) -> None:
        # A disk that is full now costs no more than offering something twice.
        with contextlib.suppress(StorageError):
            write_json(self._recorded, dataclasses.asdict(recorded))

    @property
    def description(self) -> RunDescription | None:
        """What MLflow is told of the run; None of a run that was not to be recorded."""
        with contextlib.suppress(StateError, TypeError):
            return RunDescription(**read_json(self._described))
        return None

    def describe(self, description: RunDescription) -> None:
        values: dict[str, Any] = dataclasses.asdict(description) | {"params": description.param_texts()}
        if self.description != RunDescription(**values):
            with contextlib.suppress(StorageError):
                write_json(self._described, values)

    def kept(self, product: str) -> Path | None:
        path = self._kept / product
        return path if path.is_dir() else None

    def keep(self, product: str, source: Path) -> Path:
        """Copy a directory that MLflow did not take; return the copy, or `source` where there is no space."""
        target = self._kept / product
        if source == target:
            return source
        half = target.with_suffix(".tmp")
        with contextlib.suppress(StorageError), storage(target):
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(source, half)
            shutil.rmtree(target, ignore_errors=True)
            half.rename(target)
            return target
        return source

    def drop(self, product: str) -> None:
        """Forget the copy of what MLflow has now."""
        for name in (product, f"{product}.tmp"):
            shutil.rmtree(self._kept / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # the other one may be in it
            self._kept.rmdir()
