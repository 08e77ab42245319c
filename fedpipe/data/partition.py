"""Which record goes to which client, and which to the test.

Every scheme gives each training record exactly one owner, so clients are disjoint and
cover the records by construction; a scheme only decides who owns what. All draws come
from a generator seeded with the settings' seed and the purpose of the draw: the test
split stays the same when the partition's settings change.
"""

from __future__ import annotations

import heapq

import numpy as np
import pandas as pd

from fedpipe.config import PartitionSettings
from fedpipe.data.groups import KEY, Items
from fedpipe.errors import DataError

TRIES = 100

Strings = np.ndarray  # (n,) of str, as objects or as a fixed-width type
Indices = np.ndarray  # (m,) of int64, ascending


def assign(
    settings: PartitionSettings, labels: Strings, column: Strings | None, seed: int, groups: Strings | None = None
) -> list[Indices]:
    """Deal records to clients; return the records' indices per client.

    Parameters
    ----------
    settings
        `iid` deals at random, equally. `dirichlet` deals each label by proportions drawn from
        Dir(alpha) (Hsu et al. 2019), again until every client has `min_records`, at most
        `TRIES` times. `shards` sorts by label, cuts, and gives each client `shards_per_client`
        (McMahan et al. 2017). `natural` keeps records of the same value in `column` together:
        a client per value, in sorted order, or, with `clients`, the values dealt largest first
        to the client that has least.
    labels, column
        (n,) strings; `column` is needed by `natural` only.
    groups
        (n,) strings: records with the same value stay together. Every scheme then deals groups as it
        deals records, each with the label that most of its records have; `min_records` counts records.

    Returns
    -------
    list of numpy.ndarray
        (m_i,) ascending indices per client: disjoint, and together 0 ... n-1.

    Raises
    ------
    DataError
        There are too few records or values, a label that nothing can be learnt of, or a group that
        `natural` would divide.
    """
    check_labels(labels)
    items = Items.make(labels, column if settings.scheme == "natural" else None, groups)
    owner, clients = _owners(settings, items, seed)
    smallest = int(np.bincount(owner, weights=items.sizes, minlength=clients).min())
    if smallest < settings.min_records:
        raise DataError(
            f"partition.min_records: the smallest client has {smallest} records, expected at least "
            f"{settings.min_records}; lower partition.min_records, or deal to fewer clients (partition.clients)"
        )
    return _by_owner(owner[items.of], clients)


def _owners(settings: PartitionSettings, items: Items, seed: int) -> tuple[np.ndarray, int]:
    """Return the client of each item, and how many clients there are."""
    clients, records = settings.clients, int(items.sizes.sum())
    if settings.scheme == "natural":
        return _natural(items, clients)
    if clients is None:
        raise DataError(f"partition.clients: scheme '{settings.scheme}' needs a number of clients")
    if records < clients * settings.min_records:
        raise DataError(
            f"partition.clients: {records} training records are too few for {clients} clients with at least "
            f"{settings.min_records} each (partition.min_records); lower one of the two"
        )
    if len(items.sizes) < clients:
        raise DataError(
            f"partition.clients: {clients} clients, but the training records are of {len(items.sizes)} groups ({KEY}), "
            "which are not divided; lower partition.clients"
        )
    generator = _generator(seed, settings.scheme)
    if settings.scheme == "iid":
        return _iid(len(items.sizes), clients, generator), clients
    if settings.scheme == "shards":
        return _shards(items.labels, clients, settings.shards_per_client, generator), clients
    return _dirichlet(items, settings, clients, generator), clients


def split_test(
    labels: Strings, groups: Strings | None, fraction: float, seed: int, key: str = "data.group"
) -> tuple[Indices, Indices]:
    """Set test records apart; return the ascending indices for training and for the test.

    With `groups`, whole groups are added to the test, in random order, until it has at least
    `fraction` of the records; no group is on both sides, and at least one is for training.
    `key` is the setting that names their column. Otherwise every label gives `fraction` of its
    records, rounded, at least one where it has three, and keeps two.

    Raises
    ------
    DataError
        A label has fewer than two records for training, or nothing is left for the test.
    """
    check_labels(labels)
    generator = _generator(seed, "test")
    test = _stratified(labels, fraction, generator) if groups is None else _grouped(groups, fraction, generator, key)
    if not test.any():
        raise DataError(f"data.test_fraction: {fraction} of {len(labels)} records leaves none for the test; raise it")
    untrained = set(labels) - set(labels[~test])
    if untrained:
        raise DataError(
            f"{key}: all records of label '{min(untrained)}' fell into the test; "
            "lower data.test_fraction, or change the seed"
        )
    return np.flatnonzero(~test), np.flatnonzero(test)


def check_labels(labels: Strings) -> None:
    """Refuse labels that nothing can be learnt of: only one in all, or one of a single record."""
    codes, names = pd.factorize(labels, sort=True)
    if len(names) < 2:
        raise DataError(f"data.label: only one label, '{names[0]}', in {len(labels)} records; expected at least two")
    counts = np.bincount(codes)
    if counts.min() < 2:
        raise DataError(
            f"data.label: label '{names[counts.argmin()]}' has 1 record among {len(labels)}; a label needs at least 2: "
            "add more, remove it, or name another column"
        )


def natural_values(column: Strings, parts: list[Indices]) -> list[str | list[str]]:
    """Return each client's value of the column, or the sorted list of them where it has several."""
    values = [sorted(set(column[part])) for part in parts]
    return [client[0] if len(client) == 1 else client for client in values]


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode()])


def _by_owner(owner: np.ndarray, clients: int) -> list[Indices]:
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _even(total: int, parts: int) -> np.ndarray:
    """Return sizes that add up to `total` and differ by one at most."""
    return np.diff(np.arange(parts + 1) * total // parts)


def _iid(records: int, clients: int, generator: np.random.Generator) -> np.ndarray:
    return generator.permutation(np.repeat(np.arange(clients), _even(records, clients)))


def _by_label(codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return all indices, label after label, in random order within each."""
    shuffled = generator.permutation(len(codes))
    return shuffled[np.argsort(codes[shuffled], kind="stable")]


def _shards(labels: Strings, clients: int, per_client: int, generator: np.random.Generator) -> np.ndarray:
    codes, _ = pd.factorize(labels, sort=True)
    order = _by_label(codes, generator)
    holders = generator.permutation(np.repeat(np.arange(clients), per_client))
    owner = np.empty(len(codes), dtype=np.int64)
    owner[order] = np.repeat(holders, _even(len(codes), len(holders)))
    return owner


def _dirichlet(items: Items, settings: PartitionSettings, clients: int, generator: np.random.Generator) -> np.ndarray:
    codes, _ = pd.factorize(items.labels, sort=True)
    # How many records a client gets depends on the order where items differ in size, and else it does not.
    order = _by_label(codes, generator) if len(items.of) > len(codes) else None
    holders = _dirichlet_holders(
        codes, items.sizes if order is None else items.sizes[order], settings, clients, generator
    )
    owner = np.empty(len(codes), dtype=np.int64)
    owner[_by_label(codes, generator) if order is None else order] = holders
    return owner


def _dirichlet_holders(
    codes: np.ndarray, sizes: np.ndarray, settings: PartitionSettings, clients: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw the client of each item, label after label; `sizes` are the items' records, in the same order."""
    totals, best = np.bincount(codes), 0
    for _ in range(TRIES):
        shares = generator.dirichlet(np.full(clients, settings.alpha), size=len(totals))
        ends = np.rint(np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
        ends[:, -1] = totals
        counts = np.diff(ends, axis=1, prepend=0)
        holders = np.repeat(np.tile(np.arange(clients), len(totals)), counts.ravel())
        smallest = int(np.bincount(holders, weights=sizes, minlength=clients).min())
        if smallest >= settings.min_records:
            return holders
        best = max(best, smallest)
    raise DataError(
        f"partition.alpha: in {TRIES} draws with alpha {settings.alpha} the smallest of {clients} clients had at most "
        f"{best} records, expected {settings.min_records} (partition.min_records); raise partition.alpha, or lower "
        "partition.clients or partition.min_records"
    )


def _natural(items: Items, clients: int | None) -> tuple[np.ndarray, int]:
    if items.column is None:
        raise DataError("partition.column: scheme 'natural' needs the column whose values make the clients")
    codes, values = pd.factorize(items.column, sort=True)
    if clients is None:
        return codes, len(values)
    if len(values) < clients:
        raise DataError(
            f"partition.clients: {clients} clients, but partition.column has only {len(values)} values in the "
            "training records; lower partition.clients, or set it to null"
        )
    sizes = np.bincount(codes, weights=items.sizes).astype(np.int64)
    load = [(0, client) for client in range(clients)]
    holder = np.empty(len(values), dtype=np.int64)
    for value in np.argsort(-sizes, kind="stable"):
        size, client = load[0]
        heapq.heapreplace(load, (size + int(sizes[value]), client))
        holder[value] = client
    return holder[codes], clients


def _stratified(labels: Strings, fraction: float, generator: np.random.Generator) -> np.ndarray:
    codes, _ = pd.factorize(labels, sort=True)
    totals = np.bincount(codes)
    wanted = np.minimum(np.maximum(np.rint(fraction * totals), 1), totals - 2)
    order = _by_label(codes, generator)
    rank = np.arange(len(codes)) - np.repeat(np.cumsum(totals) - totals, totals)
    test = np.empty(len(codes), dtype=bool)
    test[order] = rank < wanted[codes[order]]
    return test


def _grouped(groups: Strings, fraction: float, generator: np.random.Generator, key: str) -> np.ndarray:
    codes, values = pd.factorize(groups, sort=True)
    if len(values) < 2:
        raise DataError(f"{key}: only one group, '{values[0]}'; a test split by group needs at least two")
    order = generator.permutation(len(values))
    reached = np.cumsum(np.bincount(codes)[order])
    wanted = int(np.searchsorted(reached, fraction * len(codes))) + 1
    return np.isin(codes, order[: min(wanted, len(values) - 1)])
