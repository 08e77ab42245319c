"""Sums of gradients that do not depend on the order or the grouping of what is added.

Floating-point sums do: (a + b) + c and a + (b + c) differ in their last digits, and those of a
model that is trained on differ in all of them. So every number is first cut to a whole multiple
of one small unit, a power of two (towards zero, so that no record exceeds its clip norm by it).
Sums of such multiples are exact in float64 as long as they stay below 2^53 units, and then neither
the cut into micro-batches, nor the size of a cohort, nor the number of threads can change them.
(Demmel and Nguyen 2013, "Fast reproducible floating-point summation", for the idea; the unit is
fixed here, because what is added is bounded by a clip norm.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedpipe.models import steady
from fedpipe.models.batched import Gradient, OuterProducts, in_memory_order, is_turned

# Below the clip norm by this many bits: finer than float32 for all numbers that are not far smaller than the norm,
# and 2^18 clipped records can be added before a sum may be rounded.
_BITS = 35
_UNBOUNDED = 2.0**-42  # without a clip norm; sums of up to 2^11 are exact, and nothing is lost in larger ones
# Numbers that are held in float64 at once: on a processor they stay in its cache.
_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}


def unit_of(clip_norm: float | None) -> float:
    """Return what numbers are cut to a multiple of."""
    return _UNBOUNDED if clip_norm is None else 2.0 ** (math.floor(math.log2(clip_norm)) - _BITS)


def shape_of(gradient: Gradient) -> tuple[int, ...]:
    """Return the shape of a record's gradient."""
    if isinstance(gradient, OuterProducts):
        return gradient.outputs.shape[2], gradient.inputs.shape[2]
    return tuple(gradient.shape[1:])


def numbers_of(gradient: Gradient) -> int:
    """Return how many numbers a record's gradient has."""
    return math.prod(shape_of(gradient))


def squares(gradient: Gradient) -> Tensor:
    """Return each record's squared norm, (n,) float64."""
    if isinstance(gradient, OuterProducts) and gradient.inputs.shape[1] == 1:
        # Of one product: that of its two norms, without the product.
        sides = (gradient.inputs[:, 0], gradient.outputs[:, 0])
        return steady.squares(sides[0]) * steady.squares(sides[1])
    return torch.cat([steady.squares(rows) for _, rows in _chunks(gradient)])


def sums(
    gradient: Gradient,
    place: Tensor,
    count: int,
    unit: float,
    factors: Tensor | None = None,
    lost: Tensor | None = None,
) -> Tensor:
    """Add each record's gradient, times a factor, to one of `count` sums.

    Parameters
    ----------
    gradient : of n records
    place : (n,) int64, the sum that each is added to
    unit : what numbers are cut to a multiple of
    factors : (n,); None for ones
    lost : (n,) bool, records that add nothing, whatever their numbers; None where there are none

    Returns
    -------
    (count, numbers) float64, in the order in which weights lie in memory
    """
    total = torch.zeros(count, numbers_of(gradient), dtype=torch.float64, device=place.device)
    scales = None if factors is None else factors.double()[:, None] / unit
    for part, rows in _chunks(gradient):
        rows.mul_(1 / unit if scales is None else scales[part]).trunc_()
        if lost is not None:
            rows.masked_fill_(lost[part, None], 0.0)
        total.index_add_(0, place[part], rows)
    return total.mul_(unit)


def _chunks(gradient: Gradient) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few records at a time, and their gradients as new (few, numbers) in float64."""
    outer = isinstance(gradient, OuterProducts)
    held = gradient.inputs if outer else gradient
    few = max(1, _AT_ONCE[held.device.type] // max(1, numbers_of(gradient)))
    for first in range(0, len(held), few):
        part = slice(first, first + few)
        if outer:
            left, right = gradient.outputs[part], gradient.inputs[part]
            left, right = (right, left) if is_turned(shape_of(gradient)) else (left, right)
            yield part, steady.bmm(left.transpose(1, 2), right).flatten(1).double()
        else:
            rows = in_memory_order(gradient[part]).flatten(1)
            yield part, rows.double() if rows.dtype != torch.float64 else rows.clone()
