"""Who takes part in a round of unit `client`: drawn by secret coins, and known to nobody but the server.

What would tell it (the round's own plan, what was trained, how many there were) lies in a directory that
only its owner may enter, and is deleted when the round is recorded. What a step returns, and what a run
publishes, is the same whoever took part: a fixed number of cohorts, of any number of clients each.
"""

from __future__ import annotations

import math
import shutil
import stat
from collections.abc import Mapping
from typing import Any

from fedpipe.errors import PrivacyError
from fedpipe.files import private_directory, storage
from fedpipe.privacy.noise import KeyedStream
from fedpipe.server.central import taking_part
from fedpipe.state import Run


def drawn(run: Run, round: int, query: str) -> tuple[str, ...]:
    """Return who takes part in a round of this query, in order of the names."""
    return taking_part(run.key, query, round, run.plan.participants[round - 1], run.plan.central.sampling_rate)


def drawn_cohorts(run: Run, round: int, query: str, size: int) -> list[list[str]]:
    """Divide who takes part into cohorts, as many as the expected number of clients needs; some may be empty."""
    members, count = drawn(run, round, query), math.ceil(run.plan.central.expected_batch / size)
    return [list(members[place::count]) for place in range(count)]


def shown(run: Run, round_plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may be known of a round's plan: with unit `client`, how many cohorts and not who is in them."""
    if run.plan.central is None:
        return dict(round_plan)
    return {**round_plan, "cohorts": [[] for _ in round_plan["cohorts"]]}


def open_work(run: Run, round: int) -> None:
    """Make the directory of a round that others may not enter, and delete those of other rounds.

    Raises
    ------
    PrivacyError
        It is there already, and others may enter it.
    """
    path = run.work_dir(round)
    if path == run.round_dir(round):
        return
    private_directory(path.parent)
    mode = stat.S_IMODE(path.parent.stat().st_mode)
    if mode & 0o077:
        raise PrivacyError(f"{path.parent}: others may enter (mode {mode:04o}), and it tells who takes part; use 0700")
    with storage(path):
        for other in path.parent.iterdir():
            if other != path:
                shutil.rmtree(other)


def forget_work(run: Run, round: int) -> None:
    """Delete what a recorded round does not need any more: who took part, and their updates."""
    path = run.work_dir(round)
    if path != run.round_dir(round) and path.exists():
        with storage(path):
            shutil.rmtree(path)


def salt(run: Run, round: int, query: str, cohort: int) -> str:
    """Return what keeps a digest of a cohort's file from being found by trying who may be in it."""
    return KeyedStream(run.key, "salt", query, round, cohort).uint64(4).tobytes().hex()
