"""Products whose rows do not depend on their company: the same row, in whatever batch, has the same bits.

A record's gradient must not change with the batch it is computed in, or a run would end with other
bytes under another token budget or cohort size. On a processor the libraries keep to that by
themselves, but for two things: a batch of one, and products of a few rows, are computed by other
code, which adds in another order. So neither is asked for here. On a GPU the code is chosen by the
shape of the whole batch, and no such promise can be made.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_BORDER = 16  # numbers
ROWS = 8  # at least, in a product with a shared matrix


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """Return (n, i, j) times (n, j, k), each of the n like in any other batch."""
    if left.shape[0] != 1:
        return torch.bmm(left, right)
    return torch.bmm(left.expand(2, -1, -1), right.expand(2, -1, -1))[:1]


def enough_rows(rows: Tensor) -> Tensor:
    """Return (n, k) with rows of zeros below it, if there are fewer than `ROWS`."""
    missing = ROWS - rows.shape[0]
    return functional.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what `torch.nn.functional.linear` does, each row like in any other batch."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    outputs = functional.linear(enough_rows(rows), weight, bias)[: rows.shape[0]]
    return outputs.reshape(*inputs.shape[:-1], weight.shape[0])


def aligned(rows: Tensor) -> Tensor:
    """Return (n, k) with zeros to the right, so that each row of a matrix of such rows begins at a vector's border.

    Libraries compute what lies before the first border by itself.
    """
    return functional.pad(rows, (0, -rows.shape[1] % _BORDER))


def squares(rows: Tensor) -> Tensor:
    """Return the sum of each row's squares, (n, ...) -> (n,), in float64."""
    flat = rows.detach().flatten(1).double().square()
    if flat.device.type != "cpu":
        return flat.sum(1)
    # PyTorch adds along a row in another order when there is only one; NumPy does not.
    return torch.from_numpy(np.add.reduce(flat.contiguous().numpy(), axis=1))


def at_least_two(records: np.ndarray) -> np.ndarray:
    """Return the records of a batch, a single one twice: some backbones compute a batch of one in another way."""
    return np.repeat(records, 2) if len(records) == 1 else records


def widths(lengths: np.ndarray) -> np.ndarray:
    """Return what records of these lengths are padded to: the next whole eight, or eighth of a power of two.

    A record is always computed at this width, since kernels go along a row in steps of the vector unit and
    compute the rest by other code. Few widths leave few batches, and eights keep every row at a vector's
    border. It is never the length itself: where a batch has no padding, backbones leave out the mask, and
    take another kernel. (Records that were cut at the longest length have none, and batches of their own.)
    """
    eighth = 2 ** np.ceil(np.log2(np.maximum(lengths, 64))).astype(np.int64) // 8
    return (lengths // eighth + 1) * eighth
