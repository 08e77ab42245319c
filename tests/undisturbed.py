"""All that a finished run leaves, in a form in which two runs of the same experiment are equal.

Left out are the times of day, the seconds that something took, and the ids that MLflow draws.
"""

from __future__ import annotations

import csv
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from fedpipe.files import read_json, read_sealed

TIMES = {"seconds", "started", "finished", "mlflow", "git_commit"}
# Places, and what says nothing of the experiment; a user's name and the notes on it, which hold times.
OWN_TAGS = {"mlflow.user", "mlflow.note.content", "mlflow.loggedArtifacts", "mlflow.source.git.commit"}


def everything(project: Path) -> dict[str, Any]:
    """Return what a finished run left: by file, and by kind of what MLflow has of it.

    That nothing is left which should be gone (a key, a half written file, a round's secrets) is checked here.
    """
    (root,) = (path.parent for path in project.glob("runs/*/complete.json"))
    assert not [path for path in project.rglob("*") if path.name.endswith(".tmp")]
    assert not list(root.glob("secrets/*"))
    assert not (root / "confidential").exists()
    assert not list(root.glob("clients/*/outbox-*"))
    assert not (root / "mlflow-kept").exists()
    found: dict[str, Any] = {f"mlflow {name}": value for name, value in in_mlflow(project).items()}
    whole = [*project.glob("models/adapter/*"), *project.glob("reports/ledger.json")]
    whole += [*root.rglob("*.safetensors"), *root.glob("clients/*/adapter/*"), root / "plan.json"]
    found |= {str(path.relative_to(project)): path.read_bytes() for path in whole if path.exists()}
    # Cohorts may finish in any order; each client has a chain of its own, so its lines are the same all the same.
    found["ledger"] = sorted((root / "ledger.jsonl").read_bytes().splitlines())
    for name in ("metrics", "run", "evaluation"):
        found[name] = timeless(read_json(project / "reports" / f"{name}.json"))
    with open(project / "reports" / "rounds.csv", newline="") as file:
        found["rounds"] = [timeless(row) for row in csv.DictReader(file)]
    found["complete"] = timeless(read_sealed(root / "complete.json"))
    found["records"] = [timeless(read_sealed(path)) for path in sorted(root.glob("rounds/*/round.json"))]
    return found


def timeless(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMES}


def in_mlflow(project: Path) -> dict[str, Any]:
    """Return what MLflow has of the one run there is, which must be finished, with no point twice."""
    # A copy, since MLflow keeps connections to a database, and a test may put another one in its place.
    copy = project.with_name(f"{project.name}-{uuid.uuid4().hex}.db")
    shutil.copy(project / "mlflow.db", copy)
    client = MlflowClient(f"sqlite:///{copy}")
    experiments = [entry.experiment_id for entry in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    (model,) = client.search_logged_models(experiments)
    assert (run.info.status, model.status) == ("FINISHED", "READY")
    points = [point for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)]
    assert len({(point.key, point.step) for point in points}) == len(points)
    # Of what takes time, that it is there.
    values = {(p.key, p.step): None if p.key == "time/round_s" else p.value for p in points}
    files = Path(run.info.artifact_uri)
    return {
        "points": values,
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key not in OWN_TAGS},
        "datasets": [item.dataset.digest for item in run.inputs.dataset_inputs],
        "models": [output.step for output in run.outputs.model_outputs],
        "files": {str(path.relative_to(files)): _content(path) for path in files.rglob("*") if path.is_file()},
        "model": {path.name for path in Path(model.artifact_location).rglob("*")},
    }


def _content(path: Path) -> bytes | None:
    """Return what a file holds, if no times of day are in it."""
    return path.read_bytes() if path.suffix == ".safetensors" else None


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Name what is not the same, and say a word of what it is."""
    names = sorted(found.keys() | expected.keys())
    return [
        f"{name}: {_short(found.get(name))}, not {_short(expected.get(name))}"
        for name in names
        if found.get(name) != expected.get(name)
    ]


def _short(value: Any) -> str:
    return re.sub(r"\s+", " ", repr(value))[:300]
