"""Which methods can be had with privacy for whole clients, and with which settings.

The server releases one noisy sum of clipped moves, each counted alike, and nothing else of a round: who
took part is secret. So nothing may be decided from single updates, sent beside them, counted by client,
or kept at the clients from round to round.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedpipe.client.clip import Joint
from fedpipe.client.objectives import Objective
from fedpipe.config import Settings
from fedpipe.methods.method import Method
from fedpipe.methods.sums import needs
from fedpipe.server.aggregate import Mean
from fedpipe.server.ranks import Common
from fedpipe.server.scheduling import Synchronous
from fedpipe.server.weights import Uniform


def not_for_clients(method: Method) -> str | None:
    """Say why a method cannot be had with `privacy.unit: client`; None if it can."""
    return next((reason for _, reason, _ in _reasons(method)), None)


def unit_client(method: Method, settings: Settings) -> Iterator[str]:
    """With unit client, the server's noisy sum of clipped moves is all that there is."""
    privacy = settings.privacy
    if privacy.unit != "client":
        if privacy.noise != "central":
            yield f"privacy.noise: {privacy.noise} is for privacy.unit client, found {privacy.unit}; use central"
        return
    said = set()
    for axis, reason, cure in _reasons(method):
        # One line for an axis; weights by the number of records are refused in every private run.
        if axis not in said and not (axis == "weights" and method.weights.uses_sizes):
            said.add(axis)
            yield f"method.{axis}: {reason}, and privacy.unit client releases one noisy sum a round; {cure}"
    if settings.privacy.diagnostics:
        yield (
            "privacy.diagnostics: training losses are those of who took part, which privacy.unit client keeps secret; "
            "set it to false"
        )
    yield from (_central if privacy.noise == "central" else _distributed)(settings)


def _central(settings: Settings) -> Iterator[str]:
    """The server draws in secret who takes part, and adds the noise."""
    federation = settings.federation
    if federation.secure_aggregation:
        yield (
            "federation.secure_aggregation: with privacy.unit client the server clips every update and must see it; "
            "set it to false, or privacy.noise to distributed"
        )
    if federation.max_participations is not None:
        yield (
            "federation.max_participations: who takes part is drawn anew in every round and is secret, so that nobody "
            "may count it; leave it null: privacy.unit client accounts for all rounds"
        )
    if federation.dropout:
        yield (
            "federation.dropout: with privacy.unit client who takes part is drawn by secret coins, not by the seed; "
            "set it to 0 and lower federation.clients_per_round"
        )


def _distributed(settings: Settings) -> Iterator[str]:
    """The server adds up what clients have noised, and knows who they are."""
    privacy = settings.privacy
    if not settings.federation.secure_aggregation:
        yield (
            "privacy.noise: one client's share of distributed noise does not protect it, the sum of all shares does; "
            "set federation.secure_aggregation to true"
        )
    if privacy.accountant != "rdp":
        yield (
            f"privacy.accountant: found {privacy.accountant}; of distributed noise a bound by Rényi divergences is "
            "known, and no other; use rdp"
        )
    if privacy.adjacency != "add-remove":
        yield (
            "privacy.adjacency: distributed noise is accounted for a client whose move becomes zero, since who takes "
            f"part is known; found {privacy.adjacency}, use add-remove"
        )


def _reasons(method: Method) -> Iterator[tuple[str, str, str]]:
    """Return each axis that stands in the way, the reason, and what to use instead."""
    yield from needs(method)
    if not isinstance(method.aggregation, Mean):
        yield "aggregation", f"aggregation {method.aggregation.name} is another rule than the mean", "use mean"
    if not isinstance(method.weights, Uniform):
        yield "weights", f"weights {method.weights.name} count clients differently", "use uniform"
    if not isinstance(method.rounds, Synchronous):
        yield "rounds", f"rounds {method.rounds.name} treat clients differently", "use synchronous"
    if not isinstance(method.ranks, Common):
        yield "ranks", f"ranks {method.ranks.name} cut the adapter that moves are counted from", "use common"
    if not isinstance(method.clip, Joint):
        reason = f"clip {method.clip.name} groups what a record's gradient is clipped by, where none is"
        yield "clip", reason, "use joint"
    if type(method.objective).extra_specs is not Objective.extra_specs:
        yield "objective", f"objective {method.objective.name} sends more than an update", "use plain or prox"
    for axis, keeps in (
        ("objective", method.objective.stateful),
        ("initialisation", method.initialisation.stateful or method.initialisation.personal),
        ("payload", method.payload.personal),
    ):
        if keeps:
            cure = {"objective": "plain or prox", "initialisation": "global", "payload": "trained"}[axis]
            yield axis, f"{axis} {getattr(method, axis).name} keeps something at clients that took part", f"use {cure}"
