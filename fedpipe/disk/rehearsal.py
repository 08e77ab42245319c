"""Two rounds of a method on one small layer: what shapes the state, the server's memory, updates and kept files have.

What depends on a layer's sides is found by giving the small layer two sides of its own, which are then
replaced by those of each real layer. What has been added to the frozen weights grows with the rounds
and with the clients: that is measured for two numbers of clients, and continued as a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from fedpipe.client.objectives import Begin
from fedpipe.client.schedule import Decision
from fedpipe.client.starts import client_start
from fedpipe.client.training import CohortWork, Update, make_update
from fedpipe.config import Settings
from fedpipe.methods import Method
from fedpipe.models.factors import GlobalState, LowRank, Pair, pairs
from fedpipe.models.layers import TensorSpec, grid
from fedpipe.server.aggregate import Round
from fedpipe.server.initialisation import Start
from fedpipe.server.round import Updates, objective_down, server_round

ROUNDS = 2  # played: an even number, since some methods train their factors in turn
RANK = 8  # of the small layer, at the most

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Played:
    """What one round left."""

    state: GlobalState
    memory: Tensors
    update: Update


@dataclass(frozen=True)
class Rehearsal:
    """A method, the model's tensors that it is to train, and how many clients take part in a round."""

    method: Method
    specs: Sequence[TensorSpec]
    trained: frozenset[str]
    settings: Settings
    clients: int

    @cached_property
    def pair(self) -> Pair:
        """The layer that stands for all."""
        return pairs(self.specs)[0]

    @cached_property
    def rank(self) -> int:
        return min(RANK, self.settings.lora.rank)

    @cached_property
    def sides(self) -> tuple[int, int]:
        """The small layer's sides: different, and larger than all ranks that come to lie in it."""
        least = 4 * self.rank * (self.method.aggregation.least + 3)
        return least + 7, least + 9

    @cached_property
    def small(self) -> list[TensorSpec]:
        """The head's tensors, and those of the small layer."""
        (m, n), r = self.sides, self.rank
        shapes = {"A": (r, n), "B": (m, r), "R": (r, r), "mixer": (2, n), "sparse": self._crossing((m, n))}
        own = [s for s in self.specs if s.factor == "head" or s.name.startswith(f"{self.pair.name}.")]
        return [replace(spec, shape=shapes.get(spec.factor, spec.shape)) for spec in own]

    @cached_property
    def learnt(self) -> list[TensorSpec]:
        return [spec for spec in self.small if spec.name in self.trained]

    @cached_property
    def rounds(self) -> list[Played]:
        """The rounds as they are with the fewest clients."""
        return self.play(max(1, min(self.clients, self.method.aggregation.least + 1)))

    def growth(self, group: str) -> tuple[float, float]:
        """Return the rank of `base` or `rest` after round 0, and by how much a round adds to it."""
        few = self.method.aggregation.least + 1
        counts = [self.clients] if self.clients <= few + 1 else [few, few + 1]
        first, steps = 0.0, []
        for count in counts:
            ranks = [_rank(getattr(played.state, group), self.pair) for played in (self._first, *self.play(count))]
            first = ranks[0]
            steps.append((ranks[-1] - first) / ROUNDS)
        step = steps[0] if len(steps) == 1 else steps[0] + (self.clients - counts[0]) * (steps[1] - steps[0])
        larger = self.settings.lora.rank / self.rank
        return larger * first, larger * step

    def sizes(self, tensors: Tensors) -> list[tuple[str, int]]:
        """Return name and bytes of what these tensors are in the real model: for each layer, those of the small one."""
        found = []
        for name, tensor in tensors.items():
            if self.pair.name not in name:
                found.append((name, tensor.nbytes))
                continue
            for pair in pairs(self.specs):
                numel = 1
                for side in tensor.shape:
                    numel *= self._real(pair).get(side, side)
                found.append((name.replace(self.pair.name, pair.name), numel * tensor.element_size()))
        return found

    def _real(self, pair: Pair) -> dict[int, int]:
        """Return the small layer's sides -> those of a real one."""
        shape = pair.B.shape[0], pair.A.shape[1]
        crossing = dict(zip(self._crossing(self.sides), self._crossing(shape), strict=True))
        return {**crossing, self.rank: pair.A.shape[0], **dict(zip(self.sides, shape, strict=True))}

    def _crossing(self, shape: tuple[int, int]) -> tuple[int, ...]:
        share = self.method.initialisation.sparse
        return tuple(map(len, grid(self.pair.name, shape, share, self.settings.seed))) if share else (0, 0)

    def play(self, count: int) -> list[Played]:
        """Play the rounds with so many clients, who differ by noise."""
        state, memory, kept, played = self._first.state, {}, {}, []
        for number in range(1, ROUNDS + 1):
            update = self._client(number, state, memory, kept, count)
            sent, names = self._sent(number), [f"c{client:03d}" for client in range(count)]
            read = {name: partial(_shifted, update.tensors, seed) for seed, name in enumerate(names)}
            facts = self._facts(number, state, names, sent)
            result = server_round(self.method, facts, state, memory, Updates(read), count, self._weight)
            state, memory, kept = result.state, result.memory, update.kept
            played.append(Played(state, memory, update))
        return played

    @cached_property
    def _first(self) -> Played:
        held = [s for s in self.small if s.adapter == "default" and s.factor != "mixer"]
        usual = GlobalState(_shifted({spec.name: torch.zeros(spec.shape) for spec in held}, 0))
        state = self.method.initialisation.first(usual, self._facts(0, usual, [], []), self._weight)
        return Played(state, {}, Update({}, 0.0, None, 0))

    def _client(self, number: int, state: GlobalState, memory: Tensors, kept: Tensors, count: int) -> Update:
        method, settings = self.method, self.settings
        gradient = {self.pair.name: self._weight(self.pair.name)}
        facts = Start(
            round=number,
            rounds=settings.federation.rounds,
            state=state,
            kept=kept,
            kept_round=number - 1,
            scale=1.0,
            rank=self.rank,
            specs=self.small,
            weight=1 / count,
            gradient=(lambda adapter: gradient) if method.initialisation.raw_gradient else None,
        )
        start = client_start(method, self.small, self.trained, facts, objective_down(method, memory, state.adapter))
        names = {spec.name for spec in self.learnt}
        moved = _shifted(start.tensors, 1)
        ended = {name: moved[name] if name in names else tensor for name, tensor in start.tensors.items()}
        began, after = ({name: tensor[None] for name, tensor in own.items()} for own in (start.tensors, dict(ended)))
        running = method.objective.begin(
            Begin(number, self.small, began, start.received, [kept if number > 1 else None])
        )
        running.after_step(after, self.learnt, dict.fromkeys(names, 0.1))
        extras, more = ({n: t[0] for n, t in own.items()} for own in (running.extras(after), running.kept(after)))
        modes = method.schedule.modes(Decision(number, facts.rounds, settings.seed, self.learnt))
        work = CohortWork(number, ("c000",), (), (start,), self.trained, "", b"", modes)
        steps = settings.federation.local_steps
        return make_update(self.small, method, work, start, ended, extras, more, steps, None, None, None)

    def _sent(self, number: int) -> list[TensorSpec]:
        federation = self.settings.federation
        modes = self.method.schedule.modes(Decision(number, federation.rounds, self.settings.seed, self.learnt))
        return self.method.sends(self.learnt, number, federation.local_steps, modes)

    def _facts(self, number: int, state: GlobalState, names: Sequence[str], sent: Sequence[TensorSpec]) -> Round:
        return Round(
            number=number,
            rounds=self.settings.federation.rounds,
            specs=self.small,
            sent=sent,
            scale=1.0,
            start=state.adapter,
            ranks=dict.fromkeys(names, self.rank),
            records=dict.fromkeys(names, 1),
            seed=self.settings.seed,
            rest=state.rest,
        )

    def _weight(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.sides, generator=generator)


def _shifted(tensors: Tensors, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def _rank(products: Mapping[str, LowRank], pair: Pair) -> int:
    return products[pair.name].rank if pair.name in products else 0
