"""What MLflow did not take yet: a list in memory, and a file while the list is not empty.

An entry is tried again until it succeeds, so doing one twice must change nothing. Metric
points carry the time at which they were first offered: MLflow drops a point whose name,
round, time and value it has, which covers an answer that was lost on its way back.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedpipe.errors import StateError, StorageError
from fedpipe.files import canonical_json, storage, write_atomic
from fedpipe.tracking.store import reason

log = logging.getLogger(__name__)

Entry = dict[str, Any]  # "kind": metrics | tags | artifacts | model, and what it needs


class Pending:
    """Entries that wait, oldest first; `path` holds them, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = self._load()
        self._warned = False

    def process(self, new: Iterable[Entry], perform: Callable[[Entry], None]) -> bool:
        """Do the waiting entries, then the new ones; keep those that fail; return whether none is left.

        Once an entry has failed, no other of its kind is tried, and no model, which needs the rest
        to be there. So a store that is away costs little time, and artifacts that cannot be copied
        do not hold up the metrics.
        """
        kept: list[Entry] = []
        for entry in [*self.entries, *new]:
            failed = {other["kind"] for other in kept}
            if entry["kind"] in failed or (failed and entry["kind"] == "model"):
                kept.append(entry)
                continue
            try:
                perform(entry)
            except Exception as error:  # whatever is wrong with the record of a run, the run goes on
                kept.append(entry)
                self._warn(error)
        self._keep(kept)
        return not kept

    def _load(self) -> list[Entry]:
        try:
            return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise StateError(
                f"{self.path}: what MLflow has yet to record cannot be read: {error}; delete it to do without"
            ) from error

    def _keep(self, entries: list[Entry]) -> None:
        if entries == self.entries:
            return
        self.entries = entries
        # A disk that is full for MLflow may be full here too; the entries stay in memory.
        with contextlib.suppress(StorageError), storage(self.path):
            if entries:
                write_atomic(self.path, "".join(canonical_json(entry) + "\n" for entry in entries).encode())
            else:
                self.path.unlink(missing_ok=True)
                self._warned = False

    def _warn(self, error: Exception) -> None:
        level = logging.DEBUG if self._warned else logging.WARNING
        log.log(level, "MLflow does not take what is recorded: %s. The run goes on; it is tried again", reason(error))
        self._warned = True
