"""The `fedpipe` command in processes of its own, without the seconds that its imports take.

A fork server imports everything once; each command is a fork of it: a real process with its
own exit code and output, which can be killed. All of them share one Prefect server.
"""

from __future__ import annotations

import atexit
import base64
import errno
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tiny import make_backbone, tiny_values, write_records

from fedpipe.config import TrackingSettings
from fedpipe.tracking.store import _ENVIRONMENT, open_store
from flows import embedded
from flows.settings import quiet

HIDDEN = ("PREFECT_", "MLFLOW_TRACKING", "MLFLOW_RUN", "MLFLOW_EXPERIMENT")


@dataclass(frozen=True)
class Done:
    """How a command ended; a negative `code` is the signal that ended it."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass(frozen=True)
class Fault:
    """What happens at the `number`-th call of `function` in `module` (counted from 1): before it, or after it.

    `kind` is the name of a signal or of an errno (SIGKILL, SIGINT, ENOSPC, EROFS), or BUG, an exception that nobody
    expects, or SKIP: the call does nothing, or TORN: it is given half of its bytes, and then the process is killed, or
    BACK: from then on the clock goes an hour after the right one. A signal comes once; the others come at every later
    call too, if they are `lasting`.
    """

    module: str
    function: str
    number: int
    kind: str = "SIGKILL"
    after: bool = False
    lasting: bool = True


def new_project(root: Path, tracked: bool = False, **sections: Any) -> Path:
    """Make a project with records, a backbone and settings, nothing fetched yet.

    Its paths are relative, so that two projects with the same settings are the same experiment.
    """
    shutil.copytree(_template(), root)
    values = tiny_values(Path(""), **sections)
    if tracked:
        shutil.copy(_mlflow_database(), root / "mlflow.db")
        values["tracking"] = {"uri": "sqlite:///mlflow.db"}
    (root / "params.yaml").write_text(json.dumps(values))  # JSON is YAML
    return root


def _temporary(prefix: str) -> Path:
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@lru_cache(maxsize=1)
def _template() -> Path:
    root = _temporary("fedpipe-project-")
    write_records(root / "records.csv")
    make_backbone(root / "backbone")
    return root


@lru_cache(maxsize=1)
def _mlflow_database() -> Path:
    """Make MLflow's empty tables once: it takes seconds."""
    file = _temporary("fedpipe-mlflow-") / "mlflow.db"
    open_store(TrackingSettings(uri=f"sqlite:///{file}", experiment="template"))
    return file


class Command:
    """A command that was started."""

    def __init__(self, directory: Path, arguments: tuple[str, ...], fault: Fault | None, env: dict[str, str]) -> None:
        self._output = Path(tempfile.mkdtemp(prefix="fedpipe-command-"))
        self.process = _server().Process(target=_main, args=(directory, self._output, arguments, fault, env))
        self.process.start()

    def wait(self, timeout: float = 120) -> Done:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        out, err = (
            (self._output / name).read_text(encoding="utf-8") if (self._output / name).exists() else ""
            for name in ("out", "err")
        )
        shutil.rmtree(self._output)
        return Done(self.process.exitcode, out, err)


def start(directory: Path, *arguments: str, fault: Fault | None = None, **env: str) -> Command:
    """Start `fedpipe` with these arguments in a directory."""
    return Command(directory, arguments, fault, env)


def fedpipe(directory: Path, *arguments: str, fault: Fault | None = None, **env: str) -> Done:
    """Run `fedpipe` with these arguments in a directory to its end."""
    return start(directory, *arguments, fault=fault, **env).wait()


@lru_cache(maxsize=1)
def prefect_home() -> Path:
    return _temporary("fedpipe-prefect-")


@lru_cache(maxsize=1)
def prefect_access() -> dict[str, str]:
    """Start the Prefect server of these tests; return its API's address and password, as settings of Prefect."""
    with _environment():
        return embedded._start(prefect_home(), timeout=180)


def prefect_url() -> str:
    return prefect_access()["PREFECT_API_URL"]


def prefect(path: str, **body: Any) -> Any:
    """Ask the Prefect server."""
    password = base64.b64encode(prefect_access()["PREFECT_API_AUTH_STRING"].encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {password}"}
    request = urllib.request.Request(f"{prefect_url()}/{path}", json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as answer:
        return json.load(answer)


class _environment:  # noqa: N801 (a context manager)
    """Nothing of the user's servers, and what Prefect reads when it is imported."""

    def __init__(self, **more: str) -> None:
        self._more = more

    def __enter__(self) -> None:
        self._before = dict(os.environ)
        for name in [name for name in os.environ if name.startswith(HIDDEN)]:
            del os.environ[name]
        os.environ.update(_ENVIRONMENT, OMP_NUM_THREADS="1", PREFECT_HOME=str(prefect_home()), **self._more)
        quiet()

    def __exit__(self, *error: object) -> None:
        os.environ.clear()
        os.environ.update(self._before)


@lru_cache(maxsize=1)
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    from multiprocessing import forkserver

    # The fork server finds no module of the tests by itself.
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with _environment(**prefect_access(), PYTHONPATH=path):
        forkserver.ensure_running()
    return context


def _main(directory: Path, output: Path, arguments: tuple[str, ...], fault: Fault | None, env: dict[str, str]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(directory)
    os.environ.update(env)
    if fault:
        _inject(fault)
    from fedpipe.cli import main

    main(list(arguments), prog_name="fedpipe")


def _turn_back(seconds: int) -> None:
    """Make the clock that Python reads go behind, as after a correction by hand or by a server of the time."""
    second, nanosecond = time.time, time.time_ns
    time.time = lambda: second() - seconds
    time.time_ns = lambda: nanosecond() - seconds * 10**9


def _inject(fault: Fault) -> None:
    module: Any = importlib.import_module(fault.module)
    original, calls = getattr(module, fault.function), 0

    def strike() -> None:
        if fault.kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault.kind))
        elif fault.kind == "BUG":
            raise RuntimeError("an injected fault")
        elif fault.kind == "BACK":
            _turn_back(3600)
        else:
            raise OSError(getattr(errno, fault.kind), os.strerror(getattr(errno, fault.kind)))

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        lasting = fault.lasting and not fault.kind.startswith("SIG")
        due = calls == fault.number or (lasting and calls > fault.number)
        if due and fault.kind == "SKIP":
            return None
        if due and fault.kind == "TORN":
            original(*(part[: len(part) // 2] if isinstance(part, bytes) else part for part in args), **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        if due and not fault.after:
            strike()
        result = original(*args, **kwargs)
        if due and fault.after:
            strike()
        return result

    setattr(module, fault.function, faulty)
