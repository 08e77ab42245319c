"""The doctor finds what is broken, says what to do, and never breaks itself."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from fedpipe import steps
from fedpipe.config import Settings
from fedpipe.doctor import Check, examine, machine, render, services
from fedpipe.project import Project

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


@pytest.fixture
def healthy(tiny: tuple[Project, Settings], tmp_path: Path) -> tuple[Project, Settings]:
    """A copy of the tiny project, to be broken."""
    project, settings = tiny
    shutil.copytree(project.root, tmp_path / "copy", ignore=shutil.ignore_patterns("runs"))
    return Project(tmp_path / "copy"), settings


def find(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_a_healthy_project_passes(healthy: tuple[Project, Settings]) -> None:
    failed = [check for check in examine(*healthy) if not check.ok]
    assert failed == []


def test_an_empty_directory_fails_with_advice_for_each(tmp_path: Path, tiny: tuple[Project, Settings]) -> None:
    checks = examine(Project(tmp_path), tiny[1])
    failed = {check.name: f"{check.found} {check.advice}" for check in checks if not check.ok}
    assert set(failed) == {"data", "backbone", "partition"}
    assert all("fedpipe" in text for text in failed.values())


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("data: {sauce: x}\n")
    check = find(examine(Project(tmp_path), None), "settings")
    assert not check.ok
    assert "data.sauce" in check.found


def test_nothing_at_all_never_raises(tmp_path: Path) -> None:
    checks = examine(Project(tmp_path / "nowhere"), None)
    assert not find(checks, "project directory").ok
    assert "params.yaml" in find(checks, "settings").found


def test_a_broken_check_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "python", lambda: 1 / 0)
    check = find(examine(Project(tmp_path), None), "Python")
    assert not check.ok
    assert "ZeroDivisionError" in check.found


def test_damaged_stale_and_foreign_files(healthy: tuple[Project, Settings]) -> None:
    project, settings = healthy
    data = settings.data.model_copy(update={"test_fraction": 0.25})
    stale = find(examine(project, settings.model_copy(update={"data": data})), "partition")
    assert not stale.ok
    assert "data.test_fraction" in stale.found

    arrow = project.partition / "c000.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-1] + b"?")
    damaged = find(examine(project, settings), "partition")
    assert not damaged.ok
    assert "c000.arrow" in damaged.found

    other = settings.data.model_copy(update={"source": "package:other"})
    foreign = find(examine(project, settings.model_copy(update={"data": other})), "data")
    assert not foreign.ok
    assert "package:other" in foreign.found


def test_packages_are_compared_with_what_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "dvc":
            raise metadata.PackageNotFoundError(name)
        return {"fastapi": "0.151.0", "torch": "2.12.1+cu130"}.get(name, machine.TESTED[name][0])

    monkeypatch.setattr(metadata, "version", version)
    assert not machine.package("fastapi").ok
    assert "0.150.0" in machine.package("fastapi").advice
    assert machine.package("torch") == Check("torch", True, "2.12.1+cu130 (tested with 2.13.0)")
    assert "dvc repro" in machine.package("dvc").found
    assert not machine.package("dvc").ok


def test_the_tested_versions_are_the_pinned_ones() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"{name}=={version}" for name, (version, _) in machine.TESTED.items()} <= set(pins)


def test_a_full_disk(healthy: tuple[Project, Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**8))
    check = find(examine(*healthy), "disk")
    assert not check.ok
    assert "0.1 GB free" in check.found
    assert "dvc gc" in check.advice


def test_gpu_asked_for_where_there_is_none(tiny: tuple[Project, Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runtime = tiny[1].runtime.model_copy(update={"device": "cuda"})
    assert not machine.device(tiny[1].model_copy(update={"runtime": runtime})).ok


def test_sqlite_stores(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    uri = f"sqlite:///{file}"
    assert services.mlflow(uri).ok
    assert not file.exists()

    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE t (x)")
    assert services.mlflow(uri).ok
    file.write_bytes(b"this is no database, and long enough to be read as one" * 30)
    assert "not a database" in services.mlflow(uri).found
    assert not services.mlflow(f"sqlite:///{tmp_path}/no/such/directory/mlflow.db").ok


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers /health."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path.endswith("/health") else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    listener = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_port}"
    listener.shutdown()
    listener.server_close()


def test_servers_that_answer_and_that_do_not(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    silent = f"http://user:secret@127.0.0.1:{port}"
    assert services.mlflow(server).ok
    down = services.mlflow(silent)
    assert not down.ok
    assert "tracking.uri" in down.advice
    assert "secret" not in down.found

    monkeypatch.setenv("PREFECT_API_URL", f"{server}/api")
    assert services.prefect().ok
    monkeypatch.setenv("PREFECT_API_URL", silent)
    assert "unset PREFECT_API_URL" in services.prefect().advice


def test_locks_of_dvc(tmp_path: Path) -> None:
    lock = tmp_path / "rwlock"

    def held_by(pid: int) -> Check:
        lock.write_text(json.dumps({"write": {"data/raw": {"pid": pid, "cmd": "dvc repro"}}, "read": {}}))
        check = services.dvc_lock(lock)
        assert check is not None
        return check

    assert services.dvc_lock(lock) is None
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    assert held_by(killed.pid).ok  # DVC clears it
    if Path("/proc/self/cmdline").exists():
        with subprocess.Popen(["sleep", "60"]) as stranger:
            reused = held_by(stranger.pid)
            stranger.kill()
        assert not reused.ok
        assert f"rm {lock}" in reused.advice
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc"]) as busy:
            at_work = held_by(busy.pid)
            busy.kill()
        assert at_work.ok
        assert "at work" in at_work.found
    lock.write_text('{"write": ')
    damaged = services.dvc_lock(lock)
    assert damaged is not None
    assert not damaged.ok


def test_a_run_that_was_stopped_and_one_that_lost_its_key(healthy: tuple[Project, Settings]) -> None:
    project, settings = healthy
    run = steps.prepare(project, settings).run
    stopped = find(examine(project, settings), "runs")
    assert stopped.ok
    assert f"{run.root.name} (round 0 of {settings.federation.rounds})" in stopped.found

    run.key_path.unlink()
    keyless = find(examine(project, settings), "runs")
    assert not keyless.ok
    assert f"rm -r {run.root}" in keyless.advice


def test_the_table_shows_every_finding_and_advice() -> None:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render([Check("disk", True, "9 GB [free]"), Check("data", False, "gone", "Run `fedpipe fetch`.")]))
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["ok", "disk", "9", "GB", "[free]"]
    assert lines[1].split() == ["no", "data", "gone"]
    assert lines[2].strip() == "Run `fedpipe fetch`."


def test_no_orchestrator_is_imported() -> None:
    code = "import sys, fedpipe.doctor; sys.exit(bool({'prefect', 'mlflow', 'dvc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
