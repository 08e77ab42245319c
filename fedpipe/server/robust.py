"""Robust rules: aggregates that a minority of clients cannot carry away.

They deal with everything that is sent, the head included. None of them replaces the check of every
update (`fedpipe.server.checks`): a value that is not a number has no order and no distance.

What each resists, of K clients: median and geometric median fewer than K / 2 that lie, trimmed
mean a share `trim`, Krum and its kin `attackers` of at least 2 attackers + 3. The noise of
differential privacy stands between any two honest clients, sqrt(2 d) sigma for d numbers, and hides
liars of that size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from fedpipe.models.factors import State
from fedpipe.server.aggregate import Aggregation, Outcome, Round, RunningAggregation, RunningMean
from fedpipe.server.moves import CollectingAll, gram, mean_of, move_length, move_of, moved

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PerNumber(Aggregation):
    """A rule that looks at each number by itself, over the clients; their weights are ignored."""

    @abstractmethod
    def of(self, moves: Tensor) -> Tensor:
        """Return what becomes of moves (clients, numbers), float64."""

    def open(self, round: Round, memory: Mapping[str, Tensor]) -> RunningPerNumber:
        return RunningPerNumber(self, round, memory)


class RunningPerNumber(CollectingAll):
    """One round of a rule that looks at each number by itself."""

    def __init__(self, rule: PerNumber, round: Round, memory: Mapping[str, Tensor]) -> None:
        super().__init__(round, memory)
        self.rule = rule

    def combine(self) -> Outcome:
        start, names = self.round.start, [spec.name for spec in self.round.sent]
        return Outcome(moved(start, {name: self.rule.of(move_of(name, self.updates, start)) for name in names}))


class Median(PerNumber):
    """The median of every number; of an even number of clients the mean of the middle two (Yin et al. 2018).

    arXiv 1803.01498. Weights are ignored.
    """

    name = "median"

    def of(self, moves: Tensor) -> Tensor:
        return _middle(moves.sort(dim=0).values, (len(moves) - 1) // 2)


class TrimmedMean(PerNumber):
    """The mean of every number without its largest and smallest values (Yin et al. 2018, arXiv 1803.01498).

    `trim` is the share of clients that is left out at either end, rounded down to whole clients; a
    round with so few that it rounds to none is refused, since nothing would be trimmed. 0 is the
    mean. Weights are ignored.
    """

    name = "trimmed-mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2

    @property
    def least(self) -> int:
        return math.ceil(1 / self.trim - 1e-9) if self.trim else 1

    def of(self, moves: Tensor) -> Tensor:
        return _middle(moves.sort(dim=0).values, math.floor(self.trim * len(moves) + 1e-9))


def _middle(ranked: Tensor, left_out: int) -> Tensor:
    return ranked[left_out : len(ranked) - left_out].mean(dim=0)


class GeometricMedian(Aggregation):
    """The point with the least weighted sum of distances to the clients (RFA, Pillutla et al. 2022, arXiv 1912.13445).

    By smoothed Weiszfeld steps: the mean with weights p / max(smoothing, distance), again and again.
    They begin at the mean and run to convergence; after the four steps that are often taken, one client at
    1e6 still moves the result by hundreds. It compares factors, because factors are what it averages.

    Options
    -------
    smoothing : the distance below which a client counts as being at the point
    tol : stop when a step is shorter than this share of the weighted harmonic mean of the distances, which
        a far client does not lengthen
    max_iter : and at the latest after so many steps; the metric `geometric-median/steps` tells

    Weights count.
    """

    name = "geometric-median"
    smoothing: Positive = 1e-5
    tol: Positive = 1e-6
    max_iter: PositiveInt = 1000

    def open(self, round: Round, memory: Mapping[str, Tensor]) -> RunningGeometricMedian:
        return RunningGeometricMedian(self, round, memory)

    def weights(self, products: Tensor, weights: Tensor) -> tuple[Tensor, int]:
        """Return the weights of the clients whose mean is the geometric median, and the steps it took.

        Parameters
        ----------
        products : inner products of the clients' moves, (clients, clients)
        weights : the clients' own, summing to 1
        """
        squares, current, steps = products.diagonal(), weights, 0
        while steps < self.max_iter:
            steps += 1
            distances = (squares - 2 * products @ current + current @ products @ current).clamp(min=0).sqrt()
            pulls = weights / distances.clamp(min=self.smoothing)
            following = pulls / pulls.sum()
            moved_by = (following - current) @ products @ (following - current)
            current = following
            if float(moved_by.clamp(min=0).sqrt()) * float(pulls.sum()) <= self.tol:
                break
        return current, steps


class RunningGeometricMedian(CollectingAll):
    """One round of the geometric median."""

    def __init__(self, rule: GeometricMedian, round: Round, memory: Mapping[str, Tensor]) -> None:
        super().__init__(round, memory)
        self.rule = rule

    def combine(self) -> Outcome:
        products = gram(self.updates, self.round, "factors")
        weights, steps = self.rule.weights(products, torch.tensor(self.weights, dtype=torch.float64))
        means = mean_of(self.clients, self.updates, weights.tolist(), self.round.start)
        return Outcome(means, metrics={"geometric-median/steps": float(steps)})


class NormBound(Aggregation):
    """The mean of moves that are each shortened to `bound` where they are longer (Sun et al. 2019, arXiv 1911.07963).

    The length is that of all tensors of an update together, and `bound` is fixed: clients could shorten
    their own moves, so a sum is all that the server needs, and nothing is said about how many were
    longer. The result moves by `bound` at most.
    """

    name = "norm-bound"
    linear = True
    bound: Positive = 1.0

    def bounded(self, update: State, start: State) -> State:
        length = move_length(update, start)
        if length <= self.bound:
            return update
        moves = {name: tensor.double() - start[name].double() for name, tensor in update.items()}
        return {name: start[name].double() + self.bound / length * move for name, move in moves.items()}

    def open(self, round: Round, memory: Mapping[str, Tensor]) -> RunningNormBound:
        return RunningNormBound(self, round)


class RunningNormBound(RunningAggregation):
    """One round of the norm bound; memory does not grow with the clients."""

    def __init__(self, rule: NormBound, round: Round) -> None:
        self.rule = rule
        self._start = round.start
        self._mean = RunningMean(round.start)

    def add(self, client: str, update: State, weight: float) -> None:
        self._mean.add(client, self.rule.bounded(update, self._start), weight)

    def result(self) -> Outcome:
        return self._mean.result()
