"""The reference engine: Opacus' hooks, one client at a time, on an unchanged peft model.

Slow, and independent of the cohort engine in what matters: who computes the per-record
gradients. Tests and benchmarks hold the two against each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from fedpipe.client.clipping import add_clipped
from fedpipe.client.engine import State, autocast, dropout, micro_batches
from fedpipe.models.lora import AdaptedModel, TensorSpec
from fedpipe.models.task import Encoded


class OpacusEngine:
    """Per-record gradients by Opacus. The model must be a plain one, not its batched copy."""

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
        for row, (encoded, batch) in enumerate(zip(records, batches, strict=True)):
            self._load({name: tensor[row] for name, tensor in state.items()})
            for part in micro_batches(encoded.lengths[batch], self.tokens_per_batch):
                inputs, labels = encoded.batch(batch[part], self.device)
                owners = torch.full((len(part),), row, device=self.device)
                with dropout(self.model, None if seeds is None else seeds[row], batch[part], self.device):
                    gradients = self._gradients(inputs, labels, active)
                add_clipped(sums, gradients, owners, clip_norm)
        return sums

    def _parameter(self, spec: TensorSpec) -> nn.Parameter:
        return self.model.model.get_submodule(spec.module).get_parameter(spec.parameter)

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for spec in self.model.specs:
                self._parameter(spec).copy_(tensors[spec.name])

    def _gradients(self, inputs: Mapping[str, Tensor], labels: Tensor, active: Sequence[TensorSpec]) -> State:
        parameters = {spec.name: self._parameter(spec) for spec in active}
        for spec in active:
            parameters[spec.name].requires_grad_(True)
            # Opacus' hooks are silent in evaluation mode; a linear layer is the same in both.
            self.model.model.get_submodule(spec.module).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that hooks see no gradient of the (integer) inputs
            hooked = GradSampleModule(self.model.model.get_base_model(), loss_reduction="sum")
            try:
                with autocast(self.device, self.precision):
                    outputs = hooked(**inputs)
                self.model.task.losses(outputs, labels).sum().backward()
                return {name: parameter.grad_sample.detach() for name, parameter in parameters.items()}
            finally:
                hooked.remove_hooks()
                for parameter in parameters.values():
                    parameter.requires_grad_(False)
                    parameter.grad = parameter.grad_sample = None
