"""The real private steps, run on tiny models, and what a server sees of them.

Nothing in here imitates the mechanism: `train_cohort` and the cohort engine are run as they are.
With SGD at learning rate 1 a step moves the adapter by exactly what it releases, so what a step
released is read off the states before and after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small import CPU, random_state
from test_families import FAMILIES, LABELS, ImageClassification, Images, save
from tiny import make_backbone, tiny_values
from torch import Tensor

from fedpipe.client.engine import CohortEngine, Engine
from fedpipe.client.filters import NoFilter
from fedpipe.client.starts import client_start
from fedpipe.client.training import CohortWork, train_cohort
from fedpipe.config import LoraSettings, OptimizerSettings, Settings, parse_settings
from fedpipe.methods import CATALOGUE, Method
from fedpipe.models.factors import GlobalState
from fedpipe.models.lora import AdaptedModel, build_model
from fedpipe.models.source import Backbone
from fedpipe.models.task import Encoded, TextClassification
from fedpipe.plan import Plan, make_plan
from fedpipe.privacy.ledger import Ledger
from fedpipe.server.initialisation import Start

KEY, QUERY = bytes(range(32)), "a query"
CLIENTS = ("c000", "c001", "c002")
CLIP, BATCH = 0.5, 8.0
QUIET = 1e-4  # a noise multiplier beside which one record's contribution is plain to see
State = dict[str, Tensor]


@dataclass
class Trace:
    """What a cohort's steps released: `moves[step - 1]` is name -> (clients, *shape), of every tensor that is sent."""

    clients: tuple[str, ...]
    moves: list[State]
    batches: list[list[np.ndarray]]
    active: list[set[str]]
    ledger: Ledger
    plan: Plan

    def released(self, step: int = 1, row: int = 0) -> Tensor:
        """Return all that a client released in a step, as one vector in double precision."""
        move = self.moves[step - 1]
        return torch.cat([move[name][row].double().flatten() for name in sorted(move)])


class Recorder:
    """An engine that keeps every state it is given, and asks another one."""

    device = CPU

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.states: list[State] = []
        self.batches: list[list[np.ndarray]] = []
        self.active: list[set[str]] = []

    def clipped_sums(self, state: State, records: Any, batches: Any, active: Any, *others: Any, **more: Any) -> State:
        self.states.append({name: tensor.clone() for name, tensor in state.items()})
        self.batches.append(list(batches))
        self.active.append({spec.name for spec in active})
        return self.engine.clipped_sums(state, records, batches, active, *others, **more)


class NoGradients:
    """An engine whose records have no gradient, for long runs in which only batches and noise matter."""

    device = CPU

    def clipped_sums(self, state: State, records: Any, batches: Any, active: Any, *others: Any, **more: Any) -> State:
        return {spec.name: torch.zeros_like(state[spec.name]) for spec in active}


class Pictures(Images):
    """Images that are each a unit of their own."""

    groups = None


def unfiltered(name: str, **parts: Any) -> Method:
    """Return a method of the catalogue without its filter, which would colour the noise."""
    return replace(CATALOGUE[name], filter=NoFilter(), **parts)


def only(records: Any, kept: Sequence[int]) -> Any:
    """Return some of a client's records, in this order."""
    chosen = np.asarray(kept, dtype=np.int64)
    if not isinstance(records, Encoded):
        return Pictures(records.pixels[chosen], records.labels[chosen])
    pieces = [records.tokens[records.offsets[i] : records.offsets[i + 1]] for i in chosen]
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return Encoded(np.concatenate(pieces), offsets, records.labels[chosen], records.pad)


@dataclass
class World:
    """A model, three clients' records, and somewhere to put ledgers."""

    model: AdaptedModel
    records: Sequence[Any]
    settings: Settings
    directory: Path
    _count: itertools.count = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        # Now, and not in the middle of a run with a bug in it.
        self._batched = self.model.to_batched()
        self._plan = make_plan(self.settings, dict.fromkeys(CLIENTS, 100))
        # An adapter without zeros, so that A and B both have a gradient.
        self.start = {name: tensor[0] for name, tensor in random_state(self.model.specs, 1).items()}

    @property
    def everything(self) -> frozenset[str]:
        return frozenset(spec.name for spec in self.model.specs)

    def new_ledger(self) -> Ledger:
        return Ledger(self.directory / f"{next(self._count)}.jsonl", "a run")

    def plan(self, sizes: Sequence[int], steps: int, sigma: float, q: float, batch: float, clip: float) -> Plan:
        base, clients = self._plan, {}
        for client, size in zip(CLIENTS, sizes, strict=False):
            changes = {"records": size, "sampling_rate": q, "expected_batch": batch, "noise_multiplier": sigma}
            clients[client] = replace(base.clients[client], **changes, max_steps=10 * steps, local_steps=steps)
        return replace(base, clip_norm=clip, local_steps=steps, clients=clients)

    def run(
        self,
        records: Sequence[Any] | None = None,
        *,
        method: Method | None = None,
        sigma: float = QUIET,
        q: float = 1.0,
        batch: float = BATCH,
        clip: float = CLIP,
        steps: int = 1,
        plan: Plan | None = None,
        engine: Engine | None = None,
        ledger: Ledger | None = None,
        lr: float = 1.0,
        **work: Any,
    ) -> Trace:
        """Run one round of a cohort; the clients are as many as lists of records."""
        records = self.records if records is None else records
        clients = CLIENTS[: len(records)]
        plan = plan or self.plan([len(own) for own in records], steps, sigma, q, batch, clip)
        method, ledger = method or unfiltered("dp-lora"), ledger or self.new_ledger()
        recorder = Recorder(engine or CohortEngine(self._batched, CPU, "fp32", 10**6))
        settings = OptimizerSettings(name="sgd", lr=lr)
        cohort = self._work(records, clients, method, plan, work)
        updates = train_cohort(recorder, self.model, cohort, plan, method, settings, ledger)
        last = {name: tensor.clone() for name, tensor in recorder.states[-1].items()}
        for row, client in enumerate(clients):
            for name, tensor in updates[client].tensors.items():
                last[name][row] = tensor
        states = [*recorder.states, last]
        moves = [{n: (a[n] - b[n]) / lr for n in a} for a, b in itertools.pairwise(states)]
        return Trace(clients, moves, recorder.batches, recorder.active, ledger, plan)

    def _work(
        self, records: Sequence[Any], clients: tuple[str, ...], method: Method, plan: Plan, changes: Mapping[str, Any]
    ) -> CohortWork:
        values = {"round": 1, "trained": self.everything, "query": QUERY, "key": KEY, **changes}
        facts = Start(
            round=values["round"],
            rounds=plan.rounds,
            state=GlobalState(dict(self.start)),
            kept={},
            kept_round=0,
            scale=self.model.scale,
            rank=2,
            specs=self.model.specs,
        )
        start = client_start(method, self.model.specs, values["trained"], facts)
        return CohortWork(clients=clients, records=records, starts=[start] * len(clients), **values)


class Lab:
    """The worlds that the checks run in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.text = self._text()
        self.images = self._images()

    def _text(self) -> World:
        """A BERT of two layers, whose records' gradients are longer than the clip norm."""
        backbone = Backbone(make_backbone(self.directory / "backbone", spread=0.3), "0" * 64, "tiny", {})
        task = TextClassification(("bad", "good"))
        model = build_model(backbone, task, LoraSettings(rank=2, alpha=4.0), 0)
        return World(model, make_texts(), self.settings(), self._below("text"))

    def _images(self) -> World:
        """A Swin of two stages, which folds the windows of an image into the batch axis."""
        family = FAMILIES["swin"]
        model = build_model(save(family, self.directory / "swin"), ImageClassification(LABELS), LoraSettings(rank=2), 0)
        generator = np.random.default_rng(0)
        pixels = generator.standard_normal((6, 3, *family.size), dtype=np.float32)
        records = [Pictures(pixels, generator.integers(len(LABELS), size=6))]
        return World(model, records, self.settings(), self._below("images"))

    def settings(self, **sections: Any) -> Settings:
        """Return settings that need no numerical composition to be calibrated."""
        privacy = {"accountant": "rdp", **sections.pop("privacy", {})}
        return parse_settings(tiny_values(self.directory, privacy=privacy, **sections))

    def _below(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir()
        return path


def make_texts(clients: int = 3, records: int = 16) -> list[Encoded]:
    """Return records of unequal length for each client."""
    generator, made = np.random.default_rng(0), []
    for _ in range(clients):
        lengths = generator.integers(3, 11, records)
        tokens, offsets = generator.integers(5, 25, lengths.sum()), np.cumsum([0, *lengths])
        made.append(Encoded(tokens, offsets, generator.integers(0, 2, records), 0))
    return made
