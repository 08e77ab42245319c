"""The steps of a run, each a function from a run's directory to files in it.

Every step takes and returns paths, digests and numbers that JSON can hold, so that any
workflow engine may call them, in any process. Every step may be called again after a crash:
what is complete is read back, what is not is computed anew with the same batches and the
same noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpipe.config import FederationSettings
from fedpipe.errors import ShortRoundError
from fedpipe.state import Run
from fedpipe.steps.aggregating import aggregate, finish_round
from fedpipe.steps.beginning import begin_round
from fedpipe.steps.evaluating import evaluate_round
from fedpipe.steps.forgetting import forget_rounds
from fedpipe.steps.preparing import prepare
from fedpipe.steps.summing import sum_updates
from fedpipe.steps.training import train

__all__ = [
    "aggregate",
    "begin_round",
    "evaluate_round",
    "finish_round",
    "forget_rounds",
    "prepare",
    "run_round",
    "sum_updates",
    "train",
    "tried",
]


def run_round(run_dir: Path, round: int) -> dict[str, Any]:
    """Run a whole round in this process; return its record.

    Raises
    ------
    ShortRoundError
        As often as `federation.retries` allows, too few clients were of use. Called again, it goes on.
    """
    started = time.monotonic()
    plan = begin_round(run_dir, round)
    aggregated = tried(Run(run_dir).settings.federation, lambda: _attempt(run_dir, round, len(plan["cohorts"])))
    metrics = evaluate_round(run_dir, round, aggregated)
    record = finish_round(run_dir, round, aggregated, metrics, time.monotonic() - started)
    forget_rounds(run_dir, round)
    return record


def tried(
    federation: FederationSettings,
    attempt: Callable[[], dict[str, Any]],
    told: Callable[[str], object] = lambda reason: None,
) -> dict[str, Any]:
    """Return what an attempt at a round returns; it is made again where too few clients were of use.

    `told` is called with the reason before each attempt but the first.
    """
    for left in reversed(range(federation.tries)):
        try:
            return attempt()
        except ShortRoundError as error:
            if not left:
                raise
            told(str(error))
    raise AssertionError("a round is tried once at least")


def _attempt(run_dir: Path, round: int, cohorts: int) -> dict[str, Any]:
    """Train the cohorts that are not trained, and aggregate."""
    listed = [train(run_dir, round, cohort) for cohort in range(cohorts)]
    if listed and Run(run_dir).settings.federation.secure_aggregation:
        listed = [sum_updates(run_dir, round, listed)]
    return aggregate(run_dir, round, listed)
