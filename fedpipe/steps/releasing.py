"""The server's part of a round of unit `client`: the ledger's line, the noisy sum, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpipe.files import inside, read_sealed, read_tensors, write_tensors
from fedpipe.privacy.ledger import EVERY, LedgerEntry
from fedpipe.server.central import STEP, Release
from fedpipe.server.ranks import numel
from fedpipe.server.round import released_round
from fedpipe.state import Run
from fedpipe.steps.common import all_listed, open_unchanged, round_facts, sent_specs
from fedpipe.steps.training import check_planned
from fedpipe.workspace import Workspace


def release(run_dir: Path, round: int, cohorts: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Release a round's noisy sum; return what the round's record takes from it: nothing that tells who took part.

    The round's plan is checked again, since this is where noise is drawn for its query.
    """
    run, workspace = open_unchanged(run_dir)
    directory, method, before = run.work_dir(round), workspace.method, run.state(round - 1)
    round_plan = read_sealed(directory / "plan.json")
    listed = all_listed(directory, round_plan, cohorts)
    check_planned(run, workspace, round_plan, list(listed))
    sent = sent_specs(run, workspace, round, round_plan)
    facts = round_facts(run, workspace, round, sent, round_plan["ranks"], before)
    central = run.plan.central
    # On disk before the sum is formed.
    run.ledger.append(
        [
            LedgerEntry(
                client=EVERY,
                round=round,
                step=STEP,
                sigma=central.noise_multiplier,
                q=central.sampling_rate,
                query=round_plan["query"],
            )
        ]
    )
    made = Release(
        clip_norm=run.plan.clip_norm,
        noise_multiplier=central.noise_multiplier,
        expected=central.expected_batch,
        round=round,
        query=round_plan["query"],
        key=run.key,
    ).of(facts.start, sent, _readers(directory, listed))
    result = released_round(
        method, facts, before, run.memory(round - 1), made.adapter, len(run.plan.clients), workspace.model.frozen_weight
    )
    return {
        "state": write_tensors(run.adapter_path(round), result.state.tensors()),
        "memory": write_tensors(run.memory_path(round), result.memory) if result.memory else None,
        "clients": {EVERY: {"norm": made.norm, "snr": made.snr}},
        "refused": {},
        "server": result.metrics,
        "down": result.down,
        "ranked": result.ranked,
        "decisions": run.round_record(round - 1).get("decisions", {}),
        "kept": {},
    }


def _readers(directory: Path, listed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: functools.partial(read_tensors, inside(directory, entry["file"]), entry["sha256"])
        for name, entry in listed.items()
    }


def expected_traffic(run: Run, workspace: Workspace, round: int, round_plan: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of a round (float32) in which as many clients take part as do on average."""
    if round_plan["skipped"]:
        return {"bytes_up": 0, "bytes_down": 0}
    clients, sent = run.plan.central.expected_batch, sent_specs(run, workspace, round, round_plan)
    rank, before = run.settings.lora.rank, run.round_record(round - 1)
    up = sum(numel(spec, rank) for spec in sent)
    return {"bytes_up": int(4 * clients * up), "bytes_down": int(4 * clients * before["down"])}
