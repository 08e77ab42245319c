"""The report of a run: one HTML page that opens offline, written from the files a run leaves behind.

The page is a pure function of those files, so the same run always gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from fedpipe.project import Project

__all__ = ["write_report"]


def write_report(project: Project) -> Path:
    """Write `reports/report.html` and return its path.

    Parameters
    ----------
    project : Project
        Where `reports/{metrics,ledger,run}.json`, `reports/rounds.csv` and
        `data/partition/manifest.json` are; `reports/evaluation.json` may be missing.

    Raises
    ------
    StateError
        A file that the report needs is missing or damaged.
    StorageError
        The page cannot be written.
    """
    # matplotlib takes a second to import, and the terminal needs only fedpipe.report.numbers.
    from fedpipe.files import write_atomic
    from fedpipe.report.data import load
    from fedpipe.report.html import render

    path = project.reports / "report.html"
    write_atomic(path, render(load(project)).encode())
    return path
