"""Recording in a thread of its own, so that one round is recorded while the next one trains."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fedpipe.tracking.tracker import Status, Tracker


class BackgroundTracker(Tracker):
    """A tracker before which nobody waits, unless it takes longer than a round.

    At most one round is under way: a store that is slow or away holds up what it would have
    held up anyway, and never a long queue at the end. What has no next round to overlap with,
    the end of a run, is recorded at once. A process that is killed loses the round under way,
    like one killed just before: the next process, or `fedpipe sync`, offers every complete round again.

    Parameters
    ----------
    tracker
        Does the work. From here on, only this object calls it.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        self._under_way: Future[None] | None = None

    def log_round(self, round: int, metrics: Mapping[str, float | None], directory: Path | None = None) -> None:
        self._settle()
        self._under_way = self._worker.submit(self._tracker.log_round, round, metrics, directory)

    def log_final(self, metrics: Mapping[str, float | None], adapter: Path, description: str) -> None:
        self._settle()
        self._tracker.log_final(metrics, adapter, description)

    def log_reports(self, directory: Path) -> None:
        self._settle()
        self._tracker.log_reports(directory)

    def tag(self, tags: Mapping[str, str]) -> None:
        self._settle()
        self._tracker.tag(tags)

    def close(self, status: Status) -> dict[str, str | None]:
        self._worker.shutdown()
        info = self._tracker.close(status)
        self._settle()
        return info

    @property
    def recorded(self) -> int | None:
        return self._tracker.recorded

    @property
    def info(self) -> dict[str, str | None]:
        return self._tracker.info

    @property
    def run_url(self) -> str | None:
        return self._tracker.run_url

    def _settle(self) -> None:
        """Wait for the round under way; raise what went wrong with it."""
        future, self._under_way = self._under_way, None
        if future is not None:
            future.result()
