"""Evaluation of one global state: batched, sorted by length, never larger than the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedpipe.client.batching import Budget, micro_batches
from fedpipe.client.engine import autocast
from fedpipe.client.parallel import in_turn
from fedpipe.models import steady
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

    Sums are float64 and in the order of the records, so that the same state gives the same digits.
    `models` are batched models that share a backbone; each computes one batch at a time.
    """
    found = _by_record(models, adapter, records, device, precision, budget)
    return {name: float(values.sum()) / len(records) for name, values in found.items()}


def record_losses(
    models: Sequence[AdaptedModel],
    adapter: Mapping[str, Tensor],
    records: Encoded,
    device: torch.device,
    precision: str,
    budget: Budget,
) -> np.ndarray:
    """Return the loss of every record, (records,) float64. Of private records it must not leave this process."""
    return _by_record(models, adapter, records, device, precision, budget)["loss"]


def _by_record(
    models: Sequence[AdaptedModel],
    adapter: Mapping[str, Tensor],
    records: Encoded,
    device: torch.device,
    precision: str,
    budget: Budget,
) -> dict[str, np.ndarray]:
    """Return name -> that metric of every record, (records,) float64."""
    for model in models:
        model.set_adapter({name: tensor.to(device) for name, tensor in adapter.items()})

    @torch.inference_mode()
    def one(model: AdaptedModel, part: np.ndarray) -> tuple[np.ndarray, dict[str, Tensor]]:
        inputs, labels = records.batch(steady.at_least_two(part), device)
        with autocast(device, precision):
            outputs = model.forward(inputs)
        return part, model.task.metrics(outputs, labels)

    found: dict[str, np.ndarray] = {}
    for part, metrics in in_turn(one, models, list(micro_batches(records.kinds, budget))):
        for name, values in metrics.items():
            found.setdefault(name, np.zeros(len(records)))[part] = values[: len(part)].double().cpu().numpy()
    return found
