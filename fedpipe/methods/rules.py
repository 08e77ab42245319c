"""Which parts may be combined with which, and with which settings; every rule says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedpipe.config import Settings
from fedpipe.errors import SettingsError
from fedpipe.methods.hostile import faulty_clients
from fedpipe.methods.method import Method
from fedpipe.methods.sums import MANY, secure_aggregation
from fedpipe.methods.whole import unit_client


def check(method: Method, settings: Settings) -> None:
    """Refuse a combination that would not be what it says it is.

    Raises
    ------
    SettingsError
        Rules that are broken, a line each: the key, the reason, and what would be valid.
    """
    rules: tuple[Callable[[Method, Settings], Iterator[str]], ...] = (
        _private,
        _groups,
        _factors,
        _server_optimizer,
        _objective,
        _remembered,
        _ranks,
        _core,
        _own,
        _phases,
        _stale,
        _clients,
        faulty_clients,
        secure_aggregation,
        unit_client,
    )
    if broken := [line for rule in rules for line in rule(method, settings)]:
        raise SettingsError("\n".join(broken))


def _private(method: Method, settings: Settings) -> Iterator[str]:
    """What looks at raw records, or publishes their number, is no part of a private run."""
    if not settings.private:
        return
    if not method.private:
        same = ", or use dp-lora, which is the same method with privacy" if method.name == "fedit" else ""
        yield f"method.name: {method.name} is for training without privacy; set privacy.unit to none{same}"
    elif method.weights.uses_sizes:
        yield (
            f"method.weights: {method.weights.name} weights clients by their number of records, which privacy.unit "
            f"{settings.privacy.unit} protects; use uniform"
        )
    if method.initialisation.raw_gradient:
        yield (
            f"method.initialisation: {method.initialisation} computes gradients of the clients' records that are "
            "neither clipped nor noised; set gradient to false, or privacy.unit to none"
        )


def _groups(method: Method, settings: Settings) -> Iterator[str]:
    """A group's gradient is made of several records'; only the cohort engine makes it before it clips."""
    if settings.privacy.unit == "group" and settings.runtime.engine == "opacus":
        yield (
            "runtime.engine: opacus clips each record, and privacy.unit group clips the mean gradient of a group's "
            "records; use cohort"
        )


def _factors(method: Method, settings: Settings) -> Iterator[str]:
    """Rules for products need both factors of a round."""
    rule, schedule = method.aggregation, method.schedule
    name = rule.name if rule.both_factors else method.initialisation.name
    if not rule.both_factors and not method.initialisation.both_factors:
        return
    axis = "aggregation" if rule.both_factors else "initialisation"
    if schedule.factors != frozenset("AB") or not schedule.together:
        trained = "B only" if schedule.factors == frozenset("B") else "one factor a round"
        cure = "use fedsvd" if schedule.factors == frozenset("B") else "use mean, which is exact there"
        yield f"method.{axis}: {name} makes both factors anew, and schedule {schedule.name} trains {trained}; {cure}"
    if method.payload.name == "a-only":
        yield f"method.{axis}: {name} needs both factors, and payload a-only sends A; use payload trained"


def _server_optimizer(method: Method, settings: Settings) -> Iterator[str]:
    """Moments of moves that are not in the same space from round to round mean nothing."""
    if method.server.identity:
        return
    for axis, culprit, anew in (
        ("aggregation", method.aggregation, not method.aggregation.in_factors),
        ("initialisation", method.initialisation, method.initialisation.refactors),
    ):
        if anew:
            yield (
                f"method.server: {method.server.name} follows the factors' moves from round to round, and {axis} "
                f"{culprit.name} makes the factors anew in each; use none"
            )


def _objective(method: Method, settings: Settings) -> Iterator[str]:
    optimizer = settings.optimizer
    if method.objective.needs_sgd and (optimizer.name != "sgd" or optimizer.momentum):
        yield (
            f"method.objective: {method.objective.name} takes what a client moved, over its learning rate, for its "
            "mean gradient, which holds for plain SGD only; set optimizer.name to sgd and optimizer.momentum to 0"
        )


def _remembered(method: Method, settings: Settings) -> Iterator[str]:
    """What clients remember of their last round must still mean the same in the next one."""
    name, anew = method.objective.name, method.initialisation.refactors or not method.aggregation.in_factors
    if name == "scaffold" and anew:
        yield (
            "method.objective: scaffold corrects the factors' gradients, and "
            f"aggregation {method.aggregation.name} with initialisation {method.initialisation.name} makes the factors "
            "anew in every round; use mean and global, or prox"
        )
    if name == "moon" and (method.aggregation.changes_base or method.initialisation.changes_base):
        yield (
            "method.objective: moon compares with the client's last model, and "
            f"aggregation {method.aggregation.name} with initialisation {method.initialisation.name} has changed the "
            "weights below it since; use prox"
        )
    for axis, part in (("objective", method.objective), ("initialisation", method.initialisation)):
        if method.rounds.stale and part.stateful:
            yield (
                f"method.rounds: {method.rounds.name} takes late updates, and {axis} {part.name} goes on from the "
                "round before; use synchronous"
            )


def _ranks(method: Method, settings: Settings) -> Iterator[str]:
    if method.ranks.mixed and not method.aggregation.any_ranks:
        yield (
            f"method.ranks: {method.ranks.name} gives clients different ranks, and aggregation "
            f"{method.aggregation.name} compares numbers that not all of them have; use mean, flora, flexlora, fedhl, "
            "fedex or lora-fair"
        )
    if method.ranks.name != "common" and not method.initialisation.any_ranks:
        yield (
            f"method.ranks: {method.ranks.name} cuts the adapter, and initialisation {method.initialisation.name} "
            "begins at a product that is another function when it is cut; use common"
        )


def _core(method: Method, settings: Settings) -> Iterator[str]:
    """Where something else than A and B is trained, rules and payloads for A and B have nothing to work on."""
    start, rule = method.initialisation, method.aggregation
    if not (start.core or start.sparse):
        return
    if rule.both_factors or rule.changes_base or not rule.in_factors or method.payload.name == "a-only":
        yield (
            f"method.initialisation: {start.name} trains another tensor than A and B, and aggregation {rule.name} "
            f"with payload {method.payload.name} needs these; use mean and trained"
        )


def _phases(method: Method, settings: Settings) -> Iterator[str]:
    start, rounds = method.initialisation, settings.federation.rounds
    if start.sparse and start.rounds >= rounds:
        yield (
            f"method.initialisation.rounds: found {start.rounds}, and federation.rounds is {rounds}, so that no round "
            "would train the adapter; expected fewer"
        )


def _own(method: Method, settings: Settings) -> Iterator[str]:
    """The mean of the others follows from the mean of all only where the server holds that mean."""
    rule, start = method.aggregation.name, method.initialisation.name
    if start == "rest-of-world" and (rule != "mean" or not method.server.identity):
        yield (
            "method.initialisation: rest-of-world takes a client's own part out of the mean of all, and aggregation "
            f"{rule} with server {method.server.name} leaves no mean; use mean and none"
        )


def _stale(method: Method, settings: Settings) -> Iterator[str]:
    """Late updates are moves of the factors from another state than the last."""
    if not method.rounds.stale:
        return
    for axis, culprit, moved in (
        ("aggregation", method.aggregation, method.aggregation.changes_base or not method.aggregation.in_factors),
        ("initialisation", method.initialisation, method.initialisation.refactors),
    ):
        if moved:
            yield (
                f"method.rounds: {method.rounds.name} takes late updates, and {axis} {culprit.name} has changed the "
                "weights or the factors that they started from; use synchronous"
            )
    if not method.schedule.together:
        yield (
            f"method.rounds: {method.rounds.name} takes late updates, and schedule {method.schedule.name} trains "
            "another factor in each round; use synchronous, or schedule both"
        )


def _clients(method: Method, settings: Settings) -> Iterator[str]:
    """Robust rules need a number of clients; what the partition has is known when their number is given."""
    present = settings.federation.clients_per_round or settings.partition.clients
    if present is not None and method.aggregation.least > present:
        yield (
            f"method.aggregation: {method.aggregation} needs at least {method.aggregation.least} clients in a round, "
            f"and there are {present}; raise partition.clients or federation.clients_per_round, or its options"
        )


def warnings_for(method: Method, settings: Settings) -> list[str]:
    """Return what is allowed but probably not meant."""
    steps, rounds = settings.federation.local_steps, settings.federation.rounds
    notes = []
    if method.schedule.name == "alternate-step" and steps == 1:
        notes.append(f"federation.local_steps is 1: {method.name} trains B in odd steps only, so A never moves")
    if method.schedule.name == "alternate-round" and rounds == 1:
        notes.append(f"federation.rounds is 1: {method.name} trains B in odd rounds only, so A never moves")
    if settings.privacy.group is not None and settings.privacy.unit != "group":
        notes.append(
            f"privacy.group keeps groups whole and bounded at the clients; privacy.unit is {settings.privacy.unit}, so "
            "that a group is not what is protected"
        )
    if settings.private and method.weights.name == "norm":
        notes.append("method.weights norm counts a client by the size of its product, and noise makes it larger")
    present = settings.federation.clients_per_round or settings.partition.clients or 0
    if settings.federation.secure_aggregation and present > MANY:
        notes.append(f"federation.secure_aggregation: a round's work grows with the square of its {present} clients")
    return notes
