"""One round at the server: check, weigh, aggregate, step, and make the next state.

It sees updates one at a time, as functions that read them, so that they may be files. It knows
nothing of records, and nothing of what clients keep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedpipe.errors import PrivacyError, QuorumError, TrainingError
from fedpipe.methods import Method
from fedpipe.models.factors import GlobalState, State
from fedpipe.models.lora import TensorSpec
from fedpipe.server.aggregate import Outcome, Round, RunningMean
from fedpipe.server.checks import refuse_reason
from fedpipe.server.weights import Readers, normalised

log = logging.getLogger(__name__)

Memory = dict[str, Tensor]


@dataclass(frozen=True)
class Updates:
    """A round's updates.

    Attributes
    ----------
    read : client -> a function that reads what it sent, in order of the names
    started : client -> the global adapter that it started from, for those that did not start from the last one
    shares : client -> a factor on its weight, for those that have one: they are late, or took more steps
    missing : client -> why it has sent nothing that could be read
    """

    read: Readers
    started: Mapping[str, State] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Total:
    """What secure aggregation leaves of a round's updates.

    Attributes
    ----------
    moves : name -> the weighted sum of how far the clients moved from the round's start, float64
    weight : the sum of their weights
    clients : those in the sum, in order of their names
    """

    moves: State
    weight: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What a round leaves at the server.

    `weights` are those of the updates that were used, `refused` says why others were not. `down` is how
    many numbers a client of full rank receives to get from the last state to this one, and `ranked` are
    the tensors among these of which one of lower rank receives its part only.
    """

    state: GlobalState
    memory: Memory
    metrics: dict[str, float]
    weights: dict[str, float]
    refused: dict[str, str]
    down: int
    ranked: list[str]


def server_round(
    method: Method,
    round: Round,
    previous: GlobalState,
    memory: Mapping[str, Tensor],
    updates: Updates,
    clients: int,
    weight: Callable[[str], Tensor],
    quorum: int = 0,
) -> Result:
    """Aggregate a round's updates into the next global state.

    Parameters
    ----------
    round : what is public of it
    previous, memory : as the last round left them
    clients : how many there are in the whole federation
    weight : the frozen weight of a pair, (m, n), by its name
    quorum : how many updates must be usable, whatever the rule would be content with

    Raises
    ------
    TrainingError
        Fewer updates passed their checks than the aggregation rule needs; `QuorumError`: than the quorum.
    """
    expected = [*round.sent, *method.objective.extra_specs(round.sent)]
    readers, refused = dict(updates.read), dict(updates.missing)
    for client, reason in refused.items():
        log.warning("round %d, client %s: %s; it is left out", round.number, client, reason)
    while True:
        _enough(method, round, readers, refused, quorum)
        rule = method.aggregation.open(round, _part(memory, "rule"))
        extras = RunningMean({})
        weights, found = _feed(method, round, expected, replace(updates, read=readers), rule.add, extras)
        if not found:
            break
        refused |= found
        readers = {name: read for name, read in readers.items() if name not in refused}
    used, mean = len(readers), extras.result().adapter
    return _next(method, round, previous, memory, rule.result(), mean, weights, refused, used, clients, weight)


def sum_round(
    method: Method,
    round: Round,
    previous: GlobalState,
    memory: Mapping[str, Tensor],
    total: Total,
    clients: int,
    weight: Callable[[str], Tensor],
) -> Result:
    """Make the next global state of the sum of a round's moves; no update is reached, or needed.

    To a linear rule with public weights the mean of all is as good as all of them. Parameters
    are as of `server_round`, `total` in the place of the updates.
    """
    weights = method.weights.of(dict.fromkeys(total.clients, _not_there), round)
    rule = method.aggregation.open(round, _part(memory, "rule"))
    start = {name: round.start[name].double() if name in round.start else 0.0 for name in total.moves}
    rule.add("all", {name: start[name] + move / total.weight for name, move in total.moves.items()}, 1.0)
    used = len(total.clients)
    return _next(method, round, previous, memory, rule.result(), {}, weights, {}, used, clients, weight)


def released_round(
    method: Method,
    round: Round,
    previous: GlobalState,
    memory: Mapping[str, Tensor],
    adapter: State,
    clients: int,
    weight: Callable[[str], Tensor],
) -> Result:
    """Make the next global state of a mean that was made elsewhere: it has no weights, and nothing beside it.

    Parameters are as of `server_round`, the new values of the tensors that were sent in the place of the updates.
    """
    return _next(method, round, previous, memory, Outcome(adapter), {}, {}, {}, clients, clients, weight)


def _not_there() -> State:
    raise PrivacyError("an update was asked for where the server is handed the sum only")


def _next(
    method: Method,
    round: Round,
    previous: GlobalState,
    memory: Mapping[str, Tensor],
    outcome: Outcome,
    extras: State,
    weights: dict[str, float],
    refused: dict[str, str],
    used: int,
    clients: int,
    weight: Callable[[str], Tensor],
) -> Result:
    """Step from a rule's outcome, and the plain mean of `used` clients' extras, to the next state."""
    sent = [spec for spec in round.sent if spec.name in outcome.adapter]
    stepped, moments = method.server.step(round.start, outcome.adapter, _part(memory, "server"), sent)
    outcome = replace(outcome, adapter=stepped)
    state = method.initialisation.next(previous, outcome, round, weight)
    control = method.objective.remember(_part(memory, "objective"), extras, used, clients)
    down = method.initialisation.down(previous, state, outcome, round) + sum(
        tensor.numel() for tensor in method.objective.down(control, state.adapter).values()
    )
    remembered = {"rule": outcome.memory, "server": moments, "objective": control}
    flat = {f"{part}/{name}": tensor for part, held in remembered.items() for name, tensor in held.items()}
    ranked = sorted(outcome.adapter) if method.initialisation.sends_factors else []
    return Result(state, flat, outcome.metrics, weights, refused, down, ranked)


def objective_down(method: Method, memory: Mapping[str, Tensor], start: State) -> dict[str, Tensor]:
    """Return what the server sends to all clients beside the global state."""
    return method.objective.down(_part(memory, "objective"), start)


def _enough(method: Method, round: Round, readers: Readers, refused: Mapping[str, str], quorum: int) -> None:
    least = max(1, method.aggregation.least)
    if len(readers) >= max(least, quorum):
        return
    why = "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:3])
    if any("finite" in reason or "moved" in reason for reason in refused.values()):
        why += "; lower optimizer.lr or lr_head"
    found = f"round {round.number}: {len(readers)} usable updates, and"
    if quorum:
        raise QuorumError(
            f"{found} federation.quorum needs {max(least, quorum)}{why}. The rounds before are kept: run the same "
            "command again to try this one again; another quorum begins a new run"
        )
    raise TrainingError(f"{found} method.aggregation {method.aggregation.name} needs {least}{why}")


def _feed(
    method: Method,
    round: Round,
    expected: Sequence[TensorSpec],
    updates: Updates,
    add: Callable[[str, State, float], None],
    extras: RunningMean,
) -> tuple[dict[str, float], dict[str, str]]:
    """Give every update to the rule; return the weights, and those that must not be used, each with the reason.

    Checked in the same pass, since a second reading of ten thousand files takes as long as the round:
    where one is refused, the caller begins again without it.
    """
    names = {spec.name for spec in round.sent}
    refused: dict[str, str] = {}
    weights = _weights(method, round, expected, updates, refused)
    for client, read in updates.read.items():
        update = read()
        if reason := refuse_reason(update, expected, updates.started.get(client, round.start)):
            log.warning("round %d, client %s: its update %s; it is left out", round.number, client, reason)
            refused[client] = reason
        if refused:
            continue
        own = {name: tensor for name, tensor in update.items() if name in names}
        add(client, _moved(own, updates.started.get(client), round.start), weights[client])
        extras.add(client, {n: t for n, t in update.items() if n not in names}, 1 / len(updates.read))
    return weights, refused


def _weights(
    method: Method, round: Round, expected: Sequence[TensorSpec], updates: Updates, refused: dict[str, str]
) -> dict[str, float]:
    """Return the clients' weights; where they depend on the updates, only on such as pass the checks."""
    if method.weights.reads_updates:
        for client, read in updates.read.items():
            if reason := refuse_reason(read(), expected, updates.started.get(client, round.start)):
                refused[client] = reason
        if refused:
            return {}
    weights = method.weights.of(updates.read, round)
    if not updates.shares:
        return weights
    return normalised({name: weight * updates.shares.get(name, 1.0) for name, weight in weights.items()})


def _moved(update: dict[str, Tensor], started: State | None, start: State) -> State:
    """Return a late update as if it had begun at the round's start: the start and what the client moved."""
    if started is None:
        return update
    return {name: start[name] + (tensor - started[name]) for name, tensor in update.items()}


def _part(memory: Mapping[str, Tensor], part: str) -> Memory:
    prefix = f"{part}/"
    return {name[len(prefix) :]: tensor for name, tensor in memory.items() if name.startswith(prefix)}
