"""Evaluation of one global state: batched, sorted by length, never larger than the budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedpipe.client.batching import Budget, micro_batches
from fedpipe.client.engine import autocast
from fedpipe.client.parallel import in_turn
from fedpipe.models.lora import AdaptedModel
from fedpipe.models.task import Encoded


def evaluate(
    models: Sequence[AdaptedModel],
    adapter: Mapping[str, Tensor],
    records: Encoded,
    device: torch.device,
    precision: str,
    budget: Budget,
) -> dict[str, float]:
    """Return the mean of each of the task's metrics over all records.

    Sums are float64 and in a fixed order, so that the same state gives the same digits.
    `models` are batched models that share a backbone; each computes one batch at a time.
    """
    totals: dict[str, float] = {}
    for _, metrics in _by_batch(models, adapter, records, device, precision, budget):
        for name, values in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(values.sum())
    return {name: total / len(records) for name, total in totals.items()}


def record_losses(
    models: Sequence[AdaptedModel],
    adapter: Mapping[str, Tensor],
    records: Encoded,
    device: torch.device,
    precision: str,
    budget: Budget,
) -> np.ndarray:
    """Return the loss of every record, (records,) float64. Of private records it must not leave this process."""
    losses = np.zeros(len(records))
    for part, metrics in _by_batch(models, adapter, records, device, precision, budget):
        losses[part] = metrics["loss"].double().cpu().numpy()
    return losses


def _by_batch(
    models: Sequence[AdaptedModel],
    adapter: Mapping[str, Tensor],
    records: Encoded,
    device: torch.device,
    precision: str,
    budget: Budget,
) -> Iterable[tuple[np.ndarray, dict[str, Tensor]]]:
    """Yield the records of each batch, and their metrics by name, in a fixed order."""
    for model in models:
        model.set_adapter({name: tensor.to(device) for name, tensor in adapter.items()})

    @torch.inference_mode()
    def one(model: AdaptedModel, part: np.ndarray) -> tuple[np.ndarray, dict[str, Tensor]]:
        inputs, labels = records.batch(part, device)
        with autocast(device, precision):
            outputs = model.forward(inputs)
        return part, model.task.metrics(outputs, labels)

    return in_turn(one, models, list(micro_batches(records.lengths, budget)))
