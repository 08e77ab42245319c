"""Aggregation rules: from the clients' updates to what the server makes of them.

A rule sees one update at a time, in a fixed order of clients, so that the result is the same
whoever finished first, and so that for linear rules memory does not grow with the clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fedpipe.models.factors import LowRank, Pair, State, pairs
from fedpipe.models.lora import TensorSpec
from fedpipe.parts import Part


@dataclass(frozen=True)
class Round:
    """What a rule may know of a round; all of it is public.

    Attributes
    ----------
    number, rounds : this round, from 1, and how many there will be
    specs : all tensors of the adapter
    sent : those that clients send in this round
    scale : s in W + s B A, the same for all clients and ranks
    start : the global adapter that the round began with, name -> (*shape)
    ranks : each client's rank; updates are padded with zeros up to the common shape
    records : each client's number of records, where the weights may use it, else None
    seed : of the run
    rest : pair's name -> what the global model has beyond `start`, see `GlobalState.rest`
    """

    number: int
    rounds: int
    specs: Sequence[TensorSpec]
    sent: Sequence[TensorSpec]
    scale: float
    start: Mapping[str, Tensor]
    ranks: Mapping[str, int]
    records: Mapping[str, int] | None = None
    seed: int = 0
    rest: Mapping[str, LowRank] = field(default_factory=dict)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The adapted layers' factors."""
        return pairs(self.specs)

    @cached_property
    def full_rank(self) -> int:
        """The rank of the tensors: the largest that a client may have."""
        return self.pairs[0].A.shape[0]


@dataclass(frozen=True)
class Outcome:
    """What a rule made of the updates.

    Attributes
    ----------
    adapter : new values of the tensors that clients sent
    base : pair's name -> what is to be added to the frozen weight, W + scale B A, for good
    rest : pair's name -> see `GlobalState.rest`; replaces what was there
    memory : what the rule keeps until the next round, by names of its own
    metrics : numbers to be logged, by name
    """

    adapter: dict[str, Tensor]
    base: dict[str, LowRank] = field(default_factory=dict)
    rest: dict[str, LowRank] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class RunningAggregation(ABC):
    """One round's aggregation."""

    @abstractmethod
    def add(self, client: str, update: State, weight: float) -> None:
        """Take a client's values of the tensors that it sent; the weights of a round sum to 1.

        Called once for each client, in order of their names.
        """

    @abstractmethod
    def result(self) -> Outcome:
        """Return what the rule made of the updates."""


class Aggregation(Part):
    """An aggregation rule, and what can be said of it."""

    # Linear in the updates with weights that no update decides: what a sum alone suffices for, so
    # what secure aggregation and client-level privacy can be had with. `add` is then called once, with
    # the weighted mean of what `bounded` made of the updates.
    linear: ClassVar[bool] = False
    # Its result is a move in the space of the factors, which a server optimiser can take as a gradient.
    in_factors: ClassVar[bool] = True
    # Adds to the frozen weights.
    changes_base: ClassVar[bool] = False
    # May be given updates of different ranks.
    any_ranks: ClassVar[bool] = False
    # Needs A and B to be both trained and sent.
    both_factors: ClassVar[bool] = False

    @property
    def least(self) -> int:
        """The fewest clients of a round that the rule makes sense with."""
        return 1

    def bounded(self, update: State, start: State) -> State:
        """Return what a client makes of its own update where the server sees the sum only; of linear rules."""
        return update

    @abstractmethod
    def open(self, round: Round, memory: Mapping[str, Tensor]) -> RunningAggregation:
        """Return the rule for one round; `memory` is what its last outcome left, {} at first."""


class Mean(Aggregation):
    """The weighted mean of every tensor (FedAvg, McMahan et al. 2017, arXiv 1602.05629).

    For factors that all clients share it averages the products B A exactly; where both
    factors moved, mean(B) mean(A) differs from mean(B A) by the spread of the clients.
    """

    name = "mean"
    linear = True
    any_ranks = True

    def open(self, round: Round, memory: Mapping[str, Tensor]) -> RunningMean:
        return RunningMean(round.start)


class RunningMean(RunningAggregation):
    """A mean summed in float64; memory does not grow with the clients."""

    def __init__(self, start: State) -> None:
        self._start = start
        self._sums: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}

    def add(self, client: str, update: State, weight: float) -> None:
        for name, tensor in update.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self._parts[name] = torch.empty_like(self._sums[name])
            # Scaled and added one after the other: a fused step may round differently on another processor.
            self._sums[name].add_(self._parts[name].copy_(tensor).mul_(weight))

    def means(self) -> dict[str, Tensor]:
        """Return the means, float64."""
        return self._sums

    def result(self) -> Outcome:
        return Outcome({name: total.to(self._dtype(name)) for name, total in self._sums.items()})

    def _dtype(self, name: str) -> torch.dtype:
        return self._start[name].dtype if name in self._start else torch.float32


class Collecting(RunningAggregation):
    """A rule that needs all updates at once: they are kept until `result`, and the head is averaged.

    Subclasses write `combine`.
    """

    def __init__(self, round: Round, memory: Mapping[str, Tensor]) -> None:
        self.round = round
        self.memory = memory
        self.clients: list[str] = []
        self.updates: list[dict[str, Tensor]] = []
        self.weights: list[float] = []
        self._others = RunningMean(round.start)

    def add(self, client: str, update: State, weight: float) -> None:
        factors = {name: tensor for name, tensor in update.items() if name in self.factors}
        self.clients.append(client)
        self.updates.append(factors)
        self.weights.append(weight)
        self._others.add(client, {name: tensor for name, tensor in update.items() if name not in factors}, weight)

    @cached_property
    def factors(self) -> frozenset[str]:
        """The names of the tensors that the rule itself deals with; all others are averaged."""
        return frozenset(spec.name for spec in self.round.sent if spec.factor in ("A", "B", "R"))

    @abstractmethod
    def combine(self) -> Outcome:
        """Make the outcome of `clients`, `updates` and `weights`, all in the same order."""

    def result(self) -> Outcome:
        outcome = self.combine()
        return Outcome(
            {**self._others.result().adapter, **outcome.adapter},
            outcome.base,
            outcome.rest,
            outcome.memory,
            outcome.metrics,
        )
