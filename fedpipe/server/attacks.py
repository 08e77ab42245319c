"""Clients that send what they should not, simulated: who they are, and what they make of their update.

They are drawn from the seed, and are the same in all rounds. They act on what leaves them, after the
private step, or on the labels of the records that they train on; so what the ledger says of them holds, and
of everybody else, too. A free rider trains here and sends nothing of it: it is charged for what it did not spend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedpipe.config import AttackSettings
from fedpipe.errors import SettingsError
from fedpipe.models.task import Encoded

_ATTACK = 5  # which of the seed's streams


def malicious(attack: AttackSettings, seed: int, clients: Sequence[str]) -> tuple[str, ...]:
    """Return who of all clients is malicious, in order of their names.

    Raises
    ------
    SettingsError
        There are not so many.
    """
    if attack.kind is None:
        return ()
    names, wanted = sorted(clients), attack.clients
    count = wanted if isinstance(wanted, int) else max(1, round(wanted * len(names)))
    if count > len(names):
        raise SettingsError(
            f"federation.attack.clients: found {count}; the partition has {len(names)} clients, expected no more"
        )
    return _drawn(seed, tuple(names), count)


@lru_cache(maxsize=2)
def _drawn(seed: int, names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Draw them once, since each client asks."""
    return tuple(sorted(np.random.default_rng([seed, 0, _ATTACK]).choice(names, size=count, replace=False).tolist()))


def attacked(
    attack: AttackSettings,
    update: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    seed: int,
    round: int,
    client: str,
) -> dict[str, Tensor]:
    """Return what a malicious client sends in the place of its update.

    Parameters
    ----------
    start : what it received; tensors that are not in it began at zero
    seed, round, client : name the noise of a free rider, which is public like all of the simulation
    """
    factor = {"sign-flip": -attack.strength, "scaling": attack.strength, "free-rider": 0.0}.get(attack.kind or "")
    if factor is None:
        return dict(update)
    generator = np.random.default_rng(
        [seed, round, _ATTACK, int.from_bytes(hashlib.sha256(client.encode()).digest()[:8])]
    )
    sent = {}
    for name in sorted(update):
        tensor = update[name]
        began = start.get(name, torch.zeros_like(tensor))
        moved = factor * (tensor.double() - began.double())
        if attack.kind == "free-rider" and attack.noise:
            moved = torch.from_numpy(attack.noise * generator.normal(size=tuple(tensor.shape)))
        sent[name] = (began.double() + moved).to(tensor.dtype)
    return sent


def with_wrong_labels(records: Encoded, classes: int) -> Encoded:
    """Return the records, each under the label after its own."""
    return replace(records, labels=(records.labels + 1) % classes)


def length(update: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Return how far an update is from what its client received."""
    squares = (
        float((tensor.double() - start[name].double() if name in start else tensor.double()).square().sum())
        for name, tensor in update.items()
    )
    return sum(squares) ** 0.5
