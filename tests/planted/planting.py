"""What a bug is, and how it is planted.

A bug replaces functions of fedpipe by broken ones for as long as it is planted, and counts how often
they were called: a check that never reaches the broken function has shown nothing. Where it is
simple, a bug says what it does to epsilon, as the histories that are claimed and that are true of
the same run: sigma 1, sampling rate 0.01, 1000 steps, delta 1e-5, in 100 rounds of 10 steps, batches of 100.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedpipe.privacy.accounting import Entry
from planted.world import World

SOUND, DELTA = ((1.0, 0.01, 1000),), 1e-5


@dataclass
class Planting:
    """A bug as it is planted: what replaces functions, and how often the broken ones were called."""

    patch: pytest.MonkeyPatch
    world: World
    calls: Counter[str] = field(default_factory=Counter)

    def around(self, owner: Any, name: str, broken: Callable[..., Any]) -> None:
        """Replace `owner.name` by `broken(real, *args)`."""
        real, self.calls[name] = getattr(owner, name), 0

        def replacement(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return broken(real, *args, **options)

        self.patch.setattr(owner, name, replacement)


Plant = Callable[[Planting], None]


@dataclass(frozen=True)
class Bug:
    """A bug, the checks that must find it, and what it does to epsilon.

    Attributes
    ----------
    number : as in the list of seventeen; the others follow
    claimed, true : histories of the run; `true` is None where no finite epsilon holds
    claimed_delta, true_delta : at which epsilon is told
    """

    number: int
    name: str
    plant: Plant
    checks: tuple[str, ...]
    claimed: tuple[Entry, ...] = SOUND
    true: tuple[Entry, ...] | None = None
    claimed_delta: float = DELTA
    true_delta: float = DELTA


BUGS: dict[str, Bug] = {}


def bug(number: int, *checks: str, **epsilon: Any) -> Callable[[Plant], Plant]:
    """Make a function that plants a bug one of `BUGS`."""

    def register(plant: Plant) -> Plant:
        BUGS[plant.__name__] = Bug(number, plant.__name__, plant, checks, **epsilon)
        return plant

    return register
