"""What privacy asks of every composition of parts: the bound on a record, the noise, the query, the plan.

Each property is held against a reference that is written out here, one record, client or number at a time.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import CPU, make_records, random_state
from test_plan import SIZES, of, settings_of
from test_steps import changed
from tiny import make_backbone
from torch import Tensor

from fedpipe import steps, workspace
from fedpipe.client.adaptive import Adaptive
from fedpipe.client.clip import Clip
from fedpipe.client.engine import CohortEngine
from fedpipe.client.filters import Filter, RunningFilter
from fedpipe.client.objectives import Contrast
from fedpipe.client.payloads import OnlyA
from fedpipe.client.schedule import AlternateStep, Both
from fedpipe.client.starts import client_start
from fedpipe.client.training import CohortWork, Update, train_cohort
from fedpipe.config import LoraSettings, OptimizerSettings, Settings
from fedpipe.errors import SettingsError, StateError
from fedpipe.files import read_tensors, write_sealed
from fedpipe.methods import CATALOGUE, Method, compose
from fedpipe.methods.axes import AXES
from fedpipe.models.factors import GlobalState
from fedpipe.models.layers import Structure
from fedpipe.models.lora import AdaptedModel, TensorSpec, build_model
from fedpipe.models.source import Backbone
from fedpipe.models.task import TextClassification
from fedpipe.plan import ClientPlan, Plan, make_plan
from fedpipe.privacy.accounting import epsilon
from fedpipe.privacy.ledger import Ledger
from fedpipe.privacy.noise import client_key, step_noise
from fedpipe.project import Project
from fedpipe.server.continuity import InterpolateOwn
from fedpipe.server.core import Core
from fedpipe.server.initialisation import Global, Start
from fedpipe.server.personal import GlobalAndPersonal, RestOfWorld
from fedpipe.server.ranks import Fixed
from fedpipe.server.scheduling import Buffered, Clusters, Job, Ringmaster, Scheduling, Synchronous
from fedpipe.server.sparse import SparseFirst, TrainedCore
from fedpipe.steps.beginning import decide

RANK, CLIENTS = 2, ("c000", "c001", "c002")
STRUCTURES = {
    "plain": Structure(),
    "core": Structure(core=True),
    "context": Structure(context=True),
    "mixer": Structure(context=True, mixer=True),
    "sparse": Structure(sparse=0.1),
    "whole weights": Structure(core=True, sparse=1.0),
}
BATCHES = [np.array([0, 3, 4]), np.array([1, 5]), np.array([2, 6, 7, 9])]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Structure], AdaptedModel]:
    backbone = Backbone(make_backbone(tmp_path_factory.mktemp("model") / "backbone"), "0" * 64, "tiny", {})
    made: dict[Structure, AdaptedModel] = {}

    def build(structure: Structure) -> AdaptedModel:
        if structure not in made:
            task = TextClassification(("bad", "good"))
            made[structure] = build_model(backbone, task, LoraSettings(rank=RANK, alpha=4.0), 0, structure)
        return made[structure]

    return build


def trained(model: AdaptedModel) -> list[TensorSpec]:
    return [spec for spec in model.specs if spec.adapter == "default"]


def norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


# The bound on a record


@pytest.mark.parametrize("clip", [part() for part in AXES["clip"].values()], ids=list(AXES["clip"]))
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=list(STRUCTURES))
def test_a_record_moves_its_clients_sum_by_at_most_the_norm_and_no_other_sum(
    models: Callable[[Structure], AdaptedModel], structure: Structure, clip: Clip
) -> None:
    """Over all that is active together, a term of contrast included, and at a norm that every record exceeds."""
    model, bound, records = models(structure), 1e-3, make_records()
    state, received, previous = (random_state(model.specs, 3, seed) for seed in range(3))
    for name in (spec.name for spec in model.specs if spec.factor in ("A", "B")):
        state[name][1].mul_(kept_in(name, RANK - 1))  # a client of lower rank
    contrast = Contrast(received, previous, torch.tensor([1.0, 0.0, 2.0]), 0.5)
    active, engine = trained(model), CohortEngine(model.to_batched(), CPU, "fp32", 64)

    def sums(batches: Sequence[np.ndarray]) -> dict[str, Tensor]:
        return engine.clipped_sums(state, records, batches, active, bound, None, clip, contrast)

    whole, groups = sums(BATCHES), clip.groups(active)
    assert clip.name != "joint" or len(groups) == 1
    assert sorted(spec.name for group in groups for spec in group) == sorted(spec.name for spec in active)
    for row, batch in enumerate(BATCHES):
        for place in range(len(batch)):
            less = list(BATCHES)
            less[row] = np.delete(batch, place)
            moved = {name: whole[name] - rest for name, rest in sums(less).items()}
            lengths = [norm([moved[spec.name][row] for spec in group]) for group in groups]
            assert all(length <= bound / math.sqrt(len(groups)) * 1.001 for length in lengths)
            assert 0.9 * bound < math.hypot(*lengths) <= bound * 1.001
            others = [other for other in range(3) if other != row]
            assert norm([tensor[others] for tensor in moved.values()]) <= 1e-3 * bound


def kept_in(name: str, rank: int) -> Tensor:
    """1 where a client of this rank has numbers of A (rank, in) or B (out, rank), 0 elsewhere."""
    ones = torch.zeros(RANK, 1)
    ones[:rank] = 1
    return ones if ".lora_A." in name else ones.T


def own_numbers(spec: TensorSpec, rank: int) -> Tensor:
    """1 where a client of this rank has numbers of a tensor, 0 elsewhere."""
    first = (torch.arange(RANK) < rank).float()
    if spec.factor in ("A", "B"):
        return kept_in(spec.name, rank) * torch.ones(spec.shape)
    return first[:, None] * first if spec.factor == "R" else torch.ones(spec.shape)


# The noise


class Silent:
    """An engine whose records have no gradient, which checks that the step it is asked for is in the ledger."""

    device = CPU

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.calls = ledger, 0

    def clipped_sums(self, state: Any, records: Any, batches: Any, active: Any, *others: Any) -> dict[str, Tensor]:
        self.calls += 1
        assert Counter(entry.client for entry in self.ledger.entries()) == dict.fromkeys(CLIENTS, self.calls)
        return {spec.name: torch.zeros_like(state[spec.name]) for spec in active}


COMPOSED = {
    "la-lora": (STRUCTURES["plain"], {"schedule": AlternateStep()}),
    "own A": (STRUCTURES["plain"], {"schedule": Both(), "payload": OnlyA()}),
    "remembering": (STRUCTURES["plain"], {"schedule": Both(), "initialisation": InterpolateOwn()}),
    "fdlora": (STRUCTURES["context"], {"schedule": Both(), "initialisation": GlobalAndPersonal()}),
    "fedalt": (STRUCTURES["mixer"], {"schedule": Both(), "initialisation": RestOfWorld()}),
    "fed-sb": (STRUCTURES["core"], {"schedule": Both(), "initialisation": Core()}),
    "fed-sb's first round": (
        Structure(core=True, sparse=0.1),
        {"schedule": Both(), "initialisation": TrainedCore(rounds=1, density=0.1)},
    ),
    "slora": (STRUCTURES["sparse"], {"schedule": Both(), "initialisation": SparseFirst(rounds=1, density=0.1)}),
}


def run_on_zero_gradients(
    model: AdaptedModel, method: Method, directory: Path, ranks: Sequence[int], query: str = "a query"
) -> tuple[dict[str, Update], dict[str, dict[str, Tensor]]]:
    """Two local steps of SGD at rate 1; return the updates, and where each client began."""
    records, steps, sigmas, bound = make_records(), 2, (1.5, 2.0, 3.0), 0.7
    clients = {
        client: ClientPlan(12, batch / 12, float(batch), sigma, 10, steps)
        for client, batch, sigma in zip(CLIENTS, (4, 5, 6), sigmas, strict=True)
    }
    jobs = (tuple(Job(client, 0) for client in CLIENTS),)
    plan = Plan("record", "add/remove", 8.0, 1e-5, "rdp", bound, 1, steps, clients, jobs, (1.0,))
    names = frozenset(spec.name for spec in trained(model))
    held = {name: tensor[0] for name, tensor in random_state(model.specs, 1).items()}
    starts = [
        client_start(
            method,
            model.specs,
            names,
            Start(1, 3, GlobalState(held), {}, 0, model.scale, rank, model.specs),
        )
        for rank in ranks
    ]
    work = CohortWork(1, CLIENTS, records, starts, names, query, bytes(range(32)))
    ledger = Ledger(directory / "ledger.jsonl", "a run")
    updates = train_cohort(Silent(ledger), model, work, plan, method, OptimizerSettings(lr=1.0), ledger)
    return updates, {client: dict(start.tensors) for client, start in zip(CLIENTS, starts, strict=True)}


@pytest.mark.parametrize("name", COMPOSED)
def test_what_moves_is_noise_of_sigma_c_over_b_where_a_step_trains_and_a_client_has_ranks(
    models: Callable[[Structure], AdaptedModel], tmp_path: Path, name: str
) -> None:
    """Number by number, from streams drawn one at a time; what is sent and what is kept are all that moved.

    The ratio of signal and noise is of these numbers alone.
    """
    structure, parts = COMPOSED[name]
    model, ranks = models(structure), (2, 1, 2)
    method = replace(CATALOGUE["dp-lora"], **parts)
    updates, began = run_on_zero_gradients(model, method, tmp_path, ranks)
    for client, rank, batch, sigma in zip(CLIENTS, ranks, (4, 5, 6), (1.5, 2.0, 3.0), strict=True):
        update, ended, energy, expected = updates[client], dict(began[client]), 0.0, 0.0
        for step in (1, 2):
            for spec in trained(model):
                if not method.is_active(1, step, spec):
                    continue
                key = client_key(bytes(range(32)), client)
                own = own_numbers(spec, rank)
                drawn = own * step_noise(key, "a query", 1, client, step, spec.name, spec.shape, sigma * 0.7) / batch
                energy += float(drawn.double().square().sum())
                expected += int(own.sum()) * (sigma * 0.7 / batch) ** 2
                ended[spec.name] = ended[spec.name] - drawn
        assert update.snr == pytest.approx(math.sqrt(max(0.0, energy - expected) / expected), abs=1e-4)
        sent = {spec.name for spec in method.sends(trained(model), 1, 2)}
        assert set(update.tensors) == sent
        moved = {spec.name for spec in method.trains(trained(model), 1, 2)}
        own = {key.partition("/")[2] or key for key in update.kept}
        assert moved <= sent | own
        for key, tensor in {**update.kept, **update.tensors}.items():
            torch.testing.assert_close(tensor, ended[key.rpartition("/")[2]], rtol=1e-5, atol=1e-5, msg=key)


class Spreading(Filter):
    """A filter that puts something everywhere."""

    name = "spreading"

    def open(self, scale: float = 1.0) -> RunningFilter:
        class Running(RunningFilter):
            def __call__(self, gradients: Any, state: Any, active: Any) -> dict[str, Tensor]:
                return {name: gradient + 1 for name, gradient in gradients.items()}

        return Running()


@pytest.mark.parametrize("name", ["la-lora", "fed-sb"])
def test_nothing_grows_beyond_a_clients_rank_whatever_a_filter_does(
    models: Callable[[Structure], AdaptedModel], tmp_path: Path, name: str
) -> None:
    structure, parts = COMPOSED[name]
    model, method = models(structure), replace(CATALOGUE["dp-lora"], **parts, filter=Spreading())
    updates, _ = run_on_zero_gradients(model, method, tmp_path, (2, 1, 2))
    for spec in method.sends(trained(model), 1, 2):
        assert not (updates["c001"].tensors[spec.name] * (1 - own_numbers(spec, 1))).any()


def test_no_two_queries_rounds_clients_steps_or_tensors_share_noise() -> None:
    seen: dict[bytes, tuple[Any, ...]] = {}
    for query in ("one", "two"):
        for round in (1, 2):
            for client in ("c1", "c2", "c11"):
                for step in (1, 11):
                    for tensor in ("a", "b"):
                        key = client_key(bytes(32), client)
                        drawn = step_noise(key, query, round, client, step, tensor, (4,), 1.0).numpy().tobytes()
                        assert drawn not in seen
                        seen[drawn] = (query, round, client, step, tensor)


# The query


FIRST_LAYER = "base_model.model.bert.encoder.layer.0"


def recorded() -> dict[str, Any]:
    """A world in which round 3 is about to begin."""
    memory = {
        "schedule": {"scores": {"A": {FIRST_LAYER: 1.0}, "B": {FIRST_LAYER: 1e9}}},
        "ranks": {"c000": 2},
    }
    done = {
        "state": "state two",
        "memory": "memory two",
        "decisions": memory,
        "clients": {"c000": {"norm": 1.0, "snr": 0.1, "weight": 0.25}, "c001": {"norm": 1.0, "weight": 0.75}},
        "kept": {name: {"round": 2, "file": f"kept/{name}", "sha256": f"kept {name}"} for name in ("c000", "c001")},
        "metrics": {"accuracy": 0.5},
        "seconds": 1.0,
    }
    return {
        "info": {"query": "settings, data, code", "plan_sha256": "plan"},
        "key": bytes(range(32)),
        "device": "cpu",
        "jobs": (Job("c000", 2), Job("c001", 1), Job("c002", 2, used=False)),
        "records": {1: {**done, "state": "state one", "memory": "memory one"}, 2: done},
    }


METHOD = replace(
    CATALOGUE["dp-lora"],
    schedule=Adaptive(warm_up=0.0, coldest=1e-3, temperature=1e-3, exploration=0.0),
    objective=CATALOGUE["scaffold"].objective,
    initialisation=RestOfWorld(),
    ranks=CATALOGUE["hetlora"].ranks,
)


def decided(world: dict[str, Any], specs: Sequence[TensorSpec]) -> dict[str, Any]:
    run = SimpleNamespace(
        round_record=world["records"].get,
        round_dir=str,
        last_trained=lambda before: before,
        plan=SimpleNamespace(jobs_of=lambda _: world["jobs"], clients=dict.fromkeys(CLIENTS), rounds=9),
        settings=SimpleNamespace(lora=SimpleNamespace(rank=8), seed=1),
        info=world["info"],
        key=world["key"],
    )
    workspace = SimpleNamespace(
        method=METHOD,
        model=SimpleNamespace(specs=specs),
        trained=frozenset(spec.name for spec in specs),
        device=SimpleNamespace(type=world["device"]),
    )
    return decide(run, workspace, 3)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "settings, data or code": lambda world: world["info"].update(query="other"),
    "the plan": lambda world: world["info"].update(plan_sha256="other"),
    "the key": lambda world: world.update(key=bytes(32)),
    "the device": lambda world: world.update(device="cuda"),
    "the state it starts from, weights below included": lambda world: world["records"][2].update(state="other"),
    "a state that a late client starts from": lambda world: world["records"][1].update(state="other"),
    "the server's memory, from which clients are corrected": lambda world: world["records"][2].update(memory="other"),
    "what a client kept": lambda world: world["records"][2]["kept"]["c001"].update(sha256="other"),
    "when a client kept it": lambda world: world["records"][2]["kept"]["c001"].update(round=1),
    "that a client kept nothing": lambda world: world["records"][2]["kept"].pop("c001"),
    "a rank": lambda world: world["records"][2]["decisions"]["ranks"].update(c000=1),
    "which factor is trained": lambda world: world["records"][2]["decisions"]["schedule"]["scores"]["A"].update(
        {FIRST_LAYER: 1e18}
    ),
    "who is late": lambda world: world.update(jobs=(Job("c000", 1), Job("c001", 1), Job("c002", 2, used=False))),
    "whose update is used": lambda world: world.update(jobs=(Job("c000", 2), Job("c001", 1), Job("c002", 2))),
}


@pytest.fixture(scope="module")
def specs(models: Callable[[Structure], AdaptedModel]) -> tuple[TensorSpec, ...]:
    return models(STRUCTURES["plain"]).specs


@pytest.mark.parametrize("change", CHANGES)
def test_the_query_binds_all_that_a_round_depends_on(specs: Sequence[TensorSpec], change: str) -> None:
    """One noise under two sums would cancel out of their difference."""
    before, world = decided(recorded(), specs), recorded()
    CHANGES[change](world)
    assert decided(world, specs)["query"] != before["query"]


def test_the_query_binds_how_much_a_clients_last_update_counted(specs: Sequence[TensorSpec]) -> None:
    before, world = decided(recorded(), specs), recorded()
    world["records"][2]["clients"]["c000"]["weight"] = 0.5
    assert decided(world, specs)["query"] != before["query"]


def test_what_no_client_computes_with_leaves_the_query_as_it_is(specs: Sequence[TensorSpec]) -> None:
    """Otherwise a round that is repeated would draw fresh noise and spend again."""
    before, world = decided(recorded(), specs), copy.deepcopy(recorded())
    world["records"][2] |= {"seconds": 9.0, "metrics": {}}
    world["records"][2]["clients"]["c000"] |= {"norm": 7.0, "snr": None}
    assert decided(world, specs) == before


def test_every_option_of_every_part_is_in_a_methods_identity() -> None:
    for method in CATALOGUE.values():
        for axis in AXES:
            part = getattr(method, axis)
            assert method.axes[axis]["name"] == part.name
            assert set(type(part).model_fields) <= set(method.axes[axis])


# The plan


ROUNDS: dict[str, Scheduling] = {
    "synchronous": Synchronous(spread=1.0),
    "clusters": Clusters(tau_max=5, spread=1.0),
    "buffered": Buffered(size=2, max_staleness=1, spread=1.0),
    "dropping": Ringmaster(threshold=1, spread=1.0),
    "ringmaster": Ringmaster(threshold=2, spread=1.0),
}


CAP = 7


def planned(rounds: Scheduling, sizes: dict[str, int], **federation: Any) -> Plan:
    values = {"rounds": 8, "local_steps": 3, "batch_size": 64, "clients_per_round": 3, "max_participations": CAP}
    settings = settings_of(federation={**values, **federation}, partition={"clients": len(sizes)})
    return make_plan(settings, sizes, of(rounds))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=list(ROUNDS))
def test_no_plan_takes_a_step_that_its_noise_is_not_for(rounds: Scheduling, dropout: float) -> None:
    """Jobs whose update is dropped count; the cap holds; the history of all steps is within the target."""
    plan = planned(rounds, SIZES, dropout=dropout)
    taken: Counter[str] = Counter()
    for jobs in plan.jobs:
        names = [job.client for job in jobs]
        assert len(names) == len(set(names))
        assert any(job.used for job in jobs)
        taken.update({job.client: plan.clients[job.client].local_steps for job in jobs})
    for name, client in plan.clients.items():
        assert taken[name] <= client.max_steps <= CAP * client.local_steps
        assert client.expected_batch == pytest.approx(client.sampling_rate * client.records)
        history = ((client.noise_multiplier, client.sampling_rate, taken[name]),) if taken[name] else ()
        assert (epsilon(history, plan.delta, "rdp") if history else 0.0) <= plan.epsilon


@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=list(ROUNDS))
def test_who_works_when_and_for_how_long_does_not_depend_on_what_clients_hold(rounds: Scheduling) -> None:
    plans = [
        planned(rounds, {name: 200 + spread * number for number, name in enumerate(sorted(SIZES))}, dropout=0.3)
        for spread in (0, 100)
    ]
    first, second = (
        (plan.jobs, plan.seconds, {name: client.local_steps for name, client in plan.clients.items()}) for plan in plans
    )
    assert first == second


# What is planned is what is done


@pytest.fixture
def project(tiny: tuple[Project, Settings], tmp_path: Path) -> Iterator[Project]:
    shutil.copytree(tiny[0].root, tmp_path / "copy")
    yield Project(tmp_path / "copy")
    workspace.forget_workspaces()


@pytest.mark.parametrize(("key", "value"), [("ranks", {"c000": 2, "c001": 2, "c002": 2}), ("modes", {"x": "A"})])
def test_a_rounds_plan_that_says_other_than_its_query_is_refused(
    tiny: tuple[Project, Settings], project: Project, key: str, value: dict[str, Any]
) -> None:
    """It would be another sum under the same noise."""
    method = {"name": "dp-lora", "ranks": {"name": "fixed", "each": [1, 2]}}
    run = steps.prepare(project, changed(tiny[1], method=method, privacy__accountant="rdp")).run
    plan = steps.begin_round(run.root, 1)
    write_sealed(run.round_dir(1) / "plan.json", {**plan, key: value})
    with pytest.raises(StateError):
        steps.train(run.root, 1, 0)


def test_no_client_spends_for_an_update_that_its_round_refuses(
    tiny: tuple[Project, Settings], project: Project
) -> None:
    """Where clients take different numbers of steps and a schedule trains A in even ones only."""
    method = {"name": "la-lora", "rounds": {"name": "clusters", "tau_max": 2, "clusters": 3, "spread": 3.0}}
    run = steps.prepare(project, changed(tiny[1], method=method, privacy__accountant="rdp")).run
    assert {client.local_steps for client in run.plan.clients.values()} == {1, 2}
    assert not steps.run_round(run.root, 1)["refused"]


# What is refused


def asked(method: dict[str, Any]) -> Settings:
    return settings_of(federation={"rounds": 8}, method=method)


@pytest.mark.parametrize("name", [method.name for method in CATALOGUE.values() if method.private])
def test_no_private_method_may_weigh_by_sizes(name: str) -> None:
    with pytest.raises(SettingsError, match="number of records"):
        compose(asked({"name": name, "weights": "samples"}))
    assert CATALOGUE[name].weights.name != "samples"
    assert not CATALOGUE[name].initialisation.raw_gradient


@pytest.mark.parametrize("rounds", ["clusters", "buffered", "ringmaster"])
def test_nor_through_another_scheduling(rounds: str) -> None:
    with pytest.raises(SettingsError, match="number of records"):
        compose(asked({"name": "dp-lora", "rounds": rounds, "weights": "samples"}))


def test_gradients_of_raw_records_are_refused_under_privacy() -> None:
    with pytest.raises(SettingsError, match="neither clipped nor noised"):
        compose(asked({"name": "fedsmoothlora", "initialisation": {"gradient": True}}))


# What stays at a client


@pytest.mark.parametrize("name", [name for name, method in CATALOGUE.items() if method.private])
def test_what_a_client_keeps_is_in_no_update(
    models: Callable[[Structure], AdaptedModel], tmp_path: Path, name: str
) -> None:
    """A local head, B and a mixer are never sent; and a rank that a client lacks is sent as zero."""
    start = CATALOGUE[name].initialisation
    sparse = 0.1 if start.sparse else 0.0
    model = models(Structure(core=start.core, context=start.context, mixer=start.mixer, sparse=sparse))
    method = replace(CATALOGUE[name], ranks=Fixed(each=(2, 1)))
    if sparse:
        method = replace(method, initialisation=start.model_copy(update={"rounds": 1, "density": sparse}))
    updates, began = run_on_zero_gradients(model, method, tmp_path, (2, 1, 2))
    factors = {spec.name: spec.factor for spec in model.specs}
    for client, update in updates.items():
        sent = {factors[key] for key in update.tensors if key in factors}
        assert "mixer" not in sent
        assert ("head" in sent) == (method.payload.head == "shared")
        assert ("B" in sent) <= (method.payload.name != "a-only")
        assert set(update.tensors) - set(factors) <= {f"control/{key}" for key in factors}
        squares = [
            float((update.tensors[key] - began[client][key]).double().square().sum())
            for key in update.tensors
            if key in factors
        ]
        assert update.norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)
    for spec in model.specs:
        if spec.name in updates["c001"].tensors:
            assert not (updates["c001"].tensors[spec.name] * (1 - own_numbers(spec, 1))).any()


def test_what_clients_keep_is_not_among_the_files_of_a_round(tiny: tuple[Project, Settings], project: Project) -> None:
    """The directory of a round is what MLflow gets."""
    run = steps.prepare(project, changed(tiny[1], method={"name": "fedsa-lora"}, privacy__accountant="rdp")).run
    record = steps.run_round(run.root, 1)
    assert {path.name for path in run.round_dir(1).iterdir() if path.is_dir()} == {"updates"}
    assert {path.stem for path in (run.round_dir(1) / "updates").iterdir()} == set(record["clients"])
    for client in record["clients"]:
        own = run.client_dir(client)
        assert own.parent.stat().st_mode & 0o777 == 0o700
        assert run.kept(1, client)[1].keys() & read_tensors(own / "kept-0001.safetensors").keys()


def test_the_usual_start_remembers_nothing() -> None:
    assert not Global().stateful
    assert Global().keep(SimpleNamespace(), {"a": torch.ones(1)}, {}) == {}
