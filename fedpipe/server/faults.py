"""Faults of clients, simulated: what goes wrong with whom, drawn from the seed, and what a spoilt update looks like.

A client of a round has one fault at the most. It is a function of the seed, the settings, the round, the
attempt at it and the client's name, and of nothing that anybody holds: so it is public, the same whenever a
run is resumed, and another one when the round is tried again. A client that is hit has trained, and has spent.

How long a client takes follows from its simulated speed (`fedpipe.server.jobs`), and so is public, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpipe.config import FaultSettings
from fedpipe.server.jobs import Demand, Scheduling

KINDS = ("exception", "nan", "shape", "digest", "norm", "straggle", "vanish")
STAGES = ("keys", "shares", "upload", "reveal")  # a secure sum's messages; who vanishes sends none from one on
SIMULATED = "(simulated)"  # stands behind the reason for what is no real fault
_ABSURD = 1e9  # on every number
_FAULTS = 6  # which of a round's streams


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a client in a round; `stage` is where in a secure sum, if it vanishes there."""

    kind: str
    stage: str


def faults_of(settings: FaultSettings, seed: int, round: int, attempt: int, clients: Iterable[str]) -> dict[str, Fault]:
    """Return the faults of those of these clients that have one in an attempt at a round."""
    chances = np.cumsum([getattr(settings, kind) for kind in KINDS])
    found = {}
    for client in clients if settings.any else ():
        name = int.from_bytes(hashlib.sha256(client.encode()).digest()[:8])
        luck, place = np.random.default_rng([seed, round, _FAULTS, attempt, name]).random(2)
        if luck < chances[-1]:
            kind = KINDS[int(np.searchsorted(chances, luck, side="right"))]
            found[client] = Fault(kind, STAGES[int(place * len(STAGES))])
    return found


def job_seconds(rounds: Scheduling, steps: Mapping[str, int], seed: int) -> dict[str, float]:
    """Return how long each client takes for a job of so many local steps; the median one takes 1 s for a step.

    `steps` are those of all clients: speeds are drawn in the order of their names.
    """
    clients = tuple(sorted(steps))
    speeds = rounds.speeds(Demand(clients, rounds=1, wanted=1, local_steps=1, cap=1, seed=seed))
    return {client: speeds.job(place, steps[client]) for place, client in enumerate(clients)}


def spoilt(update: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return an update with a fault of a kind that changes its content; `digest` changes one number a little."""
    name = min(update)
    tensor = update[name].clone()
    if kind == "norm":
        return {other: whole + _ABSURD for other, whole in update.items()}
    if kind == "shape":
        return {**update, name: tensor.new_zeros(tensor.numel() + 1)}
    if kind == "nan":
        tensor.view(-1)[0] = torch.nan
    elif kind == "digest":
        tensor.view(-1)[0] += 1.0
    else:
        return dict(update)
    return {**update, name: tensor}


def unusable(update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what no server takes, and nobody can tell from a training that diverged."""
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in update.items()}
