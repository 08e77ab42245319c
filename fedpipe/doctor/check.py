"""One finding of the examination."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What was found; `advice` says what to do, and may stand beside a check that passed."""

    name: str
    ok: bool
    found: str
    advice: str = ""
