"""Open an MLflow store: check its URI, reach it quickly or say why not, find the experiment.

MLflow creates the tables of a new database without a lock and tries an unreachable one for
more than a minute. Here a short probe goes first, and two runs that start at the same
moment on a new SQLite file create it one after the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.config import TrackingSettings
from fedpipe.errors import SettingsError, StateError, hide_password, nearest
from fedpipe.tracking.reach import BUSY, ask_database, ask_server, reached

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SCHEMES = (*_DATABASES, "http", "https", "databricks")

# MLflow reads these when it is imported or called. A value set by the user stays.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GIT_PYTHON_REFRESH": "quiet",
}

# Without it, the menu of MLflow's pages leads to prompts and traces, but to no training runs.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


@dataclass(frozen=True)
class Store:
    """An open store. `uri` is the one of the settings, with any password hidden; `address`, what MLflow is given."""

    client: MlflowClient
    uri: str
    address: str
    experiment_id: str


def load_mlflow() -> Any:
    """Import MLflow, silent and without telemetry; return the module.

    Raises
    ------
    SettingsError
        MLflow is not installed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    retries = logging.getLogger("urllib3.connectionpool")
    if retries.level == logging.NOTSET:  # else each attempt is a warning of its own, before ours
        retries.setLevel(logging.ERROR)
    try:
        return importlib.import_module("mlflow")
    except ImportError as error:
        raise SettingsError(
            "tracking.uri: MLflow is not installed; run 'pip install mlflow', or train without it: tracking.uri: null"
        ) from error


def open_store(settings: TrackingSettings) -> Store:
    """Open the store that `settings.uri` names, and the experiment in it; create what is missing.

    A relative SQLite path starts at the current directory. The artifacts of an experiment that
    is created in a SQLite store are kept in `mlruns/` beside the database file.

    Raises
    ------
    SettingsError
        `tracking.uri` names no kind of store that MLflow can write to.
    StateError
        The experiment was deleted in MLflow.
    StorageError
        The store cannot be read; `StoreAwayError` where it only cannot be reached now.
    """
    assert settings.uri is not None
    shown = hide_password(settings.uri)
    _check_scheme(settings.uri, shown)
    mlflow = load_mlflow()
    with reached(shown):
        if settings.uri.startswith(_DATABASES):
            uri, file = _locate(settings.uri, shown)
            ask_database(uri, BUSY)
        else:
            uri, file = settings.uri, None
            if uri.startswith("http"):
                ask_server(uri)
        with _creation_lock(file):
            client = mlflow.MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        return Store(client, shown, uri, _experiment(client, settings.experiment, file))


def _check_scheme(uri: str, shown: str) -> None:
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in _SCHEMES:
        raise SettingsError(
            f"tracking.uri: found '{shown}'; {nearest(scheme, _SCHEMES)} "
            "For a file in this directory: sqlite:///mlflow.db; for no tracking: null"
        )


def _locate(uri: str, shown: str) -> tuple[str, Path | None]:
    """Return the URI with an absolute path, and the database file where it is SQLite."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        raise SettingsError(f"tracking.uri: '{shown}' is not a database URL, such as sqlite:///mlflow.db") from None
    if url.get_backend_name() != "sqlite":
        return uri, None
    if not url.database or url.database == ":memory:":
        raise SettingsError(
            f"tracking.uri: '{shown}' names no file; expected three slashes and a path: sqlite:///mlflow.db"
        )
    file = Path(url.database).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    return url.set(database=str(file)).render_as_string(hide_password=False), file


@contextlib.contextmanager
def _creation_lock(file: Path | None) -> Iterator[None]:
    if file is None:
        yield
        return
    # The directory itself is locked, so that no lock file is left behind.
    handle = os.open(file.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _experiment(client: MlflowClient, name: str, file: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        directory = re.sub(r"[^\w.-]+", "-", name).lstrip(".") or "default"
        artifacts = str(file.parent / "mlruns" / directory) if file else None
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=_EXPERIMENT_TAGS))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        raise StateError(
            f"tracking.experiment: '{name}' was deleted in MLflow; choose another name"
            + (f", or run 'mlflow experiments restore -x {found.experiment_id}'" if found else "")
        )
    return str(found.experiment_id)
