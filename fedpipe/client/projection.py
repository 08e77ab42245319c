"""Gradients of a factor, projected (LA-LoRA, arXiv 2602.19926, Theorem 2).

With W = W0 + s B A and G the gradient in W, those of the factors are s G A^T and s B^T G. The step
of one factor that comes closest to G in W, the other being fixed, is

    B: (1 / s^2) g_B (A A^T)^-1        A: (1 / s^2) (B^T B)^-1 g_A

so that s times the first times A is G projected on the rows of A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpipe.models import steady


def projected(gradient: Tensor, other: Tensor, factor: str, scale: float, damping: float) -> Tensor:
    """Return the projected gradient of a factor, float64 inside.

    Parameters
    ----------
    gradient : of the factor, (clients, rank, in) for A, (clients, out, rank) for B
    other : the other factor
    factor : whose gradient it is, `A` or `B`
    scale : s
    damping : of the mean eigenvalue of the Gram matrix, which is added to its diagonal, and 1e-8 with it

    Notes
    -----
    Where the other factor is zero there is nothing to project on: the gradient is only noise, which
    the inverse would multiply by 1e8, and is left as it is.
    """
    turned = factor == "B"
    rows = (gradient.transpose(1, 2) if turned else gradient).double()  # (clients, rank, features)
    wide = (other if turned else other.transpose(1, 2)).double()
    gram = steady.bmm(wide, wide.transpose(1, 2))
    rank = gram.shape[1]
    shift = damping * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-8
    damped = gram + shift[:, None, None] * torch.eye(rank, dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(damped, rows) / scale**2
    solved = torch.where(wide.flatten(1).any(1)[:, None, None], solved, rows)
    return (solved.transpose(1, 2) if turned else solved).to(gradient.dtype)
