"""Prefect's API for one process: the server that the user configured, or a private one that lives as long as we do.

Prefect can start such a server by itself, but then it writes to our terminal, gets our
Ctrl-C before we could report it, and stays behind, on the same database, when we are
killed. Here the server writes to a log file, has its own session, and waits on a pipe
whose other end is ours: however this process ends, the pipe closes and the server stops.

A run needs no server to compute, and no run is worth less for a server that is gone. So one
that is configured and does not answer is done without; ours, when it is killed, is started
again on the same socket, which we hold, so that its clients wait instead of failing; and where
none is left at the end, a run that is complete has succeeded.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

from fedpipe.errors import FedpipeError, StorageError, hide_password
from fedpipe.files import storage

log = logging.getLogger("fedpipe.prefect")

_REFUSALS = ("Failed to reach API", "Found incompatible versions")
_FULL = 1 << 20  # bytes: a database that cannot grow by a few pages is as good as out of space
_LIVES = 4  # of our server in one process; one that ends so often has a reason

done = threading.Event()  # the flow has done all its work, and only Prefect has yet to be told
_ending = threading.Event()
_started: subprocess.Popen[bytes] | None = None


@contextlib.contextmanager
def prefect_api() -> Iterator[str]:
    """Give the body an answering Prefect API; yield its address.

    Call `flows.settings.quiet` before. A configured server (`PREFECT_API_URL`, or a profile)
    is used as it is, if it answers. Otherwise one is started, once a process, and stopped at
    exit, after Prefect has sent its last events. After `done`, a server that is gone is a warning.

    Raises
    ------
    FedpipeError
        The server did not start in time, or stopped answering; the message says where its log is.
        Where the body's own mistake could not be reported to the server any more, it is raised instead.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a home that cannot be written is told in our own words below
        from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings, temporary_settings

    settings = get_current_settings()
    if settings.api.url is None or not _there(str(settings.api.url)):
        os.environ.update(_start(settings.home, settings.server.ephemeral.startup_timeout_seconds))
        # Prefect's background threads look at the global settings, not at a temporary context.
        refresh_global_settings_context()
    # Heartbeats end a second late, and neither the environment nor prefect.toml can say "none".
    done.clear()
    with temporary_settings({"flows.heartbeat_frequency": None}) as current:
        url = str(current.api.url)
        try:
            yield url
        except Exception as error:
            if not is_gone(error):
                raise
            _forget_events()
            if not done.is_set():
                raise _explained(error, hide_password(url), settings.home) from error
            log.warning(
                "Prefect's server at %s did not take the end of the flow run: %s. The run itself is complete",
                hide_password(url),
                _words(error),
            )


def is_gone(error: BaseException) -> bool:
    """Say whether an error of Prefect's is that its server does not answer as it should."""
    from httpx import HTTPStatusError, TransportError

    # Prefect's own words for a server that is not there, or of another age, are a plain RuntimeError.
    refusal = isinstance(error, RuntimeError) and str(error).startswith(_REFUSALS)
    return refusal or isinstance(error, (HTTPStatusError, TransportError))


def _forget_events() -> None:
    """Give up the events that nobody will take: at exit, Prefect would try each of them for seconds."""
    from prefect.events.worker import EventsWorker

    with contextlib.suppress(AttributeError, queue.Empty):  # another version of Prefect may keep them elsewhere
        waiting = EventsWorker.instance()._queue
        while True:
            waiting.get_nowait()


def _there(url: str) -> bool:
    """Ask a configured server whether it is there; say so if it is not."""
    from fedpipe.tracking.reach import ask_server

    try:
        ask_server(url)
    except OSError as error:
        shown = hide_password(url)
        log.warning("Prefect's server at %s is away: %s. The run goes on with a server of its own", shown, error)
        return False
    return True


def _words(error: BaseException) -> str:
    return (" ".join(str(error).split()).partition(" - Response")[0] or type(error).__name__).rstrip(".")


def _explained(error: BaseException, url: str, home: Path) -> FedpipeError:
    """Return the mistake behind an answer that Prefect's API did not give."""
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, FedpipeError):
            return first
        first = first.__context__
    if _started is not None and _full(home):
        return _no_space(home)
    where = f" Its log: {home / 'server.log'}" if _started is not None else ""
    cure = "Run" if _started is not None else "Mend or start it, or unset PREFECT_API_URL to do without, and run"
    return StorageError(
        f"Prefect's server at {url} failed: {_words(error)}. {cure} the same command again; it goes on from the "
        f"last complete step.{where}"
    )


def _full(home: Path) -> bool:
    return shutil.disk_usage(home).free < _FULL


def _no_space(home: Path) -> StorageError:
    return StorageError(
        f"{home}: Prefect's server cannot write: the disk is full; free some space. "
        "Run the same command again; it goes on from the last complete step."
    )


def _start(home: Path, timeout: float) -> dict[str, str]:
    """Start the server and wait until it answers; return what its clients must have in their environment.

    It listens on loopback, where every user and every web page of this machine can reach it, so
    it answers only those that know a password made for this process. Both sides have it from
    their environment, which other users cannot read, as they can a command line.
    """
    global _started
    password = f"fedpipe:{secrets.token_urlsafe(32)}"
    said = home / "server.log"
    with storage(home):
        home.mkdir(parents=True, exist_ok=True)
        said.write_bytes(b"")
    listener = socket.create_server(("127.0.0.1", 0))
    environment = _environment(home) | {"PREFECT_SERVER_API_AUTH_STRING": password}
    _started = _launched(listener, said, environment)
    # Prefect's workers flush before this: theirs are thread exit hooks, and later registrations.
    atexit.register(_end)
    ready = threading.Event()
    threading.Thread(target=_watch, args=(listener, said, environment, ready), daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    try:
        # The connection waits in the listener's queue until the server takes it.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(f"{url}/health", timeout=timeout).close()
    except OSError as error:
        _stop(_started)
        if _full(home):
            raise _no_space(home) from error
        raise FedpipeError(f"Prefect's server did not start: {_reason(said) or error}. All of it: {said}") from error
    ready.set()
    return {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": password}


def _launched(listener: socket.socket, said: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(said, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.embedded", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            env=environment,
        )


def _watch(listener: socket.socket, said: Path, environment: dict[str, str], ready: threading.Event) -> None:
    """Start a server that was `ready` again when it ends before us; with the last one, its clients fail."""
    global _started
    with listener:
        for _ in range(_LIVES - 1):
            assert _started is not None
            status = _started.wait()
            if _ending.is_set() or not ready.is_set():
                return
            log.warning("Prefect's server has ended (status %d); it is started again", status)
            _started = _launched(listener, said, environment)
        _started.wait()


def _end() -> None:
    _ending.set()
    if _started is not None:
        _stop(_started)


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
