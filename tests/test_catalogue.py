"""Every method of the catalogue, end to end on the tiny model: with privacy where its card allows it, and without."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_steps import changed
from tiny import make_project

from fedpipe import steps, workspace
from fedpipe.config import Settings
from fedpipe.files import read_json, read_tensors
from fedpipe.methods import CATALOGUE
from fedpipe.models.loading import load_adapter
from fedpipe.project import Project
from fedpipe.publish import publish
from fedpipe.state import Run
from fedpipe.steps.common import round_facts
from fedpipe.workspace import open_workspace

pytestmark = pytest.mark.usefixtures("fresh_process")

PRIVATE = [name for name, method in CATALOGUE.items() if method.private]
CASES = [*((name, "record") for name in PRIVATE), *((name, "none") for name in CATALOGUE)]

Finished = Callable[[str, str], tuple[Run, Project, dict[str, Any]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Settings]:
    """A project with as many clients as every aggregation rule makes sense with."""
    return make_project(
        tmp_path_factory.mktemp("many") / "project",
        spread=0.3,
        partition={"clients": 7},
        privacy={"accountant": "rdp"},
        lora={"rank": 4, "alpha": 8.0},
        federation={"rounds": 3, "local_steps": 2, "batch_size": 8},
        evaluation={"every": 3},
        runtime={"device": "cpu", "tokens_per_batch": 4096},
    )


@pytest.fixture(scope="module")
def settings(made: tuple[Project, Settings]) -> Settings:
    return made[1]


@pytest.fixture
def project(made: tuple[Project, Settings], tmp_path: Path) -> Project:
    return copied(made[0], tmp_path / "copy")


@pytest.fixture(scope="module")
def finished(made: tuple[Project, Settings], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Runs that several tests look at, and must not write to; each is made when it is first asked for."""
    known: dict[tuple[str, str], tuple[Run, Project, dict[str, Any]]] = {}

    def run_of(name: str, unit: str) -> tuple[Run, Project, dict[str, Any]]:
        if (name, unit) not in known:
            project = copied(made[0], tmp_path_factory.mktemp(f"{name}-{unit}") / "copy")
            run = finish(project, asked(made[1], name, unit))
            known[name, unit] = run, project, publish(run, project)
        return known[name, unit]

    return run_of


def copied(project: Project, path: Path) -> Project:
    shutil.copytree(project.root, path)
    return Project(path)


def asked(settings: Settings, name: str, unit: str, **more: Any) -> Settings:
    method: dict[str, Any] = {"name": name}
    if CATALOGUE[name].initialisation.sparse:
        # Its first phase is usually longer than the whole of these runs.
        method["initialisation"] = {"rounds": 1}
    return changed(settings, method=method, privacy__unit=unit, **more)


def finish(project: Project, settings: Settings) -> Run:
    run = steps.prepare(project, settings).run
    for number in range(run.completed_rounds() + 1, run.plan.rounds + 1):
        steps.run_round(run.root, number)
    return run


@pytest.mark.parametrize(("name", "unit"), CASES)
def test_a_method_runs_and_leaves_an_adapter_that_stock_peft_loads(finished: Finished, name: str, unit: str) -> None:
    run, project, metrics = finished(name, unit)
    workspace_ = open_workspace(run.root)[1]
    assert all(math.isfinite(metrics[key]) for key in ("accuracy", "loss"))
    assert ("accuracy_worst" in run.round_record(run.plan.rounds)["metrics"]) == workspace_.method.personal
    if unit == "record":
        assert 0 < metrics["epsilon_max"] <= 8
    if workspace_.method.personal:
        return
    # The exported adapter on an untouched backbone computes what the run evaluated.
    loaded = load_adapter(project.adapter, workspace_.backbone.path)
    records = workspace_.records(None)
    inputs, labels = workspace_.task.encode(
        workspace_.federation.test(), workspace_._tokenizer, run.settings.data.max_length
    ).batch(torch.arange(len(records)).numpy(), torch.device("cpu"))
    with torch.inference_mode():
        loss = workspace_.task.losses(loaded(**inputs), labels).double().mean()
    assert float(loss) == pytest.approx(metrics["loss"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_interrupted_run_in_other_cohorts_and_batches_ends_with_the_same_bytes(
    project: Project, finished: Finished, settings: Settings, name: str
) -> None:
    """The server's memory, and what clients keep, included: a new process reads both from disk in round 2."""
    unit = "record" if CATALOGUE[name].private else "none"
    whole, other = finished(name, unit)[0], {"runtime__cohort_size": 3, "runtime__tokens_per_batch": 40}
    chosen = asked(settings, name, unit, **other)
    workspace.forget_workspaces()
    run = steps.prepare(project, chosen).run
    steps.run_round(run.root, 1)
    workspace.forget_workspaces()
    plan = steps.begin_round(run.root, 2)
    steps.train(run.root, 2, 0)
    workspace.forget_workspaces()
    assert steps.begin_round(run.root, 2) == plan
    again = finish(project, chosen)
    for number in range(1, whole.plan.rounds + 1):
        assert again.adapter_path(number).read_bytes() == whole.adapter_path(number).read_bytes(), number
        first, second = whole.memory(number), again.memory(number)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        # Digests of the memory and of what clients keep are in the record.
        first, second = whole.round_record(number), again.round_record(number)
        for key in set(first) - {"seconds"}:
            assert first[key] == second[key], key
    assert bool(whole.round_record(1)["kept"]) == CATALOGUE[name].stateful
    kept = {(path.parent.name, path.name): path.read_bytes() for path in (whole.root / "clients").glob("*/kept-*")}
    assert kept == {
        (path.parent.name, path.name): path.read_bytes() for path in (again.root / "clients").glob("*/kept-*")
    }


@pytest.mark.parametrize("name", PRIVATE)
def test_epsilon_does_not_depend_on_the_method_but_on_the_steps(finished: Finished, name: str) -> None:
    """At equal noise multipliers, rates and steps every method has spent the same."""
    run = finished(name, "record")[0]
    spent = Counter((entry.client, entry.sigma, entry.q) for entry in run.ledger.entries())
    expected = Counter()
    for job in (job for jobs in run.plan.jobs for job in jobs):
        planned = run.plan.clients[job.client]
        expected[job.client, planned.noise_multiplier, planned.sampling_rate] += planned.local_steps
    assert spent == expected


@pytest.mark.parametrize("name", CATALOGUE)
def test_bytes_up_are_those_of_the_files(finished: Finished, name: str) -> None:
    """Zeros beyond a client's rank are in the file, but need not be sent."""
    run = finished(name, "none")[0]
    rank = run.settings.lora.rank
    for number in range(1, run.plan.rounds + 1):
        record, plan = run.round_record(number), read_json(run.round_dir(number) / "plan.json")
        numbers = 0
        for client in record["clients"]:
            update = read_tensors(run.round_dir(number) / "updates" / f"{client}.safetensors")
            for name_, tensor in update.items():
                axis = 1 if "lora_B" in name_ else 0
                left, rest = (
                    tensor.split([plan["ranks"][client], rank - plan["ranks"][client]], axis)
                    if ("lora_" in name_)
                    else (tensor, tensor[:0])
                )
                assert not rest.any()
                numbers += left.numel()
        assert record["bytes_up"] == 4 * numbers
        assert record["bytes_down"] > 0


def dense(run: Run, number: int) -> dict[str, torch.Tensor]:
    """What a state adds to each adapted layer's weight, without the scale."""
    state = run.state(number)
    facts = round_facts(run, open_workspace(run.root)[1], number, [], {}, state)
    found = {}
    for pair in facts.pairs:
        whole = pair.of(state.adapter).dense().double()
        for group in (state.base, state.rest):
            if pair.name in group:
                whole = whole + group[pair.name].dense().double()
        found[pair.name] = whole
    return found


EXACT = ("fedex-lora", "flora", "flexlora")


def test_at_full_rank_stacking_residuals_and_products_agree_after_one_round(
    project: Project, settings: Settings
) -> None:
    """FLoRA = FedEx-LoRA = FlexLoRA at a rank that holds all clients' products; and one client's noise is no matter."""
    found = []
    for name in EXACT:
        # All records in every batch: a run's sample is its own.
        whole_batch = {"federation__batch_size": 1000, "federation__rounds": 1}
        full = changed(settings, lora__rank=16, lora__alpha=32.0, **whole_batch)
        run = finish(project, asked(full, name, "none"))
        found.append(dense(run, 1))
        workspace.forget_workspaces()
    for other in found[1:]:
        for name, whole in found[0].items():
            torch.testing.assert_close(other[name], whole, rtol=1e-4, atol=1e-6)
            assert float(whole.abs().max()) > 1e-3


def test_the_records_are_json(finished: Finished) -> None:
    json.dumps(finished("dp-lora", "record")[0].round_record(1), allow_nan=False)
