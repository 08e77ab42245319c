"""Whatever starts a killed run again, it goes on to the same end: DVC, a retry in Prefect, another deployment run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Fault, fedpipe, new_project, prefect, prefect_access, prefect_home
from test_dvc import Pipeline
from test_flow import ROOT
from test_kill_matrix import KILLED, trained
from undisturbed import differences, everything

pytestmark = pytest.mark.slow

ROUNDS = {"rounds": 8}  # long enough to be killed on the way by hand


def same(project: Path, before: dict[Path, tuple[int, int]], expected: dict[str, Any]) -> None:
    assert not differences(everything(project), expected)
    assert before
    assert trained(project).items() >= before.items()


def test_dvc_goes_on_where_a_killed_stage_was(tmp_path: Path) -> None:
    usual = Pipeline(tmp_path / "usual")
    usual.run("dvc", "repro")
    pipeline = Pipeline(tmp_path / "project")
    pipeline.run("dvc", "repro", "partition")
    killed = Fault("fedpipe.steps.training", "write_tensors", 5)
    assert fedpipe(pipeline.root, "train", fault=killed).code == KILLED
    before = trained(pipeline.root)
    assert "resumed from round 2: 1 done before" in pipeline.run("dvc", "repro")
    same(pipeline.root, before, everything(usual.root))
    assert pipeline.lock()["train"]["models/adapter"] == usual.lock()["train"]["models/adapter"]


class Deployed:
    """A project with a deployment, and a worker of its own process, as `prefect.yaml` says."""

    def __init__(self, root: Path) -> None:
        self.project = new_project(root, tracked=True, federation=ROUNDS)
        for name in ("prefect.yaml", "prefect.toml"):
            shutil.copy(ROOT / name, self.project / name)
        for name in ("flows", "tasks"):
            shutil.copytree(ROOT / name, self.project / name, ignore=shutil.ignore_patterns("__pycache__"))
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        self._env = clean | {**prefect_access(), "PREFECT_HOME": str(prefect_home()), "CI": "true"}
        self._pool = f"fedpipe-{root.parent.name}"
        text = (self.project / "prefect.yaml").read_text().replace("name: fedpipe-local", f"name: {self._pool}")
        (self.project / "prefect.yaml").write_text(text)
        self("work-pool", "create", self._pool, "--type", "process")
        self("deploy", "--name", "local")

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [str(Path(sys.executable).with_name("prefect")), "--no-prompt", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.project, env=self._env, **pipes)

    def __call__(self, *words: str) -> str:
        process = self.start(*words)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        return said

    def worker(self) -> subprocess.Popen[str]:
        return self.start("worker", "start", "--pool", self._pool, "--run-once")

    def runs(self) -> list[dict[str, Any]]:
        found = prefect("flow_runs/filter", sort="START_TIME_ASC")
        return [run for run in found if run["work_pool_name"] == self._pool]

    def holder(self) -> int:
        """Wait until two rounds are done; return the process that drives the run, as its lock says."""
        wait(lambda: list(self.project.glob("runs/*/rounds/0002/round.json")))
        (lock,) = self.project.glob("runs/*/lock")
        return int(lock.read_text().split()[1])


def wait(until: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    project = new_project(tmp_path_factory.mktemp("usual") / "project", tracked=True, federation=ROUNDS)
    assert fedpipe(project, "run").code == 0
    return everything(project)


@pytest.fixture
def deployed(tmp_path: Path) -> Deployed:
    return Deployed(tmp_path / "project")


@pytest.mark.parametrize("way", ["retry", "another run"])
def test_the_process_of_a_deployment_run(deployed: Deployed, expected: dict[str, Any], way: str) -> None:
    deployed("deployment", "run", "federated/local")
    worker = deployed.worker()
    os.kill(deployed.holder(), signal.SIGKILL)
    worker.communicate(timeout=120)
    (run,) = deployed.runs()
    assert run["state_type"] == "CRASHED"
    before = trained(deployed.project)
    if way == "retry":
        deployed("flow-run", "retry", run["id"])
    else:
        deployed("deployment", "run", "federated/local")
    worker = deployed.worker()
    said = worker.communicate(timeout=300)[0]
    assert [run["state_type"] for run in deployed.runs()][-1] == "COMPLETED", said
    assert len(deployed.runs()) == (1 if way == "retry" else 2)
    same(deployed.project, before, expected)


def test_the_worker_of_a_deployment_run(deployed: Deployed, expected: dict[str, Any]) -> None:
    """The run's own process goes on without its worker, and holds the run until it ends; then another one may go on."""
    deployed("deployment", "run", "federated/local")
    worker = deployed.worker()
    holder = deployed.holder()
    os.kill(holder, signal.SIGSTOP)  # so that it cannot end before the others have looked
    worker.kill()
    worker.wait()
    held = fedpipe(deployed.project, "run")
    assert held.code == 3
    assert f"in use by process {holder} on " in held.err
    before = trained(deployed.project)
    os.kill(holder, signal.SIGKILL)
    deployed("deployment", "run", "federated/local")
    said = deployed.worker().communicate(timeout=300)[0]
    assert deployed.runs()[-1]["state_type"] == "COMPLETED", said
    same(deployed.project, before, expected)


def test_a_retry_of_a_run_without_a_deployment(tmp_path: Path, expected: dict[str, Any]) -> None:
    """Prefect retries what it knows to have ended; that a process was killed, nobody told it."""
    project = new_project(tmp_path / "project", tracked=True, federation=ROUNDS)
    fault = Fault("fedpipe.steps", "aggregate", 3, "BUG")
    assert fedpipe(project, "run", fault=fault).code == 1
    before = trained(project)
    (run,) = [
        run
        for run in prefect("flow_runs/filter", sort="START_TIME_ASC")
        if run["parameters"]["params_file"] == str(project / "params.yaml")
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    env = clean | {**prefect_access(), "PREFECT_HOME": str(prefect_home())}
    command = [str(Path(sys.executable).with_name("prefect")), "--no-prompt", "flow-run", "retry", run["id"]]
    command += ["--entrypoint", f"{ROOT}/flows/federated.py:federated"]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    same(project, before, expected)
