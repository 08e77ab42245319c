"""Factor schedules: which tensors of the adapter are trained in which local step of which round.

A schedule is a function of public facts only (round, step, tensor), so a restarted run, a
late client and the server all agree on it. Rounds and steps count from 1. With B = 0 at the
start the gradient of A is zero, so whatever alternates begins with B.
"""

from __future__ import annotations

from collections.abc import Callable

from fedpipe.models.lora import TensorSpec

Schedule = Callable[[int, int, TensorSpec], bool]


def both(round: int, step: int, spec: TensorSpec) -> bool:
    """Train A and B in every step."""
    return True


def b_only(round: int, step: int, spec: TensorSpec) -> bool:
    """Keep A as it was drawn, train B (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313)."""
    return spec.factor != "A"


def alternate_round(round: int, step: int, spec: TensorSpec) -> bool:
    """Train B in odd rounds and A in even rounds (RoLoRA, Chen et al. 2024, arXiv 2409.02346)."""
    return spec.factor == "head" or spec.factor == ("B" if round % 2 else "A")


def alternate_step(round: int, step: int, spec: TensorSpec) -> bool:
    """Train B in odd local steps and A in even ones, in every round (LA-LoRA, arXiv 2602.19926)."""
    return spec.factor == "head" or spec.factor == ("B" if step % 2 else "A")


SCHEDULES: dict[str, Schedule] = {
    "both": both,
    "b-only": b_only,
    "alternate-round": alternate_round,
    "alternate-step": alternate_step,
}
