"""Evaluation of one global state: batched, sorted by length, never larger than the token budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedpipe.client.engine import autocast, micro_batches
from fedpipe.models.lora import AdaptedModel
from fedpipe.models.task import Encoded


@torch.inference_mode()
def evaluate(
    model: AdaptedModel,
    adapter: Mapping[str, Tensor],
    records: Encoded,
    device: torch.device,
    precision: str,
    tokens_per_batch: int,
    batch_size: int,
) -> dict[str, float]:
    """Return the mean of each of the task's metrics over all records.

    Sums are float64 and in a fixed order, so that the same state gives the same digits.
    """
    model.set_adapter({name: tensor.to(device) for name, tensor in adapter.items()})
    totals: dict[str, float] = {}
    for part in micro_batches(records.lengths, tokens_per_batch):
        for chunk in np.array_split(part, range(batch_size, len(part), batch_size)):
            inputs, labels = records.batch(chunk, device)
            with autocast(device, precision):
                outputs = model.forward(inputs)
            for name, values in model.task.metrics(outputs, labels).items():
                totals[name] = totals.get(name, 0.0) + float(values.sum())
    return {name: total / len(records) for name, total in totals.items()}
