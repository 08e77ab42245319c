"""The reference engine: Opacus' hooks, one client at a time, on an unchanged peft model.

Slow, and independent of the cohort engine in what matters: who computes the per-record
gradients. Tests and benchmarks hold the two against each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from fedpipe.client.batching import Budget, micro_batches
from fedpipe.client.clip import JOINT, Clip
from fedpipe.client.clipping import apart, sum_in_groups
from fedpipe.client.contrast import Frozen, Representations, contrast_losses, strengths
from fedpipe.client.diagnostics import Note, StepLosses, noted
from fedpipe.client.engine import State, autocast, dropout
from fedpipe.client.objectives import Contrast
from fedpipe.errors import PrivacyError
from fedpipe.models.batched import Owners
from fedpipe.models.lora import AdaptedModel, TensorSpec
from fedpipe.models.task import Encoded

Term = Callable[[Tensor], Tensor]


class OpacusEngine:
    """Per-record gradients by Opacus. The model must be a plain one, not its batched copy."""

    def __init__(self, model: AdaptedModel, device: torch.device, precision: str, budget: Budget | int) -> None:
        self.model = model
        self.device = device
        self.precision = precision
        self.budget = Budget(budget) if isinstance(budget, int) else budget

    def clipped_sums(
        self,
        state: Mapping[str, Tensor],
        records: Sequence[Encoded],
        batches: Sequence[np.ndarray],
        active: Sequence[TensorSpec],
        clip_norm: float | None,
        seeds: Sequence[np.ndarray] | None = None,
        clip: Clip = JOINT,
        contrast: Contrast | None = None,
        units: Sequence[np.ndarray] | None = None,
        losses: StepLosses | None = None,
    ) -> State:
        if units is not None:
            raise PrivacyError("the reference engine clips records; groups of them need runtime.engine: cohort")
        total = torch.zeros(len(batches), sum(spec.numel for spec in active), device=self.device, dtype=torch.float64)
        if losses is not None:
            losses.begin(batches)
        firsts = np.cumsum([0, *map(len, batches)])
        for row, (encoded, batch) in enumerate(zip(records, batches, strict=True)):
            for part in micro_batches(encoded.kinds[batch], self.budget):
                inputs, labels = encoded.batch(batch[part], self.device)
                owners = Owners(np.zeros(len(part), dtype=np.int64), self.device)
                term = self._term(inputs, row, contrast)
                note = None if losses is None else losses.at(firsts[row] + part)
                self._load(state, row)
                with dropout(self.model, None if seeds is None else seeds[row], batch[part], self.device):
                    gradients = self._gradients(inputs, labels, active, term, note)
                total[row] += sum_in_groups(gradients, owners, clip_norm, clip, active)[0]
        return apart(total, {spec.name: spec.shape for spec in active})

    def _parameter(self, spec: TensorSpec) -> nn.Parameter:
        return self.model.model.get_submodule(spec.module).get_parameter(spec.parameter)

    def _load(self, tensors: Mapping[str, Tensor], row: int) -> None:
        with torch.no_grad():
            for spec in self.model.specs:
                self._parameter(spec).copy_(tensors[spec.name][row])

    @torch.no_grad()
    def _term(self, inputs: Mapping[str, Tensor], row: int, contrast: Contrast | None) -> Term | None:
        """Return a client's contrast term, as a function of what the head reads; None where it has none."""
        strength = strengths(contrast, [row])
        if strength is None:
            return None
        found = []
        with Representations(self.model).caught() as representations, autocast(self.device, self.precision):
            for adapter in (contrast.received, contrast.previous):
                self._load(adapter, row)
                self.model.forward(inputs)
                found.append(representations.take(inputs))
        frozen: Frozen = (found[0], found[1])
        return lambda read: contrast_losses(read, frozen, strength, contrast.temperature)

    def _gradients(
        self,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        active: Sequence[TensorSpec],
        term: Term | None,
        note: Note | None,
    ) -> State:
        parameters = {spec.name: self._parameter(spec) for spec in active}
        for spec in active:
            parameters[spec.name].requires_grad_(True)
            # Opacus' hooks are silent in evaluation mode; a linear layer is the same in both.
            self.model.model.get_submodule(spec.module).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that hooks see no gradient of the (integer) inputs
            hooked = GradSampleModule(self.model.model.get_base_model(), loss_reduction="sum")
            try:
                with Representations(self.model).caught() if term else nullcontext() as representations:
                    with autocast(self.device, self.precision):
                        outputs = hooked(**inputs)
                    read = representations.take(inputs) if term else None
                losses = noted(self.model.task.losses(outputs, labels), note)
                (losses if term is None else losses + term(read)).sum().backward()
                return {name: parameter.grad_sample.detach() for name, parameter in parameters.items()}
            finally:
                hooked.remove_hooks()
                for parameter in parameters.values():
                    parameter.requires_grad_(False)
                    parameter.grad = parameter.grad_sample = None
