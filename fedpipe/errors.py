"""Errors whose message is all a user needs: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class FedpipeError(Exception):
    """A mistake in the input or the environment that the user can mend.

    Command line tools print the message, without a traceback, and exit with `exit_code`.
    """

    exit_code = 2


class SettingsError(FedpipeError):
    """A key, a type or a combination in the settings is wrong."""


class DataError(FedpipeError):
    """The data, the partition or the backbone is not what the settings say."""


class StateError(FedpipeError):
    """A file of a run is missing, damaged, or in use by another process."""

    exit_code = 3


class StorageError(FedpipeError):
    """The disk is full, read-only or out of reach. What was complete stays complete."""

    exit_code = 4


class PrivacyError(FedpipeError):
    """The asked guarantee cannot be given, or a check of it failed."""


class AuditError(PrivacyError):
    """An audit has refuted the epsilon that a run claims."""

    exit_code = 6


class TrainingError(FedpipeError):
    """Training did what it must not do: weights that stand still, values that are not finite."""

    exit_code = 5


class ShortRoundError(FedpipeError):
    """Too few clients of a round were of use. Nothing was aggregated, and the round may be tried again."""


class QuorumError(TrainingError, ShortRoundError):
    """Fewer updates are usable than the quorum asks for."""


class SumStoppedError(PrivacyError, ShortRoundError):
    """Too few clients stayed to the end of a secure sum; nothing was opened."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return a half sentence with the nearest valid name, or all of them.

    >>> nearest("dirichet", ["iid", "dirichlet"])
    "did you mean 'dirichlet'?"
    >>> nearest("x", ["iid", "shards"])
    'expected one of: iid, shards'
    """
    names = [str(name) for name in valid]
    close = difflib.get_close_matches(str(word), names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(names)}"


_USER_INFO = re.compile(r"://(?:[^\s/@:]*:\S*|[^\s/@]+)@")
_QUERY_SECRET = re.compile(r"(?i)([?&;][\w.-]*(?:password|passwd|pwd|token|secret|key)=)[^\s&;#'\"]+")


def hide_password(text: str) -> str:
    """Replace the user and password of every URL in `text`, and the values of parameters named as a secret is.

    >>> hide_password("postgresql://ann:pw@host/db?sslpassword=x is away")
    'postgresql://***@host/db?sslpassword=*** is away'
    """
    return _QUERY_SECRET.sub(r"\1***", _USER_INFO.sub("://***@", text))
