"""The machine: Python, packages, disk, device."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from fedpipe.config import Settings
from fedpipe.doctor.check import Check
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
    free = shutil.disk_usage(project.root).free / 1e9
    needed = _disk_needed(project, settings) / 1e9
    advice = (
        ""
        if free >= needed
        else "Free some space; old runs are in runs/ and mlruns/, DVC's old data goes with `dvc gc -w`."
    )
    return Check("disk", free >= needed, f"{free:.1f} GB free; a run needs about {needed:.1f} GB", advice)


def _disk_needed(project: Project, settings: Settings | None) -> float:
    """Estimate bytes: half a gigabyte for data, databases and reports, and every round's adapters, twice."""
    base = 0.5e9
    config = project.backbone / "config.json"
    if settings is None or not config.is_file():
        return base
    shape = json.loads(config.read_text(encoding="utf-8"))
    layers = settings.lora.last_layers or shape.get("num_hidden_layers", 12)
    factors = layers * 2 * 2 * settings.lora.rank * shape.get("hidden_size", 768)
    clients = settings.federation.clients_per_round or settings.partition.clients or 1
    # In runs/, and again in MLflow.
    return base + 2 * 4 * factors * settings.federation.rounds * (clients + 1)


def device(settings: Settings) -> Check:
    import torch

    gpu = torch.cuda.is_available()
    found = torch.cuda.get_device_name(0) if gpu else f"no GPU; CPU with {torch.get_num_threads()} threads"
    if settings.runtime.device == "cuda" and not gpu:
        return Check(
            "device", False, f"runtime.device is cuda, but torch {torch.__version__} sees no GPU", "Set it to auto."
        )
    return Check("device", True, found)
