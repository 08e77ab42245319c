"""The kill matrix: killed at random instants and at chosen points, a run ends as if nothing had happened.

`FEDPIPE_KILLS` is the number of random kills of the slow test, 100 unless it is set; they are spread
evenly over the duration of an undisturbed run, of each kind of run in turn.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from commands import Done, Fault, fedpipe, new_project, start
from undisturbed import differences, everything

from fedpipe.files import read_sealed

SLOW = pytest.mark.slow
KILLED = -signal.SIGKILL
KILLS = int(os.environ.get("FEDPIPE_KILLS", "100"))

# Between them they write every kind of file that a run has.
KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "kept": {  # clients keep tensors, the server remembers moments, the frozen layers' output is on disk
        "method": {"name": "fedsa-lora", "server": "momentum"},
        "lora": {"last_layers": 1},
        "runtime": {"cache_frozen_prefix": True, "cohort_size": 2},
    },
    "secure": {"federation": {"secure_aggregation": True}, "runtime": {"cohort_size": 2}},
    "whole clients": {
        "partition": {"clients": 6},
        "federation": {"clients_per_round": 3},
        "privacy": {"unit": "client", "accountant": "rdp", "delta": 0.01},
    },
}


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbed: all that it left, and how long it took."""

    left: dict[str, Any]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a kind of run to what it is if nobody disturbs it."""

    @lru_cache
    def of(kind: str, times: int = 1) -> Undisturbed:
        took = []
        for _ in range(times):
            project = new_project(tmp_path_factory.mktemp("undisturbed") / "project", tracked=True, **KINDS[kind])
            done, seconds = timed(project)
            assert done.code == 0, done.err
            took.append(seconds)
        return Undisturbed(everything(project), statistics.median(took))

    return of


def timed(project: Path, killed_after: float | None = None) -> tuple[Done, float]:
    """Run to the end, or kill the process after so many seconds; return how it ended, and after how long."""
    began = time.monotonic()
    command = start(project, "run")
    if killed_after is not None:
        command.process.join(max(0.0, began + killed_after - time.monotonic()))
        if command.process.exitcode is None:
            os.kill(command.process.pid, signal.SIGKILL)
    done = command.wait()
    return done, time.monotonic() - began


def trained(project: Path) -> dict[Path, tuple[int, int]]:
    """Return inode and time of all files of complete rounds, and of cohorts that are trained: they stay as they are."""
    found = [path for record in project.glob("runs/*/rounds/*/round.json") for path in record.parent.rglob("*")]
    for listing in project.glob("runs/*/*/*/cohort-*.json"):
        sent = [entry.get("file") for entry in read_sealed(listing)["updates"].values()]
        found += [listing, *(listing.parent / name for name in sent if name)]
    return {path: stamp(path) for path in found if path.is_file() and not path.name.endswith(".tmp")}


def stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def wrong_after(project: Path, before: dict[Path, tuple[int, int]], done: Done, expected: Undisturbed) -> list[str]:
    """Say what is not as it should be after a killed run was started again."""
    if done.code != 0 or "Traceback" in done.err:
        return [f"exit code {done.code}: {done.err[-1500:]}"]
    try:
        wrong = differences(everything(project), expected.left)
    except (AssertionError, ValueError) as error:
        wrong = [repr(error)[:1500]]
    # What is confidential is deleted with its round.
    return wrong + [f"{path}: was made again" for path, old in before.items() if path.exists() and stamp(path) != old]


@dataclass
class Tally:
    """What became of random kills."""

    kills: int = 0
    survived: int = 0
    resumed: int = 0  # of these, with a round or a cohort that was done
    lost: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of an undisturbed run

    def __str__(self) -> str:
        lost = sorted(self.lost)
        return (
            f"{self.kills} kills, {self.survived} survived, {self.resumed} with something done before; seconds lost: "
            f"median {statistics.median(lost):.1f}, worst {lost[-1]:.1f}, "
            f"of runs of {min(self.seconds.values()):.1f} to {max(self.seconds.values()):.1f}"
        )


def kill_at_random(tmp_path: Path, undisturbed: Any, kinds: Sequence[str], kills: int) -> Tally:
    """Kill and restart runs, one instant in each of as many equal parts of a run as each kind has kills."""
    tally, generator = Tally(), random.Random(20261120)
    for number in range(kills):
        kind, parts = kinds[number % len(kinds)], -(-kills // len(kinds))
        expected = undisturbed(kind, times=3 if kills > 2 else 1)
        instant = (number // len(kinds) + generator.random()) / parts * expected.seconds
        for again in itertools.count():
            project = new_project(tmp_path / f"project-{number}-{again}", tracked=True, **KINDS[kind])
            done, first = timed(project, instant)
            if done.code != 0:
                break
            instant = generator.random() * first  # it was faster than the undisturbed one
        assert done.code == KILLED, done.err
        before = trained(project)
        done, second = timed(project)
        wrong = wrong_after(project, before, done, expected)
        tally.kills += 1
        tally.seconds[kind] = expected.seconds
        tally.survived += not wrong
        tally.resumed += bool(before)
        # What was done twice, and the second start.
        tally.lost.append(first + second - expected.seconds)
        tally.wrong += [f"{kind}, killed after {instant:.3f} s: {line}" for line in wrong]
    return tally


def test_killed_at_random(tmp_path: Path, undisturbed: Any) -> None:
    tally = kill_at_random(tmp_path, undisturbed, ["usual"], 1)
    assert not tally.wrong, tally.wrong


@SLOW
def test_killed_at_many_random_instants(
    tmp_path: Path, undisturbed: Any, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tally = kill_at_random(tmp_path, undisturbed, list(KINDS), KILLS)
    record_property("kills", str(tally))
    with capsys.disabled():
        print(f"\n{tally}", *tally.wrong, sep="\n")
    assert not tally.wrong
    assert tally.survived == tally.kills == KILLS


POINTS: dict[str, list[tuple[str, str, int]]] = {
    "usual": [
        ("fedpipe.data.origin", "write_sealed", 1),
        ("fedpipe.data.federation", "write_table", 2),
        ("fedpipe.data.federation", "write_sealed", 1),
        ("fedpipe.state", "_new_ledger", 1),
        ("fedpipe.state", "write_sealed", 1),  # plan.json
        ("fedpipe.privacy.keys", "_write_synced", 1),  # the key
        ("fedpipe.state", "write_sealed", 2),  # runtime.json
        ("fedpipe.state", "write_sealed", 3),  # run.json
        ("fedpipe.tracking.run", "_create", 1),
        ("fedpipe.tracking.run", "write_json", 1),  # mlflow.json
        ("fedpipe.tracking.notes", "write_json", 1),
        ("fedpipe.tracking.recorder", "unless_busy", 4),
        ("fedpipe.tracking.recorder", "unless_busy", 8),
        ("fedpipe.steps.preparing", "write_tensors", 1),
        ("fedpipe.steps.preparing", "write_sealed", 1),
        ("fedpipe.steps.beginning", "write_sealed", 2),
        ("fedpipe.privacy.ledger", "_write", 4),
        ("fedpipe.steps.training", "write_tensors", 5),
        ("fedpipe.steps.training", "write_sealed", 2),
        ("fedpipe.steps.aggregating", "server_round", 2),
        ("fedpipe.steps.aggregating", "write_tensors", 2),
        ("fedpipe.steps.evaluating", "write_sealed", 3),
        ("fedpipe.steps.aggregating", "write_sealed", 2),  # round.json
        ("fedpipe.publish", "write_tensors", 1),
        ("fedpipe.publish", "write_json", 4),  # run.json of the reports
        ("fedpipe.publish", "write_json", 7),  # once more, now with what MLflow calls the run
        ("fedpipe.tracking.run", "log_model", 1),
        ("fedpipe.report.final", "write_json", 1),
        ("fedpipe.state", "write_sealed", 4),  # complete.json
        ("fedpipe.privacy.keys", "_write_synced", 2),  # zeros over the key
    ],
    "kept": [
        ("fedpipe.client.prefix", "write_sealed", 1),
        ("fedpipe.steps.training", "write_tensors", 8),
        ("fedpipe.steps.training", "write_sealed", 3),
        ("fedpipe.steps.aggregating", "write_tensors", 4),
        ("fedpipe.publish", "write_tensors", 2),
    ],
    "secure": [
        ("fedpipe.steps.training", "put", 5),
        ("fedpipe.steps.training", "write_sealed", 3),
        ("fedpipe.steps.summing", "secure_sum", 2),
        ("fedpipe.steps.summing", "write_tensors", 2),
        ("fedpipe.steps.summing", "write_sealed", 2),
        ("fedpipe.steps.aggregating", "empty", 2),
        ("fedpipe.steps.aggregating", "empty", 3),  # of the last round
    ],
    "whole clients": [
        ("fedpipe.steps.beginning", "open_work", 2),
        ("fedpipe.steps.training", "write_sealed", 2),
        ("fedpipe.privacy.ledger", "_write", 3),
        ("fedpipe.steps.releasing", "write_tensors", 2),
        ("fedpipe.steps.aggregating", "write_sealed", 2),
        ("fedpipe.steps.aggregating", "forget_work", 2),
    ],
}
FAULTS = [
    (kind, Fault(*point, after=after)) for kind, points in POINTS.items() for point in points for after in (False, True)
]
TORN = ("usual", Fault("fedpipe.privacy.ledger", "_write", 4, "TORN"))


@pytest.mark.parametrize(
    ("kind", "fault"),
    [TORN, *(pytest.param(kind, fault, marks=SLOW) for kind, fault in FAULTS)],
    ids=lambda part: (
        f"{part.function}-{part.number}-{'after' if part.after else part.kind}" if isinstance(part, Fault) else part
    ),
)
def test_killed_at_a_chosen_point(tmp_path: Path, undisturbed: Any, kind: str, fault: Fault) -> None:
    project = new_project(tmp_path / "project", tracked=True, **KINDS[kind])
    assert fedpipe(project, "run", fault=fault).code == KILLED, "the run does not pass this point any more"
    before = trained(project)
    assert not wrong_after(project, before, fedpipe(project, "run"), undisturbed(kind))


@SLOW
def test_killed_again_and_again(tmp_path: Path, undisturbed: Any) -> None:
    """With a little more time at every start, as on a machine that fails every few seconds."""
    project, generator = new_project(tmp_path / "project", tracked=True), random.Random(7)
    whole, kills = undisturbed("usual"), 0
    for step in range(1, 100):
        before = trained(project)
        done, _ = timed(project, whole.seconds * min(1.0, 0.1 * step) * generator.random())
        assert all(stamp(path) == old for path, old in before.items())
        if done.code == 0:
            break
        assert done.code == KILLED, done.err
        kills += 1
    assert kills > 3
    assert not wrong_after(project, {}, done, whole)


@SLOW
@pytest.mark.parametrize("killed", [None, Fault("fedpipe.steps.training", "write_tensors", 5)])
def test_a_clock_that_jumps_back(tmp_path: Path, undisturbed: Any, killed: Fault | None) -> None:
    """In the middle of a run; or before a killed one is started again, all of whose files are then of the future."""
    project = new_project(tmp_path / "project", tracked=True)
    if killed is not None:
        assert fedpipe(project, "run", fault=killed).code == KILLED
    before = trained(project)
    point = ("fedpipe.steps.training", "train_cohort", 2) if killed is None else ("fedpipe.cli", "main", 1)
    done = fedpipe(project, "run", fault=Fault(*point, "BACK", lasting=False))
    assert not wrong_after(project, before, done, undisturbed("usual"))


def server_of(process: subprocess.Popen[str]) -> int | None:
    """Return the Prefect server that a run has brought with it, once it is there."""
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "flows.embedded"], capture_output=True, text=True)
    return int(found.stdout.split()[0]) if found.stdout.split() else None


@SLOW
def test_its_prefect_server_killed_at_random(
    tmp_path: Path, undisturbed: Any, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on with another server; killed before it answered, the run says so and nothing has begun."""
    expected, generator = undisturbed("usual"), random.Random(20261121)
    kills, went_on, wrong = max(1, KILLS // 10), 0, []
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    seconds = 0.0
    for number in range(-1, kills):
        project = new_project(tmp_path / f"project-{number}", tracked=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        run = subprocess.Popen([Path(sys.executable).with_name("fedpipe"), "run"], cwd=project, env=clean, **pipes)
        began = time.monotonic()
        while (server := server_of(run)) is None:
            assert run.poll() is None
            began = time.monotonic()
            time.sleep(0.02)
        if number >= 0:  # the first one tells how long it takes
            time.sleep((number + generator.random()) / kills * seconds)
            if run.poll() is None:
                os.kill(server, signal.SIGKILL)
        out, err = run.communicate(timeout=300)
        seconds = seconds or time.monotonic() - began
        done = Done(run.returncode, out, err)
        went_on += done.code == 0 and number >= 0
        if done.code != 0:
            wrong += [] if (done.code, len(done.errors), "Traceback" in err) == (2, 1, False) else [err[-1500:]]
            done = fedpipe(project, "run")
        wrong += [f"server {number}: {line}" for line in wrong_after(project, {}, done, expected)]
    said = f"{kills} kills of the Prefect server: {went_on} runs went on, the others at the next start"
    record_property("server kills", said)
    with capsys.disabled():
        print(f"\n{said}", *wrong, sep="\n")
    assert not wrong
