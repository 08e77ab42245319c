"""Named checks: what must be true of a private run, asked of the real code from outside.

A check takes a `Lab`, runs the real steps, plan, ledger or partition, and raises `ViolationError` where
a property of the mechanism does not hold. It knows the theorem's side (what sensitivity, noise, coins
and composition must be), and computes it by numpy, scipy or Opacus, not by the code that it checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planted.world import Lab

RARE = 1e-7  # how seldom a statistical check fails on sound code, if keys were drawn anew
Check = Callable[[Lab], None]
CHECKS: dict[str, Check] = {}


class ViolationError(AssertionError):
    """A named property does not hold."""


def check(function: Check) -> Check:
    """Make a function a named check."""
    CHECKS[function.__name__] = function
    return function


def require(holds: Any, what: str) -> None:
    if not holds:
        raise ViolationError(what)
