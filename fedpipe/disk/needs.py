"""What a run leaves on disk, added up before it begins: each file with the whole blocks that it takes.

Tensors are counted by the shapes that a rehearsal of the method finds; records and databases by what
they were measured to take for a round, a client and a line.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from fedpipe.config import Settings
from fedpipe.disk.rehearsal import Rehearsal
from fedpipe.methods import Method
from fedpipe.models.factors import pairs
from fedpipe.models.layers import TensorSpec

BLOCK = 4096  # what a file takes at least, and is rounded up to
LAG = 2  # rounds whose tensors wait until MLflow has them, while it is there

# Measured, in bytes.
HEADER = 70  # of a tensor in a file, beside its name
LINE = 330  # of the ledger
REPORTS = 120_000  # and more with the rounds
MLFLOW, MLFLOW_ROUND = 1_100_000, 4_700  # of a new database, and of a round's numbers in it
PREFECT, PREFECT_TASK = 8_000_000, 23_000  # likewise, and of a task's record and result


@dataclass(frozen=True)
class Needs:
    """Bytes that a run takes when it takes most.

    Attributes
    ----------
    rounds : states, updates and the server's memory, of the rounds that are kept
    clients : what clients keep, and their own models at the end
    records : plans, listings, records and the ledger, of all rounds
    prefix : the frozen layers' output, where it is still to be written
    published : `models/adapter` and `reports`
    mlflow : what a local MLflow store has of the run; 0 for any other
    prefect : the records of the run's own Prefect server
    """

    rounds: int
    clients: int
    records: int
    prefix: int
    published: int
    mlflow: int
    prefect: int

    @property
    def run(self) -> int:
        """What is in the run's directory."""
        return self.rounds + self.clients + self.records


def needs_of(
    settings: Settings,
    method: Method,
    specs: Sequence[TensorSpec],
    trained: frozenset[str],
    counts: Sequence[int],
    clients: int,
    stale: int = 0,
    prefix: int = 0,
    audited: bool = False,
) -> Needs:
    """Predict what a run needs.

    Parameters
    ----------
    specs, trained : all tensors of the model, and the names of those that are trained
    counts : how many clients take part in each round
    clients : how many there are
    stale : by how many rounds a late job's state is older than the last one, at the most
    prefix : bytes of the frozen layers' output that is still to be written
    audited : whether it has canaries: nothing is deleted then, and MLflow gets no tensors
    """
    return _Sum(settings, Rehearsal(method, specs, trained, settings, max(counts)), counts, clients).needs(
        stale, prefix, audited
    )


class _Sum:
    def __init__(self, settings: Settings, rehearsal: Rehearsal, counts: Sequence[int], clients: int) -> None:
        self.settings, self.rehearsal, self.counts, self.clients = settings, rehearsal, counts, clients
        method, played = rehearsal.method, rehearsal.rounds
        self.secure = settings.federation.secure_aggregation
        self.hidden = settings.privacy.unit == "client" and not self.secure
        self.adapter = rehearsal.sizes(played[-1].state.adapter)
        self.memory = _file(rehearsal.sizes(played[-1].memory))
        sent = [_file(rehearsal.sizes(round.update.tensors)) for round in played]
        self.update = sum(sent) // len(sent)
        self.kept = max(_file(rehearsal.sizes(round.update.kept)) for round in played) if method.stateful else 0
        self._grown = [rehearsal.growth(group) for group in ("base", "rest")]
        size = settings.runtime.cohort_size
        self.cohorts = [math.ceil(count / (64 if size == "auto" else size)) for count in counts]

    def needs(self, stale: int, prefix: int, audited: bool) -> Needs:
        rounds = [self._tensors(number) for number in range(1, len(self.counts) + 1)]
        keep, tracked = None if audited else self.settings.runtime.keep_rounds, self._tracked and not audited
        held = len(rounds) if keep is None else min(len(rounds), keep + 1 + (LAG if tracked else 0))
        late = 0 if keep is None else min(stale, len(rounds) - held)
        start, last = self._state(0), len(self.counts)
        records = [self._records(number) for number in range(1, last + 1)]
        published = self._adapter() + 2 * BLOCK
        reports = REPORTS + sum(500 + 80 * count for count in self.counts) + 230 * self.clients
        copies = sum(rounds) + sum(records) if tracked else 0
        local = (self.settings.tracking.uri or "").startswith("sqlite")
        return Needs(
            rounds=start + _largest(rounds, held) + late * (self._state(last) + self.memory) + self._passing(),
            clients=self._clients(held, published),
            records=sum(records) + self._whole(),
            prefix=prefix,
            published=published + reports,
            mlflow=(MLFLOW + last * MLFLOW_ROUND + copies + 2 * published + reports) if local else 0,
            prefect=PREFECT + sum(PREFECT_TASK * (4 + self.secure + n) for n in self.cohorts) + 500 * sum(self.counts),
        )

    @property
    def _tracked(self) -> bool:
        return self.settings.tracking.uri is not None and self.settings.tracking.artifacts

    def _state(self, number: int) -> int:
        """Return the size of the global state after a round: the adapter, and products that grow up to full rank."""
        more = []
        for pair in pairs(self.rehearsal.specs):
            m, n = pair.B.shape[0], pair.A.shape[1]
            for first, step in self._grown:
                if rank := min(min(m, n), round(first + step * number)):
                    more += [(pair.name, 4 * rank * m), (pair.name, 4 * rank * n)]
        return _file([*self.adapter, *more])

    def _tensors(self, number: int) -> int:
        """Return what a complete round leaves beside its records."""
        sent = 0 if self.hidden else BLOCK + self.counts[number - 1] * self.update
        return self._state(number) + self.memory + (2 * self.update if self.secure else sent)

    def _passing(self) -> int:
        """Return what a round has only until it is complete."""
        return max(self.counts) * self.update if self.secure or self.hidden else 0

    def _records(self, number: int) -> int:
        count, cohorts = self.counts[number - 1], self.cohorts[number - 1]
        stateful, private = (int(flag) for flag in (self.rehearsal.method.stateful, self.settings.private))
        if self.hidden:  # who took part is nowhere
            return 3 * BLOCK
        plan = 700 + count * (50 + 330 * stateful + 100 * private)
        listed = cohorts * 250 + count * (230 + 230 * stateful)
        record = 1000 + 80 * len(self.adapter) + count * (100 + 100 * private) + stateful * self.clients * 210
        # With the evaluation, and the directory; with a secure sum, what is public of it.
        return _blocks(plan) + max(cohorts * BLOCK, _blocks(listed)) + _blocks(record) + (2 + self.secure) * BLOCK

    def _whole(self) -> int:
        """Return what there is once: the plan, what the run is, the ledger."""
        steps = self.settings.federation.local_steps
        if self.settings.privacy.unit == "client":
            steps = 1
        lines = (len(self.counts) if self.hidden else sum(self.counts) * steps) if self.settings.private else 0
        return _blocks(1500 + 230 * self.clients + 14 * sum(self.counts)) + _blocks(lines * LINE) + 10 * BLOCK

    def _clients(self, held: int, published: int) -> int:
        most = max(self.counts)
        kept = min(sum(self.counts), held * most + max(0, self.clients - most)) * self.kept
        method = self.rehearsal.method
        own = self.clients * (published + BLOCK) if method.personal and not method.initialisation.mixer else 0
        return kept + own + (self.clients * BLOCK if kept or own else 0)

    def _adapter(self) -> int:
        """Return the size of the published adapter, whose layers all have the largest of their ranks."""
        rank, shapes = self.settings.lora.rank, [(p.B.shape[0], p.A.shape[1]) for p in pairs(self.rehearsal.specs)]
        grown = sum(first + step * len(self.counts) for first, step in self._grown)
        if grown:
            rank = max(min(min(shape), rank + round(grown)) for shape in shapes)
        heads = [(spec.name, 4 * spec.numel) for spec in self.rehearsal.specs if spec.factor == "head"]
        return _file([*heads, *(("", 4 * rank * side) for shape in shapes for side in shape)])


def _file(tensors: Collection[tuple[str, int]]) -> int:
    return _blocks(sum(size + len(name) + HEADER for name, size in tensors)) if tensors else 0


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _largest(sizes: Iterable[int], count: int) -> int:
    """Return the largest sum of so many neighbours."""
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)
    return max((late - early for early, late in zip(sums, sums[count:], strict=False)), default=0)
