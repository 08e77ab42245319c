"""Checks of the other units of privacy: a group of records, and a client as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from made_rounds import make_specs
from scipy.stats import chi2
from torch import Tensor

from fedpipe.models.task import Encoded
from fedpipe.server import central
from planted.checks import RARE, check, require
from planted.world import BATCH, CLIP, KEY, QUERY, QUIET, Lab, State, World, only


@check
def group_sensitivity(lab: Lab) -> None:
    """With unit `group`, a whole group more moves the sum by C at most, however many records it has."""
    world = lab.text
    groups = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 4, 4, 5, 5, 5, 5])
    full, moved = _of_groups(world, groups, range(6)), []
    for left in range(6):
        moved.append(float((full - _of_groups(world, groups, [g for g in range(6) if g != left])).norm()) * BATCH)
    require(max(moved) <= CLIP * 1.001, f"one group moves the sum by {max(moved):.3f}, above C = {CLIP}")
    require(max(moved) >= CLIP * 0.9, "nothing reaches the clip norm, so that nothing was tried")


def _of_groups(world: World, groups: np.ndarray, kept: Sequence[int]) -> Tensor:
    """Return what a step of these groups releases."""
    chosen = np.flatnonzero(np.isin(groups, kept))
    records: Encoded = only(world.records[0], chosen)
    records = replace(records, groups=np.unique(groups[chosen], return_inverse=True)[1])
    plan = world.plan([len(records)], 1, QUIET, 1.0, BATCH, CLIP)
    clients = {client: replace(own, groups=len(kept)) for client, own in plan.clients.items()}
    return world.run([records], plan=replace(plan, unit="group", clients=clients)).released()


SPECS = make_specs(((60, 50), (40, 70)))
EXPECTED = 4.0


def _start() -> State:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in SPECS}


def _released(clients: Sequence[int], sigma: float, round: int = 1) -> Tensor:
    """Return the sum, over C, that unit `client` releases of clients who all moved far."""
    start, updates = _start(), {}
    for client in clients:
        generator = torch.Generator().manual_seed(100 + client)
        moved = {s.name: start[s.name] + 3 * torch.randn(s.shape, generator=generator) for s in SPECS}
        updates[f"c{client}"] = lambda moved=moved: moved
    release = central.Release(
        clip_norm=CLIP, noise_multiplier=sigma, expected=EXPECTED, round=round, query=QUERY, key=KEY
    )
    found = release.of(start, SPECS, updates).adapter
    moves = [(found[spec.name].double() - start[spec.name].double()).flatten() for spec in SPECS]
    return torch.cat(moves) * EXPECTED / CLIP


@check
def client_sensitivity(lab: Lab) -> None:
    """With unit `client`, one client more moves the sum by C at most, whoever else and however many take part."""
    for others in ([], [1], [1, 2, 3, 4, 5, 6]):
        moved = float((_released([*others, 7], QUIET) - _released(others, QUIET)).norm())
        require(moved <= 1.001, f"beside {len(others)} others, a client moves the sum by {moved:.3f} C")
        require(moved >= 0.99, "the client did not reach the clip norm, so that nothing was tried")


@check
def client_noise(lab: Lab) -> None:
    """A round of unit `client` has noise of standard deviation sigma C on the sum, of its own in each round."""
    sigma, drawn = 2.0, []
    for number, clients in enumerate(([], [1], [1, 2, 3, 4, 5, 6]), 1):
        noise = _released(clients, sigma, number) - _released(clients, sigma * 1e-6, number)
        low, high = chi2.ppf([RARE, 1 - RARE], len(noise))
        std = math.sqrt(float(noise.square().mean())) / sigma
        require(low < std**2 * len(noise) < high, f"with {len(clients)} clients noise has {std:.3g} of sigma C")
        drawn.append(noise.numpy())
    correlations = np.corrcoef(drawn)[~np.eye(len(drawn), dtype=bool)]
    require(np.abs(correlations).max() < 6 / math.sqrt(len(drawn[0])), "two rounds share noise")
