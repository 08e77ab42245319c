"""Whole groups of records: a patient's, an author's. They are dealt, bounded and, in training, drawn together.

Where a group is what privacy protects, one that stood at two clients, or in training and test, would be
protected by neither of them; so here a group is never divided. How many of its records count is bounded
by a rule that looks at nothing but the group itself: which records of the others are there changes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fedpipe.errors import DataError

KEY = "privacy.group"


@dataclass(frozen=True)
class Items:
    """What a partition deals: records, or groups of them.

    Attributes
    ----------
    labels : (items,) strings; a group's is that of most of its records, the first by name where there are several
    sizes : (items,) records of each
    of : (records,) the item that each record belongs to
    column : (items,) strings, or None: the column whose values make clients
    """

    labels: np.ndarray
    sizes: np.ndarray
    of: np.ndarray
    column: np.ndarray | None

    @classmethod
    def make(cls, labels: np.ndarray, column: np.ndarray | None, groups: np.ndarray | None = None) -> Items:
        """Return each record as an item, or each group.

        Raises
        ------
        DataError
            A group has two values in `column`, which would give it to two clients.
        """
        if groups is None:
            return cls(labels, np.ones(len(labels), dtype=np.int64), np.arange(len(labels)), column)
        of, names = pd.factorize(groups, sort=True)
        codes, words = pd.factorize(labels, sort=True)
        counts = np.zeros((len(names), len(words)), dtype=np.int64)
        np.add.at(counts, (of, codes), 1)
        held = None if column is None else _one_value(column, of, names)
        return cls(np.asarray(words)[counts.argmax(axis=1)], counts.sum(axis=1), of, held)


def _one_value(column: np.ndarray, of: np.ndarray, names: np.ndarray) -> np.ndarray:
    first = np.empty(len(names), dtype=object)
    first[of[::-1]] = column[::-1]
    if (split := np.flatnonzero(first[of] != column)).size:
        group, value = names[of[split[0]]], column[split[0]]
        raise DataError(
            f"{KEY}: group '{group}' would be divided between clients: in partition.column it has both "
            f"'{first[of[split[0]]]}' and '{value}'; a group must lie whole at one client"
        )
    return first


def check_apart(groups: np.ndarray, training: np.ndarray, test: np.ndarray) -> None:
    """Refuse a group that has records on both sides of the test split: its test records are measured exactly."""
    if both := set(groups[training]) & set(groups[test]):
        raise DataError(
            f"{KEY}: group '{min(both)}' has records in training and in the test, which data.group divides; "
            "leave data.group out, and the test is split by privacy.group"
        )


def within_bound(groups: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Say which records count where of each group at most `most` do: (n,) bool.

    A larger group's records are put into an order by sha256 of the seed, the group and the record's place
    in the group, and the first `most` count. Neither texts, labels nor other groups have a say in it.
    """
    codes, names = pd.factorize(groups, sort=True)
    kept = np.ones(len(groups), dtype=bool)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    for name, members in zip(names, np.split(order, ends[:-1]), strict=True):
        if len(members) > most:
            drawn = [hashlib.sha256(f"{seed}/{place}/{name}".encode()).digest() for place in range(len(members))]
            kept[members[sorted(range(len(members)), key=drawn.__getitem__)[most:]]] = False
    return kept
