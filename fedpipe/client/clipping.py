"""Per-record clipping: the bound on what one record can add to a sum.

One joint flat clip (Abadi et al. 2016) over everything active: the norm of a record's
gradient is taken over all active tensors together, so the sum of the clipped gradients moves
by at most the clip norm when one record is added or removed. Groups of tensors that are clipped
apart have bounds whose squares sum to that of the joint clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedpipe.client import exact
from fedpipe.client.clip import Clip
from fedpipe.models.batched import Gradient, Owners, is_turned
from fedpipe.models.lora import TensorSpec


def clip_factors(norms: Tensor, clip_norm: float | None) -> Tensor:
    """Return what each record's gradient is multiplied by: min(1, clip_norm / norm), (n,).

    A record whose gradient is not finite gets zero: the bound holds for it too, and one overflow
    does not end a private run. Without a clip norm nothing is scaled.
    """
    if clip_norm is None:
        return torch.ones_like(norms)
    factors = (clip_norm / (norms + 1e-6)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def sum_clipped(gradients: Mapping[str, Gradient], owners: Owners, clip_norm: float | None) -> Tensor:
    """Return the sum of each present client's clipped per-record gradients, all tensors side by side.

    Parameters
    ----------
    gradients : name -> (n, *shape), one for each record, or the factors of it
    owners : whose the records are
    clip_norm : bound on the joint norm of a record's gradient; None for no bound

    Returns
    -------
    (present clients, numbers of all tensors) float64, in the order of `gradients`; `apart` takes it apart.
    Sums of such sums are exact: see `fedpipe.client.exact`

    Notes
    -----
    A record whose gradient is not finite adds nothing. Without a bound there is no privacy to keep
    by that, and its client's sum is NaN: the run has diverged and must say so.
    """
    norms = sum(exact.squares(gradient) for gradient in gradients.values()).sqrt()
    lost = ~torch.isfinite(norms)
    any_lost = bool(lost.any())
    factors = clip_factors(norms, clip_norm).masked_fill(lost, 0.0)
    unit, count = exact.unit_of(clip_norm), len(owners.clients)
    lost_or_none = lost if any_lost else None
    sums = [exact.sums(part, owners.place, count, unit, factors, lost_or_none) for part in gradients.values()]
    total = torch.cat(sums, dim=1)
    if any_lost and clip_norm is None:
        total[owners.place[lost]] = torch.nan
    return total


def sum_in_groups(
    gradients: Mapping[str, Gradient], owners: Owners, clip_norm: float | None, clip: Clip, active: Sequence[TensorSpec]
) -> Tensor:
    """Return what `sum_clipped` does, with each group of `clip` under its own bound.

    A record whose gradient is not finite in a group adds nothing to that group.
    """
    groups = clip.groups(active)
    if clip_norm is None or len(groups) == 1:
        return sum_clipped(gradients, owners, clip_norm)
    bound, sums = clip.bound(clip_norm, len(groups)), {}
    for group in groups:
        total = sum_clipped({spec.name: gradients[spec.name] for spec in group}, owners, bound)
        parts = total.split([spec.numel for spec in group], dim=1)
        sums |= {spec.name: part for spec, part in zip(group, parts, strict=True)}
    return torch.cat([sums[name] for name in gradients], dim=1)


def apart(total: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Take sums of `sum_clipped`, (clients, numbers), apart: name -> (clients, *shape), float32, contiguous."""
    parts = total.float().split([math.prod(shape) for shape in shapes.values()], dim=1)
    return {
        name: part.unflatten(1, tuple(shape)[::-1]).transpose(1, 2).contiguous()
        if is_turned(shape)
        else part.unflatten(1, tuple(shape)).contiguous()
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
