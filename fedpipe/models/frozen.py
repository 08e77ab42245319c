"""Frozen linear layers by the faster of the two libraries that PyTorch has for them on a processor.

PyTorch multiplies float32 matrices with MKL, which on processors that are not Intel's uses half
of their vector units. oneDNN, which PyTorch brings along too, generates its code for the processor
it finds, and is about twice as fast there, at the same precision. Frozen layers are nearly all of
what a step computes, and they need one product forward and one backward.

That code is kept for each shape that was met, up to a megabyte of it, and Poisson batches have many.
With room for 1024 shapes, as is usual, a run's memory would grow for hundreds of rounds; so there is
room for a few.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe.models import steady

# oneDNN's own, and that of what PyTorch has before it. Both are read when the first product is computed; what the
# user has set stays.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")


class FrozenLinear(nn.Linear):
    """A linear layer whose parameters are not trained; what it computes is `nn.Linear`'s up to rounding."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not _suits(inputs):
            return steady.linear(inputs, self.weight, self.bias)
        # Rows go in and come out: what a function of autograd returns must be no view, or backbones that
        # change it in place would be refused.
        rows = inputs.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and inputs.requires_grad:
            outputs = _Product.apply(rows, self.weight, self.bias)
        else:
            outputs = _linear(rows, self.weight, self.bias)
        return outputs.reshape(*inputs.shape[:-1], self.out_features)


def speed_up(model: nn.Module) -> None:
    """Make every plain linear layer of a model, none of which may be trained, a `FrozenLinear`, in place."""
    if not _has_one_dnn():
        return
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.__class__ = FrozenLinear


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _linear(gradient.contiguous(), weight.t(), None), None, None


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = steady.enough_rows(inputs)
    outputs = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return outputs if rows is inputs else outputs[: len(inputs)].clone()


def _suits(inputs: Tensor) -> bool:
    """Say whether the inputs are for oneDNN: float32 on a processor, as they are and not to be cast by autocast."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == torch.float32
        and inputs.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _has_one_dnn() -> bool:
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
