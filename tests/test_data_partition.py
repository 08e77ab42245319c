"""The schemes: who owns which record, and what is refused."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedpipe.config import PartitionSettings
from fedpipe.data.partition import assign, check_labels, natural_values, split_test
from fedpipe.errors import DataError


def make_labels(**counts: int) -> np.ndarray:
    """Labels in a fixed, interleaved order."""
    labels = np.array([name for name, count in counts.items() for _ in range(count)], dtype=object)
    return labels[np.random.default_rng(0).permutation(len(labels))]


def sizes(parts: list[np.ndarray]) -> list[int]:
    return [len(part) for part in parts]


def settings(scheme: str, clients: int | None, **more: object) -> PartitionSettings:
    return PartitionSettings(scheme=scheme, clients=clients, **{"min_records": 1, **more})


def assert_partition(parts: list[np.ndarray], records: int) -> None:
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(records))
    assert all(np.all(np.diff(part) > 0) for part in parts)


def test_iid_sizes_differ_by_one_at_most() -> None:
    parts = assign(settings("iid", 4), make_labels(a=60, b=43), None, seed=3)
    assert_partition(parts, 103)
    assert sizes(parts) == [25, 26, 26, 26]


def test_iid_deals_each_label_about_evenly() -> None:
    labels = make_labels(a=8000, b=2000)
    parts = assign(settings("iid", 4), labels, None, seed=3)
    # Hypergeometric, mean 500: five standard deviations are 87.
    assert all(abs(int(np.sum(labels[part] == "b")) - 500) < 90 for part in parts)


def test_shards_of_a_balanced_set_hold_one_label_each() -> None:
    labels = make_labels(a=100, b=100)
    parts = assign(settings("shards", 5, shards_per_client=2), labels, None, seed=1)
    assert_partition(parts, 200)
    assert sizes(parts) == [40] * 5
    # 10 shards of 20, 5 of each label: a client has 0, 20 or 40 of a label.
    assert {int(np.sum(labels[part] == "a")) for part in parts} <= {0, 20, 40}


def test_one_shard_per_client_is_one_label_per_client() -> None:
    labels = make_labels(a=30, b=30, c=30)
    parts = assign(settings("shards", 3, shards_per_client=1), labels, None, seed=1)
    assert sorted(labels[part][0] for part in parts) == ["a", "b", "c"]
    assert all(len(set(labels[part])) == 1 for part in parts)


def test_dirichlet_is_skewed_with_a_small_alpha_and_even_with_a_large_one() -> None:
    labels = make_labels(a=5000, b=5000)

    def spread(alpha: float) -> float:
        parts = assign(settings("dirichlet", 5, alpha=alpha), labels, None, seed=5)
        assert_partition(parts, 10000)
        return float(np.std([np.mean(labels[part] == "a") for part in parts]))

    assert spread(1e4) < 0.02
    assert spread(0.2) > 0.2


def test_dirichlet_counts_follow_the_drawn_proportions() -> None:
    labels = make_labels(a=700, b=300)
    parts = assign(settings("dirichlet", 4, alpha=1.0), labels, None, seed=11)
    shares = np.random.default_rng([11, *b"dirichlet"]).dirichlet(np.ones(4), size=2)
    for share, label, total in zip(shares, "ab", (700, 300), strict=True):
        found = [int(np.sum(labels[part] == label)) for part in parts]
        assert np.allclose(found, share * total, atol=1)


def test_dirichlet_honours_min_records() -> None:
    parts = assign(settings("dirichlet", 8, alpha=0.3, min_records=40), make_labels(a=500, b=500), None, seed=2)
    assert min(sizes(parts)) >= 40


def test_dirichlet_gives_up_and_names_the_knobs() -> None:
    with pytest.raises(DataError) as error:
        assign(settings("dirichlet", 10, alpha=0.01, min_records=50), make_labels(a=300, b=300), None, seed=2)
    message = str(error.value)
    for part in ("100 draws", "partition.alpha", "partition.clients", "partition.min_records", "at most", "50"):
        assert part in message
    assert "\n" not in message


def test_natural_has_one_client_per_value_in_sorted_order() -> None:
    column = np.array(["z", "a", "m", "a", "z", "z"], dtype=object)
    parts = assign(settings("natural", None, column="who"), np.array(list("xyxyxy"), dtype=object), column, seed=0)
    assert [part.tolist() for part in parts] == [[1, 3], [2], [0, 4, 5]]
    assert natural_values(column, parts) == ["a", "m", "z"]


def test_natural_deals_values_largest_first_to_the_smallest_client() -> None:
    column = np.array(list("aaaaabbbbcccdde"), dtype=object)  # sizes 5 4 3 2 1
    labels = np.array(list("xy" * 7 + "x"), dtype=object)
    parts = assign(settings("natural", 2, column="who"), labels, column, seed=0)
    # a->0 (5), b->1 (4), c->1 (7), d->0 (7), e->0 (8)
    assert natural_values(column, parts) == [["a", "d", "e"], ["b", "c"]]
    assert sizes(parts) == [8, 7]
    assert_partition(parts, 15)


def test_natural_refuses_more_clients_than_values() -> None:
    column = np.array(["a", "a", "b", "b"], dtype=object)
    with pytest.raises(DataError, match=r"partition\.clients: 3 clients, but partition\.column has only 2 values"):
        assign(settings("natural", 3, column="who"), np.array(list("xyxy"), dtype=object), column, seed=0)


def test_natural_refuses_values_that_are_too_small() -> None:
    column = np.array(["a", "a", "a", "b"], dtype=object)
    with pytest.raises(DataError, match=r"partition\.min_records: the smallest client has 1 records.* at least 2"):
        assign(settings("natural", None, min_records=2, column="who"), np.array(list("xyxy")), column, seed=0)


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(["iid", "dirichlet", "shards", "natural"]),
    clients=st.integers(1, 12),
    records=st.integers(40, 300),
    labels=st.integers(2, 5),
    seed=st.integers(0, 2**32),
)
def test_every_scheme_is_a_repeatable_partition(
    scheme: str, clients: int, records: int, labels: int, seed: int
) -> None:
    names = np.array([f"l{index % labels}" for index in range(records)], dtype=object)
    column = np.array([f"v{index % 13}" for index in range(records)], dtype=object)
    chosen = settings(scheme, clients, column="who", alpha=5.0)
    parts = assign(chosen, names, column, seed)
    assert len(parts) == clients
    assert_partition(parts, records)
    again = assign(chosen, names.astype(str), column.astype(str), seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards"])
def test_another_seed_is_another_partition(scheme: str) -> None:
    labels = make_labels(a=200, b=200)
    one, other = (assign(settings(scheme, 4, alpha=5.0), labels, None, seed) for seed in (1, 2))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards"])
def test_too_few_records_are_refused(scheme: str) -> None:
    with pytest.raises(DataError) as error:
        assign(settings(scheme, 4, min_records=30), make_labels(a=60, b=59), None, seed=0)
    assert "119 training records" in str(error.value)
    assert "partition.clients" in str(error.value)
    assert "partition.min_records" in str(error.value)


def test_labels_that_cannot_be_learnt_are_refused() -> None:
    with pytest.raises(DataError, match="only one label, 'a', in 9 records"):
        check_labels(make_labels(a=9))
    with pytest.raises(DataError, match="label 'typo' has 1 record among 10"):
        assign(settings("iid", 1), make_labels(a=5, b=4, typo=1), None, seed=0)


def test_the_split_without_groups_is_stratified() -> None:
    labels = make_labels(a=100, b=50, rare=3, pair=2)
    train, test = split_test(labels, None, 0.2, seed=4)
    assert_partition([train, test], 155)
    assert {name: int(np.sum(labels[test] == name)) for name in ("a", "b", "rare", "pair")} == {
        "a": 20,
        "b": 10,
        "rare": 1,
        "pair": 0,
    }


def test_the_split_by_group_keeps_groups_whole_and_stops_at_the_fraction() -> None:
    generator = np.random.default_rng(0)
    groups = np.array([f"g{value}" for value in generator.integers(0, 40, size=1000)], dtype=object)
    labels = np.array([f"l{value}" for value in generator.integers(0, 2, size=1000)], dtype=object)
    train, test = split_test(labels, groups, 0.2, seed=4)
    assert_partition([train, test], 1000)
    assert not set(groups[train]) & set(groups[test])
    largest = max(np.unique(groups, return_counts=True)[1])
    assert 200 <= len(test) < 200 + largest
    again = split_test(labels, groups, 0.2, seed=4)
    assert np.array_equal(test, again[1])
    assert not np.array_equal(test, split_test(labels, groups, 0.2, seed=5)[1])


def test_the_split_by_group_leaves_a_group_for_training() -> None:
    groups = np.array(["a"] * 10 + ["b"] * 10, dtype=object)
    train, test = split_test(np.array(list("xy" * 10), dtype=object), groups, 0.9, seed=0)
    assert len(train) == len(test) == 10


def test_the_split_by_group_refuses_one_group_and_untrained_labels() -> None:
    labels = np.array(list("xy" * 5), dtype=object)
    with pytest.raises(DataError, match="only one group, 'a'"):
        split_test(labels, np.array(["a"] * 10, dtype=object), 0.2, seed=0)
    with pytest.raises(DataError, match=r"all records of label '[xy]' fell into the test"):
        split_test(labels, labels, 0.2, seed=0)


def test_a_million_records_go_to_ten_thousand_clients_in_seconds() -> None:
    generator = np.random.default_rng(0)
    labels = np.array([f"l{value}" for value in range(10)], dtype=object)[generator.integers(0, 10, size=1_000_000)]
    started = time.perf_counter()
    parts = assign(settings("dirichlet", 10_000, alpha=1.0), labels, None, seed=0)
    assert time.perf_counter() - started < 10
    assert len(parts) == 10_000
    assert sum(sizes(parts)) == 1_000_000
