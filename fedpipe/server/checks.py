"""Checks that every update passes before the server uses it.

They come before any aggregation rule, robust ones included: with one client that is not a number a
median may be none either, and where scores are compared that client can win.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedpipe.models.lora import TensorSpec

# Farther than any training that goes well, and near enough that squares of lengths keep their digits.
MOVE_CAP = 1e6


def refuse_reason(
    update: Mapping[str, Tensor],
    expected: Sequence[TensorSpec],
    start: Mapping[str, Tensor] | None = None,
    cap: float = MOVE_CAP,
) -> str | None:
    """Say why an update must not be used, or return None.

    One NaN is enough to spoil a mean, and to win some robust rules, so nothing that is not
    finite, and of exactly the expected names and shapes, goes any further.

    Parameters
    ----------
    update : what a client sent
    expected : what it should have sent
    start : the adapter that it started from; tensors that are not in it are taken to start at zero
    cap : the Euclidean length, over all tensors, that it may have moved from there
    """
    names = {spec.name for spec in expected}
    if missing := names - update.keys():
        return f"lacks '{min(missing)}'"
    if unexpected := update.keys() - names:
        return f"has {ascii(min(unexpected))[:80]}, which this round does not train"
    for spec in expected:
        tensor = update[spec.name]
        if tuple(tensor.shape) != spec.shape:
            return f"'{spec.name}' has shape {tuple(tensor.shape)}, expected {spec.shape}"
        if not tensor.is_floating_point():
            return f"'{spec.name}' has type {str(tensor.dtype).removeprefix('torch.')}, expected a floating point type"
        if not torch.isfinite(tensor).all():
            return f"'{spec.name}' has values that are not finite"
    length = _length(update, start or {})
    return f"has moved by {length:.3g}, more than the {cap:.3g} that is allowed" if length > cap else None


def _length(update: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Return how far an update is from the start; inf where float64 does not hold its square."""
    moves = (tensor.double() - start[name] if name in start else tensor for name, tensor in update.items())
    return math.hypot(*(float(torch.linalg.vector_norm(move, dtype=torch.float64)) for move in moves))
