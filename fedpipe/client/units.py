"""What is clipped as one: a record's gradient, or the mean of a group's.

With unit `group` a group's gradient is the mean of its records' (Charles et al. 2024, arXiv:2407.07737,
who call it user-level sampling; Levy et al. 2021, arXiv:2102.11845, for the setting). The mean is clipped,
so the sum moves by at most the clip norm when a whole group comes or goes, however many records it has.

The mean of gradients is again a tensor, or again a sum of outer products with more rows, so what
clips records clips groups. A group lies in one micro-batch, or, where it is larger than one may be, in
several of its own, whose parts are added up before anything is clipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpipe.client.batching import Budget, micro_batches
from fedpipe.models.batched import Gradient, OuterProducts, Owners, outer_products_pay


@dataclass(frozen=True)
class Part:
    """A micro-batch: the records, and whether they are some of a group's only, and the last of those."""

    records: np.ndarray
    partial: bool = False
    last: bool = True


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

    def parts(self, lengths: np.ndarray, budget: Budget) -> list[Part]:
        """Cut the records into micro-batches that hold whole groups, by their lengths and the budget alone.

        Groups of about one length are put together, as many as fit. Those that fit into none are cut up.
        """
        longest = np.zeros(len(self.sizes), dtype=np.int64)
        np.maximum.at(longest, self.of, lengths)
        members = np.split(np.argsort(self.of, kind="stable"), np.cumsum(self.sizes)[:-1])
        parts, held, count = [], [], 0
        for unit in np.argsort(longest, kind="stable"):
            size, most = int(self.sizes[unit]), budget.most(int(longest[unit]))
            if size > most:
                parts += _cut(members[unit], lengths, budget)
                continue
            if count + size > most:
                parts.append(Part(np.concatenate(held)))
                held, count = [], 0
            held.append(members[unit])
            count += size
        return [*parts, Part(np.concatenate(held))] if held else parts

    def means(
        self, gradients: Mapping[str, Gradient], records: np.ndarray, device: torch.device
    ) -> tuple[dict[str, Gradient], Owners]:
        """Return the gradients of the units of a micro-batch, and whose units they are.

        Parameters
        ----------
        gradients : name -> those of the records, (n, *shape) or outer products
        records : (n,) the micro-batch; records of one unit side by side, units ascending

        Returns
        -------
        name -> (units, *shape), or outer products: the sum over the unit's records here, over its size
        """
        units, place = np.unique(self.of[records], return_inverse=True)
        owners = Owners(self._clients[units], device)
        stacks = _Stacks(place.reshape(-1), device)
        weights = torch.from_numpy(1.0 / self.sizes[units]).float().to(device)
        return {name: stacks.mean(gradient, weights, owners) for name, gradient in gradients.items()}, owners


def _cut(records: np.ndarray, lengths: np.ndarray, budget: Budget) -> Iterator[Part]:
    parts = [records[part] for part in micro_batches(lengths[records], budget)]
    for number, part in enumerate(parts, start=1):
        yield Part(np.sort(part), partial=True, last=number == len(parts))


class _Stacks:
    """The records of each unit on top of each other, in the order of the records."""

    def __init__(self, place: np.ndarray, device: torch.device) -> None:
        counts = np.bincount(place)
        self.units, self.height = len(counts), int(counts.max())
        starts = np.cumsum(counts) - counts
        self._counts, self._starts, self._device = counts, starts, device
        floors = np.arange(len(place)) - starts[place]
        self._places = torch.from_numpy(place * self.height + floors).to(device)

    def mean(self, gradient: Gradient, weights: Tensor, owners: Owners) -> Gradient:
        if isinstance(gradient, Tensor):
            return self._sums(gradient) * weights.view(-1, *[1] * (gradient.dim() - 1))
        inputs, outputs = self._stacked(gradient.inputs), self._stacked(gradient.outputs)
        products = OuterProducts(inputs, outputs * weights[:, None, None], owners)
        if self.height == 1 or outer_products_pay(inputs.shape[1], inputs.shape[2], outputs.shape[2]):
            return products
        return torch.bmm(products.outputs.transpose(1, 2), products.inputs)

    def _sums(self, rows: Tensor) -> Tensor:
        """Add up each unit's rows, one after the other: a row that is not finite reaches its own unit only."""
        total = rows[torch.from_numpy(self._starts).to(self._device)]
        for floor in range(1, self.height):
            tall = np.flatnonzero(self._counts > floor)
            index = torch.from_numpy(tall).to(self._device)
            more = rows[torch.from_numpy(self._starts[tall] + floor).to(self._device)]
            total = total.index_copy(0, index, total[index] + more)
        return total

    def _stacked(self, rows: Tensor) -> Tensor:
        """Put (n, t, k) into (units, height * t, k), zero where a unit has fewer records."""
        empty = rows.new_zeros(self.units * self.height, *rows.shape[1:])
        return empty.index_copy(0, self._places, rows).reshape(self.units, -1, rows.shape[2])
