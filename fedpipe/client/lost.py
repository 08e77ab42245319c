"""Clients whose training diverges while others, in the same batches, go on.

One client must not be able to stop the round, or to move another client's update. So it is put back to
where it began and trains on, which keeps its numbers finite: its noisy steps are in the ledger, and it has
spent. What it ends with is of no use.

Where only a sum of whole updates is private, that it diverged must not show either, and no clip norm bounds
it: there it sends what no server takes, which then counts as no move. Elsewhere it sends nothing, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpipe.models import steady
from fedpipe.server.checks import MOVE_CAP


class Lost:
    """Which clients of a cohort have diverged.

    Parameters
    ----------
    start : where they began, name -> (clients, *shape)
    cap : how far a client may be from there; None where the server says so
    """

    def __init__(self, start: Mapping[str, Tensor], cap: float | None = MOVE_CAP) -> None:
        self._start, self._cap = start, cap
        self._names: dict[int, str] = {}

    def after_step(self, state: Mapping[str, Tensor]) -> None:
        """Put clients that are not finite, or farther away than the cap, back to where they began."""
        if self._cap is not None:
            squares = sum(steady.squares(state[name].double() - self._at(name, state)) for name in self._start)
            fine = {"": squares <= self._cap**2}  # NaN is not
        else:
            fine = {name: torch.isfinite(state[name]).flatten(1).all(1) for name in self._start}
        if not bool(torch.stack(list(fine.values())).all()):
            for name, of_clients in fine.items():
                for row in (~of_clients).nonzero().flatten().tolist():
                    self._names.setdefault(row, name)
        if rows := list(self._names):
            for name, tensor in state.items():
                tensor[rows] = self._at(name, state)[rows].to(tensor.dtype)

    def mark(self, state: Mapping[str, Tensor]) -> None:
        """Make what they send unusable."""
        for tensor in state.values():
            tensor[list(self._names)] = torch.nan

    def reason(self, row: int) -> str | None:
        """Say what became of a client; None of one that is not lost."""
        return f"diverged: '{self._names[row]}' is no longer finite" if row in self._names else None

    def _at(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        return self._start[name].to(state[name].device)
