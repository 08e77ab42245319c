"""`fedpipe sync`: what MLflow did not take while a run went on is recorded later, all of it, and nothing twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Done, Fault, fedpipe, new_project
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from fedpipe.files import read_json
from fedpipe.state import Run

AWAY = "MLflow does not take what is recorded: unable to open database file. The run goes on; it is tried again"
TRACKED = ("--set", "tracking.uri=sqlite:///mlflow.db")


def take_away(project: Path) -> Callable[[], None]:
    """Make the store one that cannot be opened; return a function that brings it back."""
    store = project / "mlflow.db"
    hidden = store.rename(project / "hidden.db")
    store.mkdir()

    def bring_back() -> None:
        store.rmdir()
        hidden.rename(store)

    return bring_back


def warnings(done: Done) -> list[str]:
    return [line.removeprefix("WARNING: ") for line in done.err.splitlines() if line.startswith("WARNING: ")]


def recorded(project: Path) -> tuple[MlflowRun, list[tuple[str, int]], dict[str, int]]:
    """Return the one run in MLflow, its (metric, round) points as often as each is there, and its files."""
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    names, found = run.data.metrics, run.info.run_id
    points = sorted((p.key, p.step) for name in names for p in client.get_metric_history(found, name))
    root = Path(run.info.artifact_uri)
    return run, points, {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*") if p.is_file()}


def run_of(project: Path) -> Path:
    (found,) = project.glob("runs/la-lora-*")
    return found


def test_a_run_without_its_store_is_recorded_later_as_any_other(tmp_path: Path) -> None:
    usual = new_project(tmp_path / "usual", tracked=True)
    assert fedpipe(usual, "run").code == 0
    _, points, files = recorded(usual)

    project = new_project(tmp_path / "project", tracked=True)
    bring_back = take_away(project)
    done = fedpipe(project, "run")
    name = run_of(project).name
    assert done.code == 0, done.err
    lacking = "rounds 0 to 3, the adapter, the reports and the end"
    assert warnings(done) == [
        AWAY,
        f"MLflow lacks {lacking} of run {name} (unable to open database file): kept in the run's directory; "
        "'fedpipe sync' records it",
    ]
    assert read_json(project / "reports" / "run.json")["mlflow"] is None
    for model in ("adapter_model.safetensors", "adapter_config.json"):
        assert (project / "models/adapter" / model).read_bytes() == (usual / "models/adapter" / model).read_bytes()
    assert fedpipe(project, "sync", "--list").out == f"{name}: lacks rounds 0 to 3 and the end\n"

    refused = fedpipe(project, "sync")
    assert (refused.code, len(refused.errors), refused.out) == (4, 1, "")
    assert "cannot be used: unable to open database file" in refused.err

    bring_back()
    (project / "models" / "adapter" / "adapter_config.json").write_text("of another run")
    first = fedpipe(project, "sync")
    assert (first.code, first.out) == (0, f"{name}: recorded rounds 0 to 3 and the end\n"), first.err
    run, later, kept = recorded(project)
    assert (run.info.status, later) == ("FINISHED", points)
    # What is not the run's own, such as times, may differ in length.
    assert kept.keys() == files.keys()
    assert all(kept[f] == files[f] for f in files if f.endswith(("safetensors", "adapter_config.json")))
    assert not (run_of(project) / "mlflow-kept").exists()

    second = fedpipe(project, "sync", name)
    assert (second.code, second.out) == (0, f"{name}: has all\n")
    again, twice, _ = recorded(project)
    assert (again.info.run_id, again.info.status, twice) == (run.info.run_id, "FINISHED", points)
    assert fedpipe(project, "sync", "--list").out == f"{name}: has all\n"


def test_a_run_killed_without_its_store_is_recorded_as_far_as_it_is_and_goes_on(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", tracked=True)
    bring_back = take_away(project)
    killed = fedpipe(project, "run", fault=Fault("fedpipe.steps", "finish_round", 2, after=True))
    assert killed.code == -signal.SIGKILL
    bring_back()
    done = fedpipe(project, "sync")
    assert (done.code, done.out) == (0, f"{run_of(project).name}: recorded rounds 0 to 2\n")
    run, points, _ = recorded(project)
    assert run.info.status == "KILLED"
    assert [step for name, step in points if name == "eval/loss"] == [0, 1, 2]
    assert fedpipe(project, "run").code == 0
    run, points, _ = recorded(project)
    assert run.info.status == "FINISHED"
    assert [step for name, step in points if name == "eval/loss"] == [0, 1, 2, 3]
    assert len(set(points)) == len(points)


def test_a_run_that_was_not_to_be_recorded_is_recorded_when_it_is_named(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", federation={"rounds": 1})
    assert fedpipe(project, "run").code == 0
    name = run_of(project).name
    done = fedpipe(project, "sync", name)
    assert (done.code, done.out) == (2, "")
    assert done.errors == [
        "error: tracking.uri: null, so there is no store to record in; name one: --set tracking.uri=sqlite:///mlflow.db"
    ]
    assert fedpipe(project, "sync", *TRACKED).out == ""
    unknown = fedpipe(project, "sync", "la-lora-0", *TRACKED)
    assert unknown.code == 3
    assert f"there is no such run; expected one of: {name}" in unknown.err or f"did you mean '{name}'" in unknown.err
    with Run(run_of(project)).lock():
        held = fedpipe(project, "sync", name, *TRACKED)
    assert held.code == 3
    assert "in use by process" in held.err
    done = fedpipe(project, "sync", "--all", *TRACKED)
    assert (done.code, done.out) == (0, f"{name}: recorded rounds 0 to 1 and the end\n"), done.err
    run, points, files = recorded(project)
    assert (run.info.run_name, run.info.status, run.data.tags["method"]) == (name, "FINISHED", "la-lora")
    assert [step for key, step in points if key == "privacy/epsilon_max"] == [1]
    assert {"adapter/adapter_model.safetensors", "reports/metrics.json", "reports/report.html"} <= files.keys()


@pytest.mark.slow
def test_killed_while_it_syncs(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", tracked=True)
    bring_back = take_away(project)
    assert fedpipe(project, "run").code == 0
    bring_back()
    for number in (2, 5, 9):
        fault = Fault("fedpipe.tracking.recorder", "unless_busy", number, after=True)
        assert fedpipe(project, "sync", fault=fault).code == -signal.SIGKILL
    assert fedpipe(project, "sync").code == 0
    run, points, _ = recorded(project)
    assert run.info.status == "FINISHED"
    assert len(set(points)) == len(points)
    assert [step for name, step in points if name == "eval/loss"] == [0, 1, 2, 3]
