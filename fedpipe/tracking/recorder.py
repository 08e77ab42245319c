"""The tracker behind which there is a store, which may be away at any time.

What is offered waits in a queue until the store has taken it. A store that is away is asked
again after a while, and each time after a longer one, so that it costs a run seconds. The queue
need not outlast the process: whoever opens the run again offers all of it from the state on disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedpipe.config import TrackingSettings
from fedpipe.errors import hide_password
from fedpipe.tracking.description import RunDescription
from fedpipe.tracking.model import Entry
from fedpipe.tracking.notes import PRODUCTS, Notes, Recorded
from fedpipe.tracking.reach import PROBE, StoreAwayError, answers, reached, reason, unless_busy
from fedpipe.tracking.run import MlflowRun, read_memo
from fedpipe.tracking.store import open_store
from fedpipe.tracking.tracker import Status, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 15.0, 600.0  # seconds before a store that is away is asked again


class MlflowTracker(Tracker):
    """A tracker that records one run; made by `Tracker.open`."""

    def __init__(self, settings: TrackingSettings, description: RunDescription, memo: Path, patient: bool) -> None:
        self._settings, self._description, self._memo = settings, description, memo
        self._notes, self._run = Notes(memo.parent), None
        self._queue: list[Entry] = []
        self._offered: set[int] = set()
        self._published: set[str] = set()
        self._done = -1  # MLflow has this round and all before it
        self._pause, self._asked, self._trouble = 0.0, 0.0, ""
        try:
            self._run = self._opened()
        except StoreAwayError as error:
            if not patient:
                raise
            self._is_away(error)
        # Not before the settings have turned out to name a store.
        self._notes.describe(description)

    @property
    def recorded(self) -> int | None:
        return self._done

    @property
    def info(self) -> dict[str, str | None]:
        if self._run is not None:
            return dict(self._run.info)
        known = read_memo(self._memo)
        return known if known.get("uri") == hide_password(str(self._settings.uri)) else {}

    @property
    def run_url(self) -> str | None:
        info = self.info
        uri = str(info.get("uri"))
        if not uri.startswith("http"):
            return None
        return f"{uri.rstrip('/')}/#/experiments/{info['experiment_id']}/runs/{info['run_id']}"

    def log_round(self, round: int, metrics: Mapping[str, float | None], directory: Path | None = None) -> None:
        entries = [_metrics(round, metrics)]
        if directory is not None:
            entries.append(_artifacts(directory, f"rounds/{round:04d}", round))
        self._offered.add(round)
        self._offer(*entries)

    def log_final(self, metrics: Mapping[str, float | None], adapter: Path, description: str) -> None:
        source = str(adapter.absolute())
        model = {"kind": "model", "product": "adapter", "source": source, "names": list(metrics), "note": description}
        self._published.add("adapter")
        self._offer(_metrics(None, metrics), _artifacts(adapter, "adapter"), model)
        self._keep("adapter")

    def log_reports(self, directory: Path) -> None:
        self._published.add("reports")
        self._offer(_artifacts(directory, "reports"))
        self._keep("reports")

    def tag(self, tags: Mapping[str, str]) -> None:
        self._offer({"kind": "tags", "tags": dict(tags)})

    def close(self, status: Status) -> dict[str, str | None]:
        self._flush()
        if self._run is not None and not self._pause:
            try:
                unless_busy(lambda run=self._run: run.end(status))
            except Exception as error:  # the run itself is complete; only its record lacks the end
                self._trouble = reason(error)
            else:
                self._note(status)
                if not self._queue:
                    return self.info
        log.warning(
            "MLflow lacks %s of run %s (%s): kept in the run's directory; '%s' records it",
            self._missing(),
            self._description.run_id,
            self._trouble,
            self._description.again,
        )
        return self.info

    @property
    def _client(self) -> MlflowClient:
        assert self._run is not None
        return self._run.client

    def _opened(self) -> MlflowRun:
        """Open the store and the run in it; take over what is noted about that MLflow run."""
        store = unless_busy(lambda: open_store(self._settings))
        with reached(store.uri):
            run = unless_busy(lambda: MlflowRun(store, self._description, self._memo))
        recorded = self._notes.recorded
        self._done = recorded.rounds if recorded.run_id == run.id else -1
        return run

    def _offer(self, *entries: Entry) -> None:
        self._queue += entries
        if time.monotonic() >= self._asked + self._pause:
            self._flush()

    def _flush(self) -> None:
        """Record what waits, oldest first; what fails waits on."""
        if not self._ready():
            return
        # Once an entry has failed, no other of its kind is tried, and no model, which needs the rest to be there:
        # artifacts that cannot be copied do not hold up the metrics.
        left: list[Entry] = []
        for position, entry in enumerate(self._queue):
            failed = {other["kind"] for other in left}
            if entry["kind"] in failed or (failed and entry["kind"] == "model"):
                left.append(entry)
                continue
            began = time.monotonic()
            try:
                self._perform(entry)
            except Exception as error:  # whatever is wrong with the record of a run, the run goes on
                left.append(entry)
                if time.monotonic() - began > PROBE or not answers(self._run.address):
                    left += self._queue[position + 1 :]
                    self._is_away(error)
                    break
                self._warn(error)
        self._queue = left
        if not left:
            self._trouble = ""
        self._note()

    def _ready(self) -> bool:
        """Say whether the store is there; open it if it was not there before."""
        if self._run is not None and not self._pause:
            return True
        try:
            if self._run is None:
                self._run = self._opened()
            elif not answers(self._run.address):
                raise StoreAwayError(self._trouble)
        except Exception as error:  # the run goes on, as below
            self._is_away(error)
            return False
        self._pause = 0.0
        return True

    def _perform(self, entry: Entry) -> None:
        recorded = entry["kind"] == "artifacts" and entry["round"] is not None and entry["round"] <= self._done
        if not recorded:
            run = self._run
            unless_busy(lambda: run.perform(entry))

    def _is_away(self, error: BaseException) -> None:
        self._warn(error)
        self._asked = time.monotonic()
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE)

    def _warn(self, error: BaseException) -> None:
        # The longer words are for a command that stops.
        cause = error.__cause__ if isinstance(error, StoreAwayError) else None
        known, self._trouble = self._trouble, reason(cause or error)
        level = logging.DEBUG if known else logging.WARNING
        log.log(level, "MLflow does not take what is recorded: %s. The run goes on; it is tried again", self._trouble)

    def _note(self, status: Status | None = None) -> None:
        """Note how far MLflow has the run, and drop the copies of what it has."""
        waiting = {entry["round"] for entry in self._queue if "round" in entry}
        while self._done + 1 in self._offered - waiting:
            self._done += 1
            self._offered.discard(self._done)
        assert self._run is not None
        known = self._notes.recorded
        end = known.end and known.run_id == self._run.id
        if status is not None:
            end = status == "FINISHED" and not self._queue and (end or self._published == set(PRODUCTS))
        recorded = Recorded(self._run.id, self._done, end)
        if recorded != known:
            self._notes.note(recorded)
        for product in PRODUCTS:
            if product in self._published and not any(entry.get("product") == product for entry in self._queue):
                self._notes.drop(product)

    def _keep(self, product: str) -> None:
        """Copy what MLflow did not take, before another run is published over it."""
        waiting = [entry for entry in self._queue if entry.get("product") == product]
        if waiting:
            copy = self._notes.keep(product, Path(waiting[-1]["source"]))
            for entry in waiting:
                entry["source"] = str(copy)

    def _missing(self) -> str:
        """Name what waits."""
        rounds = sorted({entry["round"] for entry in self._queue if entry.get("round") is not None})
        products = {entry.get("product") for entry in self._queue}
        words = [_range(rounds)] if rounds else []
        words += [f"the {name}" for name in PRODUCTS if name in products]
        return " and ".join(filter(None, (", ".join(words), "the end")))


def _metrics(round: int | None, metrics: Mapping[str, float | None]) -> Entry:
    return {"kind": "metrics", "round": round, "values": dict(metrics), "time": int(time.time() * 1000)}


def _artifacts(directory: Path, target: str, round: int | None = None) -> Entry:
    product = None if round is not None else target
    source = str(directory.absolute())
    return {"kind": "artifacts", "source": source, "target": target, "round": round, "product": product}


def _range(rounds: list[int]) -> str:
    return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]} to {rounds[-1]}"
