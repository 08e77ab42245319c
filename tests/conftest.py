"""Fixtures: nothing reaches the network, the user's home or a store outside a temporary directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")

from hypothesis import settings as hypothesis_settings
from tiny import make_project

from fedpipe.config import Settings
from fedpipe.project import Project
from fedpipe.workspace import Workspace, forget_workspaces

# The same code gives the same result; FEDPIPE_EXPLORE=1 draws examples that were never tried.
hypothesis_settings.register_profile("steady", derandomize=True)
hypothesis_settings.register_profile("explore", print_blob=True)
hypothesis_settings.load_profile("explore" if os.environ.get("FEDPIPE_EXPLORE") else "steady")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Settings]:
    """A tiny project that tests read and must not write to."""
    return make_project(tmp_path_factory.mktemp("tiny") / "project")


@pytest.fixture
def tiny_copy(tiny: tuple[Project, Settings], tmp_path: Path) -> Project:
    """The tiny project, for a test that writes to it."""
    shutil.copytree(tiny[0].root, tmp_path / "copy")
    return Project(tmp_path / "copy")


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """Forget what this process keeps of runs, after the test, as a new process would begin."""
    yield
    forget_workspaces()


@pytest.fixture(scope="session")
def workspace(tiny: tuple[Project, Settings]) -> Iterator[Workspace]:
    return Workspace(*tiny)


@pytest.fixture
def project_dir(tmp_path: Path) -> Path:
    return tmp_path / "project"
