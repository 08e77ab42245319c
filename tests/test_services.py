"""Services that are away: the run goes on, what was not recorded is recorded later, nothing twice, nothing visible."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import fedpipe, new_project

from fedpipe.config import TrackingSettings
from fedpipe.errors import StorageError
from fedpipe.files import read_json
from fedpipe.tracking import RunDescription, Tracker, reach, recorder
from fedpipe.tracking.notes import Notes, Recorded
from fedpipe.tracking.reach import StoreAwayError, answers, ask_server
from fedpipe.tracking.run import MlflowRun
from fedpipe.tracking.store import load_mlflow, open_store

METRICS = {"eval/accuracy": 0.5, "eval/loss": 0.9}
RUN = "la-lora-1a2b3c4d5e"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reach, "PROBE", 0.3)
    monkeypatch.setattr(reach, "BUSY", 0.3)
    monkeypatch.setattr("fedpipe.tracking.store.BUSY", 0.3)
    load_mlflow()
    return tmp_path


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock for the pauses: its one element is the time."""
    clock = [1000.0]

    class Clock:
        time = staticmethod(time.time)
        monotonic = staticmethod(lambda: clock[0])

    monkeypatch.setattr(recorder, "time", Clock)
    return clock


def start(uri: str, **options: Any) -> Tracker:
    description = RunDescription(RUN, {"seed": 3}, {"method": "la-lora"}, "data", "data.csv", "0" * 32 + ".dir")
    return Tracker.open(TrackingSettings(uri=uri), description, Path("runs", RUN, "mlflow.json"), **options)


def directory(name: str, **files: str) -> Path:
    path = Path(name)
    path.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (path / file).write_text(text)
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def recorded(uri: str) -> dict[str, list[int]]:
    """Return the steps of each metric of the one run in a store."""
    client = load_mlflow().MlflowClient(uri.replace("///", f"///{Path.cwd()}/"))
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {key: [p.step for p in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}


class TestAStoreThatIsAway:
    def test_a_dead_server_is_warned_of_once_and_asked_with_pauses(
        self, here: Path, now: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        asked: list[str] = []
        monkeypatch.setattr("fedpipe.tracking.store.ask_server", lambda uri: (asked.append(uri), ask_server(uri)))
        tracker = start(f"http://user:secret@127.0.0.1:{free_port()}")
        for number in range(100):
            tracker.log_round(number, METRICS, directory(f"rounds/{number}", adapter="x"))
            now[0] += 10.0
        assert 3 <= len(asked) <= 8, "1000 seconds of a dead server"
        assert tracker.info == {}
        assert tracker.run_url is None
        tracker.close("FAILED")
        first, last = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert "the server does not answer (Connection refused)" in first
        assert last.startswith(f"MLflow lacks rounds 0 to 99 and the end of run {RUN} (")
        assert last.endswith("'fedpipe sync' records it")
        assert "secret" not in caplog.text

    def test_a_server_that_hangs_costs_seconds(self, here: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections, never answers
            began = time.monotonic()
            tracker = start(f"http://127.0.0.1:{listener.getsockname()[1]}")
            for number in range(50):
                tracker.log_round(number, METRICS)
            tracker.close("FAILED")
            assert time.monotonic() - began < 20

    def test_for_a_command_that_only_records_it_is_an_error(self, here: Path) -> None:
        with pytest.raises(StorageError, match=r"cannot be used: the server does not answer"):
            start(f"http://127.0.0.1:{free_port()}", patient=False)
        assert not Path("runs").exists()

    def test_a_store_that_comes_later_gets_all_of_it(self, here: Path, now: list[float]) -> None:
        Path("mlflow.db").mkdir()  # no database can be opened there
        tracker = start("sqlite:///mlflow.db")
        tracker.log_round(0, METRICS, directory("rounds/0", adapter="x"))
        Path("mlflow.db").rmdir()
        tracker.log_round(1, METRICS)
        assert not Path("mlflow.db").exists(), "it is not asked for every round"
        now[0] += recorder.FIRST_PAUSE
        tracker.log_round(2, METRICS)
        assert recorded("sqlite:///mlflow.db") == {name: [0, 1, 2] for name in METRICS}
        run_id = tracker.close("FINISHED")["run_id"]
        assert Notes(Path("runs", RUN)).recorded == Recorded(run_id, rounds=2)

    def test_the_adapter_outlasts_the_next_run_that_is_published(self, here: Path) -> None:
        Path("mlflow.db").mkdir()
        first = start("sqlite:///mlflow.db")
        first.log_round(0, METRICS)
        first.log_final(METRICS, directory("adapter", file="of this run"), "text")
        first.log_reports(directory("reports", file="of this run"))
        first.close("FINISHED")
        directory("adapter", file="of the next run")
        Path("mlflow.db").rmdir()
        notes = Notes(Path("runs", RUN))
        adapter, reports = notes.kept("adapter"), notes.kept("reports")
        assert adapter is not None
        assert reports is not None
        for _ in range(2):
            second = start("sqlite:///mlflow.db")
            second.log_round(0, METRICS)
            if adapter.exists():
                second.log_final(METRICS, adapter, "text")
                second.log_reports(reports)
            second.close("FINISHED")
        (copy,) = Path("mlruns").rglob("artifacts/adapter/file")
        assert copy.read_text() == "of this run"
        assert not adapter.parent.exists()
        assert notes.recorded.end
        assert recorded("sqlite:///mlflow.db") == {name: [0] for name in METRICS}

    def test_what_mlflow_has_is_not_copied_again(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        copied: list[str] = []
        perform = MlflowRun.perform
        monkeypatch.setattr(MlflowRun, "perform", lambda run, e: (copied.append(e.get("target")), perform(run, e)))
        for count in (3, 5):
            copied.clear()
            tracker = start("sqlite:///mlflow.db")
            for number in range(count):
                tracker.log_round(number, METRICS, directory(f"rounds/{number}", adapter="x"))
        assert [target for target in copied if target] == ["rounds/0003", "rounds/0004"]
        assert recorded("sqlite:///mlflow.db") == {name: [0, 1, 2, 3, 4] for name in METRICS}
        Path("runs", RUN, "mlflow-recorded.json").write_text("{ half")
        assert Notes(Path("runs", RUN)).recorded == Recorded()

    def test_gateways_without_a_server_are_no_answer_and_refusals_are(self, here: Path) -> None:
        for status, there in ((200, True), (401, True), (404, True), (502, False), (503, False)):

            class Handler(http.server.BaseHTTPRequestHandler):
                code = status

                def do_GET(self) -> None:
                    self.send_error(self.code)

                def log_message(self, *words: object) -> None:
                    pass

            with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                assert answers(f"http://user:secret@127.0.0.1:{server.server_port}/under/a/path") is there
                server.shutdown()


class TestSqlite:
    def test_another_writer_for_a_while_is_not_seen(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("fedpipe.tracking.store.BUSY", 20.0)
        monkeypatch.setattr(reach, "BUSY", 20.0)
        open_store(TrackingSettings(uri="sqlite:///mlflow.db"))
        other = sqlite3.connect("mlflow.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(1.5, lambda: other.execute("ROLLBACK")).start()
        tracker = start("sqlite:///mlflow.db")
        tracker.log_round(0, METRICS)
        tracker.close("FINISHED")
        other.close()
        assert recorded("sqlite:///mlflow.db") == {name: [0] for name in METRICS}
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_a_refusal_at_once_is_tried_again(self) -> None:
        calls = []

        def refused_twice() -> int:
            calls.append(1)
            if len(calls) < 3:
                raise sqlite3.OperationalError("database is locked")
            return 7

        assert reach.unless_busy(refused_twice) == 7

    def test_a_lock_that_stays_is_a_store_that_is_away(self, here: Path) -> None:
        open_store(TrackingSettings(uri="sqlite:///mlflow.db"))
        with contextlib.closing(sqlite3.connect("mlflow.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(StoreAwayError, match="database is locked"):
                start("sqlite:///mlflow.db", patient=False)

    @pytest.mark.parametrize("processes", [3, pytest.param(8, marks=pytest.mark.slow)])
    def test_many_writers_lose_no_point_and_say_nothing(self, tmp_path: Path, processes: int) -> None:
        script = """
import sys
from pathlib import Path
from fedpipe.config import TrackingSettings
from fedpipe.tracking import RunDescription, Tracker
description = RunDescription(sys.argv[1], {}, {}, "data", "data.csv", "0" * 32 + ".dir")
tracker = Tracker.open(TrackingSettings(), description, Path("runs", sys.argv[1], "mlflow.json"))
for number in range(25):
    tracker.log_round(number, {f"m{i}": float(i) for i in range(5)})
tracker.close("FINISHED")
"""
        command, pipes = [sys.executable, "-c", script], {"cwd": tmp_path, "stderr": subprocess.STDOUT}
        running = [subprocess.Popen([*command, f"r{i}"], stdout=subprocess.PIPE, **pipes) for i in range(processes)]
        assert [process.communicate()[0] for process in running] == [b""] * processes
        client = load_mlflow().MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        found = client.search_runs([e.experiment_id for e in client.search_experiments()])
        assert sorted(run.info.run_name for run in found) == [f"r{i}" for i in range(processes)]
        for run in found:
            for name in (f"m{i}" for i in range(5)):
                assert [p.step for p in client.get_metric_history(run.info.run_id, name)] == list(range(25))


HOLDER = """
import sys, time
from pathlib import Path
from fedpipe.state import Run
with Run(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_says_who_holds_it_and_ends_with_its_process(tmp_path: Path) -> None:
    from fedpipe.errors import StateError
    from fedpipe.state import Run

    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    held = rf"in use by process {holder.pid} on {socket.gethostname()} since [-\d]+ [:\d]+ UTC; wait for it"
    with pytest.raises(StateError, match=held) as caught, Run(tmp_path).lock():
        pass
    assert caught.value.exit_code == 3
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Run(tmp_path).lock():
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_the_description_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    given = RunDescription(RUN, {"a": None, "b": 0.5, "c": "x" * 7000}, {"t": "1"}, "d", "s", "0" * 32 + ".dir")
    notes = Notes(tmp_path)
    notes.describe(given)
    again = notes.description
    assert again is not None
    assert (again.param_texts(), again.tag_texts()) == (given.param_texts(), given.tag_texts())
    assert read_json(tmp_path / "mlflow-described.json")["again"] == "fedpipe sync"
    (tmp_path / "mlflow-described.json").write_text(json.dumps({"other": 1}))
    assert notes.description is None


SERVER = """
import sys, time
from pathlib import Path
from flows.settings import quiet
quiet(Path.cwd())
from flows import embedded
embedded._LIVES = 1
access = embedded._start(Path("home"), 180)
print(access["PREFECT_API_URL"], access["PREFECT_API_AUTH_STRING"], embedded._started.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
class TestPrefectKilledOnTheWay:
    """The run goes on to its end; with a fixed key, to the same bytes as any other."""

    def command(self, project: Path, **env: str) -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        words = [Path(sys.executable).with_name("fedpipe"), "run"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, cwd=project, env=clean | env, **pipes)

    def after_round_1(self, project: Path) -> None:
        deadline = time.monotonic() + 120
        while not list(project.glob("runs/*/rounds/0001/round.json")) and time.monotonic() < deadline:
            time.sleep(0.02)

    def adapter(self, project: Path) -> bytes:
        return (project / "models" / "adapter" / "adapter_model.safetensors").read_bytes()

    def test_our_own_is_started_again(self, tmp_path: Path) -> None:
        projects = [new_project(tmp_path / name, federation={"rounds": 8}) for name in ("usual", "project")]
        assert fedpipe(projects[0], "run").code == 0
        run = self.command(projects[1])
        self.after_round_1(projects[1])
        found = subprocess.run(["pgrep", "-P", str(run.pid), "-f", "flows.embedded"], capture_output=True, text=True)
        os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
        said = run.communicate(timeout=240)[1]
        assert run.returncode == 0
        warnings = [line for line in said.splitlines() if line.startswith("WARNING")]
        assert warnings == ["WARNING: Prefect's server has ended (status -9); it is started again"]
        assert "Traceback" not in said
        assert self.adapter(projects[0]) == self.adapter(projects[1])

    def test_the_user_s_is_done_without(self, tmp_path: Path) -> None:
        project = new_project(tmp_path / "project", federation={"rounds": 8})
        server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        url, password, pid = server.stdout.readline().split()
        run = self.command(project, PREFECT_API_URL=url, PREFECT_API_AUTH_STRING=password)
        self.after_round_1(project)
        os.kill(int(pid), signal.SIGKILL)
        server.kill()
        server.wait()
        said = run.communicate(timeout=240)[1]
        assert run.returncode == 0, said
        first, last = [line for line in said.splitlines() if line.startswith("WARNING")]
        assert first == (
            "WARNING: Prefect's server does not answer; the run goes on, and its progress is not shown there"
        )
        assert last.endswith("Connection refused. The run itself is complete")
        assert "Traceback" not in said
        assert "ERROR" not in said
