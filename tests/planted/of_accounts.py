"""Checks of the coins, of what is counted and composed, of delta, the data, the key; and the audit."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from opacus.accountants import RDPAccountant
from scipy.stats import chi2, norm

from fedpipe import plan, state
from fedpipe.client import engine
from fedpipe.data import federation
from fedpipe.data.sources import fetch_data
from fedpipe.identity import identify
from fedpipe.models.batched import Owners
from fedpipe.models.task import Encoded
from fedpipe.privacy.accounting import epsilon_prv
from fedpipe.privacy.audit import one_run_audit
from fedpipe.privacy.summary import summary
from planted.checks import RARE, check, require
from planted.world import CLIENTS, CLIP, CPU, Lab, NoGradients, State, unfiltered

# Sampling


@check
def poisson(lab: Lab) -> None:
    """Every record takes part by a coin of its own: sizes, pairs of records, steps and clients as they then are."""
    q, steps, world = 0.3, 400, lab.text
    trace = world.run(sigma=1.0, q=q, steps=steps, engine=NoGradients())
    n = len(world.records[0])
    drawn = np.zeros((len(CLIENTS), steps, n))
    for step, batches in enumerate(trace.batches):
        for row, batch in enumerate(batches):
            drawn[row, step, batch] = 1
    sizes = drawn.sum(2)
    bound = norm.ppf(1 - RARE / n**2)
    rate = (drawn.mean((0, 1)) - q) / math.sqrt(q * (1 - q) / (len(CLIENTS) * steps))
    require(np.abs(rate).max() < bound, "a record is not drawn with probability q")
    require(abs(rate.mean()) * math.sqrt(n) < bound, f"records are drawn with probability {drawn.mean():.4f}, not {q}")
    variance = float(((sizes - n * q) ** 2).sum() / (n * q * (1 - q)))
    low, high = chi2.ppf([RARE, 1 - RARE], sizes.size)
    require(0.9 * low < variance < 1.1 * high, f"batch sizes have {variance / sizes.size:.3g} of a binomial's variance")
    flat = drawn.reshape(-1, n)
    _unrelated(np.corrcoef(flat.T)[~np.eye(n, dtype=bool)], len(flat), bound, "two records of a batch")
    lagged = [np.corrcoef(own[:-1, i], own[1:, i])[0, 1] for own in drawn for i in range(n)]
    _unrelated(np.array(lagged), steps, bound, "a record in two steps")
    across = [np.corrcoef(drawn[a, :, i], drawn[b, :, i])[0, 1] for a, b in ((0, 1), (0, 2), (1, 2)) for i in range(n)]
    _unrelated(np.array(across), steps, bound, "two clients")


def _unrelated(correlations: np.ndarray, samples: int, bound: float, what: str) -> None:
    largest = float(np.abs(correlations).max())
    require(largest < bound / math.sqrt(samples), f"coins of {what} have correlation {largest:.2f}")


# Accounting


def _epsilon(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Return epsilon by Opacus' RDP accountant itself."""
    accountant = RDPAccountant()
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta))


@check
def every_step_counted(lab: Lab) -> None:
    """The ledger has one line for each noisy release, with the sigma and the q that it was made with."""
    ledger, seen, given = lab.text.new_ledger(), Counter(), {"sigma": 1.0, "q": 0.3, "steps": 4, "lr": 0.05}
    for round in (1, 2):
        trace = lab.text.run(method=unfiltered("la-lora"), ledger=ledger, round=round, **given)
        for step, move in enumerate(trace.moves, 1):
            moved = torch.stack([tensor.flatten(1).any(1) for tensor in move.values()]).any(0)
            seen.update((client, round, step) for client, did in zip(trace.clients, moved, strict=True) if did)
    lines = Counter((entry.client, entry.round, entry.step) for entry in ledger.entries())
    require(len(seen) == 2 * 4 * len(CLIENTS), "some step released nothing")
    require(lines == seen, f"{len(seen)} noisy steps were released, {sum(lines.values())} are counted")
    require({(e.sigma, e.q) for e in ledger.entries()} == {(1.0, 0.3)}, "a line has another sigma or q than its step")


@check
def composition(lab: Lab) -> None:
    """The epsilon that is reported is that of all noisy steps of all rounds together."""
    ledger, rounds, steps, delta = lab.text.new_ledger(), 4, 5, 1e-5
    releases: Counter[str] = Counter()
    for round in range(1, rounds + 1):
        trace = lab.text.run(sigma=1.1, q=0.2, steps=steps, round=round, ledger=ledger, engine=NoGradients())
        for row, client in enumerate(trace.clients):
            releases[client] += sum(bool(trace.released(step, row).any()) for step in range(1, steps + 1))
    sizes = {client: len(own) for client, own in zip(CLIENTS, lab.text.records, strict=True)}
    told = summary(ledger, delta, "rdp", sizes, dp_valid=True)["clients"]
    for client, count in releases.items():
        spent, claimed = _epsilon([(1.1, 0.2, count)], delta), told[client]["epsilon"]
        require(claimed > 0.98 * spent, f"{client}: epsilon {claimed:.3f} is reported, {count} steps spend {spent:.3f}")


@check
def calibration(lab: Lab) -> None:
    """A client's noise is enough for all the steps that the plan lets it take, at the rate that it samples with."""
    federation = {"rounds": 6, "clients_per_round": 1, "local_steps": 3, "batch_size": 20}
    settings = lab.settings(federation=federation, privacy={"epsilon": 3.0, "delta": 1e-5})
    made = plan.make_plan(settings, dict.fromkeys(CLIENTS, 200))
    for client, own in made.clients.items():
        taken = sum(names.count(client) for names in made.participants) * own.local_steps
        require(taken <= own.max_steps, f"{client}: {taken} steps are planned, noise is for {own.max_steps}")
        spent = _epsilon([(own.noise_multiplier, own.sampling_rate, own.max_steps)], 1e-5)
        require(own.sampling_rate == 20 / 200, f"{client}: is sampled at {own.sampling_rate}, not at b / n")
        require(spent <= 3.0 * 1.001, f"{client}: may spend epsilon {spent:.3f}, 3 is promised")


@check
def delta_rule(lab: Lab) -> None:
    """Delta is at most a tenth of one over the records of the largest client."""
    sizes = {"c000": 300_000, "c001": 200_000, "c002": 250_000}
    federation = {"rounds": 1, "local_steps": 1, "batch_size": 100}
    made = plan.make_plan(lab.settings(federation=federation, privacy={"delta": "auto"}), sizes)
    most = 0.1 / max(sizes.values())
    require(made.delta <= most * (1 + 1e-9), f"delta is {made.delta:g}, expected {most:g} at most")


# Data and key


@check
def disjoint(lab: Lab) -> None:
    """Every record is at one client, or in the test, and nowhere else; whatever the scheme."""
    raw, source = lab.directory / "raw", lab.directory / "numbered.csv"
    lines = [f"text number {i},{'good' if i % 2 else 'bad'},topic{i % 7}" for i in range(210)]
    source.write_text("\n".join(["text,label,topic", *lines]) + "\n")
    for scheme in ("iid", "dirichlet", "shards", "natural"):
        partition = {"scheme": scheme, "clients": 3, "min_records": 10}
        partition |= {"column": "topic"} if scheme == "natural" else {}
        settings = lab.settings(data={"source": str(source)}, partition=partition)
        fetch_data(settings.data, raw)
        federation.write_partition(settings, raw, lab.directory / "partition")
        dealt = federation.Federation.open(lab.directory / "partition")
        texts = Counter(t for client in dealt.clients for t in dealt.client(client)["text"])
        texts.update(dealt.test()["text"])
        twice = [text for text, count in texts.items() if count > 1]
        require(not twice, f"{scheme}: {len(twice)} records are dealt more than once, such as '{(twice or [''])[0]}'")
        require(len(texts) == 210, f"{scheme}: {len(texts)} of 210 records were dealt")


_runs = itertools.count()


@check
def secret_key(lab: Lab) -> None:
    """Two runs of the same settings draw their noise from different keys, which the seed says nothing of."""
    settings = lab.settings(privacy={"test_key": None})
    identity = identify(settings, unfiltered("la-lora"), "a partition", "a backbone")
    keys = []
    for _ in range(2):
        runs = lab.directory / f"runs-{next(_runs)}"
        keys.append(state.open_run(runs, identity, settings, lambda: plan.make_plan(settings, {"c000": 400})).run.key)
    require(keys[0] != keys[1], "two runs of one seed have the same key")


class Canaries:
    """An engine whose records have gradients that are known: record j's is long, and along coordinate j alone.

    They are clipped and summed by the functions that the cohort engine clips and sums by.
    """

    device = CPU

    def clipped_sums(
        self, state: State, records: Any, batches: Any, active: Any, clip_norm: Any, seeds: Any, clip: Any, *_: Any
    ) -> State:
        drawn = [own.tokens[batch] for own, batch in zip(records, batches, strict=True)]
        rows = np.repeat(np.arange(len(drawn)), [len(own) for own in drawn])
        flat = torch.zeros(len(rows), sum(spec.numel for spec in active))
        flat[torch.arange(len(rows)), torch.from_numpy(np.concatenate(drawn))] = 30 * CLIP
        parts = flat.split([spec.numel for spec in active], dim=1)
        gradients = {spec.name: part.reshape(-1, *spec.shape) for spec, part in zip(active, parts, strict=True)}
        total = engine.sum_in_groups(gradients, Owners(rows, CPU), clip_norm, clip, active)
        return engine.apart(total, {spec.name: spec.shape for spec in active})


@check
def audit(lab: Lab) -> None:
    """A one-run audit of a step with canaries does not refute the epsilon that it claims."""
    sigma, canaries, delta = 4.0, 200, 1e-5
    coins = np.random.default_rng(1).integers(2, size=canaries).astype(bool)
    ids = np.flatnonzero(coins)
    records = Encoded(ids, np.arange(len(ids) + 1), np.zeros(len(ids), dtype=np.int64), 0)
    world = lab.text
    trace = world.run([records], sigma=sigma, batch=float(canaries), engine=Canaries())
    # As the engine has the coordinates: tensor after tensor, in the order of the specs.
    scores = torch.cat([trace.moves[0][spec.name][0].flatten() for spec in world.model.specs])[:canaries]
    claimed = epsilon_prv([(sigma, 1.0, 1)], delta)
    verdict = one_run_audit(scores.numpy(), coins, [(canaries // 2, canaries // 2)], claimed=claimed, delta=delta)
    require(verdict.ceiling > claimed, "the audit could not have failed")
    verdict.check()
