"""The terms of a secure sum of updates: what is summed, in whole numbers of which range, and for how many clients.

What is summed is each client's move from the round's start. All clients know the start, so their
moves add up to what their updates would, and moves are small, so few levels are wasted. The range
is a setting and the number of levels follows from how many clients were chosen: both are public,
and both are known before anybody trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedpipe.config import FederationSettings
from fedpipe.models.factors import State
from fedpipe.models.lora import TensorSpec
from fedpipe.server.masking import MODULUS, Codec, Terms
from fedpipe.server.shamir import SHARE_BYTES

_KEYS = 2 * 32  # bytes of two public keys
_SEALED = 2 * SHARE_BYTES + 16  # of two shares under a cipher with its tag


def terms_of(
    federation: FederationSettings,
    query: str,
    round: int,
    clients: Sequence[str],
    specs: Sequence[TensorSpec],
    max_weight: int | None,
) -> Terms:
    """Return the terms of a round.

    Parameters
    ----------
    query : names the masks; it must be new where another attempt at the same sum has failed
    clients : all that trained in the round
    specs : what they send
    max_weight : the largest weight a client may have; None where all weigh the same

    Raises
    ------
    SettingsError
        There are too few clients, or too many for the weights.
    """
    codec = Codec(clip=federation.secure_range, levels=most_levels(len(clients)), max_weight=max_weight)
    size = sum(spec.numel for spec in specs)
    return Terms(query, round, tuple(clients), threshold_of(federation, len(clients)), size, codec)


def threshold_of(federation: FederationSettings, clients: int) -> int:
    """Return how many of so many clients must stay to the end: more than half in any case."""
    return max(clients // 2 + 1, math.ceil(federation.secure_threshold * clients - 1e-9))


def most_levels(clients: int) -> int:
    """Return the largest odd number of levels with which the sum over so many clients cannot wrap round.

    Odd, so that zero is a level; at most 2^31 - 1.
    """
    steps = min((MODULUS - 1) // max(clients, 1), 2**31 - 2)
    return steps - steps % 2 + 1


def flat_move(update: State, start: State, specs: Sequence[TensorSpec]) -> np.ndarray:
    """Return how far an update is from the start, (numbers,) float64: the tensors of `specs` one after the other."""
    moves = [update[s.name].double() - (start[s.name].double() if s.name in start else 0.0) for s in specs]
    return torch.cat([move.flatten() for move in moves]).numpy()


def by_name(numbers: np.ndarray, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Return the tensors, float64, that stand one after the other in `numbers`."""
    parts = torch.from_numpy(numbers).split([spec.numel for spec in specs])
    return {spec.name: part.reshape(spec.shape).clone() for spec, part in zip(specs, parts, strict=True)}


def unfit(vector: np.ndarray, limit: float) -> str | None:
    """Say why a client must not put a vector into the sum, or return None; the client itself asks.

    In a sum nobody can leave it out later, and clipped to the range it would not be what was trained.
    """
    if not np.isfinite(vector).all():
        return "has values that are not finite"
    if np.abs(vector).max() > limit:
        return f"has a number that moved by more than federation.secure_range, {limit:g}"
    return None


def message_bytes(terms: Terms, counts: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes that all clients send and receive in a sum.

    `counts` says how many clients sent their `keys`, `shares`, `upload` and `reveal`. Names and lists of
    names are not counted.
    """
    keys, dealt = counts["keys"], counts["shares"]
    up = keys * _KEYS + dealt * (keys - 1) * _SEALED
    up += counts["upload"] * 4 * terms.entries + counts["reveal"] * dealt * SHARE_BYTES
    return {"bytes_up": up, "bytes_down": keys * (keys - 1) * _KEYS + dealt * (dealt - 1) * _SEALED}
