"""Queries of raw records that nothing clips or noises: for training without privacy only.

Whatever calls this under privacy would publish what no ledger knows of; the settings refuse it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fedpipe.client import exact
from fedpipe.client.batching import Budget, micro_batches
from fedpipe.client.clipping import apart
from fedpipe.client.parallel import one_core
from fedpipe.models import steady
from fedpipe.models.batched import OuterProducts
from fedpipe.models.factors import pairs
from fedpipe.models.lora import AdaptedModel
from fedpipe.models.task import Encoded


def full_gradients(
    model: AdaptedModel,
    adapter: Mapping[str, Tensor],
    records: Encoded,
    device: torch.device,
    budget: Budget | int,
) -> dict[str, Tensor]:
    """Return the gradient of the records' mean loss in the adapted layers' frozen weights.

    Parameters
    ----------
    model : a batched model; its adapter is overwritten
    adapter : where to take the gradient, name -> each of its spec's shape
    budget : how large a micro-batch may be; a number is one of tokens

    Returns
    -------
    pair's name -> (out, in), float32, on the processor
    """
    model.set_adapter({name: tensor.to(device) for name, tensor in adapter.items()})
    taps = {
        pair.name: _Tap(model.model.get_submodule(pair.name).base_layer, (pair.B.shape[0], pair.A.shape[1]), device)
        for pair in pairs(model.specs)
    }
    budget = Budget(budget) if isinstance(budget, int) else budget
    try:
        with one_core():
            for part in micro_batches(records.kinds, budget):
                inputs, labels = records.batch(steady.at_least_two(part), device)
                total = model.task.losses(model.forward(inputs), labels).sum()
                probes = [probe for tap in taps.values() for probe in tap.probes]
                found = iter(torch.autograd.grad(total, probes, allow_unused=True, materialize_grads=True))
                for tap in taps.values():
                    tap.collect(found, len(part))
    finally:
        for tap in taps.values():
            tap.hook.remove()
    return {name: tap.mean(len(records)).cpu() for name, tap in taps.items()}


class _Tap:
    """Sums a layer's gradient over batches: outer products of what it read and the gradient of what it wrote."""

    def __init__(self, layer: nn.Module, shape: tuple[int, int], device: torch.device) -> None:
        self.probes: list[Tensor] = []
        self._shape = shape
        self._total = torch.zeros(1, math.prod(shape), dtype=torch.float64, device=device)
        self._inputs: list[Tensor] = []
        self.hook = layer.register_forward_hook(self._note)

    def _note(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self._inputs.append(args[0].detach())
        self.probes.append(torch.zeros_like(output, requires_grad=True))
        return output + self.probes[-1]

    def collect(self, found: Iterator[Tensor], records: int) -> None:
        """Take the gradients of the probes of a batch, the next ones of `found`, of its first so many records."""
        for inputs in self._inputs:
            rows = (rows.reshape(max(2, records), -1, rows.shape[-1]) for rows in (inputs, next(found)))
            outer = OuterProducts(*rows)[:records]
            place = torch.zeros(records, dtype=torch.int64, device=inputs.device)
            self._total += exact.sums(outer, place, 1, exact.unit_of(None))
        self.probes, self._inputs = [], []

    def mean(self, records: int) -> Tensor:
        return apart(self._total / max(1, records), {"": self._shape})[""][0]
