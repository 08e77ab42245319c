"""Linear layers in which every record of the batch has weights of its own.

With weights of shape (n, out, in) as leaf tensors of autograd, their gradients *are* the
gradients of the n records, for all clients at once, in one backward pass, with no hooks:
record j's loss depends on slice j alone. What is not differentiated (the frozen backbone)
stays shared and costs what it costs in ordinary training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PerRecordLinear(nn.Module):
    """A linear layer whose weights are shared, (out, in), or one for each record, (n, out, in).

    Inputs are (n, ..., in). Where a backbone folds positions into the batch axis, as window
    attention does (n * windows, ..., in), the windows of one record lie side by side and are
    folded back, so that a record still meets its own weights and sums its own gradient.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight.to(inputs.dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        if weight.dim() == 2:
            return functional.linear(inputs, weight, bias)
        rows = inputs.reshape(weight.shape[0], -1, weight.shape[-1])
        outputs = torch.bmm(rows, weight.transpose(1, 2))
        if bias is not None:
            outputs = outputs + bias[:, None, :]
        return outputs.reshape(*inputs.shape[:-1], weight.shape[1])


class KeyedDropout(nn.Module):
    """Dropout that belongs to the record: what is dropped follows from its seed and the place in its input.

    Which others share a record's batch has no say in it. Draws from one generator for a whole
    batch would shift with every record that comes or goes, so that one record could move the
    sum of gradients by more than the clip norm, and another token budget would be another
    computation. Without seeds it does nothing.

    Parameters
    ----------
    probability : of an input to be dropped
    layer : tells the draws of this layer from those of others
    """

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability = probability
        self.layer = layer
        self.seeds: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.seeds is None:
            return inputs
        rows = inputs.reshape(len(self.seeds), -1)
        places = torch.arange(rows.shape[1], device=rows.device) * _GOLDEN
        draws = _mixed(_mixed(self.seeds + self.layer)[:, None] + places)
        kept = _shifted(draws, 11) >= int(self.probability * 2**53)
        return (rows * kept / (1 - self.probability)).reshape(inputs.shape)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shift right and fill with zeros; torch itself fills with the sign."""
    return (bits >> count) & (2 ** (64 - count) - 1)


def _mixed(bits: Tensor) -> Tensor:
    """Return 64 bits that depend on all 64 given ones (SplitMix64, Steele, Lea and Flood 2014); int64."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)
