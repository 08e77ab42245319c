"""The private sum of a round, for unit `client`: DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963).

In each round every client takes part independently with probability q, by secret coins. What it moved,
over all tensors that it sends, is one vector and is clipped to l2 norm C. The server releases

    start + (sum of the clipped moves + N(0, sigma^2 C^2)) / (expected number of clients)

and nothing else. One client more or less changes the sum by C at most: no weight, denominator or
refusal of another client depends on it. The expected number is fixed, for the realised one is as
secret as the coins; and a round in which nobody took part releases noise, like any other.

The server is trusted here: it sees the updates as they are. Everybody else sees what it releases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpipe.errors import StateError
from fedpipe.models.factors import State
from fedpipe.models.lora import TensorSpec
from fedpipe.privacy.ledger import EVERY
from fedpipe.privacy.noise import KeyedStream, client_key, poisson_sample
from fedpipe.server.checks import refuse_reason
from fedpipe.server.weights import Readers

STEP = 1  # a round is one noisy step of all clients


@dataclass(frozen=True)
class Released:
    """What everybody may see of a round.

    Attributes
    ----------
    adapter : the new values of the tensors that were sent, (*shape) in the start's type
    norm : the l2 norm of the move from the start to them
    snr : of signal and noise in that move, estimated from the noisy sum alone
    """

    adapter: State
    norm: float
    snr: float


@dataclass(frozen=True)
class Release:
    """What makes a round's sum private.

    Attributes
    ----------
    clip_norm : C, the bound on the l2 norm of a client's move over all tensors together
    noise_multiplier : sigma, the noise's standard deviation on the sum over C
    expected : how many clients take part on average, which the sum is divided by
    query : digest of all that the sum depends on; the noise is a function of (key, query, round, tensor)
    """

    clip_norm: float
    noise_multiplier: float
    expected: float
    round: int
    query: str
    key: bytes = field(repr=False)

    def of(self, start: Mapping[str, Tensor], sent: Sequence[TensorSpec], updates: Readers) -> Released:
        """Return what is released of these updates.

        Parameters
        ----------
        start : the global adapter that the round began with
        sent : the tensors that each update consists of
        updates : of the clients that took part, maybe none

        Raises
        ------
        StateError
            An update cannot be read. Who sent it is not said.
        """
        total = clipped_sum(start, sent, updates, self.clip_norm)
        std = self.noise_multiplier * self.clip_norm
        for spec in sent:
            total[spec.name] += std * self._normals(spec)
        adapter = {
            spec.name: (start[spec.name].double() + total[spec.name] / self.expected).to(start[spec.name].dtype)
            for spec in sent
        }
        energy = sum(float(tensor.square().sum()) for tensor in total.values())
        noise = std**2 * sum(spec.numel for spec in sent)
        return Released(adapter, math.sqrt(energy) / self.expected, math.sqrt(max(energy - noise, 0.0) / noise))

    def _normals(self, spec: TensorSpec) -> Tensor:
        """Return standard normals, float64 of the tensor's shape."""
        stream = KeyedStream(client_key(self.key, EVERY), "noise", self.query, self.round, EVERY, STEP, spec.name)
        return torch.from_numpy(stream.gaussian(spec.shape))


def taking_part(key: bytes, query: str, round: int, clients: Sequence[str], rate: float) -> tuple[str, ...]:
    """Return who takes part in a round: each client by a coin of its own, from the secret key; maybe nobody."""
    chosen = poisson_sample(client_key(key, EVERY), query, round, EVERY, STEP, len(clients), rate)
    return tuple(clients[index] for index in chosen)


def clipped_sum(start: Mapping[str, Tensor], sent: Sequence[TensorSpec], updates: Readers, clip_norm: float) -> State:
    """Return the sum of the clients' clipped moves, float64, in order of their names.

    An update that does not pass the server's checks adds nothing, as if it had not moved; nobody is told.
    """
    total = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in sent}
    for client in sorted(updates):
        try:
            update = updates[client]()
        except StateError:
            # The message would name the client; that it took part is a secret.
            raise StateError("an update of the round is missing or damaged; run the same command again") from None
        if refuse_reason(update, sent, start) is None:
            for name, move in clipped(start, update, clip_norm).items():
                total[name] += move
    return total


def clipped(start: Mapping[str, Tensor], update: Mapping[str, Tensor], clip_norm: float) -> State:
    """Return what a client moved, float64, shortened to `clip_norm` over all tensors together if it is longer."""
    # In order of the names: a file hands its tensors over in any order, and the last bit of the norm is of the order.
    moves = {name: update[name].double() - start[name].double() for name in sorted(update)}
    norm = math.sqrt(sum(float(move.square().sum()) for move in moves.values()))
    return {name: move * min(1.0, clip_norm / norm) for name, move in moves.items()} if norm > 0 else moves
