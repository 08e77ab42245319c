"""Whether a backbone keeps the records of a batch apart: what private training stands on, and no backbone promises.

A record's gradient must not depend on who shares its batch. Some backbones break this: they
apply an adapted layer across records (positions first, or one table of positions for the
whole batch), or read the padding that a longer neighbour brings (convolutions, Fourier
mixing). Shapes fit, sums look sound, and the clip norm bounds nothing. So it is tried out.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from fedpipe.client.batching import Budget
from fedpipe.client.engine import CohortEngine, State
from fedpipe.errors import SettingsError
from fedpipe.models.lora import AdaptedModel
from fedpipe.models.task import Encoded

TOLERANCE = 1e-4  # rounding stays below 1e-5, and the backbones that break it are above 1e-3
RECORDS = 4


def check_apart(model: AdaptedModel, records: Encoded, device: torch.device) -> None:
    """Compare a few records' gradients, each under an adapter of its own, in one batch and in batches of one.

    Parameters
    ----------
    model : a batched model; its adapter is overwritten
    records : of which the shortest, the longest and two in between are tried; texts beside one of twice the
        length, so that all of them are padded further than alone

    Raises
    ------
    SettingsError
        The gradients differ.
    """
    ranks = np.linspace(0, len(records) - 1, min(RECORDS, len(records))).round().astype(int)
    few = np.argsort(records.lengths, kind="stable")[ranks]
    tried = [(records, record) for record in few]
    if isinstance(records, Encoded):
        tried.append((_twice(records, int(few[-1])), 0))
    generator = torch.Generator().manual_seed(0)
    state = {
        spec.name: (model.initial[spec.name] + 0.1 * torch.randn(len(tried), *spec.shape, generator=generator)).to(
            device
        )
        for spec in model.specs
    }
    given = (state, [own for own, _ in tried], [np.array([record]) for _, record in tried], model.specs, None)
    alone, one_batch = Budget(1), Budget(tokens=10**9, start=10**9)
    try:
        apart = CohortEngine(model, device, "fp32", alone).clipped_sums(*given)
        together = CohortEngine(model, device, "fp32", one_batch).clipped_sums(*given)
    except (RuntimeError, ValueError) as error:  # there is no way to read one record's rows out of a batch
        raise _refusal(model) from error
    moved = _norms({name: together[name] - tensor for name, tensor in apart.items()})
    if not bool((moved <= TOLERANCE * _norms(apart)).all()):
        raise _refusal(model)


def _twice(records: Encoded, record: int) -> Encoded:
    """Return one record with the tokens of this one twice, but for what may begin and end it only once."""
    own = records.part(record, record + 1)
    tokens = np.concatenate([own.tokens[:-1], own.tokens[1:]])
    if len(tokens) < 2 or len(tokens) > (records.room or math.inf):
        return own
    return replace(own, tokens=tokens, offsets=np.array([0, len(tokens)], dtype=np.int64))


def _norms(sums: State) -> torch.Tensor:
    return torch.stack([tensor.flatten(1).square().sum(1) for tensor in sums.values()]).sum(0).sqrt()


def _refusal(model: AdaptedModel) -> SettingsError:
    return SettingsError(
        f"model.backbone: in {type(model.model.get_base_model()).__name__} a record's gradient depends on the other "
        "records of its batch, so that no clip norm bounds it; use another backbone, or other lora.targets"
    )
