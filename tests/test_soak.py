"""Hundreds of rounds: memory, open files, threads, and the work of a round stay what they were after the first ones.

The real command with Prefect and MLflow, on a tiny model with two clients, watched from outside.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import new_project, start

from fedpipe.files import read_json

MORE_MEMORY = 1.1  # that is flat: medians of rounds differ by what numbers of a longer history take, and no more
MORE_WORK = 1.5  # processor time of a round, at the end over the beginning; a machine that is shared has its moods


@dataclass(frozen=True)
class Seen:
    """A process after a round: private memory in MiB, open files, threads, processor seconds so far."""

    memory: float
    files: int
    threads: int
    seconds: float


def look(process: int) -> Seen:
    root = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (root / "status").read_text().splitlines())
    ticks = sum(map(int, (root / "stat").read_text().rpartition(")")[2].split()[11:13]))
    return Seen(
        memory=int(status["RssAnon"].split()[0]) / 1024,
        files=len(os.listdir(root / "fd")),
        threads=int(status["Threads"]),
        seconds=ticks / os.sysconf("SC_CLK_TCK"),
    )


def soaked(project: Path, rounds: int) -> dict[int, Seen]:
    """Run to the end; return what the process looked like when each round was complete."""
    command, seen, number = start(project, "run"), {}, 1
    deadline = time.monotonic() + 60 + 10 * rounds
    while command.process.is_alive() and number <= rounds and time.monotonic() < deadline:
        if any(project.glob(f"runs/*-*/rounds/{number:04d}/round.json")):
            seen[number] = look(command.process.pid)
            number += 1
        else:
            time.sleep(0.02)
    done = command.wait(timeout=120)
    assert done.code == 0, done.err
    assert max(seen) == rounds
    return seen


def medians(seen: Mapping[int, Seen], first: int, last: int) -> Seen:
    """Return the medians of some rounds; of processor time, the mean of a round."""
    found = [seen[number] for number in range(first, last + 1)]
    each = (found[-1].seconds - found[0].seconds) / (last - first)
    middle = {name: statistics.median(getattr(one, name) for one in found) for name in ("memory", "files", "threads")}
    return Seen(seconds=each, **middle)


def tiny_project(path: Path, rounds: int, **sections: Any) -> Path:
    return new_project(
        path,
        tracked=True,
        federation={"rounds": rounds, "local_steps": 1, "batch_size": 8},
        partition={"scheme": "iid", "clients": 2, "min_records": 20},
        lora={"rank": 2, "alpha": 4.0, "last_layers": 1},
        runtime={"keep_rounds": 2},
        **{"method": {"name": "dp-lora"}, **sections},
    )


def check_flat(early: Seen, late: Seen) -> None:
    assert late.memory <= MORE_MEMORY * early.memory, (early, late)
    assert abs(late.files - early.files) <= 2, (early, late)
    assert abs(late.threads - early.threads) <= 2, (early, late)


def test_forty_rounds(tmp_path: Path) -> None:
    seen = soaked(tiny_project(tmp_path / "project", 40), 40)
    check_flat(medians(seen, 11, 20), medians(seen, 31, 40))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rounds"), [("dp-lora", 500), ("flora", 200), ("fedsmoothlora", 200)])
def test_hundreds_of_rounds(tmp_path: Path, method: str, rounds: int, capsys: pytest.CaptureFixture[str]) -> None:
    project = tiny_project(tmp_path / "project", rounds, method={"name": method})
    began = time.monotonic()
    seen = soaked(project, rounds)
    early, late = medians(seen, 41, 60), medians(seen, rounds - 19, rounds)
    (run,) = project.glob("runs/*-*")
    ends = (run / "rounds" / "0050", run / "rounds" / f"{rounds:04d}")
    records = [sum(path.stat().st_size for path in end.glob("*.json")) for end in ends]
    with capsys.disabled():
        print(f"\n{method}, {rounds} rounds in {time.monotonic() - began:.0f} s:", seen[50], seen[rounds], sep="\n")
        print(early, late, f"bytes of records {records}", sep="\n")
    check_flat(early, late)
    assert late.seconds <= MORE_WORK * early.seconds + 0.05, (early, late)
    assert records[1] <= 1.2 * records[0] + 500
    assert len(list(run.rglob("*.safetensors"))) <= 20
    assert read_json(project / "reports" / "metrics.json")["rounds"] == rounds
