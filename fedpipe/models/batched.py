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
    """Dropout that draws from a generator given from outside; without one it does nothing.

    The global generator's position depends on all that ran before, which a restarted run
    does not repeat.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.generator: torch.Generator | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.generator is None:
            return inputs
        draws = torch.rand(inputs.shape, generator=self.generator, device=inputs.device)
        return inputs * (draws >= self.probability) / (1 - self.probability)
