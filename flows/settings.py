"""What Prefect must be told before it is first imported, so that a run on a laptop is quiet and leaves nothing behind.

Prefect reads its settings once, at import, from (first wins) the environment, `.env`,
`prefect.toml` in the working directory, and the user's profile. `prefect.toml` says what
holds for this project whoever starts it. Here are the same defaults for a working directory
without that file, and two that only a run in a terminal wants.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PROJECT_DEFAULTS: Mapping[str, str] = {
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # Prefect's own default is pickle
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # the first start migrates a database
}
TERMINAL_DEFAULTS: Mapping[str, str] = {
    "DO_NOT_TRACK": "1",
    # A server that is gone or hangs costs a minute or three at the end, not ten.
    "PREFECT_API_REQUEST_TIMEOUT": "10",
    "PREFECT_CLIENT_MAX_RETRIES": "2",
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",  # else every event that it does not take is an error on the terminal
    # The progress bar owns the terminal. Prefect's API still receives every log line.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}


def quiet(root: Path | None = None) -> None:
    """Set what the environment, `.env` and `prefect.toml` leave open. Call it before the first import of prefect.

    Prefect's database, results and logs go to `.prefect/` below `root`, the working directory
    by default: a home directory may be missing or read-only, and a database in it may belong
    to another version of Prefect. A profile in the home directory, with the address of a
    server for instance, still counts.
    """
    home = Path.home() / ".prefect"
    defaults = {
        **PROJECT_DEFAULTS,
        **TERMINAL_DEFAULTS,
        "PREFECT_HOME": str((root or Path.cwd()).resolve() / ".prefect"),
    }
    if "PREFECT_HOME" not in os.environ and (home / "profiles.toml").is_file():
        defaults["PREFECT_PROFILES_PATH"] = str(home / "profiles.toml")
    in_files = set(_in_toml()) | _in_dotenv()
    for name, value in defaults.items():
        if name not in in_files:
            os.environ.setdefault(name, value)


def _in_toml() -> Iterator[str]:
    try:
        content = tomllib.loads(Path("prefect.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # Prefect itself reports a file that is not TOML
        return
    yield from _names(content, "PREFECT")


def _names(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield the environment name of each setting in a table of `prefect.toml`."""
    for key, value in table.items():
        name = f"{prefix}_{key.upper()}"
        if isinstance(value, Mapping):
            yield from _names(value, name)
        else:
            yield name


def _in_dotenv() -> set[str]:
    try:
        lines = Path(".env").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return set()
    return {line.partition("=")[0].removeprefix("export ").strip().upper() for line in lines}
