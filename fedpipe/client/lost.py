"""Clients whose training diverges while others, in the same batches, go on.

Where only a sum of whole updates is private, a client must not be able to stop the round or to move
another client's update: that it diverged would show, and no clip norm bounds it. It is put back to
where it began, trains on, and in the end sends what no server takes, which then counts as no move.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpipe.server.checks import MOVE_CAP


class Lost:
    """Which clients of a cohort have diverged.

    Parameters
    ----------
    start : where they began, name -> (clients, *shape)
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self._start = {name: tensor.clone() for name, tensor in start.items()}
        first = next(iter(self._start.values()))
        self._lost = torch.zeros(len(first), dtype=torch.bool, device=first.device)

    def after_step(self, state: Mapping[str, Tensor]) -> None:
        """Put clients that are not finite, or farther away than a server takes, back to where they began."""
        moves = ((state[name].double() - start.double()).flatten(1) for name, start in self._start.items())
        squares = torch.stack([move.square().sum(1) for move in moves]).sum(0)
        self._lost |= ~(squares <= MOVE_CAP**2)  # NaN is not
        self._put(state, self._start)

    def mark(self, state: Mapping[str, Tensor]) -> None:
        """Make what they send unusable."""
        self._put(state, {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()})

    def _put(self, state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        if bool(self._lost.any()):
            for name, tensor in state.items():
                tensor[self._lost] = values[name][self._lost]
