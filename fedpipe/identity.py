"""Which run is this? The digests that name a run and bind its noise.

A run is a function of its settings, its data, its backbone and the code. Their digest is
the run's name: the same four meet the same directory, and go on from what is there. A part
of them defines the private queries and is bound into every stream of noise, so that the
same query draws the same noise and a changed one fresh noise.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fedpipe.config import Settings
from fedpipe.files import digest, file_digest
from fedpipe.methods import Method

PACKAGES = ("torch", "transformers", "peft", "opacus", "numpy", "datasets", "prefect", "mlflow", "dvc")

_NUMERIC = ("torch", "transformers", "tokenizers", "peft", "opacus", "numpy")

# What computes numbers; a changed report or command line is not a changed experiment.
_SCIENCE = ("client", "data", "methods", "models", "privacy", "server", "steps")
_SCIENCE_FILES = (
    "budget.py",
    "config.py",
    "files.py",
    "identity.py",
    "parts.py",
    "plan.py",
    "state.py",
    "workspace.py",
)

# How a run is computed and where it is shown; none of it changes what is computed.
_NOT_IDENTITY = {"tracking", "runtime"}


@dataclass(frozen=True)
class Identity:
    """`run` is the digest that names the run, `query` the one bound into its noise; both sha256 hex."""

    run_id: str
    run: str
    query: str
    parts: dict[str, Any]


def identify(
    settings: Settings, method: Method, dataset_digest: str, backbone_digest: str, probe_digest: str | None = None
) -> Identity:
    """Name the run of these settings, data, backbone and public probe under the installed code."""
    values = settings.model_dump(mode="json")
    science = {name: value for name, value in values.items() if name not in _NOT_IDENTITY}
    test_key = science["privacy"].pop("test_key")
    # It adds to what a run leaves behind, and changes nothing that is noised: another run, and the same query.
    diagnostics = science["privacy"].pop("diagnostics")
    query = {
        **{name: value for name, value in science.items() if name != "evaluation"},
        "method": {"name": method.name, **method.axes},
        "precision": settings.runtime.precision,
        "dataset": dataset_digest,
        "backbone": backbone_digest,
        "probe": probe_digest,
        "code": code_digest(),
        **_foreign_code(method),
    }
    # A fixed key gives other bytes than a secret one; its fingerprint keeps the runs apart.
    fingerprint = hashlib.sha256(test_key.lower().encode()).hexdigest()[:16] if test_key else None
    parts = {**query, "evaluation": science["evaluation"], "engine": settings.runtime.engine, "test_key": fingerprint}
    parts["diagnostics"] = diagnostics
    run = digest(parts)
    return Identity(run_id=f"{method.name}-{run[:10]}", run=run, query=digest(query), parts=parts)


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Return the sha256 over the sources and library versions that the numbers depend on."""
    root = Path(__file__).parent
    files = [file for package in _SCIENCE for file in sorted((root / package).rglob("*.py"))]
    files += [root / name for name in _SCIENCE_FILES]
    sources = {str(file.relative_to(root)): file_digest(file) for file in files}
    numeric = {name: version(name) for name in _NUMERIC}
    return digest({"sources": sources, "versions": numeric})


def _foreign_code(method: Method) -> dict[str, dict[str, str]]:
    """Return the sha256 of the sources of parts that are not in this package: a changed rule is another run."""
    own = {axis: part for axis, part in method.parts.items() if not type(part).__module__.startswith("fedpipe.")}
    return {"own_parts": {axis: _source_digest(type(part)) for axis, part in own.items()}} if own else {}


def _source_digest(kind: type) -> str:
    try:
        return file_digest(Path(inspect.getfile(kind)))
    except (TypeError, OSError):
        return "typed in"  # at a prompt: there is no file that could be compared


def version(package: str) -> str | None:
    """Return an installed package's version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the versions that a reader of the results may ask for."""
    return {"python": platform.python_version(), "fedpipe": version("fedpipe"), **{p: version(p) for p in PACKAGES}}


def git_commit(directory: Path) -> str | None:
    """Return the commit of the working tree, with `-dirty` where files differ from it; None outside git."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def changed_keys(old: Any, new: Any, path: str = "") -> list[str]:
    """Return `key: old -> new` for every leaf that differs between two identities' parts."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in changed_keys(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    if old == new:
        return []
    short = [value[:12] + "…" if isinstance(value, str) and len(value) > 24 else value for value in (old, new)]
    return [f"{path}: {short[0]} -> {short[1]}"]
