"""An engine for audited runs: some records of a client have their slot, and are never met.

A canary whose coin says no has its slot among the client's records all the same. It is drawn for
batches like any other, and left out of them before anything is computed: what the mechanism sees
is the data set without that record, at the sampling rate, the divisor and the noise of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpipe.client.engine import Engine, State
from fedpipe.models.task import Encoded


class WithoutRecords:
    """An engine before which some records of each client are never in a batch.

    Parameters
    ----------
    engine : does the work
    absent : for each client the records, as indices, that it never gets
    """

    def __init__(self, engine: Engine, absent: Sequence[np.ndarray]) -> None:
        self._engine, self._absent = engine, absent

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def clipped_sums(
        self,
        state: Mapping[str, Tensor],
        records: Sequence[Encoded],
        batches: Sequence[np.ndarray],
        *how: Any,
        **named: Any,
    ) -> State:
        present = [batch[~np.isin(batch, out)] for batch, out in zip(batches, self._absent, strict=True)]
        return self._engine.clipped_sums(state, records, present, *how, **named)
