"""Clients that fail while they are trained with others: which one it was, and what may be told of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import OutOfMemoryError

from fedpipe.client.training import Update
from fedpipe.errors import DataError, FedpipeError
from fedpipe.models.layers import TensorSpec
from fedpipe.models.task import Encoded
from fedpipe.state import Run

log = logging.getLogger(__name__)


def without_the_failing(
    run: Run,
    clients: Sequence[str],
    read: Callable[[str], Encoded],
    train: Callable[[Mapping[str, Encoded]], dict[str, Update]],
) -> tuple[dict[str, Update], dict[str, str]]:
    """Train clients together, without those that fail; return the updates, and why others have none.

    An exception does not say whose it was, so each is then tried alone. It is told by its kind only, for
    its words may hold what is in a record.

    Raises
    ------
    Exception
        What the machine or the run is to blame for; what all of several clients failed with.
    """
    records, failed, updates = {}, {}, {}
    for client in clients:
        try:
            records[client] = read(client)
        except DataError as error:
            failed[client] = _told(run, client, "its records cannot be read", error)
    try:
        return train(records), failed
    except Exception as error:
        if not _of_a_client(error):
            raise
        for client, own in records.items():
            try:
                updates |= train({client: own})
            except Exception as alone:
                if not _of_a_client(alone):
                    raise
                failed[client] = _told(run, client, "its training failed", alone)
        if len(records) > 1 and not updates:
            raise
    return updates, failed


def nothing_of(run: Run, sent: Sequence[TensorSpec], reason: str) -> Update:
    """Return the update of a client that failed; with whole clients as the unit, one that counts as no move."""
    if not run.plan.whole_clients:
        return Update({}, norm=0.0, snr=None, rank=0, failed=reason, spent=False)
    return Update({spec.name: torch.full(spec.shape, torch.nan) for spec in sent}, norm=0.0, snr=None, rank=0)


def _of_a_client(error: Exception) -> bool:
    """Say whether one client may be to blame: not for what we know, and not for the machine."""
    return not isinstance(error, FedpipeError | OSError | MemoryError | OutOfMemoryError)


def _told(run: Run, client: str, what: str, error: Exception) -> str:
    """Return what may be told of a failure; log it where it may be known whose it is."""
    reason = f"{what} ({type(error).__name__})"
    if not run.plan.whole_clients:
        log.warning("client %s: %s; the others go on", client, reason, exc_info=None if run.plan.private else error)
    return reason
