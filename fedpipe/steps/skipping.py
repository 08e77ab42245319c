"""Rounds that are skipped: too few of their clients can still afford them.

A round's clients without the budget for it are left out, and the others train. Where none is
left, or fewer than the aggregation rule needs, nobody trains, nothing is spent, and the state
of the round before stands under the new round's number. It is decided from the plan and the
ledger alone, before anything private is touched, so a run that is started again decides alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedpipe.files import write_tensors
from fedpipe.methods import Method
from fedpipe.state import Run


def skip_reason(
    method: Method,
    planned: Collection[str],
    excluded: Mapping[str, str],
    unused: Collection[str],
    summed: bool = False,
) -> str | None:
    """Return why a round of these clients is skipped; None where it takes place.

    Parameters
    ----------
    planned : all who would work for the round; with unit `client`, what they have one budget as
    excluded : those of them that have no budget for it
    unused : those whose update would not be aggregated, because it comes too late
    summed : the server is to see the sum of their updates only, which of one client is its update
    """
    left = [client for client in planned if client not in excluded]
    used, rule = [client for client in left if client not in unused], method.aggregation
    least, who = max((rule.least, f"method.aggregation {rule.name}"), (2 * summed, "federation.secure_aggregation"))
    if excluded and not left:
        return "no client has budget left for it"
    # A rule that is content with one client also is where nobody was sampled.
    if len(used) >= least or not (excluded or least > 1):
        return None
    short = " with budget for it" if excluded else ""
    return f"it has too few clients{short}: {len(used)}, and {who} needs {least}"


def carried(run: Run, round: int) -> dict[str, Any]:
    """Put the state of the last round under a skipped one's number; return what its record takes from it."""
    before, memory = run.round_record(round - 1), run.memory(round - 1)
    return {
        "state": write_tensors(run.adapter_path(round), run.state(round - 1).tensors()),
        "memory": write_tensors(run.memory_path(round), memory) if memory else None,
        "clients": {},
        "refused": {},
        "server": {},
        # Nobody has downloaded what the round before made.
        "down": before["down"],
        "ranked": before["ranked"],
        "decisions": before.get("decisions", {}),
        "kept": before.get("kept", {}),
    }
