"""What is clipped as one: a record's gradient, or the mean of a group's.

With unit `group` a group's gradient is the mean of its records' (Charles et al. 2024, arXiv:2407.07737,
who call it user-level sampling; Levy et al. 2021, arXiv:2102.11845, for the setting). The mean is clipped,
so the sum moves by at most the clip norm when a whole group comes or goes, however many records it has.

The mean of gradients is again a gradient, so what clips records clips groups. Groups are put together
in parts; the records of a part are computed in one or several micro-batches, whose exact sums are added
up group by group (see `fedpipe.client.exact`), and then the means are clipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from fedpipe.client import exact
from fedpipe.client.batching import Budget
from fedpipe.client.clipping import apart
from fedpipe.models.batched import Gradient, Owners

_FULL = 8  # times the tokens of a micro-batch, in a part: its records have several widths
_HELD = 2**24  # numbers of units that are summed at once


class Units:
    """The groups that the records of a step's batches are of.

    Parameters
    ----------
    clients : (n,) the client of each drawn record, as a row of the state
    groups : (n,) its group, of those of its client

    Attributes
    ----------
    of : (n,) the unit of each record; units ascend with their clients
    sizes : (units,) records of each
    """

    def __init__(self, clients: np.ndarray, groups: np.ndarray) -> None:
        pairs = np.stack([clients, groups])
        found, self.of, self.sizes = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
        self.of = self.of.reshape(-1)
        self._clients = found[0]

    def parts(self, widths: np.ndarray, numbers: int, budget: Budget) -> list[np.ndarray]:
        """Put whole units together: enough of them to fill micro-batches, and no more than can be summed at once.

        Parameters
        ----------
        widths : (n,) of the records
        numbers : in a gradient
        """
        tokens = np.zeros(len(self.sizes), dtype=np.int64)
        np.add.at(tokens, self.of, widths)
        ends = np.cumsum(self.sizes)
        by_unit = np.argsort(self.of, kind="stable")
        most = max(1, _HELD // max(1, numbers))
        parts, held, filled = [], [], 0
        for unit, (size, end) in enumerate(zip(self.sizes, ends, strict=True)):
            held.append(by_unit[end - size : end])
            filled += tokens[unit]
            if filled >= _FULL * budget.tokens or len(held) >= most:
                parts.append(np.concatenate(held))
                held, filled = [], 0
        return [*parts, np.concatenate(held)] if held else parts

    def means(
        self, batches: Iterable[tuple[np.ndarray, Mapping[str, Gradient]]], part: np.ndarray, device: torch.device
    ) -> tuple[dict[str, Tensor], Owners]:
        """Return the gradients of the units of a part, and whose units they are.

        Parameters
        ----------
        batches : the records of each micro-batch of the part, and their gradients, name -> those of n records
        part : the records of all of them

        Returns
        -------
        name -> (units, *shape): the sum over the unit's records, over its size
        """
        units = np.unique(self.of[part])
        totals: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for records, gradients in batches:
            place = torch.from_numpy(np.searchsorted(units, self.of[records])).to(device)
            for name, gradient in gradients.items():
                shapes[name] = exact.shape_of(gradient)
                found = exact.sums(gradient, place, len(units), exact.unit_of(None))
                totals[name] = found if name not in totals else totals[name].add_(found)
        sizes = torch.from_numpy(self.sizes[units]).float().to(device)[:, None]
        means = {name: apart(total.float() / sizes, {name: shapes[name]})[name] for name, total in totals.items()}
        return means, Owners(self._clients[units], device)
