"""Before round 1: everything is checked, and the run is opened."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedpipe.config import Settings
from fedpipe.disk import check_room, needs_of
from fedpipe.errors import DataError
from fedpipe.files import write_sealed, write_tensors
from fedpipe.identity import identify
from fedpipe.models.factors import GlobalState
from fedpipe.models.lora import TensorSpec
from fedpipe.plan import Plan, make_plan
from fedpipe.project import Project
from fedpipe.server.attacks import malicious
from fedpipe.state import Opened, Run, open_run
from fedpipe.steps.agreeing import checked
from fedpipe.steps.common import round_facts
from fedpipe.steps.evaluating import evaluate
from fedpipe.workspace import Workspace, workspace_of

log = logging.getLogger(__name__)


def prepare(project: Project, settings: Settings, audit: bool = False) -> Opened:
    """Check everything that can be checked before training, and open the run; with canaries only for an `audit`.

    Raises
    ------
    FedpipeError
        Settings, data, backbone and method do not fit together, or the run does not fit on the disk; nothing was
        started.
    """
    workspace = workspace_of(project, settings)
    method, federation = workspace.method, workspace.federation
    federation.check_fresh(settings)
    if bool(federation.canaries) != audit:
        found, expected = ("no canaries", "an audit's partition") if audit else ("an audit's canaries", "none")
        raise DataError(f"{federation.path}: found {found}, expected {expected}; run `fedpipe partition` again")
    probe = workspace.probe.digest
    workspace.model  # noqa: B018 (loads the backbone: a missing target module is found here, not in round 1)
    malicious(settings.federation.attack, settings.seed, list(federation.sizes))
    identity = identify(settings, method, federation.digest, workspace.backbone.digest, probe)
    specs = [spec for spec in workspace.model.specs if spec.name in workspace.trained]

    def plan() -> Plan:
        made = checked(make_plan(settings, federation.sizes, method, federation.groups), settings, method, specs)
        _check_room(workspace, settings, made)
        return made

    opened = open_run(project.runs, identity, settings, plan)
    if not opened.run.complete:
        if opened.resumed:
            _check_room(workspace, settings, opened.run.plan, opened.run)
        _start(opened.run, workspace)
    return opened


def _check_room(workspace: Workspace, settings: Settings, plan: Plan, run: Run | None = None) -> None:
    """Refuse a run of this plan that does not fit on the disk."""
    whole, prefix = plan.central is not None, workspace.prefix_bytes()
    try:
        needs = needs_of(
            settings,
            workspace.method,
            workspace.model.specs,
            workspace.trained,
            counts=[round(plan.central.expected_batch) if whole else len(members) for members in plan.participants],
            clients=len(plan.clients),
            stale=max((until - start for start, until in plan.started_until.items()), default=0),
            prefix=prefix,
            audited=bool(workspace.federation.canaries),
        )
    except Exception as error:  # a part of somebody's own that cannot be rehearsed is no reason not to train
        log.warning("what the run needs on disk is not known (%s: %s)", type(error).__name__, error)
        return
    check_room(workspace.project, settings, needs, run)


def _start(run: Run, workspace: Workspace) -> None:
    """Write the state before round 1."""
    if run.completed_rounds() < 0:
        usual, model = GlobalState(_held(workspace.model.initial, workspace.model.specs)), workspace.model
        facts = round_facts(run, workspace, 0, [], {}, usual)
        first = workspace.method.initialisation.first(usual, facts, model.frozen_weight)
        state = write_tensors(run.adapter_path(0), first.tensors())
        metrics = evaluate(run, workspace, 0, state, first, {}, {})
        # What a client downloads before round 1: all of it.
        down = sum(tensor.numel() for tensor in first.tensors().values())
        record = {"round": 0, "state": state, "metrics": metrics, "down": down, "ranked": sorted(first.adapter)}
        write_sealed(run.round_dir(0) / "round.json", record)


def _held(tensors: Mapping[str, Tensor], specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Return the tensors that the server holds: neither a client's second adapter nor its mixer."""
    names = [spec.name for spec in specs if spec.adapter == "default" and spec.factor != "mixer"]
    return {name: tensors[name] for name in names}
