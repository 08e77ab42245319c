"""Tasks that obtain the data and the backbone and partition the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from fedpipe.config import load_settings
from fedpipe.data.federation import Federation, write_partition
from fedpipe.data.sources import fetch_data
from fedpipe.errors import DataError
from fedpipe.models.source import fetch_backbone
from fedpipe.project import Project
from tasks.policy import RETRIED, STEP


@task(name="fetch", task_run_name="fetch data and backbone", **RETRIED)
def fetch(params_file: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Obtain what is not there yet; return where it comes from."""
    path = Path(params_file)
    settings, project = load_settings(path, overrides), Project(path.parent)
    return {
        "data": fetch_data(settings.data, project.raw),
        "backbone": fetch_backbone(settings.model.backbone, project.backbone),
    }


@task(name="partition", task_run_name="partition into clients", **STEP)
def partition(params_file: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Partition the records unless a fresh partition is there; return its digest and sizes."""
    path = Path(params_file)
    settings, project = load_settings(path, overrides), Project(path.parent)
    try:
        Federation.open(project.partition).check_fresh(settings, project.raw)
    except DataError:
        write_partition(settings, project.raw, project.partition)
    federation = Federation.open(project.partition)
    hidden = settings.privacy.unit == "client"  # sizes are then a part of what is protected
    return {"digest": federation.digest, "sizes": None if hidden else federation.sizes}
