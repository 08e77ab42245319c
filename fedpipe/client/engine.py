"""The cohort engine: many clients' private gradients in one forward and one backward pass.

The Poisson batches of all clients of a cohort are pooled, sorted by length, and cut into
micro-batches by a budget of padded tokens. In a micro-batch every record carries a copy of
its own client's adapter, so that the gradients of those copies are the per-record
gradients (see `fedpipe.models.batched`). They are clipped and summed client by client.
Memory is bounded by the token budget, not by the number of clients or of records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedpipe.client.clipping import add_clipped
from fedpipe.models.lora import AdaptedModel, TensorSpec
from fedpipe.models.task import Encoded

State = dict[str, Tensor]


class Engine(Protocol):
    """Computes the sum of clipped per-record gradients, client by client."""

    def clipped_sums(
        self,
        state: Mapping[str, Tensor],
        records: Sequence[Encoded],
        batches: Sequence[np.ndarray],
        active: Sequence[TensorSpec],
        clip_norm: float | None,
        seeds: Sequence[np.ndarray] | None = None,
    ) -> State:
        """Return, for each active tensor, (clients, *shape): zero for a client whose batch is empty.

        Parameters
        ----------
        state : the adapters, name -> (clients, *shape)
        records : each client's records
        batches : each client's batch, as indices into its records
        active : the tensors to differentiate; no gradient of any other is computed
        clip_norm : bound on the joint norm of one record's gradient over `active`; None for no bound
        seeds : what dropout draws from, for each client (records,) int64; None for no dropout
        """


class CohortEngine:
    """All clients at once. `precision` bf16 runs the backbone under autocast; sums stay fp32."""

    def __init__(self, model: AdaptedModel, device: torch.device, precision: str, tokens_per_batch: int) -> None:
        self.model = model
        self.device = device
        self.precision = precision
        self.tokens_per_batch = tokens_per_batch

    def clipped_sums(
        self,
        state: Mapping[str, Tensor],
        records: Sequence[Encoded],
        batches: Sequence[np.ndarray],
        active: Sequence[TensorSpec],
        clip_norm: float | None,
        seeds: Sequence[np.ndarray] | None = None,
    ) -> State:
        sums = {spec.name: torch.zeros_like(state[spec.name]) for spec in active}
        pool = Encoded.join(records)
        starts = np.cumsum([0, *map(len, records)])
        chosen = np.concatenate([batch + start for batch, start in zip(batches, starts, strict=False)])
        owners = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
        drawn = None if seeds is None else np.concatenate(seeds)
        for part in micro_batches(pool.lengths[chosen], self.tokens_per_batch):
            clients = torch.from_numpy(owners[part]).to(self.device)
            inputs, labels = pool.batch(chosen[part], self.device)
            with dropout(self.model, drawn, chosen[part], self.device):
                gradients = self._gradients(state, clients, inputs, labels, active)
            add_clipped(sums, gradients, clients, clip_norm)
        return sums

    def _gradients(
        self,
        state: Mapping[str, Tensor],
        clients: Tensor,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        active: Sequence[TensorSpec],
    ) -> State:
        """Return the per-record gradients of the active tensors, name -> (n, *shape), float32."""
        copies = {name: tensor.index_select(0, clients) for name, tensor in state.items()}
        leaves = [copies[spec.name].requires_grad_(True) for spec in active]
        self.model.set_adapter(copies)
        with autocast(self.device, self.precision):
            outputs = self.model.forward(inputs)
        losses = self.model.task.losses(outputs, labels)
        gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
        return {spec.name: gradient for spec, gradient in zip(active, gradients, strict=True)}


def micro_batches(lengths: np.ndarray, tokens_per_batch: int) -> Iterator[np.ndarray]:
    """Cut records, sorted by length, so that each part padded to its longest stays within the budget.

    A record longer than the budget makes a part of its own. Yields indices into `lengths`.
    """
    order = np.argsort(lengths, kind="stable")
    ascending = lengths[order]
    start = 0
    while start < len(order):
        # Padded size grows with the end, so the last end that fits is found by bisection.
        low, high = start + 1, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            fits = (middle - start) * ascending[middle - 1] <= tokens_per_batch
            low, high = (middle, high) if fits else (low, middle - 1)
        yield order[start:low]
        start = low


@contextlib.contextmanager
def dropout(model: AdaptedModel, seeds: np.ndarray | None, records: np.ndarray, device: torch.device) -> Iterator[None]:
    """Let these records drop adapter inputs by their seeds, and leave the model without dropout."""
    model.use_dropout(None if seeds is None else torch.from_numpy(seeds[records]).to(device))
    try:
        yield
    finally:
        model.use_dropout(None)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which the backbone runs."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
