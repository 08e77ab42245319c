"""The bugs: each breaks the mechanism in the way that a real implementation of private training was broken."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpipe import plan, state
from fedpipe.client import clip, clipping, engine, exact, training
from fedpipe.client.optimizers import Optimizer
from fedpipe.data import federation
from fedpipe.models.batched import Owners, PerClientLinear
from fedpipe.models.lora import TensorSpec
from fedpipe.privacy.accounting import Entry, merge
from fedpipe.privacy.ledger import Ledger
from planted.planting import SOUND, Planting, bug
from planted.world import BATCH, CLIP

# Clipping


def _norms(gradients: Any) -> Tensor:
    squares = [exact.squares(gradient) for gradient in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


@bug(1, "sensitivity", "data_independent_threshold", "audit", true=((1 / 200, 0.01, 1000),))
def batch_mean_clipped(p: Planting) -> None:
    """The gradient of the batch's mean loss is clipped, as it is when `clip_grad_norm_` stands in for DP-SGD."""

    def broken(real: Any, gradients: Any, owners: Owners, clip_norm: Any, *others: Any) -> Tensor:
        counts = torch.bincount(owners.place).float()[:, None]
        means = real(gradients, owners, None, *others) / counts
        return counts * means * clipping.clip_factors(means.norm(dim=1), clip_norm)[:, None]

    p.around(engine, "sum_in_groups", broken)


@bug(2, "sensitivity", true=((1 / math.sqrt(3), 0.01, 1000),))
def each_factor_clipped_at_c(p: Planting) -> None:
    """A, B and the head are each clipped at C, with noise for one clip at C."""
    p.around(clip.Clip, "bound", lambda real, self, clip_norm, groups: clip_norm)
    p.around(clip.Joint, "groups", lambda real, self, active: clip.PerFactor().groups(active))


@bug(10, "sensitivity")
def head_left_out_of_the_clip(p: Planting) -> None:
    """Norm and clip are those of the adapters; the new classifier's gradient joins them as it is."""

    def broken(real: Any, gradients: Any, owners: Owners, clip_norm: Any) -> Tensor:
        sums: dict[str, Tensor] = {}
        for head, bound in ((False, clip_norm), (True, None)):
            part = {name: g for name, g in gradients.items() if ("classifier" in name) is head}
            if part:
                total = real(part, owners, bound)
                sums |= dict(zip(part, total.split([exact.numbers_of(g) for g in part.values()], dim=1), strict=True))
        return torch.cat([sums[name] for name in gradients], dim=1)

    p.around(clipping, "sum_clipped", broken)


@bug(11, "window_sensitivity", true=((1 / 64, 0.01, 1000),))
def norm_before_windows_are_folded(p: Planting) -> None:
    """Window attention folds windows into the batch axis, and each window is clipped as if it were a record."""

    def unfolded(owners: Owners, windows: int) -> Owners:
        return Owners(np.repeat(owners.index.numpy(), windows), owners.device)

    def forward(real: Any, self: PerClientLinear, inputs: Tensor) -> Tensor:
        windows = 1 if self.owners is None else inputs.shape[0] // len(self.owners)
        if windows > 1:
            self.owners = unfolded(self.owners, windows)
            for name, copies in self._copies.items():
                repeated = copies.detach().repeat_interleave(windows, 0)
                self._copies[name] = repeated.requires_grad_(name in self.active)
        return real(self, inputs)

    def sum_clipped(real: Any, gradients: Any, owners: Owners, clip_norm: Any) -> Tensor:
        def windows_of(gradient: Tensor) -> int:
            return gradient.shape[0] // len(owners)

        counts = {windows_of(g) for g in gradients.values()}
        sums: dict[str, Tensor] = {}
        for windows in counts:
            part = {name: g for name, g in gradients.items() if windows_of(g) == windows}
            total = real(part, unfolded(owners, windows), clip_norm)
            sums |= dict(zip(part, total.split([g[0].numel() for g in part.values()], dim=1), strict=True))
        return torch.cat([sums[name] for name in gradients], dim=1)

    p.around(PerClientLinear, "forward", forward)
    p.around(clipping, "sum_clipped", sum_clipped)


@bug(16, "data_independent_threshold", "audit")
def threshold_is_the_median(p: Planting) -> None:
    """The clip threshold is the median of the batch's own norms."""

    def broken(real: Any, gradients: Any, owners: Owners, clip_norm: Any, *others: Any) -> Tensor:
        return real(gradients, owners, float(_norms(gradients).median()), *others)

    p.around(engine, "sum_in_groups", broken)


@bug(18, "sensitivity", "audit")
def nothing_clipped(p: Planting) -> None:
    """Noise is added, and the clip that it was calibrated for is missing."""
    p.around(engine, "sum_in_groups", lambda real, g, owners, clip_norm, *others: real(g, owners, None, *others))


# Noise


def _noise(p: Planting, change: Callable[..., tuple[Any, ...]]) -> None:
    """Hand other (query, round, clients, step, keys, stds) to what adds noise."""
    p.around(training, "add_step_noise", lambda real, sums, *context: real(sums, *change(*context)))


@bug(3, "noise_scale", "audit", true=((1 / 100, 0.01, 1000),))
def noise_divided_by_the_batch(p: Planting) -> None:
    """The noise is scaled by 1 / b as if for a mean, and then divided by b again with the sum."""

    def change(query: str, round: int, clients: Any, step: int, keys: Any, stds: Any) -> tuple[Any, ...]:
        return query, round, clients, step, keys, [std / BATCH for std in stds]

    _noise(p, change)


@bug(19, "noise_scale", true=((1 / 10, 0.01, 1000),))
def noise_without_c(p: Planting) -> None:
    """The standard deviation is sigma instead of sigma C, at a C above 1."""

    def change(query: str, round: int, clients: Any, step: int, keys: Any, stds: Any) -> tuple[Any, ...]:
        return query, round, clients, step, keys, [std / CLIP for std in stds]

    _noise(p, change)


@bug(13, "fresh_noise")
def one_stream_for_all_clients(p: Planting) -> None:
    """Every client seeds its generator alike, so that the difference of two updates has no noise."""

    def change(query: str, round: int, clients: Any, step: int, keys: Any, stds: Any) -> tuple[Any, ...]:
        return query, round, [clients[0]] * len(clients), step, [keys[0]] * len(keys), stds

    _noise(p, change)


@bug(20, "fresh_noise")
def generator_seeded_anew_each_round(p: Planting) -> None:
    """The generator is seeded at the start of each round, so that all rounds have the same noise."""

    def change(query: str, round: int, clients: Any, step: int, keys: Any, stds: Any) -> tuple[Any, ...]:
        return query, 1, clients, step, keys, stds

    _noise(p, change)


@bug(14, "same_noise_on_retry", true=((1.0, 0.01, 2000),))
def retry_with_new_noise(p: Planting) -> None:
    """A task that failed is run again, draws new batches and new noise, and is counted once."""
    draws = itertools.count()

    def other(key: bytes) -> bytes:
        return hashlib.sha256(key + next(draws).to_bytes(4)).digest()

    def change(query: str, round: int, clients: Any, step: int, keys: Any, stds: Any) -> tuple[Any, ...]:
        return query, round, clients, step, [other(key) for key in keys], stds

    _noise(p, change)
    p.around(training, "poisson_sample", lambda real, key, *context: real(other(key), *context))


@bug(9, "noise_scale")
def only_inactive_factors_noised(p: Planting) -> None:
    """After a switch of factors what gets noise is still the other one: what is trained gets none."""

    def broken(real: Any, sums: dict[str, Tensor], *context: Any) -> None:
        some = next(iter(sums.values()))
        resting = {s.name: some.new_zeros(len(some), *s.shape) for s in p.world.model.specs if s.name not in sums}
        real(resting or sums, *context)

    p.around(training, "add_step_noise", broken)


@bug(12, "inactive_untouched", true=((1 / math.sqrt(2), 0.01, 1000),))
def stale_gradients_of_the_resting_factor(p: Planting) -> None:
    """The last step's sum stays in the resting factor's gradient, is noised anew and stepped: released twice."""

    def sums(real: Any, self: Any, state: Any, records: Any, batches: Any, active: Any, *others: Any) -> Any:
        fresh = real(self, state, records, batches, active, *others)
        stale = {name: total for name, total in getattr(self, "_stale", {}).items() if name not in fresh}
        self._stale = {name: total.clone() for name, total in fresh.items()}
        return fresh | stale

    def step(real: Any, self: Optimizer, state: Any, gradients: Any, active: Sequence[TensorSpec]) -> None:
        real(self, state, gradients, [spec for spec in p.world.model.specs if spec.name in gradients])

    p.around(engine.CohortEngine, "clipped_sums", sums)
    p.around(Optimizer, "step", step)


# Batches


def _watch_sizes(p: Planting) -> dict[str, int]:
    """Return a dictionary that will hold the size of each client's last batch, in the order of the cohort."""
    sizes: dict[str, int] = {}

    def watched(real: Any, key: bytes, query: str, round: int, client: str, *others: Any) -> np.ndarray:
        batch = real(key, query, round, client, *others)
        if client in sizes:  # the next step has begun
            sizes.clear()
        sizes[client] = len(batch)
        return batch

    p.around(training, "poisson_sample", watched)
    return sizes


@bug(4, "denominator", true=((0.5, 0.01, 1000),))
def divided_by_the_realised_size(p: Planting) -> None:
    """Sum and noise are divided by the number of records that were drawn."""
    sizes = _watch_sizes(p)

    def step(real: Any, self: Optimizer, state: Any, gradients: Any, active: Any) -> None:
        factors = torch.tensor([BATCH / max(1, size) for size in sizes.values()])
        scaled = {name: g * factors.view(-1, *[1] * (g.dim() - 1)) for name, g in gradients.items()}
        real(self, state, scaled, active)

    p.around(Optimizer, "step", step)


@bug(5, "poisson", true=((1.0, 1.0, 10),))
def shuffled_not_poisson(p: Planting) -> None:
    """A loader shuffles and cuts into batches of one size; the accountant is told of Poisson samples."""

    def broken(real: Any, key: bytes, query: str, round: int, client: str, step: int, n: int, q: float) -> Any:
        size = max(1, int(q * n + 0.5))
        epoch, place = divmod(step - 1, n // size)
        seed = [*key[:8], *client.encode(), round, epoch]
        return np.sort(np.random.default_rng(seed).permutation(n)[place * size : (place + 1) * size])

    p.around(training, "poisson_sample", broken)


@bug(6, "empty_batches")
def empty_batches_skipped(p: Planting) -> None:
    """A loop over a loader has nothing to do for an empty batch and goes on: no noise, no step."""
    sizes = _watch_sizes(p)

    def broken(real: Any, sums: dict[str, Tensor], *context: Any) -> None:
        empty = [row for row, size in enumerate(sizes.values()) if size == 0]
        before = {name: total[empty].clone() for name, total in sums.items()}
        real(sums, *context)
        for name, total in sums.items():
            total[empty] = before[name]

    p.around(training, "add_step_noise", broken)


# Accounting


@bug(7, "composition", claimed=((1.0, 0.01, 10),), true=SOUND)
def engine_rebuilt_each_round(p: Planting) -> None:
    """A new privacy engine in each round has a new accountant: the last round's epsilon is reported."""

    def history(real: Any, self: Ledger, client: str, *through: Any) -> tuple[Entry, ...]:
        entries = self.entries(client)
        last = max((entry.round for entry in entries), default=0)
        return merge((e.sigma, e.q, 1) for e in entries if e.round == last)

    p.around(Ledger, "history", history)


@bug(8, "every_step_counted", claimed=((1.0, 0.01, 500),), true=SOUND)
def half_of_the_alternating_steps_counted(p: Planting) -> None:
    """Each factor is trained in every other step, so only half of the steps are counted."""
    p.around(Ledger, "append", lambda real, self, entries: real(self, [entry for entry in entries if entry.step % 2]))


@bug(15, "delta_rule", claimed_delta=0.01, true=SOUND)
def delta_of_one_over_the_batches(p: Planting) -> None:
    """Delta is one over the number of batches of an epoch."""
    p.around(plan, "delta_auto", lambda real, sizes: 100 / max(sizes))


@bug(21, "delta_rule", true=SOUND, true_delta=1e-7)
def delta_of_the_smallest_client(p: Planting) -> None:
    """Delta is for the smallest client's number of records (here 10^4), and is told for the largest (10^6) too."""
    p.around(plan, "delta_auto", lambda real, sizes: real([min(sizes)]))


@bug(22, "calibration", claimed=((1.0, 0.01 / 3, 1000),), true=SOUND)
def participation_claimed_as_amplification(p: Planting) -> None:
    """The sampling rate is multiplied by the share of clients in a round, against a server that chose them."""
    p.around(plan, "calibrate", lambda real, e, delta, q, steps, *others: real(e, delta, q / 3, steps, *others))


@bug(23, "calibration", claimed=((1.0, 0.01, 333),), true=SOUND)
def expected_participations_calibrated(p: Planting) -> None:
    """Noise is for the steps that a client takes on average, and not for the most that it may take."""
    p.around(plan, "calibrate", lambda real, e, delta, q, steps, *others: real(e, delta, q, steps // 3, *others))


@bug(25, "calibration", claimed=((1.0, 0.01, 10),), true=SOUND)
def noise_calibrated_for_one_round(p: Planting) -> None:
    """Sigma is found for the epochs of one round, by an engine that knows of no other."""
    p.around(plan, "calibrate", lambda real, e, delta, q, steps, *others: real(e, delta, q, steps // 6, *others))


# Data and key


@bug(17, "disjoint", true=((1.0, 0.01, 2000),))
def record_at_two_clients(p: Planting) -> None:
    """Some records are dealt to two clients, and the largest client's epsilon is reported for all."""

    def broken(real: Any, *given: Any) -> list[np.ndarray]:
        parts = real(*given)
        following = [*parts[1:], parts[0]]
        return [np.union1d(part, other[:3]) for part, other in zip(parts, following, strict=True)]

    p.around(federation, "assign", broken)


@bug(26, "disjoint", true=((1.0, 0.0199, 1000),))
def clients_filled_up_with_repeated_records(p: Planting) -> None:
    """Small clients are made as large as the others by repeating records: one person is several units."""
    p.around(federation, "assign", lambda real, *given: [np.append(part, part[:3]) for part in real(*given)])


@bug(24, "secret_key")
def key_from_the_seed(p: Planting) -> None:
    """The noise is seeded by the experiment's seed, which is in the configuration that is published."""
    p.around(state, "new_key", lambda real: hashlib.sha256(b"seed 3").digest())
