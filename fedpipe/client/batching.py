"""Micro-batches: records of one width together, as many as a bound on the size of a batch allows.

What a record is padded to depends on its own length alone, so on a processor its
gradient has the same bits in every batch (see `fedpipe.models.steady`), and the cut into batches is
not seen in what a run computes.

A GPU cannot promise that, and is idle while a batch is started. There records of different widths may
share a batch, padded to the widest. One batch for everything wastes half the work on short records; the
cut weighs the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Budget:
    """How large a micro-batch may be. All sizes are in tokens.

    Attributes
    ----------
    tokens : padded tokens of a batch at most; a single longer record makes a batch of its own
    start : what starting a batch costs, in tokens that could be computed meanwhile, where records of
        different widths may share one; None where they may not
    record : what a record costs besides its tokens (copies of its client's factors and their gradients)
    records : at most, in a batch; None for any number
    """

    tokens: int
    start: int | None = None
    record: int = 0
    records: int | None = None

    def most(self, length: int) -> int:
        """Return how many records of this length a batch may hold."""
        fitting = max(1, self.tokens // (length + self.record))
        return fitting if self.records is None else min(fitting, self.records)


def micro_batches(kinds: np.ndarray, budget: Budget) -> Iterator[np.ndarray]:
    """Cut records, sorted by kind, between kinds: between all, or so that computing all parts costs least.

    Kinds are those of `Encoded.kinds`. The cost of a part is its padded size plus what starting it costs.
    Records between two cuts that do not fit into one part are dealt out evenly to several. Yields indices
    into `kinds`.
    """
    order = np.argsort(kinds, kind="stable")
    values, counts = np.unique(kinds, return_counts=True)
    values = values // 2  # widths
    ends = np.cumsum(counts)
    apart = [(int(end - count), number) for number, (end, count) in enumerate(zip(ends, counts, strict=True))]
    for first, last in _segments(values, ends, budget) if budget.start is not None else apart:
        segment = order[first : ends[last]]
        parts = -(-len(segment) // budget.most(int(values[last])))
        yield from np.array_split(segment, parts)


def _segments(values: np.ndarray, ends: np.ndarray, budget: Budget) -> list[tuple[int, int]]:
    """Return the best cuts between widths, as (first record, last width), by dynamic programming.

    The cheapest way to cut the records up to some width ends in one segment; all its possible
    starts are tried, and what lies before has been solved already.
    """
    starts = np.concatenate([[0], ends[:-1]])
    cheapest = np.zeros(len(values) + 1)
    start_of = np.zeros(len(values), dtype=np.int64)
    for last, length in enumerate(values):
        records = ends[last] - starts[: last + 1]
        parts = -(-records // budget.most(int(length)))
        costs = cheapest[: last + 1] + records * (int(length) + budget.record) + parts * budget.start
        start_of[last] = int(np.argmin(costs))
        cheapest[last + 1] = costs[start_of[last]]
    segments, last = [], len(values) - 1
    while last >= 0:
        segments.append((int(starts[start_of[last]]), last))
        last = int(start_of[last]) - 1
    return segments[::-1]
