"""The machine: Python, packages, disk, device."""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from fedpipe.config import Settings
from fedpipe.doctor.check import Check
from fedpipe.errors import FedpipeError
from fedpipe.project import Project

# The versions that fedpipe is tested with, as in constraints.txt, and what each is for.
TESTED = {
    "torch": ("2.13.0", "training"),
    "transformers": ("5.23.0", "backbones"),
    "peft": ("0.21.2", "adapters"),
    "opacus": ("1.6.0", "privacy accounting"),
    "datasets": ("5.2.0", "reading data"),
    "prefect": ("3.8.8", "`fedpipe run` and `fedpipe train`"),
    "fastapi": ("0.150.0", "Prefect's server"),
    "mlflow": ("3.17.2", "tracking; `tracking.uri: null` does without"),
    "dvc": ("3.67.1", "`dvc repro` and `make run`; `fedpipe run` does without"),
}
ROOM = 500_000_000  # bytes for what is no run's: data, databases, reports
REINSTALL = "pip install -c constraints.txt -e ."


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Check(
        "Python", fits, version, "" if fits else "Use Python 3.11 or 3.12: make PYTHON=/path/to/python3.11 run"
    )


def package(name: str) -> Check:
    tested, purpose = TESTED[name]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, False, f"not installed; needed for {purpose}", f"{REINSTALL} (tested with {name} {tested})")
    if not _allowed(name, version):
        return Check(name, False, f"{version}, which fedpipe does not work with", f"pip install {name}=={tested}")
    return Check(name, True, version if version.split("+")[0] == tested else f"{version} (tested with {tested})")


def _allowed(name: str, version: str) -> bool:
    """Say whether fedpipe's own requirements allow a version."""
    from packaging.requirements import Requirement

    try:
        stated = metadata.requires("fedpipe") or []
    except metadata.PackageNotFoundError:
        return True
    ours = [requirement for requirement in map(Requirement, stated) if requirement.name == name]
    return all(requirement.specifier.contains(version, prereleases=True) for requirement in ours)


def writable(root: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=root):
            return Check("project directory", True, f"{root}: can be written")
    except OSError as error:
        advice = "Give this user the right to write there, or work in a copy elsewhere."
        return Check("project directory", False, f"{root}: cannot be written: {error.strerror}", advice)


def disk(project: Project, settings: Settings | None) -> Check:
    """Hold what a run of these settings would need against what is free, with room for data and databases."""
    from fedpipe.disk.room import shown

    free = shutil.disk_usage(project.root).free
    parts = _needed(project, settings)
    needed = ROOM + sum(parts.values())
    advice = (
        ""
        if free >= needed
        else "Free some space; old runs are in runs/ and mlruns/, DVC's old data goes with `dvc gc -w`. "
        "runtime.keep_rounds: 2 and tracking.artifacts: false make a run smaller."
    )
    told = ", ".join(f"{what} {shown(size)}" for what, size in parts.items() if size)
    what = f"a run needs about {needed / 1e9:.1f} GB" + (f" ({told})" if told else "; more is known with a partition")
    return Check("disk", free >= needed, f"{free / 1e9:.1f} GB free; {what}", advice)


def _needed(project: Project, settings: Settings | None) -> dict[str, int]:
    """Return what takes how many bytes; empty where there is no partition or backbone yet."""
    from fedpipe.disk import needs_of
    from fedpipe.workspace import workspace_of

    if settings is None:
        return {}
    try:
        workspace = workspace_of(project, settings)
        clients, federation = len(workspace.federation.clients), settings.federation
        needs = needs_of(
            settings,
            workspace.method,
            workspace.model.specs,
            workspace.trained,
            counts=[federation.clients_per_round or clients] * federation.rounds,
            clients=clients,
            prefix=workspace.prefix_bytes(),
        )
    except FedpipeError:  # another check says what is wrong
        return {}
    return {
        "the run": needs.run,
        "frozen layers": needs.prefix,
        "MLflow": needs.mlflow,
        "Prefect": needs.prefect,
        "adapter and reports": needs.published,
    }


def device(settings: Settings) -> Check:
    import torch

    gpu = torch.cuda.is_available()
    found = torch.cuda.get_device_name(0) if gpu else f"no GPU; CPU with {torch.get_num_threads()} threads"
    if settings.runtime.device == "cuda" and not gpu:
        return Check(
            "device", False, f"runtime.device is cuda, but torch {torch.__version__} sees no GPU", "Set it to auto."
        )
    return Check("device", True, found)
