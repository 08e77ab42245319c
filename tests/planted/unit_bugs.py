"""Bugs of the other units of privacy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedpipe.client import engine
from fedpipe.server import central
from planted.planting import Planting, bug


@bug(27, "group_sensitivity", true=((1 / 8, 0.01, 1000),))
def records_of_a_group_clipped_alone(p: Planting) -> None:
    """A person is the unit that is announced, and each of the person's 8 records is clipped at C."""

    def broken(real: Any, self: Any, *given: Any, **named: Any) -> Any:
        units = 8  # place among the engine's arguments
        given = (*given[:units], None, *given[units + 1 :]) if len(given) > units else given
        return real(self, *given, **{**named, **({"units": None} if "units" in named else {})})

    p.around(engine.CohortEngine, "clipped_sums", broken)


@bug(28, "client_sensitivity", true=((1 / math.sqrt(3), 0.01, 1000),))
def tensors_of_a_client_clipped_alone(p: Planting) -> None:
    """Each kind of tensor of a client's update is clipped at C on its own: A, B and the head."""

    def kind(name: str) -> str:
        return next((factor for factor in ("lora_A", "lora_B") if factor in name), "head")

    def broken(real: Any, start: Any, update: Mapping[str, Any], clip_norm: float) -> Any:
        kinds: dict[str, dict[str, Any]] = {}
        for name, tensor in update.items():
            kinds.setdefault(kind(name), {})[name] = tensor
        return {n: move for part in kinds.values() for n, move in real(start, part, clip_norm).items()}

    p.around(central, "clipped", broken)


@bug(29, "client_sensitivity", "client_noise", true=((0.5, 0.01, 1000),))
def divided_by_the_clients_that_came(p: Planting) -> None:
    """The noisy sum of the updates is divided by the number of clients that took part."""

    def broken(real: Any, self: Any, start: Any, sent: Any, updates: Any) -> Any:
        return real(replace(self, expected=float(max(1, len(updates)))), start, sent, updates)

    p.around(central.Release, "of", broken)


@bug(30, "client_noise", true=((1 / 100, 0.01, 1000),))
def sum_noised_as_if_it_were_the_mean(p: Planting) -> None:
    """Noise of standard deviation sigma C / m, right for the mean of m clients, is added to their sum."""

    def broken(real: Any, self: Any, start: Any, sent: Any, updates: Any) -> Any:
        return real(replace(self, noise_multiplier=self.noise_multiplier / self.expected), start, sent, updates)

    p.around(central.Release, "of", broken)
