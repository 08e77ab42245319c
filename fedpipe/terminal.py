"""What a person sees of a run: a live bar on a terminal, plain lines in a log, a summary at the end.

Progress goes to stderr and the summary to stdout, so that either can be kept alone.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedpipe.report import numbers
from fedpipe.report.summary import RunHeader, cost_line, header_lines, print_summary, round_line

__all__ = ["LiveProgress", "PlainProgress", "Progress", "RunHeader", "TimeLeft", "clock_time", "make_progress"]


class Progress(Protocol):
    """What the flow reports while a run goes on. Call it from the main thread only."""

    def getting_ready(self, what: str) -> AbstractContextManager[object]:
        """Show, while the body runs and before `start`, what is being done."""

    def start(self, header: RunHeader) -> None:
        """Show what is about to run."""

    def round_begins(self, round: int, before: float, after: float) -> None:
        """Show what a round will cost: the largest epsilon of its clients without it, and with it."""

    def clients_done(self, round: int, done: int, total: int) -> None:
        """Show that `done` of the round's `total` clients are trained."""

    def round_done(self, round: int, metrics: Mapping[str, float | None]) -> None:
        """Show a finished round: `accuracy`, `loss`, `epsilon_max`, `seconds`; None was not measured."""

    def note(self, text: str) -> None:
        """Show one line of plain text."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the summary: the keys of `reports/metrics.json`, and where things are.

        The places are `adapter`, `report`, `ledger`, `run_directory` (paths) and `mlflow`
        (`run_id` and `uri`, or None); one that is missing is left out.
        """

    def close(self) -> None:
        """Give the terminal back; safe to call at any time, and again. For `finally`."""


class TimeLeft:
    """How long the rest of a run takes, by the rounds that this process has measured.

    Rounds of an earlier process may have run on another machine, so they do not count.
    """

    def __init__(self, rounds: int, completed: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rounds, self._completed, self._clock = rounds, completed, clock
        self._measured = 0
        self._started = self._last = clock()

    def round_done(self, round: int) -> None:
        self._last = self._clock()
        if round > self._completed:
            self._measured += round - self._completed
            self._completed = round
        elif not self._measured:
            self._started = self._last  # the evaluation of the start model is no round

    def seconds(self) -> float | None:
        """Return the seconds left, None until a round is measured."""
        left = self._rounds - self._completed
        if left <= 0:
            return 0.0
        if not self._measured:
            return None
        mean = (self._last - self._started) / self._measured
        return mean * (left - 1) + max(mean - (self._clock() - self._last), 0.0)


def make_progress(stream: TextIO | None = None) -> Progress:
    """Return a live display if `stream` (default stderr) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    live = stream.isatty() and console.is_terminal and not console.is_dumb_terminal
    return LiveProgress(console) if live else PlainProgress(stream)


class PlainProgress:
    """One plain line for each thing that happened."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._header: RunHeader | None = None
        self._left = TimeLeft(0, 0, clock)

    def getting_ready(self, what: str) -> AbstractContextManager[object]:
        return nullcontext()

    def start(self, header: RunHeader) -> None:
        self._header = header
        self._left = TimeLeft(header.rounds, header.completed_rounds, self._clock)
        for line in header_lines(header):
            self.note(line)

    def round_begins(self, round: int, before: float, after: float) -> None:
        self.note(cost_line(self._header, round, before, after))

    def clients_done(self, round: int, done: int, total: int) -> None:
        """Say nothing: a line for each client would bury the rounds."""

    def round_done(self, round: int, metrics: Mapping[str, float | None]) -> None:
        self._left.round_done(round)
        self.note(round_line(self._header, round, metrics, self._left.seconds()))

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.close()
        print_summary(self._header, summary)

    def close(self) -> None:
        """There is nothing to give back."""


class LiveProgress:
    """A bar that stays at the bottom of the terminal, the finished rounds above it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._header: RunHeader | None = None
        self._left = TimeLeft(0, 0, clock)
        self._live: Live | None = None
        self._round, self._done, self._total = 1, 0, 0
        self._metrics: dict[str, float | None] = {}
        self._ahead: float | None = None

    def getting_ready(self, what: str) -> AbstractContextManager[object]:
        return self._console.status(what)

    def start(self, header: RunHeader) -> None:
        self._header = header
        self._left = TimeLeft(header.rounds, header.completed_rounds, self._clock)
        self._round, self._total = min(header.completed_rounds + 1, header.rounds), 0
        for line in header_lines(header):
            self._console.print(Text(line, style="bold red" if line.startswith("NOT PRIVATE") else ""))
        self._live = Live(console=self._console, get_renderable=self.renderable, refresh_per_second=4, transient=True)
        self._live.start()
        # A killed process cannot bring the cursor back, so it is never taken away.
        self._console.show_cursor(True)
        atexit.register(self.close)

    def round_begins(self, round: int, before: float, after: float) -> None:
        self._round, self._ahead = round, after

    def clients_done(self, round: int, done: int, total: int) -> None:
        self._round, self._done, self._total = round, done, total

    def round_done(self, round: int, metrics: Mapping[str, float | None]) -> None:
        self._left.round_done(round)
        self._ahead = None
        self._metrics.update({name: value for name, value in metrics.items() if value is not None})
        self.note(round_line(self._header, round, metrics))
        rounds = self._header.rounds if self._header else round
        self._round, self._done, self._total = min(round + 1, rounds), int(round >= rounds), int(round >= rounds)

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.close()
        print_summary(self._header, summary)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)

    def renderable(self) -> RenderableType:
        """Return the two lines at the bottom: where the run is, and how well it does."""
        rounds = self._header.rounds if self._header else 1
        part = self._done / self._total if self._total else 0.0
        line = Table.grid(padding=(0, 2, 0, 0), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        left = self._left.seconds()
        line.add_row(
            Text(f"round {self._round}/{rounds}", style="bold"),
            ProgressBar(total=rounds, completed=self._round - 1 + part, complete_style="cyan", finished_style="cyan"),
            f"{clock_time(left)} left" if left is not None else "--:-- left",
        )
        clients = f"clients {self._done}/{self._total}  " if self._total and self._round - 1 + part < rounds else ""
        line.add_row("", Text(clients + self._measures(), style="dim", overflow="ellipsis", no_wrap=True), "")
        return line

    def _measures(self) -> str:
        target = self._header.epsilon_target if self._header else None
        parts = [f"{name} {numbers.number(self._metrics.get(name))}" for name in ("accuracy", "loss")]
        if target is not None:
            ahead = "" if self._ahead is None else f", {numbers.epsilon(self._ahead)} after this round"
            parts.append(f"epsilon {numbers.epsilon(self._metrics.get('epsilon_max'))} of {target:g}{ahead}")
        return "  ".join(parts)


def clock_time(seconds: float) -> str:
    """Return a length of time as a clock shows it.

    >>> clock_time(83.4), clock_time(3780)
    ('1:23', '1:03:00')
    """
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
