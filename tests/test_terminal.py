"""What a person sees of a run: exact lines in a log, a live bar on a terminal, the summary."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from fedpipe.terminal import LiveProgress, PlainProgress, RunHeader, TimeLeft, clock_time, make_progress

HEADER: dict[str, Any] = {
    "run_id": "la-lora-1a2b3c4d5e",
    "method": "la-lora",
    "clients": 4,
    "rounds": 6,
    "completed_rounds": 0,
    "epsilon_target": 8.0,
    "device": "cpu",
    "dp_valid": True,
}
METRICS = {"accuracy": 0.7412, "loss": 0.5521, "epsilon_max": 5.906, "seconds": 12.34}
SUMMARY: dict[str, Any] = {
    "accuracy": 0.7431, "majority_share": 0.5913, "loss": 0.5491, "epsilon_max": 7.9812, "epsilon_rdp": 8.7304,
    "delta": 1e-5, "rounds": 6, "seconds": 151.7, "bytes_up": 4_872_000, "bytes_down": 4_872_000, "dp_valid": True,
    "unit": "record", "adapter": "models/adapter", "report": "reports/report.html", "ledger": "reports/ledger.json",
    "run_directory": "runs/la-lora-1a2b3c4d5e", "mlflow": {"run_id": "4e4e", "uri": "sqlite:///mlflow.db"},
}  # fmt: skip


def header(**values: Any) -> RunHeader:
    return RunHeader(**(HEADER | values))


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_exactly() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(stream, clock)
    progress.start(header())
    progress.round_done(0, {"accuracy": 0.4104, "loss": 0.7012, "epsilon_max": 0.0, "seconds": None})
    clock.now = 12.5
    progress.clients_done(1, 2, 4)
    progress.round_done(1, METRICS)
    progress.note("written: models/adapter [bold]")
    clock.now = 25.0
    progress.round_done(2, {"accuracy": None, "loss": None, "epsilon_max": 6.5, "seconds": 12.5})

    assert stream.getvalue().splitlines() == [
        "run la-lora-1a2b3c4d5e: la-lora, 4 clients, 6 rounds, epsilon at most 8, on cpu",
        "round 0/6  accuracy 0.410  loss 0.701  epsilon 0.00   -",
        "round 1/6  accuracy 0.741  loss 0.552  epsilon 5.91   12.3 s  left 1 min 2 s",
        "written: models/adapter [bold]",
        "round 2/6  accuracy -      loss -      epsilon 6.50   12.5 s  left 50.0 s",
    ]
    assert stream.getvalue().isascii()


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"completed_rounds": 2}, ["resumed from round 3: 2 done before"]),
        ({"completed_rounds": 6}, ["resumed: all 6 rounds were done before"]),
        (
            {"dp_valid": False},
            ["NOT PRIVATE: the noise is fixed by privacy.test_key, so the epsilon does not hold"],
        ),
        (
            {"dp_valid": False, "completed_rounds": 1, "epsilon_target": None},
            [
                "resumed from round 2: 1 done before",
                "NOT PRIVATE: trained without differential privacy (privacy.unit: none)",
            ],
        ),
        ({}, []),
    ],
)
def test_start_says_resumed_and_not_private(values: dict[str, Any], lines: list[str]) -> None:
    stream = io.StringIO()
    PlainProgress(stream).start(header(**values))
    assert stream.getvalue().splitlines()[1:] == lines


def test_without_dp_no_epsilon_in_a_line() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, Clock())
    progress.start(header(epsilon_target=None, dp_valid=False, rounds=1, clients=1))
    progress.round_done(1, METRICS | {"epsilon_max": None})

    first, _, last = stream.getvalue().splitlines()
    assert first == "run la-lora-1a2b3c4d5e: la-lora, 1 client, 1 round, no privacy, on cpu"
    assert last == "round 1/1  accuracy 0.741  loss 0.552  12.3 s"


def test_time_left_is_the_mean_of_measured_rounds() -> None:
    clock = Clock()
    left = TimeLeft(rounds=6, completed=0, clock=clock)
    assert left.seconds() is None
    clock.now = 10.0
    left.round_done(1)
    assert left.seconds() == pytest.approx(50.0)
    clock.now = 30.0
    left.round_done(2)
    assert left.seconds() == pytest.approx(4 * 15.0)
    clock.now = 36.0
    assert left.seconds() == pytest.approx(4 * 15.0 - 6.0)
    clock.now = 90.0
    assert left.seconds() == pytest.approx(3 * 15.0)  # the current round is late; the others still come
    left.round_done(6)
    assert left.seconds() == 0.0


def test_time_left_counts_neither_earlier_rounds_nor_the_start_model() -> None:
    clock = Clock()
    left = TimeLeft(rounds=6, completed=4, clock=clock)
    clock.now = 100.0
    left.round_done(0)
    assert left.seconds() is None
    clock.now = 107.0
    left.round_done(5)
    assert left.seconds() == pytest.approx(7.0)


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (83.4, "1:23"), (3780, "1:03:00")])
def test_clock_time(seconds: float, shown: str) -> None:
    assert clock_time(seconds) == shown


def test_summary_goes_to_stdout_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress()
    progress.start(header(completed_rounds=2))
    progress.finish(SUMMARY)

    out, err = capsys.readouterr()
    assert err.startswith("run la-lora-1a2b3c4d5e: la-lora")
    assert out.splitlines() == [
        "run            la-lora-1a2b3c4d5e",
        "accuracy       0.743 (majority share 0.591)",
        "loss           0.549",
        "epsilon        7.99, by RDP 8.74 (largest of all clients)",
        "delta          1e-5",
        "rounds         6 (resumed from round 3)",
        "time           2 min 32 s",
        "traffic        4.9 MB up, 4.9 MB down",
        "adapter        models/adapter",
        "report         reports/report.html",
        "ledger         reports/ledger.json",
        "run directory  runs/la-lora-1a2b3c4d5e",
        "MLflow run     4e4e",
        "to see it      mlflow ui --backend-store-uri sqlite:///mlflow.db",
    ]


@pytest.mark.parametrize(
    ("target", "reason"), [(None, "trained without differential privacy"), (8.0, "the noise is fixed by")]
)
def test_summary_of_a_run_that_is_not_private(
    capsys: pytest.CaptureFixture[str], target: float | None, reason: str
) -> None:
    progress = make_progress()
    progress.start(header(epsilon_target=target, dp_valid=False))
    changes = {"dp_valid": False, "mlflow": None} | ({} if target else {"epsilon_max": None, "epsilon_rdp": None})
    progress.finish(SUMMARY | changes)

    out = capsys.readouterr().out
    assert f"privacy        NOT PRIVATE: {reason}" in out
    assert ("\nepsilon " in out) is (target is not None)
    assert "MLflow" not in out


def test_summary_points_to_a_remote_server_itself(capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress()
    progress.start(header())
    progress.finish(SUMMARY | {"mlflow": {"run_id": "4e4e", "uri": "https://mlflow.example.org"}})
    assert "to see it      https://mlflow.example.org\n" in capsys.readouterr().out


def live(width: int = 80) -> tuple[LiveProgress, io.StringIO, Clock, Console]:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=width, height=24, color_system=None, legacy_windows=False)
    return LiveProgress(console, clock), stream, clock, console


def frame(progress: LiveProgress, width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(progress.renderable())
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 200])
def test_live_bar_shows_round_clients_metrics_and_time_left(width: int) -> None:
    progress, _, clock, _ = live(width)
    progress.start(header())
    try:
        progress.clients_done(1, 1, 4)
        top, bottom = frame(progress, width)
        assert top.startswith("round 1/6  ")
        assert top.endswith("--:-- left")
        assert bottom.strip() == "clients 1/4  accuracy -  loss -  epsilon - of 8"

        clock.now = 20.0
        progress.round_done(1, METRICS)
        progress.clients_done(2, 2, 4)
        clock.now = 25.0
        top, bottom = frame(progress, width)
        assert top.startswith("round 2/6  ")
        assert top.endswith("1:35 left")
        assert bottom.strip() == "clients 2/4  accuracy 0.741  loss 0.552  epsilon 5.91 of 8"

        progress.round_done(2, {"accuracy": None, "loss": None, "epsilon_max": 6.0, "seconds": 5.0})
        assert "accuracy 0.741  loss 0.552  epsilon 6.00 of 8" in frame(progress, width)[1]
    finally:
        progress.close()


def test_live_bar_grows_with_the_clients_that_are_done() -> None:
    progress, *_ = live()
    progress.start(header(rounds=2, completed_rounds=1))
    try:
        lengths = []
        for done in range(5):
            progress.clients_done(2, done, 4)
            stream = io.StringIO()
            # Without colours rich draws the rest of a bar as blanks.
            Console(file=stream, width=80, color_system=None).print(progress.renderable())
            lengths.append(len(re.findall("[━╸]", stream.getvalue())))
        assert lengths == sorted(set(lengths))
    finally:
        progress.close()


def test_live_keeps_the_rounds_above_and_gives_the_terminal_back(capsys: pytest.CaptureFixture[str]) -> None:
    progress, stream, *_ = live()
    progress.start(header(dp_valid=False))
    progress.round_done(6, METRICS)
    progress.note("a [bold]note[/bold]")
    running = stream.getvalue()
    assert running.rfind("\x1b[?25h") > running.rfind("\x1b[?25l") >= 0  # a killed run leaves a cursor
    progress.finish(SUMMARY | {"dp_valid": False})
    progress.close()

    seen = stream.getvalue()
    assert "NOT PRIVATE: the noise is fixed by privacy.test_key" in seen
    assert "round 6/6  accuracy 0.741  loss 0.552  epsilon 5.91   12.3 s" in seen
    assert "a [bold]note[/bold]" in seen
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")
    assert "accuracy       0.743" in capsys.readouterr().out


def test_a_stream_that_is_no_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_progress(io.StringIO()), PlainProgress)


@pytest.mark.parametrize(("term", "kind"), [("xterm-256color", LiveProgress), ("dumb", PlainProgress)])
def test_a_terminal_gets_the_bar_unless_it_is_dumb(monkeypatch: pytest.MonkeyPatch, term: str, kind: type) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", term)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(make_progress(Terminal()), kind)


def test_the_terminal_does_not_wait_for_matplotlib() -> None:
    code = "import sys, fedpipe.terminal; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_getting_ready_shows_on_a_terminal_only() -> None:
    stream = io.StringIO()
    with PlainProgress(stream).getting_ready("the plan"):
        pass
    assert stream.getvalue() == ""
    console = Console(file=stream, force_terminal=True, width=80)
    with LiveProgress(console).getting_ready("the plan"):
        pass
    assert "the plan" in stream.getvalue()
