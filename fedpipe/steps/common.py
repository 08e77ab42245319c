"""What several steps need."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpipe.errors import StateError
from fedpipe.files import digest, inside, read_json, read_sealed
from fedpipe.identity import changed_keys, identify
from fedpipe.models.factors import GlobalState
from fedpipe.models.lora import TensorSpec
from fedpipe.server.aggregate import Round
from fedpipe.state import Run
from fedpipe.workspace import Workspace, open_workspace

log = logging.getLogger(__name__)


def open_unchanged(run_dir: Path) -> tuple[Run, Workspace]:
    """Open a run for a step that touches private data, if it still is what it was begun as.

    A partition, a backbone or code replaced since, or a setting edited in the run's own file,
    would be another query under the noise and the accounting of the old one.
    """
    run, workspace = open_workspace(run_dir)
    digests = workspace.federation.digest, workspace.backbone.digest, workspace.probe.digest
    now = identify(run.settings, workspace.method, *digests)
    begun = run.info["parts"]
    changes = changed_keys(begun, now.parts | {"test_key": begun["test_key"]})
    if changes or now.query != run.info["query"] or digest(begun) != run.info["identity"]:
        what = "; ".join(changes) or "its run.json was edited"
        raise StateError(f"{run_dir}: is not what it was begun as: {what}; start again, and a new run begins")
    return run, workspace


def readable(path: Path) -> dict[str, Any] | None:
    """Return what a file holds that can be computed again: None where it is missing or damaged."""
    try:
        value = read_sealed(path)
    except StateError as error:
        if path.exists():
            log.warning("%s; it is computed again", error)
        return None
    return value


def round_facts(
    run: Run,
    workspace: Workspace,
    round: int,
    sent: Sequence[TensorSpec],
    ranks: Mapping[str, int],
    state: GlobalState,
) -> Round:
    """Return what is public of a round that begins with this state."""
    sizes = {name: client.records for name, client in run.plan.clients.items()}
    return Round(
        number=round,
        rounds=run.plan.rounds,
        specs=workspace.model.specs,
        sent=sent,
        scale=workspace.model.scale,
        start=state.adapter,
        rest=state.rest,
        ranks=ranks,
        records=sizes if workspace.method.weights.uses_sizes else None,
        seed=run.settings.seed,
    )


def all_listed(
    directory: Path, round_plan: Mapping[str, Any], cohorts: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Return what the cohorts list, in order of the clients' names; all of it, and of this plan."""
    listed: dict[str, dict[str, Any]] = {}
    for cohort in cohorts:
        listing = read_json(inside(directory, cohort["file"]), cohort["sha256"])
        if listing["query"] != round_plan["query"]:
            raise StateError(f"{directory / cohort['file']}: is of an earlier plan of this round; run again")
        listed |= listing["updates"]
    if sorted(listed) != sorted(client for members in round_plan["cohorts"] for client in members):
        raise StateError(f"{directory}: the updates of round {round_plan['round']} are not all there; run again")
    return dict(sorted(listed.items()))


def sent_specs(run: Run, workspace: Workspace, round: int, round_plan: Mapping[str, Any]) -> list[TensorSpec]:
    """Return what clients send in a round: all what those send that take most local steps."""
    specs = [spec for spec in workspace.model.specs if spec.name in workspace.trained]
    return workspace.method.sends(specs, round, run.plan.local_steps, round_plan["modes"])
