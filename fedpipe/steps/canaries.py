"""The canaries of an audited run: which of them take part, and how training goes without the others.

A secret coin decides for each canary whether it takes part. The coins are a keyed stream of the
run, like its noise: nothing in the run's files, and not the experiment's seed, tells them, and a
run that was resumed has the same ones. They are revealed with the verdict; then the key is destroyed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedpipe.client.audited import WithoutRecords
from fedpipe.client.engine import Engine
from fedpipe.privacy.audit import draw_coins
from fedpipe.state import Run

Slots = Mapping[str, Sequence[int]]  # client -> where its canaries begin, and how many there are


def coins_of(run: Run, slots: Slots) -> dict[str, np.ndarray]:
    """Return each client's coins, (canaries,) bool: true for a canary that takes part."""
    return {client: draw_coins(count, run.key, run.info["query"], client) for client, (_, count) in slots.items()}


def audited(engine: Engine, run: Run, slots: Slots, clients: Sequence[str]) -> Engine:
    """Return an engine for these clients without the canaries that are left out; the same one where there are none."""
    if not slots:
        return engine
    coins = coins_of(run, {client: slots[client] for client in clients if client in slots})
    none = np.zeros(0, dtype=np.int64)
    return WithoutRecords(engine, [slots[c][0] + np.flatnonzero(~coins[c]) if c in coins else none for c in clients])
