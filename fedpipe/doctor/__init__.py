"""Is everything in place for a run, and if not, what is to be done?

Each check is one function that returns what it found. A check that itself fails is a
finding, never a traceback: the examination is for a machine where something is wrong.
Nothing is changed, and neither Prefect, MLflow nor DVC is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.table import Table
from rich.text import Text

from fedpipe.config import Settings
from fedpipe.doctor import machine, services, work
from fedpipe.doctor.check import Check
from fedpipe.errors import FedpipeError
from fedpipe.project import Project

__all__ = ["Check", "examine", "render"]


def examine(project: Project, settings: Settings | None) -> list[Check]:
    """Examine a project and this machine. Never raises.

    Parameters
    ----------
    project : where the files are
    settings : the settings, or None where they cannot be read; then the checks that need
        them are left out, and the first finding about `params.yaml` says why
    """
    checks = [
        *_guard("Python", machine.python),
        *(check for name in machine.TESTED for check in _guard(name, machine.package, name)),
        *_guard("settings", work.settings_file, project, settings),
        *_guard("project directory", machine.writable, project.root),
        *_guard("disk", machine.disk, project, settings),
    ]
    if settings is not None:
        checks += [
            *_guard("data", work.data, project, settings),
            *_guard("backbone", work.backbone, project, settings),
            *_guard("partition", work.partition, project, settings),
            *_guard("device", machine.device, settings),
            *_guard("MLflow store", services.mlflow, settings.tracking.uri),
        ]
    return [
        *checks,
        *_guard("Prefect server", services.prefect),
        *_guard("DVC lock", services.dvc_lock, project.root / ".dvc" / "tmp" / "rwlock"),
        *_guard("runs", work.runs, project),
    ]


def render(checks: list[Check]) -> Table:
    """Lay the findings out for a terminal, with what to do below each failure."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        sign = Text("ok", style="green") if check.ok else Text("no", style="bold red")
        found = Text(check.found)
        if check.advice:
            found.append(f"\n{check.advice}", style="dim" if check.ok else "yellow")
        table.add_row(sign, check.name, found)
    return table


def _guard(name: str, check: Callable[..., Check | None], *arguments: object) -> Iterator[Check]:
    """Run one check; what it raises is its finding."""
    try:
        found = check(*arguments)
    except FedpipeError as error:
        found = Check(name, False, str(error))
    except Exception as error:
        reason = f"could not be examined: {type(error).__name__}: {error}"
        found = Check(name, False, reason, f"Try: {machine.REINSTALL}")
    if found is not None:
        yield found
