"""The steps of a run, each a function from a run's directory to files in it.

Every step takes and returns paths, digests and numbers that JSON can hold, so that any
workflow engine may call them, in any process. Every step may be called again after a crash:
what is complete is read back, what is not is computed anew with the same batches and the
same noise.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fedpipe.state import Run
from fedpipe.steps.aggregating import aggregate, finish_round
from fedpipe.steps.beginning import begin_round
from fedpipe.steps.evaluating import evaluate_round
from fedpipe.steps.preparing import prepare
from fedpipe.steps.summing import sum_updates
from fedpipe.steps.training import train

__all__ = [
    "aggregate",
    "begin_round",
    "evaluate_round",
    "finish_round",
    "prepare",
    "run_round",
    "sum_updates",
    "train",
]


def run_round(run_dir: Path, round: int) -> dict[str, Any]:
    """Run a whole round in this process; return its record."""
    started = time.monotonic()
    plan = begin_round(run_dir, round)
    cohorts = [train(run_dir, round, cohort) for cohort in range(len(plan["cohorts"]))]
    if cohorts and Run(run_dir).settings.federation.secure_aggregation:
        cohorts = [sum_updates(run_dir, round, cohorts)]
    aggregated = aggregate(run_dir, round, cohorts)
    metrics = evaluate_round(run_dir, round, aggregated)
    return finish_round(run_dir, round, aggregated, metrics, time.monotonic() - started)
