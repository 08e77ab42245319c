"""What is protected, and how two data sets that must look alike differ, in words and in one place.

The words stand in the ledger's header and beside every epsilon. They are read back from there, so that
what is printed is what was accounted.
"""

from __future__ import annotations

from fedpipe.errors import PrivacyError, nearest
from fedpipe.privacy.history import ADD_REMOVE, ADJACENCIES, REPLACE_ONE, ZERO_OUT

UNITS = {
    "record": "one record of one client",
    "group": "one group of records of one client",
    "client": "one client with all its records",
}
# Of `zero-out`: it takes part, with nothing. It is for clients whose part in a round is known.
_VERBS = {ADD_REMOVE: "add/remove", REPLACE_ONE: "replace", ZERO_OUT: "zero out"}


def neighbours(unit: str, adjacency: str = ADD_REMOVE) -> str | None:
    """Return how neighbours differ, such as "add/remove one record of one client"; None for unit `none`.

    Raises
    ------
    PrivacyError
        There is no such unit or adjacency.
    """
    if unit == "none":
        return None
    if unit not in UNITS:
        raise PrivacyError(f"ledger: unit '{unit}' spends no privacy; {nearest(unit, UNITS)}")
    if adjacency not in ADJACENCIES:
        raise PrivacyError(f"privacy.adjacency: found '{adjacency}'; {nearest(adjacency, ADJACENCIES)}")
    return f"{_VERBS[adjacency]} {UNITS[unit]}"


def adjacency_of(text: str | None) -> str:
    """Return the adjacency that `neighbours` put into words; add/remove where there are none (unit `none`).

    Raises
    ------
    PrivacyError
        The words are of neither.
    """
    if text is None:
        return ADD_REMOVE
    for adjacency, verb in _VERBS.items():
        if text == verb or text.startswith(f"{verb} "):
            return adjacency
    raise PrivacyError(f"ledger: the adjacency '{text}' is not known; expected {' or '.join(_VERBS.values())} one unit")
