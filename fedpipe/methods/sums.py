"""Which methods can do with a sum of the updates: what secure aggregation and client-level privacy ask for."""

from __future__ import annotations

from collections.abc import Iterator

from fedpipe.client.objectives import Objective
from fedpipe.client.schedule import Schedule
from fedpipe.config import Settings
from fedpipe.methods.method import Method
from fedpipe.server.ranks import RankPolicy

MANY = 200  # clients of a round, from which on the masks of all pairs are worth a warning


def needs(method: Method) -> Iterator[tuple[str, str, str]]:
    """Return each axis that needs more than a sum of the updates with public weights, why, and what to use instead."""
    if not method.aggregation.linear:
        yield "aggregation", f"aggregation {method.aggregation.name} needs every client's update", "use mean"
    if method.rounds.single:
        reason = f"a round of rounds {method.rounds.name} has one update, so that a sum hides nothing"
        yield "rounds", reason, "use synchronous"
    if not method.weights.public:
        yield "weights", f"weights {method.weights.name} are not public", "use uniform"
    if type(method.schedule).score is not Schedule.score:
        yield "schedule", f"schedule {method.schedule.name} needs every client's scores", "use alternate-round or both"
    if type(method.ranks).pruned is not RankPolicy.pruned:
        yield "ranks", f"ranks {method.ranks.name} follows what every client asks for", "use fixed or common"


def not_summed(method: Method) -> str | None:
    """Say why a method cannot be had with secure aggregation; None if it can."""
    return next((reason for _, reason, _ in _unsummed(method)), None)


def _unsummed(method: Method) -> Iterator[tuple[str, str, str]]:
    """Return each axis that stands in the way of a secure sum, the reason, and what to use instead."""
    # Whole numbers are masked as the vectors are: nobody learns more than their sum.
    yield from (found for found in needs(method) if found[0] != "weights" or not method.weights.uses_sizes)
    if method.weights.public and method.weights.name != "uniform":
        yield "weights", f"weights {method.weights.name} are no whole numbers, which is what is masked", "use uniform"
    if method.rounds.name != "synchronous" and not method.rounds.single:
        reason = f"rounds {method.rounds.name} add updates up that are late, or count by their steps"
        yield "rounds", reason, "use synchronous"
    if type(method.objective).extra_specs is not Objective.extra_specs:
        reason = f"objective {method.objective.name} sends more than an update, and of another size"
        yield "objective", reason, "use plain or prox"


def secure_aggregation(method: Method, settings: Settings) -> Iterator[str]:
    """The server is handed one sum a round, of whole numbers, and learns nothing else."""
    federation = settings.federation
    if not federation.secure_aggregation:
        return
    for axis, reason, cure in _unsummed(method):
        yield f"method.{axis}: {reason}, and federation.secure_aggregation gives the server one sum a round; {cure}"
    present = federation.clients_per_round or settings.partition.clients
    if present == 1:
        yield (
            "federation.secure_aggregation: a round has one client, whose update is the sum; raise "
            "partition.clients or federation.clients_per_round to 2 or more"
        )
