"""Prefect's API for one process: the server that the user configured, or a private one that lives as long as we do.

Prefect can start such a server by itself, but then it writes to our terminal, gets our
Ctrl-C before we could report it, and stays behind, on the same database, when we are
killed. Here the server writes to a log file, has its own session, and waits on a pipe
whose other end is ours: however this process ends, the pipe closes and the server stops.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fedpipe.errors import FedpipeError

_started: subprocess.Popen[bytes] | None = None


@contextlib.contextmanager
def prefect_api() -> Iterator[str]:
    """Give the body an answering Prefect API; yield its address.

    Call `flows.settings.quiet` before. A configured server (`PREFECT_API_URL`, or a profile)
    is used as it is. Otherwise one is started, once a process, and stopped at exit, after
    Prefect has sent its last events.

    Raises
    ------
    FedpipeError
        The server did not start in time; the message says where its log is.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings, temporary_settings

    settings = get_current_settings()
    if settings.api.url is None:
        os.environ["PREFECT_API_URL"] = _start(settings.home, settings.server.ephemeral.startup_timeout_seconds)
        # Prefect's background threads look at the global settings, not at a temporary context.
        refresh_global_settings_context()
    # Heartbeats end a second late, and neither the environment nor prefect.toml can say "none".
    with temporary_settings({"flows.heartbeat_frequency": None}) as current:
        yield str(current.api.url)


def _start(home: Path, timeout: float) -> str:
    """Start the server and wait until it answers; return the address of its API."""
    global _started
    log = home / "server.log"
    with socket.create_server(("127.0.0.1", 0)) as listener, open(log, "wb") as output:
        port = listener.getsockname()[1]
        _started = subprocess.Popen(
            [sys.executable, "-m", "flows.embedded", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            env=_environment(home),
        )
    # Prefect's workers flush before this: theirs are thread exit hooks, and later registrations.
    atexit.register(_stop, _started)
    url = f"http://127.0.0.1:{port}/api"
    try:
        # The connection waits in the listener's queue until the server takes it.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(f"{url}/health", timeout=timeout).close()
    except OSError as error:
        _stop(_started)
        raise FedpipeError(f"Prefect's server did not start: {_reason(log) or error}. All of it: {log}") from error
    return url


def _environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PREFECT_HOME": str(home.resolve()),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",  # to the log file, not to the terminal
        "PREFECT_SERVER_UI_ENABLED": "false",
        # As Prefect itself starts a server that nobody else uses: no scheduler, no UI.
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.stdin is not None:
        server.stdin.close()
    try:
        server.wait(timeout=5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _reason(log: Path) -> str:
    """Return the last line that names an error, such as `OperationalError: disk is full`, or else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
    return (errors or lines or [""])[-1].rstrip(".")


def _end_with_parent() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock would then be held when the interpreter ends
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)


def serve(listener: socket.socket) -> None:
    """Serve Prefect's API on a bound socket until standard input closes."""
    import uvicorn

    threading.Thread(target=_end_with_parent, daemon=True).start()
    application = "prefect.server.api.server:create_app"
    uvicorn.Server(uvicorn.Config(application, factory=True, log_level="error", lifespan="on")).run([listener])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
