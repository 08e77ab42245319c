"""What a round's record says of training losses, where the settings ask for them: under a key of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpipe.files import read_sealed
from fedpipe.state import Run

PREFIX = "diagnostics/"


def diagnostics_of(run: Run, round: int, round_plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the record of a round takes from its cohorts' listings: nothing where diagnostics are off.

    `diagnostics`: `metrics`, the mean and the largest of the clients' mean training losses (None where no
    record was drawn), and `clients`, those of each; not with unit `client`, where they would tell who took part.
    """
    if not run.diagnostics:
        return {}
    found: dict[str, float] = {}
    for cohort in range(len(round_plan["cohorts"])):
        listing = read_sealed(run.work_dir(round) / f"cohort-{cohort:02d}.json")
        found |= {c: entry["diagnostics"]["loss"] for c, entry in listing["updates"].items() if "diagnostics" in entry}
    losses = dict(sorted(found.items()))
    mean = sum(losses.values()) / len(losses) if losses else None
    metrics = {f"{PREFIX}train_loss": mean, f"{PREFIX}train_loss_max": max(losses.values(), default=None)}
    return {"diagnostics": {"metrics": metrics, "clients": losses if run.plan.central is None else {}}}
