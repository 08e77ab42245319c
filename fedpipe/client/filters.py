"""Filters of a gradient that is already private: post-processing, so they cost no privacy.

A filter takes the noisy gradients of one tensor, one for each client, and the tensor's
spec; it may use nothing else of the clients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fedpipe.errors import SettingsError
from fedpipe.models.lora import TensorSpec

Filter = Callable[[Tensor, TensorSpec], Tensor]

_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def none(gradients: Tensor, spec: TensorSpec) -> Tensor:
    """Leave the gradients as they are."""
    return gradients


def binomial5(padding: str) -> Filter:
    """Smooth along the feature axis with [1, 4, 6, 4, 1] / 16 (LA-LoRA, arXiv 2602.19926).

    The rows of A (rank, in) are smoothed along `in`, the columns of B (out, rank) along
    `out`; the head, which has no low-rank axis to spare, is left alone. White noise keeps
    70/256 of its variance. It assumes that neighbouring features are alike.

    Parameters
    ----------
    padding : `symmetric` mirrors with the edge repeated and keeps the sum of the gradient;
        `reflect` mirrors without repeating it (and needs three features); `circular` wraps.
    """

    def smooth(gradients: Tensor, spec: TensorSpec) -> Tensor:
        if spec.factor == "head":
            return gradients
        axis = 2 if spec.factor == "A" else 1
        taps = padded_indices(gradients.shape[axis], padding).to(gradients.device)
        parts = (weight * gradients.index_select(axis, tap) for weight, tap in zip(_BINOMIAL, taps, strict=True))
        return torch.stack(tuple(parts)).sum(0)

    return smooth


@lru_cache(maxsize=256)
def padded_indices(size: int, padding: str) -> Tensor:
    """Return, for each of the five taps, which feature each position reads: (5, size)."""
    positions = torch.arange(size)[None, :] + torch.arange(-2, 3)[:, None]
    if padding == "circular":
        return positions % size
    if padding == "symmetric":
        folded = positions % (2 * size)
        return torch.where(folded < size, folded, 2 * size - 1 - folded)
    if size < 3:
        raise SettingsError(f"method.padding: reflect needs at least 3 features, found {size}; use symmetric")
    folded = positions % (2 * size - 2)
    return torch.where(folded < size, folded, 2 * size - 2 - folded)


FILTERS: dict[str, Callable[[str], Filter]] = {"none": lambda padding: none, "binomial5": binomial5}
