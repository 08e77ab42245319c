"""What a run need not keep: the tensors of rounds before its last ones, where the settings say so.

JSON stays, of all rounds: plans, listings, records, and with them every digest. So do the ledger, the
untouched start, and each state that a later job or a run that goes on still reads. What is deleted is
deleted file by file, oldest round first, and the next call goes on with it: a process that is killed
on the way loses nothing.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from fedpipe.files import inside, storage
from fedpipe.state import Run
from fedpipe.workspace import open_workspace

_TENSORS = ("server", "sum", "adapter")

_clean: dict[Path, int] = {}  # a run's directory -> the first round in which this process may find something to delete
_clean_lock = threading.Lock()


def forget_rounds(run_dir: Path, last: int, through: int | None = None) -> None:
    """Delete the tensors of rounds that `runtime.keep_rounds` does not keep, and that nothing reads any more.

    Nothing is deleted of a run with canaries: its audit reads every update.

    Parameters
    ----------
    last : the last complete round
    through : no round after this one is touched, such as those that are still to be recorded elsewhere

    Raises
    ------
    StorageError
        The disk is read-only or out of reach.
    """
    run, workspace = open_workspace(run_dir)
    keep = run.settings.runtime.keep_rounds
    if keep is None or workspace.federation.canaries:
        return
    end = min(last - keep, last if through is None else through)
    needed = {run.last_trained(last), *(start for start, until in run.plan.started_until.items() if until > last)}
    with _clean_lock:
        left = []
        for round in range(_clean.get(run_dir, 1), end + 1):
            if round in needed:
                left.append(round)
            else:
                _forget(run, round, workspace.method.stateful)
        while len(_clean) >= 64:
            _clean.pop(next(iter(_clean)))
        _clean[run_dir] = min([*left, max(end + 1, 1)])


def _forget(run: Run, round: int, stateful: bool) -> None:
    directory = run.round_dir(round)
    with storage(directory):
        for path in _replaced(run, round) if stateful else ():
            path.unlink(missing_ok=True)
        if (directory / "updates").exists():
            shutil.rmtree(directory / "updates")
        for name in _TENSORS:
            (directory / f"{name}.safetensors").unlink(missing_ok=True)


def _replaced(run: Run, round: int) -> Iterator[Path]:
    """Yield what clients kept up to a round, and had replaced in the next one."""
    now, then = ((run.round_record(number) or {}).get("kept", {}) for number in (round, round + 1))
    for client, entry in now.items():
        if then.get(client) != entry:
            yield inside(run.root, entry["file"])
