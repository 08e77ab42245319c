"""The pipeline under DVC, as a user drives it: once, again, and as an experiment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import new_project, prefect_access, prefect_home
from ruamel.yaml import YAML

from fedpipe.config import load_settings
from fedpipe.files import read_json

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


class Pipeline:
    """A tiny project in git, with the real `dvc.yaml`."""

    def __init__(self, root: Path) -> None:
        self.root = new_project(root, tracked=True, federation={"rounds": 2})
        for name in ("dvc.yaml", ".dvcignore", ".gitignore", "data/sources", "fedpipe", "flows", "tasks"):
            source, target = ROOT / name, root / name
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        # Every watched key must stand in the file.
        whole = load_settings(root / "params.yaml").model_dump(mode="json")
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False  # DVC reads YAML 1.1, in which a colon ends a plain word in braces
        with open(root / "params.yaml", "w") as file:
            yaml.dump(whole, file)
        self.run("git", "init", "-q")
        self.run("dvc", "init", "-q")
        self.run("dvc", "config", "core.analytics", "false")
        self.commit()

    def run(self, *command: str) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        env = clean | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **prefect_access(),
            "PREFECT_HOME": str(prefect_home()),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@localhost",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@localhost",
        }
        done = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout + done.stderr

    def commit(self) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "-m", "state")

    def lock(self) -> dict[str, dict[str, str]]:
        """Return the hash of every output, stage by stage."""
        stages = YAML(typ="safe", pure=True).load((self.root / "dvc.lock").read_text())["stages"]
        return {name: {out["path"]: out["md5"] for out in stage["outs"]} for name, stage in stages.items()}

    def report(self, name: str) -> dict[str, object]:
        return read_json(self.root / "reports" / f"{name}.json")


def test_repro_twice_then_an_experiment(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path / "project")
    first = pipeline.run("dvc", "repro")
    for stage in ("fetch", "partition", "train", "report"):
        assert f"Running stage '{stage}'" in first
    before, adapter = pipeline.lock(), (pipeline.root / "models/adapter/adapter_model.safetensors").read_bytes()
    assert before["partition"]["data/partition"] == pipeline.report("run")["dataset_digest"]
    pipeline.commit()

    again = pipeline.run("dvc", "repro")
    assert "Running stage" not in again
    assert "up to date" in again
    assert pipeline.run("git", "status", "--porcelain") == ""

    experiment = pipeline.run("dvc", "exp", "run", "-S", "method.name=ffa-lora")
    assert "Running stage 'train'" in experiment
    assert "Running stage 'partition'" not in experiment
    assert "Running stage 'fetch'" not in experiment
    after = pipeline.lock()
    assert after["partition"] == before["partition"]
    assert after["train"]["models/adapter"] != before["train"]["models/adapter"]
    assert (pipeline.root / "models/adapter/adapter_model.safetensors").read_bytes() != adapter
    assert pipeline.report("run")["method"]["name"] == "ffa-lora"
    assert pipeline.report("run")["dataset_digest"] == before["partition"]["data/partition"]

    difference = json.loads(pipeline.run("dvc", "metrics", "diff", "--json"))
    assert {"loss", "bytes_up"} <= difference["reports/metrics.json"].keys()
    pipeline.run("dvc", "plots", "diff", "--out", "plots")
    page = (pipeline.root / "plots" / "index.html").read_text()
    assert all(title in page for title in ("Accuracy on the test records", "Epsilon spent so far"))


def test_a_killed_stage_goes_on(tmp_path: Path) -> None:
    """DVC deletes a stage's outputs before it starts: the run's state must be none of them."""
    pipeline = Pipeline(tmp_path / "project")
    pipeline.run("dvc", "repro", "partition")
    pipeline.run("fedpipe", "train")  # as far as a killed stage can get: complete, but DVC does not know
    (state,) = (pipeline.root / "runs").iterdir()
    (state / "complete.json").unlink()
    trained = {path: path.stat().st_mtime_ns for path in state.glob("rounds/*/updates/*")}
    assert "resumed: all 2 rounds were done before" in pipeline.run("dvc", "repro")
    assert {path: path.stat().st_mtime_ns for path in state.glob("rounds/*/updates/*")} == trained
