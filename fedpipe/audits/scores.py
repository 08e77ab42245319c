"""What an observer of an audited run makes of each canary: two scores, higher for one that seems to be in.

Black-box: how far the canary's loss fell from the first model to the last. White-box: how far the
client that holds it moved, round by round, along the gradient that the canary has at the start of
the round, clipped as the mechanism clips it (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846).
Each tensor's move is divided by its learning rate first, so that the noise is the same in all of them.

The sums of all rounds are then solved for all canaries of a client together. Their gradients resemble
each other, so a move along one is a move along many; least squares tell them apart, with a ridge for
what is noise. Any score that does not look at the coins is valid; a better one shows more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedpipe.client.engine import Engine
from fedpipe.client.optimizers import Optimizer
from fedpipe.client.starts import ClientStart
from fedpipe.errors import StateError
from fedpipe.files import inside, read_sealed, read_tensors
from fedpipe.models.factors import GlobalState
from fedpipe.models.lora import TensorSpec
from fedpipe.models.task import Encoded
from fedpipe.server.evaluate import record_losses
from fedpipe.state import Run
from fedpipe.steps.beginning import COHORT_BYTES, MAX_COHORT
from fedpipe.steps.training import client_starts
from fedpipe.workspace import Workspace

_RESOLVED = 1e-9  # of the largest eigenvalue: gradients are float32
_RIDGES = np.logspace(-9, 3, 61)
_TINY = 1e-300


@dataclass
class Moves:
    """One client's moves and its canaries' gradients over the rounds, as far as the scores need them.

    Attributes
    ----------
    along : (m,) inner products of the moves with each canary's gradients
    gram : (m, m) inner products of the gradients
    share : what a canary that is in adds to each round's move on average, in units of its gradient
    """

    along: np.ndarray
    gram: np.ndarray
    share: float

    def scores(self) -> np.ndarray:
        """Return estimates of how much each canary is in the moves, (m,).

        They are those of a Gaussian model: moves are the canaries' gradients, each by its coin, and
        noise. How much of it is noise (the real records' gradients are) is where the moves are most likely.
        """
        strengths, axes = np.linalg.eigh(self.gram)
        there = strengths > _RESOLVED * strengths[-1]
        if not there.any():
            return np.zeros_like(self.along)
        strengths, axes = strengths[there], axes[:, there]
        centred = self.along - self.share / 2 * self.gram.sum(1)
        seen = axes.T @ centred / np.sqrt(strengths)

        def likelihood(ridge: float) -> float:
            spread = strengths + ridge
            return -np.log(spread).sum() - len(seen) * np.log((seen**2 / spread).mean() + _TINY)

        ridge = max(strengths[-1] * _RIDGES, key=likelihood)
        return axes @ (np.sqrt(strengths) / (strengths + ridge) * seen)


def losses_of(workspace: Workspace, state: GlobalState, records: Encoded) -> np.ndarray:
    """Return the loss of each record under a global state, (records,)."""
    settings, specs = workspace.settings, workspace.model.specs
    whole = {spec.name: state.adapter.get(spec.name, torch.zeros(spec.shape)) for spec in specs}
    budget = replace(workspace.budget, records=settings.evaluation.batch_size)
    with workspace.batched_models() as models:
        workspace.use_base(state.base, state.rest)
        return record_losses(models, whole, records, workspace.device, settings.runtime.precision, budget)


def black_box(run: Run, workspace: Workspace) -> np.ndarray:
    """Return how far the loss of each canary fell over the run, client by client, (m,)."""
    slots = workspace.federation.canaries.items()
    found = [encoded for client, (first, count) in slots for encoded in _alone(workspace, client, first, count)]
    canaries = Encoded.join(found)
    first, last = (losses_of(workspace, run.state(round), canaries) for round in (0, run.plan.rounds))
    return first - last


def white_box(run: Run, workspace: Workspace) -> np.ndarray:
    """Return how much of each canary is in what its client sent, client by client, (m,)."""
    slots, moves = workspace.federation.canaries, {}
    for client, (_, count) in slots.items():
        own = run.plan.clients[client]
        share = own.local_steps * own.sampling_rate / own.expected_batch
        moves[client] = Moves(np.zeros(count), np.zeros((count, count)), share)
    for round in range(1, run.plan.rounds + 1):
        directory = run.round_dir(round)
        plan, sent = read_sealed(directory / "plan.json"), _sent(run, round)
        workspace.use_base(run.state(round - 1).base)
        for client in sorted(slots.keys() & sent.keys()):
            update = read_tensors(inside(directory, sent[client]["file"]), sent[client]["sha256"])
            (start,) = client_starts(run, workspace, round, plan, [client])
            _add(moves[client], run, workspace, round, client, start, update)
    return np.concatenate([found.scores() for found in moves.values()])


def _sent(run: Run, round: int) -> dict[str, dict[str, str]]:
    """Return where the clients' updates of a round are, and their digests."""
    listed: dict[str, dict[str, str]] = {}
    for path in sorted(run.round_dir(round).glob("cohort-*.json")):
        listed |= {client: own for client, own in read_sealed(path)["updates"].items() if "file" in own}
    if missing := run.round_record(round)["clients"].keys() - listed.keys():
        raise StateError(f"{run.round_dir(round)}: the update of {min(missing)} is not there; the audit needs it")
    return listed


def _add(
    moves: Moves,
    run: Run,
    workspace: Workspace,
    round: int,
    client: str,
    start: ClientStart,
    update: Mapping[str, Tensor],
) -> None:
    optimizer = Optimizer(run.settings.optimizer, round)
    specs = [s for s in workspace.model.specs if s.name in update and update[s.name].shape == s.shape]
    rates = {spec.name: optimizer.learning_rate(spec) for spec in specs}
    moved = {name: (start.tensors[name] - update[name]).double() / rate for name, rate in rates.items()}
    gradients = _gradients(run, workspace, start.tensors, client, specs)
    flat = torch.cat([moved[spec.name].flatten() for spec in specs])
    moves.along += (gradients @ flat).numpy()
    moves.gram += (gradients @ gradients.T).numpy()


def _gradients(
    run: Run, workspace: Workspace, start: Mapping[str, Tensor], client: str, specs: Sequence[TensorSpec]
) -> Tensor:
    """Return each canary's clipped gradient at the start of a round, (m, numbers): each is a client of one record."""
    canaries = _alone(workspace, client, *workspace.federation.canaries[client])
    each = max(1, min(MAX_COHORT, COHORT_BYTES // (24 * sum(spec.numel for spec in workspace.model.specs))))
    with workspace.engine() as engine:
        parts = [canaries[at : at + each] for at in range(0, len(canaries), each)]
        return torch.cat([_clipped(engine, run, workspace, start, part, specs) for part in parts])


def _clipped(
    engine: Engine,
    run: Run,
    workspace: Workspace,
    start: Mapping[str, Tensor],
    canaries: Sequence[Encoded],
    specs: Sequence[TensorSpec],
) -> Tensor:
    count = len(canaries)
    state = {name: tensor.to(engine.device).expand(count, *tensor.shape).contiguous() for name, tensor in start.items()}
    batches = [np.zeros(1, dtype=np.int64)] * count
    sums = engine.clipped_sums(state, canaries, batches, specs, run.plan.clip_norm, clip=workspace.method.clip)
    return torch.cat([sums[spec.name].flatten(1) for spec in specs], 1).double().cpu()


def _alone(workspace: Workspace, client: str, first: int, count: int) -> list[Encoded]:
    """Return a client's canaries, each as a data set of its own."""
    records = workspace.records(client)
    return [records.part(place, place + 1) for place in range(first, first + count)]
