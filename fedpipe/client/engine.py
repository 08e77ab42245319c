"""The cohort engine: many clients' private gradients in one forward and one backward pass.

The Poisson batches of all clients of a cohort are pooled, sorted by length, and cut into
micro-batches under a budget of padded tokens. In a micro-batch every record meets its own
client's adapter and has a gradient of its own (see `fedpipe.models.batched`). The gradients
are clipped and summed client by client. Memory is bounded by the budget, not by the number
of records, and by that of clients only as far as their adapters go.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedpipe.client.batching import Budget, micro_batches
from fedpipe.client.clip import JOINT, Clip
from fedpipe.client.clipping import apart, sum_in_groups
from fedpipe.client.contrast import Frozen, Representations, contrast_losses, strengths
from fedpipe.client.diagnostics import Note, StepLosses, noted
from fedpipe.client.objectives import Contrast
from fedpipe.client.parallel import in_turn
from fedpipe.client.units import Units
from fedpipe.models import steady
from fedpipe.models.batched import Gradient, Owners
from fedpipe.models.lora import AdaptedModel, TensorSpec
from fedpipe.models.task import Encoded

State = dict[str, Tensor]


class Engine(Protocol):
    """Computes the sum of clipped gradients, of records or of groups, client by client."""

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
        """Return, for each active tensor, (clients, *shape): zero for a client whose batch is empty.

        Parameters
        ----------
        state : the adapters, name -> (clients, *shape)
        records : each client's records
        batches : each client's batch, as indices into its records
        active : the tensors to differentiate; no gradient of any other is computed
        clip_norm : bound on the joint norm of one record's gradient over `active`; None for no bound
        seeds : what dropout draws from, for each client (records,) int64; None for no dropout
        clip : which tensors share a norm
        contrast : a term of a record's loss beside the task's
        units : each record's group, for each client (records,); the mean gradient of a group's records is
            then what is clipped and summed. A batch must hold all of a group's records, or none
        losses : takes each record's loss of the task
        """


class CohortEngine:
    """All clients at once. `precision` bf16 runs the backbone under autocast; norms and sums stay fp32.

    Parameters
    ----------
    model : a batched model, or several that share a backbone, each for one micro-batch at a time
    device, precision : where and how the backbone is computed
    budget : how large a micro-batch may be; a number is one of tokens
    """

    def __init__(
        self,
        model: AdaptedModel | Sequence[AdaptedModel],
        device: torch.device,
        precision: str,
        budget: Budget | int,
    ) -> None:
        self.models = [model] if isinstance(model, AdaptedModel) else list(model)
        self.device = device
        self.precision = precision
        self.budget = Budget(budget) if isinstance(budget, int) else budget
        self._joined: tuple[Sequence[Encoded], Encoded] | None = None

    @property
    def model(self) -> AdaptedModel:
        return self.models[0]

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
        if losses is not None:
            losses.begin(batches)
        pool = self._pool(records)
        starts = np.cumsum([0, *map(len, records)])
        chosen = np.concatenate([batch + start for batch, start in zip(batches, starts, strict=False)])
        owners = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
        drawn = None if seeds is None else np.concatenate(seeds)
        grouped = None if units is None else Units(owners, np.concatenate(_each(units, batches)))
        kinds, numbers = pool.kinds[chosen], sum(spec.numel for spec in active)
        if grouped is None:
            parts = list(micro_batches(kinds, self.budget))
        else:
            parts = grouped.parts(kinds // 2, numbers, self.budget)
        copier = self.model.copier(state)

        def gradients(model: AdaptedModel, part: np.ndarray) -> dict[str, Gradient]:
            count, part = len(part), steady.at_least_two(part)
            whose = Owners(owners[part], self.device)
            inputs, labels = pool.batch(chosen[part], self.device)
            strength = strengths(contrast, whose.index)
            frozen = None if strength is None else self._frozen(model, inputs, whose, contrast)
            model.set_adapter(state, whose, active, copier.copies(whose))
            note = None if losses is None else losses.at(part)
            with dropout(model, drawn, chosen[part], self.device):
                if frozen is None:
                    found = self._gradients(model, inputs, labels, note)
                else:
                    found = self._contrasted(model, inputs, labels, note, frozen, strength, contrast.temperature)
            return {name: gradient[:count] for name, gradient in found.items()}

        def of_records(model: AdaptedModel, part: np.ndarray) -> None:
            part = part[np.argsort(owners[part], kind="stable")]
            add(gradients(model, part), Owners(owners[part], self.device))

        def of_units(model: AdaptedModel, part: np.ndarray) -> None:
            cut = (np.sort(part[batch]) for batch in micro_batches(kinds[part], self.budget))
            add(*grouped.means(((batch, gradients(model, batch)) for batch in cut), part, self.device))

        total = torch.zeros(len(batches), numbers, device=self.device, dtype=torch.float64)
        adding = threading.Lock()

        def add(found: Mapping[str, Gradient], whose: Owners) -> None:
            part = sum_in_groups(found, whose, clip_norm, clip, active)
            with adding:  # in any order: these sums are exact
                total.index_add_(0, whose.clients, part)

        for _ in in_turn(of_records if grouped is None else of_units, self.models, parts):
            pass
        return apart(total, {spec.name: spec.shape for spec in active})

    def _pool(self, records: Sequence[Encoded]) -> Encoded:
        """Put the clients' records end to end, once for all steps on the same ones."""
        if self._joined is None or self._joined[0] is not records:
            self._joined = records, records[0].join(records)
        return self._joined[1]

    def _gradients(
        self, model: AdaptedModel, inputs: Mapping[str, Tensor], labels: Tensor, note: Note | None = None
    ) -> dict[str, Gradient]:
        """Return the per-record gradients of the active tensors: name -> gradients of n records, float32."""
        with autocast(self.device, self.precision):
            outputs = model.forward(inputs)
        return model.record_gradients(noted(model.task.losses(outputs, labels), note).sum())

    @torch.no_grad()
    def _frozen(self, model: AdaptedModel, inputs: Mapping[str, Tensor], whose: Owners, contrast: Contrast) -> Frozen:
        """Return the records' representations by the two adapters that they are compared with."""
        found = []
        with Representations(model).caught() as representations, autocast(self.device, self.precision):
            for adapter in (contrast.received, contrast.previous):
                model.set_adapter(adapter, whose)
                model.forward(inputs)
                found.append(representations.take(inputs))
        return found[0], found[1]

    def _contrasted(
        self,
        model: AdaptedModel,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        note: Note | None,
        frozen: Frozen,
        strength: Tensor,
        temperature: float,
    ) -> dict[str, Gradient]:
        with Representations(model).caught() as representations:
            with autocast(self.device, self.precision):
                outputs = model.forward(inputs)
            losses = contrast_losses(representations.take(inputs), frozen, strength, temperature)
        return model.record_gradients((noted(model.task.losses(outputs, labels), note) + losses).sum())


def _each(units: Sequence[np.ndarray], batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [groups[batch] for groups, batch in zip(units, batches, strict=True)]


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
