"""What settings of quorum, deadline, faults and attacks ask of the rounds."""

from __future__ import annotations

from collections.abc import Iterator

from fedpipe.config import Settings
from fedpipe.methods.method import Method


def faulty_clients(method: Method, settings: Settings) -> Iterator[str]:
    """A quorum counts usable updates, and a deadline ends a round that waits."""
    federation, whole = settings.federation, settings.privacy.unit == "client"
    if federation.quorum and federation.secure_aggregation:
        yield (
            "federation.quorum: a secure sum that was opened is never made again, so it has its own quorum before it "
            "is; set federation.secure_threshold, and quorum to 0"
        )
    elif federation.quorum and whole:
        yield (
            "federation.quorum: with privacy.unit client and noise at the server, how many updates are usable is "
            "secret, and one that is not counts as no move; set it to 0"
        )
    if federation.deadline is not None and method.rounds.stale:
        yield (
            f"federation.deadline: method.rounds {method.rounds.name} waits for nobody, and says by itself which "
            "updates come too late; set it to null"
        )
    if federation.faults.straggle and federation.deadline is None:
        yield "federation.faults.straggle: without a deadline a round waits for everybody; set federation.deadline"
