"""The flow from end to end: what it leaves behind, that all of it agrees, and what Prefect and MLflow show of it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from commands import Done, Fault, fedpipe, new_project, prefect, prefect_access, prefect_home
from mlflow.entities import Run

from fedpipe.data.federation import directory_digest
from fedpipe.files import read_json, read_tensors

ROOT = Path(__file__).parents[1]
ROUNDS = 3
TASKS = {
    "fetch data and backbone",
    "partition into clients",
    "plan",
    *(f"round {n} / {step}" for n in (1, 2, 3) for step in ("begin", "cohort 0", "aggregate", "evaluate", "record")),
    "publish",
    "report",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A project whose run is complete. Tests only read it."""
    project = new_project(tmp_path_factory.mktemp("finished") / "project", tracked=True)
    return project, fedpipe(project, "run")


@pytest.fixture(scope="module")
def project(finished: tuple[Path, Done]) -> Path:
    project, done = finished
    assert done.code == 0, done.err
    return project


def rows(project: Path) -> list[dict[str, str]]:
    with open(project / "reports" / "rounds.csv", newline="") as file:
        return list(csv.DictReader(file))


def recorded(project: Path) -> list[Run]:
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def points(project: Path, run: Run) -> list[tuple[str, int]]:
    """Return the (metric, round) pairs of a run, as often as each is there."""
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    return sorted(
        (point.key, point.step) for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)
    )


def flow_runs(project: Path) -> list[dict[str, Any]]:
    found = prefect("flow_runs/filter", sort="START_TIME_ASC")
    return [run for run in found if run["parameters"]["params_file"] == str(project / "params.yaml")]


def task_runs(flow_run: dict[str, Any]) -> list[dict[str, Any]]:
    return prefect("task_runs/filter", flow_runs={"id": {"any_": [flow_run["id"]]}})


def stored(task_run: str) -> Any:
    return json.loads(read_json(prefect_home() / "storage" / f"{task_run}.json")["result"])


class TestFiles:
    def test_all_of_the_contract_is_there(self, project: Path) -> None:
        left = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
        assert left >= {
            "data/partition/manifest.json",
            "models/adapter/adapter_config.json",
            "models/adapter/adapter_model.safetensors",
            "mlflow.db",
            *(f"reports/{name}" for name in ("metrics.json", "ledger.json", "rounds.csv", "run.json")),
            *(f"reports/{name}" for name in ("evaluation.json", "report.html")),
        }
        assert not [name for name in left if name.endswith(".tmp")]

    def test_the_reports_agree(self, project: Path) -> None:
        reports = project / "reports"
        metrics, ledger, run = (read_json(reports / f"{name}.json") for name in ("metrics", "ledger", "run"))
        evaluation, table = read_json(reports / "evaluation.json"), rows(project)
        assert [row["round"] for row in table] == ["0", "1", "2", "3"]
        for name in ("accuracy", "loss", "epsilon_max", "epsilon_rdp"):
            assert float(table[-1][name]) == metrics[name]
        assert ledger["epsilon_max"] == metrics["epsilon_max"] == max(c["epsilon"] for c in ledger["clients"].values())
        assert ledger["epsilon_max_rdp"] == metrics["epsilon_rdp"]
        assert 7.5 < metrics["epsilon_max"] <= 8.0
        assert ledger["delta"] == metrics["delta"]
        assert metrics["dp_valid"] is ledger["dp_valid"] is run["dp_valid"] is False  # the test key
        assert evaluation["accuracy"] == metrics["accuracy"]
        assert evaluation["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
        assert evaluation["majority_share"] == metrics["majority_share"]
        assert metrics["rounds"] == len(run["clients_by_round"]) == ROUNDS
        assert metrics["bytes_up"] == sum(int(row["bytes_up"]) for row in table[1:])
        assert all(client["participations"] == ROUNDS for client in ledger["clients"].values())
        assert [sum(n for _, _, n in client["entries"]) for client in ledger["clients"].values()] == [2 * ROUNDS] * 3

    def test_the_key_is_gone_and_in_no_file(self, project: Path) -> None:
        assert not list(project.glob("runs/*/secrets/*"))
        key = bytes.fromhex("ab" * 32)
        for path in project.rglob("*"):
            if path.is_file() and path.name != "params.yaml":
                content = path.read_bytes()
                assert key not in content, path
                assert b"ab" * 32 not in content, path


class TestMlflow:
    def test_one_run_with_every_round_once(self, project: Path) -> None:
        (run,) = recorded(project)
        found = points(project, run)
        assert len(set(found)) == len(found)
        for name in ("eval/accuracy", "eval/loss"):
            assert [step for key, step in found if key == name] == [0, 1, 2, 3]
        for name in ("privacy/epsilon_max", "train/update_norm", "train/snr", "time/round_s", "traffic/bytes_up"):
            assert [step for key, step in found if key == name] == [1, 2, 3]
        assert run.info.status == "FINISHED"

    def test_it_says_what_the_reports_say(self, project: Path) -> None:
        (run,) = recorded(project)
        metrics, facts = read_json(project / "reports" / "metrics.json"), read_json(project / "reports" / "run.json")
        assert run.data.metrics["eval/accuracy"] == metrics["accuracy"]
        assert run.data.metrics["privacy/epsilon_max"] == metrics["epsilon_max"]
        assert run.info.run_name == run.data.tags["fedpipe.run_id"] == facts["run_id"]
        assert (run.data.tags["method"], run.data.tags["dp_valid"]) == ("la-lora", "false")
        assert run.data.params["federation.rounds"] == "3"
        assert run.data.params["privacy.test_key"] == "set"
        assert facts["mlflow"]["run_id"] == run.info.run_id
        client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
        model = client.get_logged_model(facts["mlflow"]["model_id"])
        assert (model.source_run_id, str(model.status)) == (run.info.run_id, "READY")
        assert facts["settings"]["privacy.test_key"] == "set"

    def test_one_string_names_the_data_everywhere(self, project: Path) -> None:
        (run,) = recorded(project)
        digest = directory_digest(project / "data" / "partition")
        assert read_json(project / "reports" / "run.json")["dataset_digest"] == digest
        assert [item.dataset.digest for item in run.inputs.dataset_inputs] == [digest]
        assert run.data.tags["fedpipe.dataset_digest"] == digest

    def test_every_round_and_the_last_adapter_are_artifacts(self, project: Path) -> None:
        (run,) = recorded(project)
        root = project / "mlruns"
        (adapter,) = root.glob(f"*/{run.info.run_id}/artifacts/adapter/adapter_model.safetensors")
        assert adapter.read_bytes() == (project / "models" / "adapter" / "adapter_model.safetensors").read_bytes()
        kept = {path.parent.name for path in adapter.parents[1].glob("rounds/*/adapter.safetensors")}
        assert kept == {"0000", "0001", "0002", "0003"}
        assert len(list(adapter.parents[1].glob("rounds/*/updates/*.safetensors"))) == 3 * ROUNDS
        assert not list(root.rglob("*.key"))


class TestPrefect:
    def test_names_say_what_they_are(self, project: Path) -> None:
        (run,) = flow_runs(project)
        assert run["name"] == "la-lora / 3 rounds / seed 3"
        assert run["state_type"] == "COMPLETED"
        tasks = task_runs(run)
        assert {task["name"] for task in tasks} == TASKS
        assert len(tasks) == len(TASKS) + 1  # published again once the logged model has an id
        assert {task["state_type"] for task in tasks} == {"COMPLETED"}

    def test_results_are_json(self, project: Path) -> None:
        (run,) = flow_runs(project)
        tasks = task_runs(run)
        results = {task["name"]: stored(task["id"]) for task in tasks}
        assert results["round 3 / evaluate"] == {
            name: read_json(project / "reports" / "metrics.json")[name] for name in ("accuracy", "loss")
        }
        files = [read_json(path) for path in (prefect_home() / "storage").iterdir()]
        kinds = {file["metadata"]["serializer"]["type"] for file in files if "metadata" in file}  # a flow's has none
        assert kinds == {"json"}
        assert not any("pickle" in json.dumps(file) for file in files)

    def test_artifacts_show_progress_and_rounds(self, project: Path) -> None:
        (run,) = flow_runs(project)
        found = prefect("artifacts/filter", artifacts={"flow_run_id": {"any_": [run["id"]]}})
        by_key = {artifact["key"]: artifact for artifact in found}
        assert float(by_key["rounds-done"]["data"]) == 100
        table = json.loads(by_key["rounds"]["data"])
        assert [row["round"] for row in table] == [0, 1, 2, 3]
        assert table[-1]["accuracy"] == float(rows(project)[-1]["accuracy"])


def snapshot(project: Path) -> dict[str, bytes]:
    paths = [*project.glob("models/adapter/*"), *project.glob("reports/*.json"), project / "reports" / "rounds.csv"]
    return {str(path.relative_to(project)): path.read_bytes() for path in paths}


def test_a_complete_run_is_not_trained_again(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", tracked=True)
    assert fedpipe(project, "run").code == 0
    before = snapshot(project)
    trained = {path: path.stat().st_mtime_ns for path in project.glob("runs/*/rounds/*/*")}
    again = fedpipe(project, "run")
    assert again.code == 0
    assert "resumed: all 3 rounds were done before" in again.err
    assert snapshot(project) == before
    assert {path: path.stat().st_mtime_ns for path in project.glob("runs/*/rounds/*/*")} == trained
    (run,) = recorded(project)
    assert len(set(points(project, run))) == len(points(project, run))
    assert [r["name"] for r in flow_runs(project)] == ["la-lora / 3 rounds / seed 3"] * 2


def test_cohorts_of_one_client_give_the_same(project: Path, tmp_path: Path) -> None:
    split = new_project(tmp_path / "project", runtime={"cohort_size": 1})
    assert fedpipe(split, "run").code == 0
    (ours,), (theirs,) = project.glob("runs/*"), split.glob("runs/*")
    assert ours.name == theirs.name  # how a run is computed does not name it
    for client in ("c000", "c001", "c002"):
        file = Path("rounds", "0001", "updates", f"{client}.safetensors")
        left, right = read_tensors(ours / file), read_tensors(theirs / file)
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-6)
    clients = [read_json(root / "reports" / "ledger.json")["clients"] for root in (project, split)]
    assert [c["entries"] for c in clients[0].values()] == [c["entries"] for c in clients[1].values()]
    (run,) = flow_runs(split)
    names = {t["name"] for t in task_runs(run)}
    assert names >= {f"round {n} / cohort {cohort}" for n in (1, 2, 3) for cohort in (0, 1, 2)}


def test_without_tracking(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", federation={"rounds": 1})
    done = fedpipe(project, "run")
    assert done.code == 0
    assert "MLflow" not in done.out
    assert not (project / "mlflow.db").exists()
    assert not (project / "mlruns").exists()
    assert read_json(project / "reports" / "run.json")["mlflow"] is None


def test_without_privacy(tmp_path: Path) -> None:
    project = new_project(
        tmp_path / "project",
        federation={"rounds": 1},
        method={"name": "fedit"},
        privacy={"unit": "none", "test_key": None},
    )
    done = fedpipe(project, "run")
    assert done.code == 0
    assert "NOT PRIVATE: trained without differential privacy" in done.out
    metrics = read_json(project / "reports" / "metrics.json")
    assert (metrics["epsilon_max"], metrics["unit"], metrics["dp_valid"]) == (None, "none", False)
    assert rows(project)[1]["epsilon_max"] == ""


def test_with_secure_aggregation_no_client_is_shown_by_itself(tmp_path: Path) -> None:
    federation = {"rounds": 2, "secure_aggregation": True}
    project = new_project(tmp_path / "project", tracked=True, federation=federation, privacy={"accountant": "rdp"})
    done = fedpipe(project, "run")
    assert done.code == 0, done.err
    (run,) = (project / "runs").glob("la-lora-*")
    assert (run / "rounds" / "0002" / "sum.safetensors").exists()
    assert not list(run.rglob("updates"))
    assert not list(run.rglob("outbox-*"))
    row = rows(project)[2]
    assert (row["update_norm"], row["snr"], row["participants"], row["refused"]) == ("", "", "3", "0")
    facts = read_json(project / "reports" / "run.json")["clients_by_round"]
    assert {value for entry in facts for key in ("update_norm", "snr") for value in entry[key].values()} == {None}
    page = (project / "reports" / "report.html").read_text()
    assert "L2 norm of the update" not in page
    logged = [path.name for path in (project / "mlruns").rglob("*.safetensors")]
    assert "sum.safetensors" in logged
    assert "updates" not in {path.parent.name for path in (project / "mlruns").rglob("*.safetensors")}


def test_a_run_with_a_secret_key_is_valid(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", federation={"rounds": 1}, privacy={"test_key": None})
    done = fedpipe(project, "run")
    assert done.code == 0
    assert "NOT PRIVATE" not in done.out + done.err
    for name in ("metrics", "ledger", "run"):
        assert read_json(project / "reports" / f"{name}.json")["dp_valid"] is True
    assert not list(project.glob("runs/*/secrets/*"))


def test_train_leaves_the_stages_before_and_after_to_dvc(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", federation={"rounds": 1})
    assert [fedpipe(project, step).code for step in ("fetch", "partition", "train")] == [0, 0, 0]
    assert not (project / "reports" / "report.html").exists()
    (run,) = flow_runs(project)
    names = {task["name"] for task in task_runs(run)}
    assert not names & {"fetch data and backbone", "partition into clients", "report"}
    assert fedpipe(project, "report").code == 0
    assert (project / "reports" / "report.html").exists()


class TestRetries:
    def test_what_passes_is_tried_again(self, tmp_path: Path) -> None:
        project = new_project(tmp_path / "project")
        fault = Fault("fedpipe.steps", "aggregate", 2, "BUG", lasting=False)
        assert fedpipe(project, "run", fault=fault).code == 0
        assert rows(project)[-1]["round"] == "3"

    def test_what_stays_ends_the_run_and_the_next_one_goes_on(self, tmp_path: Path) -> None:
        project = new_project(tmp_path / "project", tracked=True)
        failed = fedpipe(project, "run", fault=Fault("fedpipe.steps", "aggregate", 2, "BUG"))
        assert failed.code == 1
        assert failed.err.rstrip().endswith("RuntimeError: an injected fault")
        (run,) = recorded(project)
        assert run.info.status == "FAILED"
        again = fedpipe(project, "run")
        assert again.code == 0
        assert "resumed from round 2: 1 done before" in again.err
        (run,) = recorded(project)
        assert run.info.status == "FINISHED"
        assert [r["state_type"] for r in flow_runs(project)] == ["FAILED", "COMPLETED"]

    def test_a_mistake_is_not_tried_again(self, tmp_path: Path) -> None:
        project = new_project(tmp_path / "project")
        fedpipe(project, "run", "--set", "data.text=sentence")
        (run,) = flow_runs(project)
        counts = {task["name"]: task["run_count"] for task in task_runs(run)}
        assert counts == {"fetch data and backbone": 1, "partition into clients": 1}


@pytest.mark.slow
def test_the_deployment_runs(tmp_path: Path) -> None:
    """As `prefect.yaml` says: a worker of its own process runs what was deployed."""
    project = new_project(tmp_path / "project", federation={"rounds": 1})
    for name in ("prefect.yaml", "prefect.toml"):
        shutil.copy(ROOT / name, project / name)
    shutil.copytree(ROOT / "flows", project / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tasks", project / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    env = clean | {**prefect_access(), "PREFECT_HOME": str(prefect_home()), "CI": "true"}
    for command in (
        "work-pool create fedpipe-local --type process",
        "deploy --all",
        "deployment run federated/local",
        "worker start --pool fedpipe-local --run-once",
    ):
        words = [Path(sys.executable).with_name("prefect"), "--no-prompt", *command.split()]
        done = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(project / "reports" / "metrics.json")["rounds"] == 1
    (run,) = [run for run in prefect("flow_runs/filter") if run["deployment_id"] is not None]
    assert (run["name"], run["state_type"]) == ("la-lora / 1 round / seed 3", "COMPLETED")
