"""Training losses, for whoever looks for a mistake and may see them: no noise protects them.

Off unless `privacy.diagnostics` asks for them. They are read off the forward pass that the
gradients come from, so nothing is computed twice, and nothing that trains reads them: an
adapter's bytes are the same with and without. What they tell is not in the ledger, so they are
kept under names of their own, and everything that shows them says that epsilon does not cover them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

Note = Callable[[Tensor], None]


class StepLosses:
    """The task's loss of each record that a step computes with.

    Every record has a place of its own, so threads may note theirs in any order, and what is
    added up later is added in one order.
    """

    def __init__(self) -> None:
        self._values, self._ends = np.zeros(0), np.zeros(1, dtype=np.int64)

    def begin(self, batches: Sequence[np.ndarray]) -> None:
        """Make places for what an engine is about to compute: each client's batch."""
        self._ends = np.cumsum([len(batch) for batch in batches])
        self._values = np.full(self._ends[-1], np.nan)

    def at(self, places: np.ndarray) -> Note:
        """Return what takes the losses, (n,), of the drawn records at these places of all batches end to end."""

        def note(losses: Tensor) -> None:
            self._values[places] = losses.detach().double().cpu().numpy()

        return note

    @property
    def by_client(self) -> list[np.ndarray]:
        """Each client's losses, (its drawn records,) float64."""
        return np.split(self._values, self._ends[:-1])


class TrainingLosses:
    """Each client's mean loss over all records that its local steps of a round have drawn."""

    def __init__(self, clients: int) -> None:
        self._sums, self._counts = np.zeros(clients), np.zeros(clients, dtype=np.int64)

    def add(self, step: StepLosses) -> None:
        for row, values in enumerate(step.by_client):
            self._sums[row] += values.sum()
            self._counts[row] += len(values)

    def mean(self, row: int) -> float | None:
        """Return a client's mean; None where nothing was drawn, or a loss was not finite."""
        if not self._counts[row]:
            return None
        mean = float(self._sums[row] / self._counts[row])
        return mean if math.isfinite(mean) else None


def noted(losses: Tensor, note: Note | None) -> Tensor:
    """Return the losses as they are, after a look at them if there is somebody to look."""
    if note is not None:
        note(losses)
    return losses
