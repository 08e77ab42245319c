"""The files around the code say what the code does: settings, pipeline, deployments, constraints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML

from fedpipe.config import Settings, load_settings
from fedpipe.identity import _SCIENCE, _SCIENCE_FILES
from fedpipe.methods import compose
from fedpipe.publish import COLUMNS

ROOT = Path(__file__).parents[1]

# Parts of fedpipe that show results, or start what makes them: a change there must not train again.
SHOWN = {
    "__init__.py",
    "audits",
    "claims",
    "cli.py",
    "disk",
    "doctor",
    "errors.py",
    "listing",
    "mistakes.py",
    "project.py",
    "report",
    "terminal.py",
    "tracking",
}


def read_yaml(name: str) -> Any:
    return YAML(typ="safe", pure=True).load((ROOT / name).read_text(encoding="utf-8"))


def outputs(stage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a stage's outputs and metrics, with the options of each."""
    listed = [*stage.get("outs", []), *stage.get("metrics", [])]
    return {
        key: options for item in listed for key, options in (item if isinstance(item, dict) else {item: {}}).items()
    }


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    return read_yaml("dvc.yaml")["stages"]


class TestParams:
    def test_the_demo_is_valid(self) -> None:
        settings = load_settings(ROOT / "params.yaml")
        assert compose(settings).name == "la-lora"
        assert settings.privacy.test_key is None
        assert settings.data.group == "movie"

    def test_every_key_says_what_it_costs(self) -> None:
        lines = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()
        keys = [line for line in lines if re.match(r" +\w+:", line)]
        silent = [line.strip() for line in keys if " # " not in line]
        obvious = {"text", "task", "min_records", "batch_size", "task_runner", "experiment"}
        assert {line.partition(":")[0] for line in silent} <= obvious


class TestPipeline:
    def test_stages_hand_on_what_the_next_one_reads(self, stages: dict[str, Any]) -> None:
        assert list(stages) == ["fetch", "partition", "train", "report"]
        made = {path for stage in stages.values() for path in outputs(stage)}
        for stage in stages.values():
            for dependency in stage["deps"]:
                assert dependency in made or (ROOT / dependency).exists(), dependency

    def test_outputs_are_the_contract(self, stages: dict[str, Any]) -> None:
        assert {name: set(outputs(stage)) for name, stage in stages.items()} == {
            "fetch": {"data/raw", "models/backbone"},
            "partition": {"data/partition"},
            "train": {"models/adapter"}
            | {f"reports/{name}" for name in ("ledger.json", "run.json", "rounds.csv", "metrics.json")},
            "report": {"reports/report.html", "reports/evaluation.json"},
        }

    def test_dvc_deletes_neither_runs_nor_downloads(self, stages: dict[str, Any]) -> None:
        everything = {path for stage in stages.values() for path in outputs(stage)}
        assert not any(path.startswith("runs") for path in everything)
        assert all(options.get("persist") for options in outputs(stages["fetch"]).values())

    def test_params_are_in_the_file_and_every_setting_is_watched(self, stages: dict[str, Any]) -> None:
        values = read_yaml("params.yaml")
        watched = set()
        for stage in stages.values():
            for path in stage.get("params", []):
                section, _, key = path.partition(".")
                assert section in values
                assert not key or key in values[section], path
                watched.add(path)
        for name in Settings.model_fields:
            # Where a run is recorded changes nothing that is computed.
            if name != "tracking" and name not in watched:
                assert {f"{name}.{key}" for key in values[name]} <= watched | {"model.task"}, name

    def test_every_module_either_trains_or_shows(self, stages: dict[str, Any]) -> None:
        """A new module needs a decision: does a change in it train again?"""
        present = {path.name for path in (ROOT / "fedpipe").iterdir() if path.name not in ("__pycache__", "py.typed")}
        trained = {path.removeprefix("fedpipe/") for path in stages["train"]["deps"] if path.startswith("fedpipe/")}
        assert trained | SHOWN == present
        assert not trained & SHOWN
        assert {*_SCIENCE, *_SCIENCE_FILES} <= trained

    def test_plots_draw_columns_that_exist(self) -> None:
        for plot in read_yaml("dvc.yaml")["plots"]:
            for spec in plot.values():
                for axis in ("x", "y"):
                    columns = spec[axis]["reports/rounds.csv"]
                    assert {columns} <= set(COLUMNS) if isinstance(columns, str) else set(columns) <= set(COLUMNS)

    def test_dvc_calls_no_one(self) -> None:
        config = (ROOT / ".dvc" / "config").read_text(encoding="utf-8")
        assert "analytics = false" in config
        assert "check_update = false" in config

    def test_dvc_reads_it(self) -> None:
        dvc = Path(sys.executable).with_name("dvc")
        done = subprocess.run([dvc, "stage", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["fetch", "partition", "train", "report"]


def needed(extras: set[str]) -> set[str]:
    """Return the distributions that fedpipe with these extras needs, directly or not."""
    found: set[str] = set()
    queue = [("fedpipe", frozenset(extras))]
    seen = set(queue)
    while queue:
        name, wanted = queue.pop()
        found.add(name)
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in wanted or {""}]
            if requirement.marker and not any(requirement.marker.evaluate(e) for e in environments):
                continue
            item = (canonical(requirement.name), frozenset(requirement.extras))
            if item not in seen:
                seen.add(item)
                queue.append(item)
    return found - {"fedpipe"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class TestConstraints:
    @pytest.fixture(scope="class")
    def pins(self) -> dict[str, str]:
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if not line.startswith("#"))

    def test_lines_are_exact_pins_only(self) -> None:
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
            assert line.startswith("# ") or re.fullmatch(r"[a-z0-9-]+==[a-zA-Z0-9.]+", line), line

    def test_everything_that_is_needed_is_pinned_at_what_is_installed(self, pins: dict[str, str]) -> None:
        everything = needed({"dev"})
        assert len(everything) > 150
        installed = {name: metadata.version(name).split("+")[0] for name in everything}
        assert {name: pins.get(name) for name in everything} == installed

    def test_what_must_not_drift(self, pins: dict[str, str]) -> None:
        assert pins["torch"] == "2.13.0"
        assert pins["fastapi"] == "0.150.0"
        assert {"ray", "prefect-ray"} <= set(pins)

    def test_pins_meet_the_requirements(self, pins: dict[str, str]) -> None:
        for line in metadata.requires("fedpipe") or []:
            requirement = Requirement(line)
            assert requirement.specifier.contains(pins[canonical(requirement.name)]), line


def prefect_settings(cwd: Path, quiet: bool = False, **environment: str) -> dict[str, Any]:
    """Return Prefect's settings as a process that starts in `cwd` sees them."""
    code = (
        "import json, os\n"
        + ("from flows.settings import quiet; quiet()\n" if quiet else "")
        + "from prefect.settings import get_current_settings\n"
        "s = get_current_settings()\n"
        "print(json.dumps({'home': str(s.home), 'url': s.api.url, 'serializer': s.results.default_serializer,"
        " 'storage': str(s.results.local_storage_path), 'analytics': s.server.analytics_enabled,"
        " 'ephemeral': s.server.ephemeral.enabled, 'timeout': s.server.ephemeral.startup_timeout_seconds,"
        " 'console': os.environ.get('PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL')}))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


class TestPrefect:
    def test_the_file_is_understood(self, tmp_path: Path) -> None:
        (tmp_path / "prefect.toml").write_text((ROOT / "prefect.toml").read_text())
        assert prefect_settings(tmp_path, HOME="/nonexistent") == {
            "home": ".prefect",
            "url": None,
            "serializer": "json",
            "storage": ".prefect/storage",
            "analytics": False,
            "ephemeral": True,
            "timeout": 180,
            "console": None,
        }

    def test_without_the_file_the_code_says_the_same(self, tmp_path: Path) -> None:
        home = str(tmp_path.resolve() / ".prefect")
        found = prefect_settings(tmp_path, quiet=True, HOME="/nonexistent")
        assert found.pop("storage") == f"{home}/storage"
        assert found == {
            "home": home,
            "url": None,
            "serializer": "json",
            "analytics": False,
            "ephemeral": True,
            "timeout": 180,
            "console": "CRITICAL",
        }

    def test_what_the_user_says_wins(self, tmp_path: Path) -> None:
        """The environment, then `prefect.toml`, then a profile at home: each is honoured."""
        (tmp_path / "prefect.toml").write_text("[server.ephemeral]\nstartup_timeout_seconds = 7\n")
        profiles = tmp_path / "home" / ".prefect" / "profiles.toml"
        profiles.parent.mkdir(parents=True)
        profiles.write_text('active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n')
        found = prefect_settings(
            tmp_path, quiet=True, HOME=str(tmp_path / "home"), PREFECT_RESULTS_DEFAULT_SERIALIZER="compressed/json"
        )
        assert found["timeout"] == 7
        assert found["url"] == "http://127.0.0.1:9/api"
        assert found["serializer"] == "compressed/json"

    def test_every_deployment_names_a_flow_that_exists(self) -> None:
        deployments = read_yaml("prefect.yaml")["deployments"]
        assert {d["name"]: d["entrypoint"] for d in deployments} == {
            "local": "flows/federated.py:federated",
            "local-audit": "flows/audit.py:audit",
        }
        for deployment in deployments:
            file, name = deployment["entrypoint"].split(":")
            assert re.search(rf'@flow\(\s*name="{name}"', (ROOT / file).read_text(encoding="utf-8"))
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
            assert Path(ROOT / deployment["parameters"]["params_file"]).is_file()
