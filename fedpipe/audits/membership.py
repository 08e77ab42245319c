"""Membership inference on a run: do the losses of what it was trained on stand out from those of other records?

Members are all clients' training records, non-members the test records. The score is how far a
record's loss fell from the first model to the last, both the global ones, so that records that are
easy for any model do not pass for members. Only what a threshold on it does to thousands of records
is returned: a single record's loss is as confidential as the record. Under privacy no threshold may
do better than epsilon and delta allow, where members and non-members come from one distribution;
where `data.group` keeps groups of the test apart, they do not quite.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fedpipe.audits.preparing import project_of
from fedpipe.audits.scores import losses_of
from fedpipe.budget import epsilon_so_far
from fedpipe.identity import identify
from fedpipe.models.task import Encoded
from fedpipe.privacy.membership import Inference, dp_tpr, infer, loss_scores
from fedpipe.state import Run
from fedpipe.workspace import Workspace, workspace_of

FPRS = (0.01, 0.001)


def membership(run: Run, workspace: Workspace, seed: int, confidence: float = 0.95) -> dict[str, Any]:
    """Return `run_id`, `size` (members, and as many others), `auc`, and at each FPR `tpr` and what DP allows."""
    found = _inference(run, workspace, seed, confidence)
    epsilon = epsilon_so_far(run)["epsilon_max"] if run.plan.private else None
    rates = {
        f"{fpr:g}": {
            **asdict(found.tpr[fpr]),
            "allowed": None if epsilon is None else float(dp_tpr(fpr, epsilon, run.plan.delta)),
        }
        for fpr in FPRS
    }
    return {"run_id": run.info["run_id"], "size": found.size, "auc": asdict(found.auc), "tpr": rates}


def _inference(run: Run, workspace: Workspace, seed: int, confidence: float) -> Inference:
    sides = (_members(workspace), workspace.records(None))
    states = [run.state(run.plan.rounds), run.state(0)]
    losses = [[losses_of(workspace, state, side) for side in sides] for state in states]
    members, others = (loss_scores(last, first) for last, first in zip(*losses, strict=True))
    return infer(members, others, seed=seed, fprs=FPRS, confidence=confidence)


def _members(workspace: Workspace) -> Encoded:
    """Return the records of all clients, without canaries, which stand behind the others."""
    slots, parts = workspace.federation.canaries, []
    for client in workspace.federation.clients:
        records = workspace.records(client)
        parts.append(records.part(0, slots.get(client, [len(records)])[0]))
    return Encoded.join(parts)


def ordinary_run(workspace: Workspace) -> Run | None:
    """Return the complete run of these settings in their own project, if there is one."""
    digests = workspace.federation.digest, workspace.backbone.digest, workspace.probe.digest
    run = Run(workspace.project.runs / identify(workspace.settings, workspace.method, *digests).run_id)
    return run if run.complete else None


def attacked(run: Run, workspace: Workspace) -> tuple[Run, Workspace]:
    """Return what membership inference is done on: the ordinary run of an audited one's settings, or else itself."""
    own = workspace_of(project_of(workspace.project), run.settings)
    ordinary = ordinary_run(own)
    return (run, workspace) if ordinary is None else (ordinary, own)
