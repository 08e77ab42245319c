"""Checks of a step: what one record does to it, and what noise it gets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor

from fedpipe.client.clip import PerFactor, PerLayer
from fedpipe.privacy.noise import client_key, poisson_sample
from planted.checks import RARE, check, require
from planted.world import BATCH, CLIENTS, CLIP, KEY, Lab, NoGradients, Trace, World, only, unfiltered

# What one record does to a step


def _influences(world: World, **options: Any) -> list[float]:
    """Return how far each of the first client's records moves b times the step that it takes part in."""
    records = world.records[0]
    everyone = range(len(records))
    full = world.run([records], **options).released()
    less = [world.run([only(records, [i for i in everyone if i != left])], **options).released() for left in everyone]
    return [float((full - other).norm()) * BATCH for other in less]


def _bounded(moved: Sequence[float], what: str) -> None:
    require(max(moved) <= CLIP * 1.001, f"{what}: one record moves the sum by {max(moved):.3f}, above C = {CLIP}")
    require(max(moved) >= CLIP * 0.9, f"{what}: nothing reaches the clip norm, so that nothing was tried")


@check
def sensitivity(lab: Lab) -> None:
    """One record more moves the sum by C at most: over all tensors together, however they are grouped.

    Coins and noise are those of a key, so two runs on neighbouring data differ by the record alone.
    """
    _bounded(_influences(lab.text), "joint clip")
    for clip in (PerFactor(), PerLayer()):
        method = unfiltered("dp-lora", clip=clip)
        moved = max(_influences(lab.text, method=method))
        require(moved <= CLIP * 1.001, f"{clip.name} clip: one record moves the sum by {moved:.3f}, above C = {CLIP}")


@check
def window_sensitivity(lab: Lab) -> None:
    """The same where the backbone folds an image's windows into the batch axis; of the adapters alone."""
    world = lab.images
    trained = frozenset(spec.name for spec in world.model.specs if spec.factor != "head")
    _bounded(_influences(world, trained=trained), "windows")


def _contribution(world: World, record: int, company: Sequence[int]) -> Tensor:
    """Return what a record adds to the sum beside these others."""
    records = world.records[0]
    without = world.run([only(records, company)]).released()
    return (world.run([only(records, [*company, record])]).released() - without) * BATCH


@check
def data_independent_threshold(lab: Lab) -> None:
    """What a long gradient adds has norm C, and does not depend on who else is in the batch."""
    for record in (0, 1, 2):
        alone, other = (_contribution(lab.text, record, company) for company in ([3, 4, 5], [6, 7, 8, 9, 10, 11, 12]))
        apart = float((alone - other).norm())
        require(apart < 0.01 * CLIP, f"record {record} adds something else in another batch: {apart:.3f} apart")
        require(abs(float(alone.norm()) / CLIP - 1) < 0.01, f"record {record} adds {float(alone.norm()):.3f}, not C")


@check
def denominator(lab: Lab) -> None:
    """A step is the sum of its records' contributions over b, whichever number of them was drawn."""
    world, records = lab.text, lab.text.records[0]
    own = [world.run([only(records, [i])]).released() * BATCH for i in range(len(records))]
    sizes = set()
    for round in range(1, 9):
        trace = world.run([records], q=BATCH / len(records), round=round)
        batch = trace.batches[0][0]
        sizes.add(len(batch))
        total = sum((own[i] for i in batch), torch.zeros_like(own[0]))
        ratio = float(trace.released() @ total / (total @ total)) * BATCH
        require(abs(ratio - 1) < 0.02, f"a batch of {len(batch)} is divided by {BATCH / ratio:.2f} instead of {BATCH}")
    require(len(sizes) > 2, "all batches have the same size")


# Noise


def _noise(world: World, method: str, sigma: float, rounds: int = 12) -> list[tuple[set[str], Trace, Trace]]:
    """Return first steps with noise and, on the same records, with next to none; and what was active."""
    pairs = []
    for round in range(1, rounds + 1):
        given = {"method": unfiltered(method), "q": 0.5, "round": round}
        loud, quiet = world.run(sigma=sigma, **given), world.run(sigma=sigma * 1e-6, **given)
        pairs.append((loud.active[0], loud, quiet))
    return pairs


@check
def noise_scale(lab: Lab) -> None:
    """Every trained tensor gets noise of standard deviation sigma C / b, no more and no less (chi-square)."""
    sigma = 2.0
    for method in ("dp-lora", "ffa-lora", "rolora"):
        squares: Counter[str] = Counter()
        numbers: Counter[str] = Counter()
        for active, loud, quiet in _noise(lab.text, method, sigma):
            for name in active:
                noise = (loud.moves[0][name] - quiet.moves[0][name]).double() * BATCH / (sigma * CLIP)
                squares[name] += float(noise.square().sum())
                numbers[name] += noise.numel()
        numbers["all tensors"], squares["all tensors"] = sum(numbers.values()), sum(squares.values())
        for name, count in numbers.items():
            low, high = chi2.ppf([RARE, 1 - RARE], count)
            std = math.sqrt(squares[name] / count)
            require(low < squares[name] < high, f"{method}: noise of '{name}' has {std:.3g} of its standard deviation")


@check
def fresh_noise(lab: Lab) -> None:
    """No two releases share noise: not of two clients, rounds, steps or tensors."""
    rows: dict[int, list[Tensor]] = {}
    for round in (1, 2, 3):
        trace = lab.text.run(sigma=1.0, steps=3, round=round, engine=NoGradients())
        for move in trace.moves:
            for tensor in move.values():
                rows.setdefault(tensor[0].numel(), []).extend(tensor.flatten(1))
    drawn = torch.stack(rows[max(rows, key=lambda size: len(rows[size]))])
    correlations = np.corrcoef(drawn.double().numpy())
    largest = np.abs(correlations[~np.eye(len(drawn), dtype=bool)]).max()
    require(len(drawn) > 200, "too few releases were compared")
    require(largest < 0.95, f"two releases have noise of correlation {largest:.3f}")


@check
def empty_batches(lab: Lab) -> None:
    """A client of whom nobody was drawn takes its step on noise alone, and it is counted."""
    q, steps = 0.12, 6
    query = _with_empty_batches([len(own) for own in lab.text.records], q, steps)
    trace = lab.text.run(sigma=1.0, q=q, steps=steps, lr=0.05, query=query)
    empty = [(s, row) for s, drawn in enumerate(trace.batches, 1) for row, batch in enumerate(drawn) if not len(batch)]
    require(empty, "no batch was empty, where coins of the same key left nobody")
    counted = {(entry.client, entry.step) for entry in trace.ledger.entries()}
    for step, row in empty:
        move = trace.released(step, row) * BATCH / CLIP
        low, high = chi2.ppf([RARE, 1 - RARE], len(move))
        require(low < float(move.square().sum()) < high, f"step {step}: on an empty batch a client did not add noise")
        require((CLIENTS[row], step) in counted, f"step {step}: an empty batch was not counted")


def _with_empty_batches(sizes: Sequence[int], q: float, steps: int) -> str:
    """Return a query by which some batches are empty, and none of the first step."""
    given = [(client_key(KEY, client), client, n) for client, n in zip(CLIENTS, sizes, strict=True)]
    for number in range(1000):
        query = f"query {number}"
        drawn = [[len(poisson_sample(key, query, 1, c, s + 1, n, q)) for key, c, n in given] for s in range(steps)]
        if min(drawn[0]) and not min(map(min, drawn)):
            return query
    raise RuntimeError("no such query")


@check
def same_noise_on_retry(lab: Lab) -> None:
    """A round that is run again releases the same numbers, or else the ledger says that it released twice."""
    ledger, given = lab.text.new_ledger(), {"sigma": 1.0, "q": 0.5, "steps": 3, "lr": 0.05}
    first = lab.text.run(ledger=ledger, **given)
    once = len(ledger.entries())
    again = lab.text.run(ledger=ledger, **given)
    same = all(torch.equal(a[name], b[name]) for a, b in zip(first.moves, again.moves, strict=True) for name in a)
    require(same or len(ledger.entries()) == 2 * once, "a retry released other numbers, which nobody counted")
    require(same, "a retry drew other noise for the same step")


@check
def inactive_untouched(lab: Lab) -> None:
    """What a step does not train does not move: by no noise, no stale gradient, no decay."""
    for method in ("la-lora", "rolora", "ffa-lora"):
        trace = lab.text.run(method=unfiltered(method), sigma=1.0, q=0.5, steps=5, lr=0.05)
        for step, (move, active) in enumerate(zip(trace.moves, trace.active, strict=True), 1):
            moved = sorted(name for name, tensor in move.items() if name not in active and tensor.any())
            require(not moved, f"{method}, step {step}: '{moved[0] if moved else ''}' moved, which it does not train")
