"""Checks that every update passes before the server uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedpipe.models.lora import TensorSpec


def refuse_reason(update: Mapping[str, Tensor], expected: Sequence[TensorSpec]) -> str | None:
    """Say why an update must not be used, or return None.

    One NaN is enough to spoil a mean, and to win some robust rules, so nothing that is not
    finite, and of exactly the expected names and shapes, goes any further.
    """
    names = {spec.name for spec in expected}
    if missing := names - update.keys():
        return f"lacks '{min(missing)}'"
    if unexpected := update.keys() - names:
        return f"has '{min(unexpected)}', which this round does not train"
    for spec in expected:
        tensor = update[spec.name]
        if tuple(tensor.shape) != spec.shape:
            return f"'{spec.name}' has shape {tuple(tensor.shape)}, expected {spec.shape}"
        if not torch.isfinite(tensor).all():
            return f"'{spec.name}' has values that are not finite"
    return None
