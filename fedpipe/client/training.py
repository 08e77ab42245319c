"""A round at the clients: local steps that are private before anything leaves them.

The private step, with unit `record` (DP-SGD, Abadi et al. 2016, arXiv 1607.00133): a
Poisson batch; each record's gradient over all active tensors clipped to norm C; the sum
noised with standard deviation sigma C; divided by the *expected* batch size. Its ledger
entry is on disk before the batch is drawn. An empty batch still takes its noisy step.
What follows (filter, optimiser, norms) sees only what is already private.

With unit `group` all of this holds for groups of records: they are drawn whole, and what is clipped
is the mean gradient of a group's records.

With unit `client` local steps are plain: what a client sends is clipped and noised as a whole, by
the server. Then no check here may speak of one client.

A client whose values stop being finite is `Lost`: the others of its cohort end with the bytes that they
would have ended with, and it has spent what the ledger says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedpipe.client.curvature import Curvature, Loss
from fedpipe.client.diagnostics import StepLosses, TrainingLosses
from fedpipe.client.engine import Engine, State
from fedpipe.client.lost import Lost
from fedpipe.client.objectives import Begin
from fedpipe.client.optimizers import Optimizer
from fedpipe.client.schedule import noise_stds
from fedpipe.client.starts import ClientStart
from fedpipe.config import OptimizerSettings
from fedpipe.errors import PrivacyError, TrainingError
from fedpipe.methods import Method
from fedpipe.models import steady
from fedpipe.models.lora import AdaptedModel, TensorSpec
from fedpipe.models.task import Encoded
from fedpipe.plan import ClientPlan, Plan
from fedpipe.privacy.ledger import Ledger, LedgerEntry
from fedpipe.privacy.noise import KeyedStream, add_step_noise, client_key, poisson_sample
from fedpipe.server.checks import MOVE_CAP
from fedpipe.server.ranks import masks, numel


@dataclass(frozen=True)
class CohortWork:
    """What a cohort needs for one round.

    `starts` are where the clients begin, `modes` what the server decided for the round's schedule.
    `query` is the digest of all that defines the private queries of this round; the noise
    of a step is a function of (key, query, round, client, step, tensor), so that a step
    taken again after a crash draws the same noise, and a changed one fresh noise. With
    `diagnostics` the losses that no noise protects are kept, too.
    """

    round: int
    clients: tuple[str, ...]
    records: Sequence[Encoded] = field(repr=False)
    starts: Sequence[ClientStart] = field(repr=False)
    trained: frozenset[str]
    query: str
    key: bytes = field(repr=False)
    modes: Mapping[str, str] = field(default_factory=dict)
    diagnostics: bool = False


@dataclass(frozen=True)
class Update:
    """What a client sends, and what can be told of it at no cost in privacy; `loss` is not of that kind.

    `norm` is the l2 norm of what it changed; `snr` estimates the ratio of signal to noise
    in its gradients, from the noisy gradients only (None without noise). `scores` are what the
    schedule made of its last noisy gradients, `rank` is what it asks for from now on, `kept`
    stays with the client. `loss` is the mean training loss, where diagnostics are asked for.
    `failed` says why there is nothing to send; `tensors` is empty then, and `spent` says whether all
    its steps were taken.
    """

    tensors: dict[str, Tensor]
    norm: float
    snr: float | None
    rank: int
    scores: dict[str, float] | None = None
    loss: float | None = None
    kept: dict[str, Tensor] = field(default_factory=dict, repr=False)
    failed: str | None = None
    spent: bool = True


def train_cohort(
    engine: Engine,
    model: AdaptedModel,
    work: CohortWork,
    plan: Plan,
    method: Method,
    optimizer_settings: OptimizerSettings,
    ledger: Ledger | None,
    probe: Loss | None = None,
) -> dict[str, Update]:
    """Run a cohort's local steps for one round; return each client's update, or why it has none.

    `probe` is an adapter's loss on public records, in rounds whose scores are made from it too.

    Raises
    ------
    TrainingError
        After the first step something stands still that should move, or moves that should not.
    PrivacyError
        What was planned and what is there differ: the records, or a private plan without a ledger.
    """
    _check_planned(work, plan, ledger)
    count, device = len(work.clients), engine.device
    began = {spec.name: torch.stack([start.tensors[spec.name] for start in work.starts]) for spec in model.specs}
    state = {name: tensor.to(device, copy=True) for name, tensor in began.items()}
    optimizer = Optimizer(optimizer_settings, work.round)
    smooth, objective = method.filter.open(model.scale), method.objective.begin(_begin(model, work, began, device))
    keys = [client_key(work.key, client) for client in work.clients]
    plans = [plan.clients[client] for client in work.clients]
    ranks = [start.facts.rank for start in work.starts]
    kept_out = {name: values.to(device) for name, values in masks(model.specs, ranks).items()}
    signal, noise, scores, losses = np.zeros(count), np.zeros(count), None, TrainingLosses(count)
    units = [records.groups for records in work.records] if plan.unit == "group" else None
    clip_norm, cap = plan.step_clip, MOVE_CAP if plan.whole_clients else None
    lost = Lost({name: tensor.to(device) for name, tensor in began.items()} if cap else began, cap)

    for step in range(1, plans[0].local_steps + 1):
        active = active_specs(model, method, work, step)
        if ledger is not None:
            ledger.append(_entries(work, plans, step))
        batches = [
            _batch(work, key, client, step, client_plan, records)
            for key, client, client_plan, records in zip(keys, work.clients, plans, work.records, strict=True)
        ]
        seeds = _dropout_seeds(work, keys, step) if model.has_dropout else None
        seen = StepLosses() if work.diagnostics else None
        sums = engine.clipped_sums(
            state, work.records, batches, active, clip_norm, seeds, method.clip, objective.contrast, units, seen
        )
        if seen is not None:
            losses.add(seen)
        if clip_norm is not None:
            _add_noise(sums, work, plans, keys, step, clip_norm)
        gradients = {name: _divide(_masked(total, kept_out.get(name)), plans) for name, total in sums.items()}
        if clip_norm is not None:
            noise += _noise_energy(active, plans, ranks, clip_norm)
            signal += _energy(gradients)
        before = {name: tensor.clone() for name, tensor in state.items()} if step == 1 else None
        if step == plans[0].local_steps:
            # Before the step: what is scored is the step from here.
            stds = noise_stds([p.noise_multiplier for p in plans], clip_norm, [p.expected_batch for p in plans])
            bends = None if probe is None else Curvature(probe, state, _factor_rate(optimizer, model))
            scores = method.schedule.score(gradients, active, stds, bends)
        filtered = smooth(gradients, state, active)
        optimizer.step(state, {name: _masked(g, kept_out.get(name)) for name, g in filtered.items()}, active)
        objective.after_step(state, active, {spec.name: optimizer.learning_rate(spec) for spec in active})
        if before is not None:
            # That one client's records move nothing must not show where clients are what is protected.
            known = [batch[:0] for batch in batches] if plan.whole_clients else batches
            check_first_step(before, state, model.specs, active, known, private=clip_norm is not None)
        lost.after_step(state)
    if plan.whole_clients:
        lost.mark(state)

    snr = np.sqrt(np.maximum(signal - noise, 0) / noise) if clip_norm is not None else [None] * count
    ended, extras, kept = (_on_cpu(tensors) for tensors in (state, objective.extras(state), objective.kept(state)))
    updates = {}
    for row, (client, start) in enumerate(zip(work.clients, work.starts, strict=True)):
        if not plan.whole_clients and (reason := lost.reason(row)):
            updates[client] = Update({}, norm=0.0, snr=None, rank=ranks[row], failed=reason)
            continue
        mine = {name: tensor[row].clone() for name, tensor in ended.items()}
        updates[client] = make_update(
            model.specs,
            method,
            work,
            start,
            mine,
            extras={name: tensor[row].clone() for name, tensor in extras.items()},
            kept={name: tensor[row].clone() for name, tensor in kept.items()},
            steps=plan.local_steps,
            snr=snr[row],
            scores=None if scores is None else scores[row],
            loss=losses.mean(row),
        )
    return updates


def _factor_rate(optimizer: Optimizer, model: AdaptedModel) -> float:
    return max(optimizer.learning_rate(spec) for spec in model.specs if spec.factor in ("A", "B"))


def _begin(model: AdaptedModel, work: CohortWork, began: Mapping[str, Tensor], device: torch.device) -> Begin:
    def there(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    return Begin(
        round=work.round,
        specs=model.specs,
        start=there(began),
        received=there(work.starts[0].received),
        kept=[there(start.facts.kept) if start.facts.kept_round else None for start in work.starts],
    )


def _check_planned(work: CohortWork, plan: Plan, ledger: Ledger | None) -> None:
    if plan.step_clip is not None and ledger is None:
        raise PrivacyError("a private plan cannot run without a ledger")
    for client, records in zip(work.clients, work.records, strict=True):
        if len(records) != (planned := plan.clients[client].records):
            raise PrivacyError(f"client {client} has {len(records)} records; the plan's sampling rate is for {planned}")
        groups = None if records.groups is None else len(np.unique(records.groups))
        if plan.unit == "group" and groups != (planned := plan.clients[client].groups):
            raise PrivacyError(f"client {client} has {groups} groups; the plan's sampling rate is for {planned}")
    if len({plan.clients[client].local_steps for client in work.clients}) > 1:
        raise PrivacyError("clients with different numbers of local steps cannot be in one cohort")
    if len({tuple(map(id, start.received.values())) for start in work.starts}) > 1:
        raise PrivacyError("clients that received different states cannot be in one cohort")


def _batch(work: CohortWork, key: bytes, client: str, step: int, own: ClientPlan, records: Encoded) -> np.ndarray:
    """Draw a client's Poisson batch; return its records: those that were drawn, or all of the groups that were."""
    drawn = poisson_sample(key, work.query, work.round, client, step, own.units, own.sampling_rate)
    return drawn if own.groups is None else np.flatnonzero(np.isin(records.groups, drawn))


def active_specs(model: AdaptedModel, method: Method, work: CohortWork, step: int) -> list[TensorSpec]:
    """Return the tensors trained in this local step."""
    specs = (spec for spec in model.specs if spec.name in work.trained)
    return [spec for spec in specs if method.is_active(work.round, step, spec, work.modes)]


def _entries(work: CohortWork, plans: Sequence[ClientPlan], step: int) -> list[LedgerEntry]:
    return [
        LedgerEntry(
            client=client,
            round=work.round,
            step=step,
            sigma=client_plan.noise_multiplier,
            q=client_plan.sampling_rate,
            query=work.query,
        )
        for client, client_plan in zip(work.clients, plans, strict=True)
    ]


def _add_noise(
    sums: State, work: CohortWork, plans: Sequence[ClientPlan], keys: Sequence[bytes], step: int, clip_norm: float
) -> None:
    """Add noise of standard deviation sigma * C to every client's sum of every active tensor, in place."""
    stds = [plan.noise_multiplier * clip_norm for plan in plans]
    add_step_noise(sums, work.query, work.round, work.clients, step, keys, stds)


def _divide(total: Tensor, plans: Sequence[ClientPlan]) -> Tensor:
    """Divide each client's sum by its expected batch size; the realised size would leak and break the bound."""
    expected = torch.tensor([client_plan.expected_batch for client_plan in plans], device=total.device)
    return total / expected.view(-1, *[1] * (total.dim() - 1))


def _masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return zeros where clients of lower rank have no numbers: noise must not become some."""
    return tensor if mask is None else tensor * mask


def _noise_energy(
    active: Sequence[TensorSpec], plans: Sequence[ClientPlan], ranks: Sequence[int], clip_norm: float
) -> np.ndarray:
    """Return the expected squared norm of the noise in each client's gradient."""
    numbers = [sum(numel(spec, rank) for spec in active) for rank in ranks]
    stds = [plan.noise_multiplier * clip_norm / plan.expected_batch for plan in plans]
    return np.array([count * std**2 for count, std in zip(numbers, stds, strict=True)])


def _energy(gradients: State) -> np.ndarray:
    return sum(steady.squares(gradient) for gradient in gradients.values()).cpu().numpy()


def _dropout_seeds(work: CohortWork, keys: Sequence[bytes], step: int) -> list[np.ndarray]:
    """Draw a seed for each record of each client.

    They are secret: were they known, a record more or less would hand the seeds of all records
    behind it to others, and move their gradients too.
    """
    return [
        KeyedStream(key, "dropout", work.query, work.round, client, step).uint64(len(records)).view(np.int64)
        for key, client, records in zip(keys, work.clients, work.records, strict=True)
    ]


def check_first_step(
    before: State,
    after: State,
    specs: Sequence[TensorSpec],
    active: Sequence[TensorSpec],
    batches: Sequence[np.ndarray],
    private: bool,
) -> None:
    """Refuse to go on when the first step did not do what a step does.

    A wrapper that holds on to old parameters, a forgotten head or a wrong mask would
    otherwise spend hours and privacy on a model that never changes.
    """
    names = {spec.name for spec in active}
    for spec in specs:
        moved = (after[spec.name] != before[spec.name]).flatten(1).any(1).cpu().numpy()
        if spec.name not in names:
            if moved.any():
                raise TrainingError(f"'{spec.name}' moved in a step that does not train it")
            continue
        # Noise moves everything. Without it an empty batch moves nothing, and neither does A while B is about zero.
        expected = np.array([private or len(batch) > 0 for batch in batches])
        if spec.factor == "A" and not private:
            expected &= _partner_moves(before, spec)
        if spec.factor == "mixer" and not private:
            expected[:] = False  # both of what it weighs are zero at the start
        if (expected & ~moved).any():
            raise TrainingError(
                f"'{spec.name}' stood still in a step that trains it; "
                "the learning rate may be too small for the precision, or the layer takes no part in the loss"
            )


def _partner_moves(before: State, spec: TensorSpec) -> np.ndarray:
    """Say for each client whether B is large enough to move A.

    A step of A is to one of B as B is to A, and B is a few steps from zero: a step moves A by
    about B^2 / A, which float32 does not resolve while B is below 2^-12 of A.
    """
    partner = before[spec.name.replace("lora_A", "lora_B")]
    size, own = (tensor.flatten(1).abs().amax(1) for tensor in (partner, before[spec.name]))
    return (size > 1e-3 * own).cpu().numpy()


def _on_cpu(tensors: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def make_update(
    specs: Sequence[TensorSpec],
    method: Method,
    work: CohortWork,
    start: ClientStart,
    ended: State,
    extras: State,
    kept: State,
    steps: int,
    snr: float | None,
    scores: dict[str, float] | None,
    loss: float | None,
) -> Update:
    """Divide what a client has after its last step into what it sends and what it keeps."""
    mine = [spec for spec in specs if spec.name in work.trained]
    sends = method.sends(mine, work.round, steps, work.modes)
    sent, beside = [spec.name for spec in sends], [spec.name for spec in method.objective.extra_specs(sends)]
    own = {spec.name for spec in method.trains(mine, work.round, steps, work.modes)} - set(sent)
    uploaded = method.initialisation.upload(start.facts, start.tensors, ended)
    values = {name: uploaded[name].contiguous() for name in sent}
    squares = sum(float((ended[name] - start.tensors[name]).double().square().sum()) for name in sent)
    keeps = {
        **start.personal,
        **{name: ended[name] for name in own},
        **kept,
        **method.initialisation.keep(start.facts, ended, values),
    }
    return Update(
        tensors={**values, **{name: extras[name] for name in beside}},
        norm=squares**0.5,
        snr=None if snr is None else float(snr),
        rank=method.ranks.pruned(start.facts.rank, start.tensors, ended, specs),
        scores=scores,
        loss=loss,
        kept={name: tensor.contiguous() for name, tensor in keeps.items()},
    )
