"""Is there room? What a run still needs, held against what is free where it will be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fedpipe.config import Settings
from fedpipe.disk.needs import Needs
from fedpipe.errors import StorageError
from fedpipe.project import Project
from fedpipe.state import Run
from fedpipe.tracking.notes import Notes


def check_room(project: Project, settings: Settings, needs: Needs, run: Run | None = None) -> None:
    """Refuse a run that will not fit; of one that goes on, what is there already does not count again.

    Raises
    ------
    StorageError
        It does not fit. The message says how much is missing where, and what to do.
    """
    if short := missing_room(project, settings, needs, run):
        raise StorageError(short)


def missing_room(project: Project, settings: Settings, needs: Needs, run: Run | None = None) -> str | None:
    """Say what does not fit, and what to do; None where all does."""
    wanted: dict[int, dict[str, int]] = {}
    places: dict[int, Path] = {}
    for what, place, size in _still(project, settings, needs, run):
        there = _existing(place)
        device = _device(there)
        places.setdefault(device, there)
        wanted.setdefault(device, {})[what] = size
    for device, parts in wanted.items():
        if parts.keys() <= {"MLflow", "Prefect"}:
            continue  # a run goes on without them
        free, need = shutil.disk_usage(places[device]).free, sum(parts.values())
        if need > free:
            told = ", ".join(f"{what} {shown(size)}" for what, size in parts.items() if 20 * size >= need)
            return (
                f"{places[device]}: {shown(free)} are free, and the run needs about {shown(need)} more ({told}); "
                f"{_cure(settings, parts)}"
            )
    return None


def shown(size: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _still(project: Project, settings: Settings, needs: Needs, run: Run | None) -> list[tuple[str, Path, int]]:
    """Return what, where, and how many bytes are still to be written."""
    there = 0 if run is None else used(run.root)
    recorded = 0 if run is None else Notes(run.root).recorded.rounds + 1
    left = max(0.0, 1 - recorded / (settings.federation.rounds + 1))
    found = [
        ("the run", project.runs, max(0, needs.run - there)),
        ("the frozen layers' output", project.runs, needs.prefix),
        ("adapter and reports", project.root, needs.published),
    ]
    if (home := project.root / ".prefect").is_dir():  # the run's own server
        found.append(("Prefect", home, max(0, int(needs.prefect * left) - (0 if recorded else used(home)))))
    uri = settings.tracking.uri or ""
    if uri.startswith("sqlite:///"):
        found.append(("MLflow", Path(uri.removeprefix("sqlite:///")).absolute().parent, int(needs.mlflow * left)))
    return found


def used(directory: Path) -> int:
    """Return what the files of a directory take on disk, in bytes."""
    total = 0
    for where, folders, files in os.walk(directory):
        for name in (*folders, *files):
            try:
                total += 512 * os.lstat(os.path.join(where, name)).st_blocks
            except OSError:  # gone since it was listed
                continue
    return total


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _device(path: Path) -> int:
    return os.stat(path).st_dev


def _cure(settings: Settings, parts: dict[str, int]) -> str:
    """Say what helps with what is too large."""
    cures = ["free some"]
    if settings.runtime.keep_rounds is None and parts.get("the run"):
        cures.append("keep the tensors of fewer rounds (runtime.keep_rounds: 2)")
    if settings.tracking.artifacts and parts.get("MLflow"):
        cures.append("leave the rounds' tensors out of MLflow (tracking.artifacts: false)")
    if parts.get("the frozen layers' output"):
        cures.append("do without the frozen layers' output (runtime.cache_frozen_prefix: false)")
    return f"{', '.join(cures)}, or work in a directory on a larger disk"
