"""Local objectives that do not depend on the records: they correct a step after it was made private.

In the paper each is a term of the loss. Its gradient is the same for all records, so inside the
records' gradients it would use up their clip norm; as a step of its own, at the learning rate of
the step that it follows, it costs neither clip norm nor privacy (decoupled, as weight decay is).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedpipe.client.objectives import Begin, Objective, Running, State
from fedpipe.models import steady
from fedpipe.models.factors import Pair, pairs
from fedpipe.models.lora import TensorSpec

_CONTROL = "control/"


class Prox(Objective):
    """Pull towards the round's start with mu / 2 ||theta - start||^2 (FedProx, Li et al. 2020, arXiv 1812.06127).

    Parameters
    ----------
    mu : weight of the pull; 0 is `plain`
    """

    name = "prox"
    mu: Annotated[float, Field(ge=0)] = 0.01

    def begin(self, begin: Begin) -> Running:
        return _Pulled(self.mu, begin.start)


class _Pulled(Running):
    def __init__(self, mu: float, start: Mapping[str, Tensor]) -> None:
        self._mu, self._start = mu, start

    def after_step(self, state: State, active: Sequence[TensorSpec], rates: Mapping[str, float]) -> None:
        if not self._mu:
            return
        for spec in active:
            state[spec.name].lerp_(self._start[spec.name], rates[spec.name] * self._mu)


class Scaffold(Objective):
    """Correct each step by the difference of the client's mean gradient from all clients' (SCAFFOLD, option II).

    Karimireddy et al. 2020, arXiv 1910.06378. A client's control is the mean of the gradients that it
    stepped along in its last round, computed from what it moved, so it costs no privacy; the server's
    is the mean of all clients'. A tensor's moves are divided by the sum of the learning rates of the
    steps that trained it, so that alternating schedules are exact, too.

    Parameters
    ----------
    approx : allow optimisers other than plain SGD, with which a control is a mean direction, not a gradient
    """

    name = "scaffold"
    stateful = True
    approx: bool = False

    @property
    def needs_sgd(self) -> bool:
        return not self.approx

    def begin(self, begin: Begin) -> Running:
        return _Controlled(begin)

    def extra_specs(self, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
        return [replace(spec, name=f"{_CONTROL}{spec.name}") for spec in specs]

    def down(self, memory: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> State:
        return {name: tensor for name, tensor in memory.items() if name.startswith(_CONTROL)}

    def remember(
        self, memory: Mapping[str, Tensor], extras: Mapping[str, Tensor], participants: int, clients: int
    ) -> State:
        moves = {name: mean * (participants / clients) for name, mean in extras.items() if name.startswith(_CONTROL)}
        return {**memory, **{name: memory[name] + move if name in memory else move for name, move in moves.items()}}


class _Controlled(Running):
    def __init__(self, begin: Begin) -> None:
        self._start = begin.start
        self._rates: Counter[str] = Counter()
        support = supports(begin.specs, begin.start)
        self._own: State = {}
        self._shared: State = {}
        for name, start in begin.start.items():
            key, nothing = f"{_CONTROL}{name}", torch.zeros_like(start[0])
            # What is never sent has no shared control; corrected by the client's own alone, its steps would be undone.
            kept = [{} if key not in begin.received else own or {} for own in begin.kept]
            self._own[name] = torch.stack([own.get(key, nothing) for own in kept])
            # Beyond a client's rank the others' control must not move its zeros.
            self._shared[name] = begin.received.get(key, nothing) * support.get(name, 1.0) + torch.zeros_like(start)

    def after_step(self, state: State, active: Sequence[TensorSpec], rates: Mapping[str, float]) -> None:
        for spec in active:
            self._rates[spec.name] += rates[spec.name]
            state[spec.name].sub_(self._shared[spec.name] - self._own[spec.name], alpha=rates[spec.name])

    def extras(self, state: Mapping[str, Tensor]) -> State:
        return {
            f"{_CONTROL}{name}": (self._start[name] - state[name]) / rate - self._shared[name]
            for name, rate in self._rates.items()
        }

    def kept(self, state: Mapping[str, Tensor]) -> State:
        moves = self.extras(state)
        controls = {f"{_CONTROL}{name}": own for name, own in self._own.items()}
        return {key: own + moves[key] if key in moves else own for key, own in controls.items()}


class HetTail(Objective):
    """Shrink the last ranks, so that a client can give them up (HetLoRA, Cho et al. 2024, arXiv 2401.06432).

    For a client of rank r the term is strength * ||B[:, t:]|| ||A[t:, :]|| of each layer, with
    t = floor(gamma r) and at least 1. The norms have no gradient at zero, so the step is that of a
    proximal method: a tail shrinks along itself, and stops at zero.

    Parameters
    ----------
    strength : weight of the term
    gamma : share of the ranks that is not in the tail; 1 has no tail
    """

    name = "het-tail"
    strength: Annotated[float, Field(ge=0)] = 0.01
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.99

    def begin(self, begin: Begin) -> Running:
        return _Shrunk(self, begin)


class _Shrunk(Running):
    def __init__(self, term: HetTail, begin: Begin) -> None:
        self._strength = term.strength
        self._tails = [
            (pair, _tail(client_ranks(pair, begin.start), pair.A.shape[0], term.gamma)) for pair in pairs(begin.specs)
        ]

    def after_step(self, state: State, active: Sequence[TensorSpec], rates: Mapping[str, float]) -> None:
        names = {spec.name for spec in active}
        for pair, tail in self._tails:
            of_a, of_b = tail[:, :, None], tail[:, None, :]
            norm_a = steady.squares(state[pair.A.name] * of_a).sqrt().float()
            norm_b = steady.squares(state[pair.B.name] * of_b).sqrt().float()
            for name, mask, own, other in ((pair.A.name, of_a, norm_a, norm_b), (pair.B.name, of_b, norm_b, norm_a)):
                if name in names:
                    step = rates[name] * self._strength * other / own.clamp(min=torch.finfo(own.dtype).tiny)
                    state[name].mul_(1 - mask * step.clamp(max=1.0)[:, None, None])


def _tail(ranks: Tensor, rank: int, gamma: float) -> Tensor:
    """Return 1 from where each client's tail begins, 0 before it: (clients, rank)."""
    first = torch.tensor([max(1, math.floor(gamma * own)) for own in ranks.tolist()], device=ranks.device)
    return (torch.arange(rank, device=ranks.device) >= first[:, None]).float()


def client_ranks(pair: Pair, start: Mapping[str, Tensor]) -> Tensor:
    """Return how many ranks each client has: up to its last row of A or column of B that is not zero, (clients,)."""
    used = (start[pair.A.name] != 0).any(2) | (start[pair.B.name] != 0).any(1)
    numbers = torch.arange(1, used.shape[1] + 1, device=used.device)
    return (used * numbers).amax(1)


def supports(specs: Sequence[TensorSpec], start: Mapping[str, Tensor]) -> State:
    """Return, for A and B, 1 where a client has numbers of its own and 0 beyond its rank, to be multiplied with."""
    found: State = {}
    for pair in pairs(specs):
        ranks = client_ranks(pair, start)
        own = (torch.arange(pair.A.shape[0], device=ranks.device) < ranks[:, None]).float()
        found |= {pair.A.name: own[:, :, None], pair.B.name: own[:, None, :]}
    return found
