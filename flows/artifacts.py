"""Prefect's artifacts: what people look at while a run goes on, and no reason to stop it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact

from flows.embedded import is_gone

log = logging.getLogger("fedpipe.prefect")

PAUSE = 300.0  # seconds before a server that was away is told of progress again

_away_since = -PAUSE


def _told(tell: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Tell Prefect's server, unless it was away just before; return its answer, or None."""
    global _away_since
    if time.monotonic() < _away_since + PAUSE:
        return None
    try:
        return tell(*args, **kwargs)
    except Exception as error:
        if not is_gone(error):
            raise
        log.warning("Prefect's server does not answer; the run goes on, and its progress is not shown there")
        _away_since = time.monotonic()
        return None


def begin_bar(percent: float, description: str) -> UUID | None:
    """Show a run's progress; None where nobody could be told."""
    return _told(create_progress_artifact, progress=percent, key="rounds-done", description=description)


def move_bar(bar: UUID | None, percent: float) -> None:
    if bar is not None:
        _told(update_progress_artifact, bar, percent)


def show_table(rows: Sequence[Mapping[str, Any]], key: str, description: str | None = None) -> None:
    _told(create_table_artifact, table=list(rows), key=key, description=description)
