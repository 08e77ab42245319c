"""Each published method as a choice on every axis, and the rules for what may not be combined.

To add a method, add an entry here; if it needs a part that no axis has yet, add that part
where its axis lives: factor schedules in `fedpipe.client.schedule`, gradient filters in
`fedpipe.client.filters`, aggregation rules in `fedpipe.server.aggregate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedpipe.client.filters import FILTERS, Filter
from fedpipe.client.schedule import SCHEDULES, Schedule
from fedpipe.config import Settings
from fedpipe.errors import SettingsError, nearest
from fedpipe.models.lora import TensorSpec
from fedpipe.server.aggregate import AGGREGATIONS


@dataclass(frozen=True)
class Method:
    """A method: who it is, and its choice on each axis.

    `private` says whether its card allows differential privacy; `note` what of ours differs
    from the paper or its code, and why.
    """

    name: str
    summary: str
    paper: str
    schedule: str = "both"
    filter: str = "none"
    padding: str = "symmetric"
    aggregation: str = "mean"
    weights: str = "uniform"
    private: bool = True
    note: str = ""

    def is_active(self, round: int, step: int, spec: TensorSpec) -> bool:
        """Say whether a tensor is trained in this local step (both count from 1)."""
        schedule: Schedule = SCHEDULES[self.schedule]
        return schedule(round, step, spec)

    def gradient_filter(self) -> Filter:
        return FILTERS[self.filter](self.padding)

    @property
    def axes(self) -> dict[str, str]:
        """The choice on each axis: what `method:` in the settings can override."""
        return {axis: getattr(self, axis) for axis in AXES}


AXES: Mapping[str, Mapping[str, Any]] = {
    "schedule": SCHEDULES,
    "filter": FILTERS,
    "padding": dict.fromkeys(("symmetric", "reflect", "circular")),
    "aggregation": AGGREGATIONS,
    "weights": dict.fromkeys(("uniform", "samples")),
}

_ENTRIES = (
    Method(
        name="fedit",
        summary="Train A and B on every client, average each; the baseline without privacy.",
        paper="Zhang et al. 2024, Towards Building the Federated GPT, arXiv 2305.05644",
        weights="samples",
        private=False,
        note="The mean of the factors is not the mean of their products; the gap is the spread of the clients.",
    ),
    Method(
        name="dp-lora",
        summary="Train A and B together on noisy, clipped gradients, average each.",
        paper="Liu et al. 2025, Differentially Private Low-Rank Adaptation, arXiv 2312.17493",
        note=(
            "One joint clip over A, B and the head. The paper clips A and B each at C, "
            "which has sensitivity sqrt(2) C. Uniform weights keep the clients' sizes private."
        ),
    ),
    Method(
        name="ffa-lora",
        summary="Keep A as it was drawn and train B: averaging is exact, and half the noise and traffic.",
        paper="Sun et al. 2024, Improving LoRA in Privacy-preserving Federated Learning, arXiv 2403.12313",
        schedule="b-only",
        note="The head is trained, clipped and noised with B.",
    ),
    Method(
        name="rolora",
        summary="Train B in odd rounds and A in even ones: averaging is exact, and both factors learn.",
        paper="Chen et al. 2025, Robust Federated Finetuning of LLMs via Alternating Optimization, arXiv 2502.01755",
        schedule="alternate-round",
        note="The original is not private; here the active factor is trained on noisy, clipped gradients.",
    ),
    Method(
        name="la-lora",
        summary="Alternate B and A in every local step and smooth the noisy gradient along the features.",
        paper="LA-LoRA, ICLR 2026, arXiv 2602.19926",
        schedule="alternate-step",
        filter="binomial5",
        note=(
            "Follows the paper, not its published code, which clips batch means (no privacy guarantee), "
            "starts with A and smooths differently. The clip is joint over all active tensors."
        ),
    ),
)

CATALOGUE: dict[str, Method] = {method.name: method for method in _ENTRIES}


def compose(settings: Settings) -> Method:
    """Return the method of the settings, with its overridden axes, if it may run so.

    Raises
    ------
    SettingsError
        The method or a part does not exist, or they may not be combined; with the reason.
    """
    chosen = settings.method
    if chosen.name not in CATALOGUE:
        raise SettingsError(f"method.name: found '{chosen.name}'; {nearest(chosen.name, CATALOGUE)}")
    overrides = {axis: value for axis in AXES if (value := getattr(chosen, axis)) is not None}
    for axis, value in overrides.items():
        if value not in AXES[axis]:
            raise SettingsError(f"method.{axis}: found '{value}'; {nearest(value, AXES[axis])}")
    method = replace(CATALOGUE[chosen.name], **overrides)
    _check(method, settings)
    return method


def _check(method: Method, settings: Settings) -> None:
    if settings.private and not method.private:
        raise SettingsError(
            f"method.name: {method.name} is the baseline without privacy; "
            "set privacy.unit to none, or use dp-lora, which is the same method with privacy"
        )
    if settings.private and method.weights == "samples":
        raise SettingsError(
            "method.weights: samples weights clients by their number of records, which privacy.unit record protects; "
            "use uniform"
        )


def warnings_for(method: Method, settings: Settings) -> list[str]:
    """Return what is allowed but probably not meant."""
    steps, rounds = settings.federation.local_steps, settings.federation.rounds
    notes = []
    if method.schedule == "alternate-step" and steps == 1:
        notes.append(f"federation.local_steps is 1: {method.name} trains B in odd steps only, so A never moves")
    if method.schedule == "alternate-round" and rounds == 1:
        notes.append(f"federation.rounds is 1: {method.name} trains B in odd rounds only, so A never moves")
    return notes
