"""What a run talks to: MLflow's store, Prefect's server, DVC's lock. None of the three is imported."""

from __future__ import annotations

import ipaddress
import json
import os
import sqlite3
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from fedpipe.doctor.check import Check
from fedpipe.errors import hide_password

TIMEOUT = 3.0  # seconds to wait for a server


def mlflow(uri: str | None) -> Check:
    name = "MLflow store"
    if uri is None:
        return Check(name, True, "off (tracking.uri is null)")
    if uri.startswith("sqlite:///"):
        return _sqlite(Path(uri.removeprefix("sqlite:///")).absolute())
    if uri.startswith(("http://", "https://")):
        found = _reach(f"{uri.rstrip('/')}/health")
        advice = "Start the server, correct tracking.uri, or train without it: --set tracking.uri=null"
        return _server(name, uri, found, advice)
    return Check(name, True, f"{hide_password(uri)}: not examined; the run tries it before it trains")


def _sqlite(file: Path) -> Check:
    name, advice = "MLflow store", "Move the file away, or name another one in tracking.uri."
    if not file.exists():
        there = file.parent if file.parent.exists() else file.parent.parent
        ok = os.access(there, os.W_OK)
        return Check(name, ok, f"{file}: " + ("will be made" if ok else "cannot be made"), "" if ok else advice)
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=TIMEOUT)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except sqlite3.Error as error:
        if "locked" in str(error):
            advice = "Another process is writing; wait for it, or stop it."
        return Check(name, False, f"{file}: {error}", advice)
    return Check(name, True, f"{file}: can be written")


def prefect() -> Check:
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return Check("Prefect server", True, "none named by PREFECT_API_URL; a run brings its own")
    found = _reach(f"{url.rstrip('/')}/health")
    advice = "Start it (`prefect server start`), or do without it: unset PREFECT_API_URL"
    return _server("Prefect server", url, found, advice)


def _server(name: str, url: str, found: str, advice: str) -> Check:
    answers, host = found == "answers", urlsplit(url).hostname or ""
    if answers and url.startswith("http://") and not _loopback(host):
        advice = f"What is sent to {host} can be read and changed on the way; give the server https (docs/security.md)."
        return Check(name, True, f"{hide_password(url)}: {found}, not encrypted", advice)
    return Check(name, answers, f"{hide_password(url)}: {found}", "" if answers else advice)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _reach(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT):
            return "answers"
    except (OSError, ValueError) as error:
        return f"does not answer: {getattr(error, 'reason', error)}"


def dvc_lock(lock: Path) -> Check | None:
    """Look at DVC's lock on stages, which a killed `dvc repro` leaves behind."""
    cure = f"Where no dvc command is running: rm {lock}"
    if not lock.exists():
        return None
    try:
        held = json.loads(lock.read_text(encoding="utf-8"))
        writers, readers = held.get("write", {}).values(), held.get("read", {}).values()
        holders = {(item["pid"], item["cmd"]) for item in [*writers, *(item for items in readers for item in items)]}
    except (ValueError, AttributeError, TypeError, KeyError):
        return Check("DVC lock", False, f"{lock}: damaged", cure)
    for pid, command in sorted(holders):
        if not _alive(pid):
            continue
        if _runs_dvc(pid):
            return Check(
                "DVC lock",
                True,
                f"process {pid} is at work: {command}",
                "Another dvc command waits, or fails, until then.",
            )
        return Check(
            "DVC lock", False, f"left by a killed `{command}`, whose number {pid} is now another process", cure
        )
    return Check("DVC lock", True, "left by a killed dvc command; the next one clears it" if holders else "free")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _runs_dvc(pid: int) -> bool:
    try:
        return b"dvc" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # no /proc on this system, so believe the lock
