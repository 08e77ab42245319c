"""Micro-batches: every record once, within the budget, and as little padding as that allows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpipe.client import batching
from fedpipe.client.batching import Budget


def micro_batches(widths: np.ndarray, budget: Budget) -> Iterator[np.ndarray]:
    """Cut records that all have some padding."""
    return batching.micro_batches(2 * widths, budget)


def cost(lengths: np.ndarray, parts: list[np.ndarray], budget: Budget) -> int:
    return sum(len(part) * (int(lengths[part].max()) + budget.record) + budget.start for part in parts)


def cheapest(lengths: list[int], budget: Budget) -> float:
    """Try every way to cut the sorted records between two lengths."""
    ordered, best = sorted(lengths), math.inf
    places = [i for i in range(1, len(ordered)) if ordered[i - 1] < ordered[i]]
    for chosen in itertools.product([False, True], repeat=len(places)):
        edges = [0, *itertools.compress(places, chosen), len(ordered)]
        total = 0
        for first, end in itertools.pairwise(edges):
            longest, records = ordered[end - 1], end - first
            total += records * (longest + budget.record) + math.ceil(records / budget.most(longest)) * budget.start
        best = min(best, total)
    return best


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=10),
    st.integers(1, 60),
    st.integers(0, 30),
    st.integers(0, 4),
    st.none() | st.integers(1, 4),
)
def test_records_are_cut_as_well_as_by_trying_everything(
    lengths: list[int], tokens: int, start: int, record: int, records: int | None
) -> None:
    budget, sizes = Budget(tokens, start, record, records), np.array(lengths)
    parts = list(micro_batches(sizes, budget))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    assert all(len(part) <= budget.most(int(sizes[part].max())) for part in parts)
    assert cost(sizes, parts, budget) <= cheapest(lengths, budget)


def test_the_budget_counts_padding() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, size=200)
    parts = list(micro_batches(lengths, Budget(160)))
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    assert all(len(part) * lengths[part].max() <= 160 for part in parts)


def test_widths_stay_apart_unless_a_batch_costs_something_to_start() -> None:
    widths = np.array([5, 9, 5, 9, 7])
    assert [part.tolist() for part in micro_batches(widths, Budget(1000))] == [[0, 2], [4], [1, 3]]
    assert [part.tolist() for part in micro_batches(widths, Budget(9))] == [[0], [2], [4], [1], [3]]


def test_records_without_padding_stay_apart_from_those_with_some() -> None:
    kinds = np.array([16, 17, 16, 17])
    assert [part.tolist() for part in batching.micro_batches(kinds, Budget(16))] == [[0, 2], [1, 3]]
    assert [part.tolist() for part in batching.micro_batches(kinds, Budget(100, start=9))] == [[0, 2, 1, 3]]


def test_a_batch_that_is_cheap_to_start_holds_one_length() -> None:
    lengths = np.array([5, 9, 5, 9, 7])
    assert [part.tolist() for part in micro_batches(lengths, Budget(1000, start=0))] == [[0, 2], [4], [1, 3]]
    assert [part.tolist() for part in micro_batches(lengths, Budget(1000, start=100))] == [[0, 2, 4, 1, 3]]


def test_what_does_not_fit_is_dealt_out_evenly() -> None:
    assert [len(part) for part in micro_batches(np.full(10, 8), Budget(32))] == [4, 3, 3]


def test_a_record_longer_than_the_budget_stands_alone() -> None:
    assert [part.tolist() for part in micro_batches(np.array([9, 50, 3]), Budget(12))] == [[2], [0], [1]]
    assert list(micro_batches(np.array([], dtype=np.int64), Budget(12))) == []


@pytest.mark.parametrize("record", [0, 8])
def test_what_a_record_costs_besides_its_tokens_counts(record: int) -> None:
    parts = list(micro_batches(np.full(64, 8), Budget(256, record=record)))
    assert max(map(len, parts)) == 256 // (8 + record)
