"""Killed at any moment and started again, a run ends with the same bytes and the same epsilon."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Command, Done, Fault, fedpipe, new_project, start
from test_flow import recorded
from undisturbed import differences, everything

from fedpipe.privacy.ledger import Ledger

SLOW = pytest.mark.slow
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run leaves that nobody disturbed."""
    project = new_project(tmp_path_factory.mktemp("undisturbed") / "project", tracked=True)
    assert fedpipe(project, "run").code == 0
    found = everything(project)
    assert found.keys() >= {"models/adapter/adapter_model.safetensors", "reports/ledger.json", "mlflow points"}
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return new_project(tmp_path / "project", tracked=True)


def goes_on(project: Path, expected: dict[str, Any]) -> Done:
    """Start the run again and check that it ends as if nothing had happened."""
    done = fedpipe(project, "run")
    assert done.code == 0, done.err
    assert not differences(everything(project), expected)
    (root,) = project.glob("runs/*")
    releases = [entry.release for entry in Ledger(root / "ledger.jsonl").entries()]
    assert len(set(releases)) == len(releases) == 3 * 3 * 2  # rounds, clients, local steps
    return done


class TestKilled:
    def test_after_round_2(self, project: Path, expected: dict[str, Any]) -> None:
        fault = Fault("fedpipe.steps", "finish_round", 2, after=True)
        assert fedpipe(project, "run", fault=fault).code == KILLED
        done = goes_on(project, expected)
        assert "resumed from round 3: 2 done before" in done.err
        assert re.findall(r"^round (\d)/3", done.err, re.M) == ["3"]

    @pytest.mark.parametrize(
        "fault",
        [
            Fault("fedpipe.steps.training", "write_tensors", 5),  # round 2, one of three updates is written
            # Round 2 is aggregated, not evaluated.
            pytest.param(Fault("fedpipe.steps.evaluating", "metrics_of", 3), marks=SLOW),
            Fault("fedpipe.publish", "write_json", 2),  # the adapter is there, the reports are not
            Fault("fedpipe.tracking.run", "log_model", 1, after=True),  # MLflow has all, nobody knows
            pytest.param(Fault("fedpipe.state", "destroy_key", 1), marks=SLOW),  # complete, the key still there
        ],
        ids=lambda fault: f"{fault.function}-{fault.number}",
    )
    def test_on_the_way(self, project: Path, expected: dict[str, Any], fault: Fault) -> None:
        assert fedpipe(project, "run", fault=fault).code == KILLED
        goes_on(project, expected)

    def test_whenever_the_ledger_grows(self, project: Path, expected: dict[str, Any]) -> None:
        command = start(project, "run")
        wait_for(project, "ledger.jsonl", 9, command)  # the header, and the steps of round 1 and some of round 2
        os.kill(command.process.pid, signal.SIGKILL)
        assert command.wait().code == KILLED
        goes_on(project, expected)

    @SLOW
    def test_twice(self, project: Path, expected: dict[str, Any]) -> None:
        for number in (3, 3):
            fault = Fault("fedpipe.steps.training", "write_tensors", number)
            assert fedpipe(project, "run", fault=fault).code == KILLED
        goes_on(project, expected)

    @SLOW
    @pytest.mark.parametrize("after", [False, True])
    def test_at_every_write(self, tmp_path: Path, expected: dict[str, Any], after: bool) -> None:
        for number in range(1 + after, 200, 2):
            project = new_project(tmp_path / f"project-{number}", tracked=True)
            done = fedpipe(project, "run", fault=Fault("os", "fsync", number, after=after))
            if done.code == 0:
                break
            assert done.code == KILLED
            goes_on(project, expected)
        assert number > 50  # the files of a run, each written with one or two


def wait_for(project: Path, name: str, lines: int, command: Command) -> None:
    """Wait until a file of the run has so many lines."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and command.process.is_alive():
        for path in project.glob(f"runs/*/{name}"):
            if path.read_bytes().count(b"\n") >= lines:
                return
        time.sleep(0.002)
    raise AssertionError(f"{name} did not grow to {lines} lines")


class TestInterrupted:
    def test_by_hand(self, project: Path, expected: dict[str, Any]) -> None:
        done = fedpipe(project, "run", fault=Fault("fedpipe.steps.training", "write_tensors", 5, "SIGINT"))
        assert done.code == 130
        assert done.err.splitlines()[-1] == "interrupted; the same command goes on from here"
        assert "Traceback" not in done.err
        assert done.out == ""
        (run,) = recorded(project)
        assert run.info.status == "KILLED"
        goes_on(project, expected)

    @SLOW
    def test_before_the_first_round(self, project: Path, expected: dict[str, Any]) -> None:
        done = fedpipe(project, "run", fault=Fault("fedpipe.steps.preparing", "make_plan", 1, "SIGINT"))
        assert (done.code, done.err) == (130, "interrupted; the same command goes on from here\n")
        goes_on(project, expected)

    @SLOW
    def test_by_the_system(self, project: Path, expected: dict[str, Any]) -> None:
        done = fedpipe(project, "run", fault=Fault("fedpipe.steps", "aggregate", 2, "SIGTERM"))
        assert done.code != 0
        assert "Traceback" not in done.err
        goes_on(project, expected)


def test_two_runs_of_the_same_settings_give_the_same_bytes(project: Path, expected: dict[str, Any]) -> None:
    goes_on(project, expected)


def test_other_settings_are_another_run_and_it_says_why(project: Path) -> None:
    fault = Fault("fedpipe.steps", "finish_round", 1, after=True)
    assert fedpipe(project, "run", fault=fault).code == KILLED
    other = fedpipe(project, "run", "--set", "federation.rounds=1")
    assert other.code == 0
    assert re.search(r"^a new run; since la-lora-\w{10}: federation\.rounds: 3 -> 1$", other.err, re.M)
    assert len(list(project.glob("runs/*"))) == 2
    assert "resumed from round 2: 1 done before" in fedpipe(project, "run").err
