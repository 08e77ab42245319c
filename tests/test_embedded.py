"""The server that a run brings with it: silent, and gone when the run is, however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fedpipe.errors import FedpipeError
from flows import embedded

RUN = """
import sys, time
from flows.settings import quiet
quiet()
from flows.embedded import prefect_api
from prefect import flow
from prefect.settings import get_current_settings

@flow(name="stub")
def stub(wait):
    print(get_current_settings().api.url, get_current_settings().flows.heartbeat_frequency, flush=True)
    time.sleep(wait)
    if wait == 0:
        raise ValueError("the flow's own error")

with prefect_api():
    try:
        stub(0)
    except ValueError as error:
        print(error, flush=True)
    stub(float(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, since the first server in it takes seconds to make the database."""
    return tmp_path_factory.mktemp("embedded")


def start(directory: Path, wait: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, wait],
        cwd=directory,
        env=clean | {"HOME": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def answers(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as client:
        return client.connect_ex((parts.hostname, parts.port)) == 0


def ends(url: str) -> bool:
    deadline = time.monotonic() + 20
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not answers(url)


@pytest.mark.parametrize("ending", [None, signal.SIGINT, signal.SIGKILL])
def test_silent_and_gone_with_the_run(directory: Path, ending: signal.Signals | None) -> None:
    process = start(directory, "0.1" if ending is None else "60")
    assert process.stdout is not None
    url, heartbeat = process.stdout.readline().split()
    assert (heartbeat, process.stdout.readline()) == ("None", "the flow's own error\n")
    assert process.stdout.readline().startswith(url)
    if ending is not None:
        assert answers(url)
        os.killpg(process.pid, ending)
    printed, complaints = process.communicate(timeout=180)  # a busy machine takes its time
    assert ends(url)
    assert printed == ""
    if ending is signal.SIGINT:  # what the command line turns into a line of its own
        assert complaints.strip().splitlines()[-1] == "KeyboardInterrupt"
        assert "Error" not in complaints
    else:
        assert complaints == ""
    assert (directory / ".prefect" / "server.log").read_text() == ""


def test_a_server_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prefect.db").mkdir()  # no database can be opened there
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{tmp_path}/prefect.db")
    with pytest.raises(
        FedpipeError, match=r"Prefect's server did not start: .*unable to open database file.*server\.log"
    ):
        embedded._start(tmp_path, timeout=60)
