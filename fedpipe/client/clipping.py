"""Per-record clipping: the bound on what one record can add to a sum.

One joint flat clip (Abadi et al. 2016) over everything active: the norm of a record's
gradient is taken over all active tensors together, so the sum of the clipped gradients moves
by at most the clip norm when one record is added or removed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def record_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the joint l2 norm of each record's gradient: (n,); each gradient is (n, *shape)."""
    squares = [gradient.flatten(1).square().sum(1) for gradient in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def clip_factors(norms: Tensor, clip_norm: float | None) -> Tensor:
    """Return what each record's gradient is multiplied by: min(1, clip_norm / norm), (n,).

    A record whose gradient is not finite gets zero: it adds nothing, so the bound holds for it
    too, and one overflow does not end a private run. Without a clip norm nothing is scaled.
    """
    if clip_norm is None:
        return torch.ones_like(norms)
    factors = (clip_norm / (norms + 1e-6)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def add_clipped(
    sums: dict[str, Tensor], gradients: Mapping[str, Tensor], clients: Tensor, clip_norm: float | None
) -> None:
    """Add each record's clipped gradient to its client's sum, in place.

    Parameters
    ----------
    sums : name -> (clients, *shape)
    gradients : name -> (n, *shape), one for each record; overwritten
    clients : (n,) int64, the row of `sums` that each record belongs to
    clip_norm : bound on the joint norm of a record's gradient; None for no bound
    """
    factors = clip_factors(record_norms(gradients), clip_norm)
    for name, gradient in gradients.items():
        if clip_norm is not None:  # zero times NaN is NaN: what is dropped must be zero before it is scaled
            gradient = torch.where((factors > 0).view(-1, *[1] * (gradient.dim() - 1)), gradient, 0.0)
        sums[name].index_add_(0, clients, gradient * factors.view(-1, *[1] * (gradient.dim() - 1)))
