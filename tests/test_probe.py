"""The curvature term of AS-LoRA: measured on public records, which cost no privacy, or refused."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import small
import tiny
import torch
from small import CPU, make_model, make_records, random_state
from test_steps import Killed, changed, kill_at
from torch import Tensor
from torch.nn import functional

from fedpipe import steps, workspace
from fedpipe.client import training
from fedpipe.client.batching import Budget
from fedpipe.client.curvature import STEP, Curvature
from fedpipe.config import Settings
from fedpipe.errors import SettingsError, StateError, TrainingError
from fedpipe.files import read_json
from fedpipe.models.lora import TensorSpec
from fedpipe.models.task import TextClassification
from fedpipe.privacy.ledger import Ledger
from fedpipe.project import Project
from fedpipe.server.evaluate import evaluate
from fedpipe.state import Run
from fedpipe.steps import training as step_training
from fedpipe.workspace import PROBE, Workspace

pytestmark = pytest.mark.usefixtures("fresh_process")

CURVED = {"curvature": True, "probe": "public.csv"}
SPEC = TensorSpec("layer.0.lora_A.weight", (2, 5), "A", "layer.0.lora_A.default", "weight")


# The second difference


def quadratic(resolution: type[np.floating] = np.float64) -> tuple[np.ndarray, Any]:
    """A loss 3 + b'x + x'Hx / 2 of the tensor's ten numbers, rounded to a resolution; and H."""
    generator = np.random.default_rng(0)
    half = generator.standard_normal((10, 10))
    hessian, slope = half @ half.T, generator.standard_normal(10)

    def loss(adapter: Mapping[str, Tensor]) -> float:
        x = adapter[SPEC.name].double().numpy().ravel()
        return float(resolution(3 + slope @ x + x @ hessian @ x / 2))

    return hessian, loss


@pytest.mark.parametrize(("resolution", "error"), [(np.float64, 1e-3), (np.float32, 2e-2)])
def test_the_curvature_of_a_quadratic_is_that_of_its_hessian(resolution: type[np.floating], error: float) -> None:
    hessian, loss = quadratic(resolution)
    generator = torch.Generator().manual_seed(1)
    state = {SPEC.name: torch.randn(3, 2, 5, generator=generator), "other": torch.zeros(3, 1)}
    curvature = Curvature(loss, state, 0.1)
    for client in range(3):
        direction = 1e-3 * torch.randn(2, 5, generator=generator)
        unit = (direction / direction.norm()).double().numpy().ravel()
        found = curvature.along(client, SPEC, direction)
        assert found == pytest.approx(unit @ hessian @ unit, abs=error)
        assert curvature.along(client, SPEC, 1e6 * direction) == pytest.approx(found, abs=error)


def test_other_clients_and_other_tensors_stay_where_they_are() -> None:
    seen: list[dict[str, Tensor]] = []

    def loss(adapter: Mapping[str, Tensor]) -> float:
        seen.append({name: tensor.clone() for name, tensor in adapter.items()})
        return 1.0

    state = {SPEC.name: torch.arange(30.0).view(3, 2, 5), "other": torch.arange(3.0)}
    before = copy.deepcopy(state)
    direction = torch.ones(2, 5)
    assert Curvature(loss, state, 0.1).along(1, SPEC, direction) == 0
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert {float(adapter["other"]) for adapter in seen} == {1.0}
    moves = sorted(float((adapter[SPEC.name] - state[SPEC.name][1]).sum()) for adapter in seen)
    assert moves == pytest.approx([-STEP * 10**0.5, 0, STEP * 10**0.5], abs=1e-5)


def test_no_direction_bends_nothing_and_a_loss_that_is_not_finite_is_told() -> None:
    state = {SPEC.name: torch.zeros(1, 2, 5)}
    assert Curvature(lambda _: 1 / 0, state, 0.1).along(0, SPEC, torch.zeros(2, 5)) == 0
    with pytest.raises(TrainingError, match="public probe is not finite"):
        Curvature(lambda _: float("nan"), state, 0.1).along(0, SPEC, torch.ones(2, 5))


def test_float32_losses_of_a_model_give_the_curvature_that_float64_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 1e-3 would be wrong by its rounding."""
    monkeypatch.setattr(small, "make_backbone", functools.partial(tiny.make_backbone, spread=0.3))
    model, (records,) = make_model(tmp_path / "backbone"), make_records(1, 24)
    state = random_state(model.specs, 1)
    double = copy.deepcopy(model)
    double.model.double()
    exact = {name: tensor.double() for name, tensor in state.items()}

    def loss_of(batched: Any) -> Any:
        return lambda adapter: evaluate([batched], adapter, records, CPU, "fp32", Budget(512))["loss"]

    single, reference = loss_of(model.to_batched()), loss_of(double.to_batched())
    generator = torch.Generator().manual_seed(2)
    for spec in model.specs:
        if spec.factor not in ("A", "B"):
            continue
        direction = torch.randn(spec.shape, generator=generator)
        found = Curvature(single, state, 1.0).along(0, spec, direction)
        unit = (direction / direction.norm()).double()
        with monkeypatch.context() as patch:
            patch.setattr(TextClassification, "losses", _double_losses)
            at = [reference({**_first(exact), spec.name: exact[spec.name][0] + h * unit}) for h in (1e-4, 0, -1e-4)]
        assert found == pytest.approx((at[0] - 2 * at[1] + at[2]) / 1e-8, rel=0.02, abs=2e-3)


def _double_losses(task: TextClassification, outputs: Any, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.logits, labels, reduction="none")


def _first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[0] for name, tensor in state.items()}


# Runs


def asked(settings: Settings, schedule: Mapping[str, Any], **more: Any) -> Settings:
    return changed(settings, method={"name": "as-lora", "schedule": dict(schedule)}, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Settings]:
    """The tiny project on a backbone whose loss bends."""
    return tiny.make_project(
        tmp_path_factory.mktemp("bent") / "project",
        spread=0.3,
        privacy={"accountant": "rdp"},
        lora={"rank": 2, "alpha": 16.0},
        federation={"rounds": 5},
        runtime={"cohort_size": 2},
    )


@pytest.fixture(scope="module")
def settings(made: tuple[Project, Settings]) -> Settings:
    """Five rounds, curved in the last three."""
    return asked(made[1], {**CURVED, "curvature_rounds": 0.6, "exploration": 0.0})


@pytest.fixture
def project(made: tuple[Project, Settings], tmp_path: Path) -> Project:
    shutil.copytree(made[0].root, tmp_path / "copy", ignore=shutil.ignore_patterns("runs"))
    tiny.write_records(tmp_path / "copy" / "public.csv", 12, seed=9)
    return Project(tmp_path / "copy")


@pytest.fixture
def _floorless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the noise's share into the scores: they are then positive, whatever the noise."""
    monkeypatch.setattr(training, "noise_stds", lambda sigmas, *_: np.zeros(len(sigmas)))


def finish(project: Project, settings: Settings) -> Run:
    run = steps.prepare(project, settings).run
    for number in range(run.completed_rounds() + 1, run.plan.rounds + 1):
        steps.run_round(run.root, number)
    return run


def results(run: Run) -> dict[str, Any]:
    """What a run leaves, byte for byte, but for the time that it took."""
    rounds = {number: run.round_record(number) for number in range(run.plan.rounds + 1)}
    for record in rounds.values():
        record.pop("seconds", None)
    states = {number: run.adapter_path(number).read_bytes() for number in rounds}
    scores = {number: _scores(run, number) for number in range(1, run.plan.rounds + 1)}
    return {"rounds": rounds, "states": states, "scores": scores, "ledger": (run.root / "ledger.jsonl").read_bytes()}


@pytest.mark.usefixtures("_floorless")
def test_the_probe_changes_scores_of_the_last_rounds_and_nothing_else(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cohort is also trained without the probe: same bytes, same ledger, other scores."""
    real, compared = step_training.train_cohort, []

    def both(engine: Any, model: Any, work: Any, plan: Any, method: Any, optimizer: Any, ledger: Ledger, probe: Any):
        bare = real(engine, model, work, plan, method, optimizer, ledger)
        entries = ledger.entries()
        curved = real(engine, model, work, plan, method, optimizer, ledger, probe)
        assert ledger.entries() == entries
        compared.append((work.round, bare, curved))
        return curved

    monkeypatch.setattr(step_training, "train_cohort", both)
    run = finish(project, settings)
    assert [number for number, _, _ in compared] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    changes = Counter[int]()
    for number, bare, curved in compared:
        for client, update in curved.items():
            assert update.tensors.keys() == bare[client].tensors.keys()
            assert all(torch.equal(t, bare[client].tensors[name]) for name, t in update.tensors.items())
            assert (update.norm, update.snr) == (bare[client].norm, bare[client].snr)
            for layer, score in bare[client].scores.items():
                changes[number] += update.scores[layer] != score
            assert update.scores.keys() == bare[client].scores.keys()
    assert changes[1] == changes[2] == 0
    assert all(changes[number] for number in (3, 4, 5))
    assert len(run.ledger.entries()) == 5 * 3 * settings.federation.local_steps


@pytest.mark.usefixtures("_floorless")
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = finish(project, settings)
    expected = results(undisturbed)
    shutil.rmtree(undisturbed.root)
    workspace.forget_workspaces()
    with monkeypatch.context() as patch:
        kill_at(patch, step_training, "metrics_of", 2)  # on the way through the first curved round
        with pytest.raises(Killed):
            finish(project, settings)
    workspace.forget_workspaces()
    again = steps.prepare(project, settings)
    assert again.resumed
    assert again.run.completed_rounds() == 2
    assert results(finish(project, settings)) == expected


@pytest.mark.usefixtures("_floorless")
def test_both_engines_measure_the_same(project: Project, settings: Settings) -> None:
    """In round 1; after it the states differ by rounding, and each engine has noise of its own."""
    scores = []
    for engine in ("cohort", "opacus"):
        more = {"runtime__engine": engine, "federation__rounds": 2}
        run = steps.prepare(project, asked(settings, {**CURVED, "curvature_rounds": 1.0}, **more)).run
        steps.run_round(run.root, 1)
        scores.append(_scores(run, 1))
    assert len(scores[0]) == 3 * 2  # clients, layers
    assert all(scores[0].values())
    # A score is a difference of two terms, and may be near zero.
    assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-3 * max(map(abs, scores[1].values())))


def _scores(run: Run, number: int) -> dict[tuple[str, str], float]:
    files = sorted(run.round_dir(number).glob("cohort-*.json"))
    updates = {client: entry for file in files for client, entry in read_json(file)["updates"].items()}
    return {(client, layer): score for client, entry in updates.items() for layer, score in entry["scores"].items()}


def test_the_loss_is_the_mean_over_the_probe_with_a_cut_backbone_too(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for cached in (False, True):
        one = Workspace(project, changed(settings, runtime__cache_frozen_prefix=cached, lora__last_layers=1))
        assert len(one.records(PROBE)) == 12
        adapter = {name: value + 0.1 for name, value in one.model.initial.items()}
        found[cached] = step_training._probe(one)(adapter)
        assert (one.records(PROBE).prefix is not None) == cached
        with one.batched_models(1) as (model,):
            inputs, labels = one.records(PROBE).batch(np.arange(12), CPU)
            model.set_adapter(adapter)
            expected = model.task.losses(model.forward(inputs), labels).mean()
        assert found[cached] == pytest.approx(float(expected), rel=1e-5)
    assert found[True] == pytest.approx(found[False], rel=1e-4)


def test_a_bf16_run_measures_in_fp32(project: Project, settings: Settings) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        one = Workspace(project, changed(settings, runtime__precision=precision, runtime__cache_frozen_prefix=False))
        losses.append(step_training._probe(one)(one.model.initial))
    assert losses[0] == losses[1]


# Which run


def test_other_public_records_are_another_run(project: Project, settings: Settings) -> None:
    first = steps.prepare(project, settings)
    assert steps.prepare(project, settings).run.root == first.run.root
    tiny.write_records(project.root / "public.csv", 12, seed=10)
    second = steps.prepare(project, settings)
    assert second.run.root != first.run.root
    assert second.run.info["query"] != first.run.info["query"]
    (change,) = second.changes
    assert change.startswith("probe: ")
    with pytest.raises(StateError, match="is not what it was begun as: probe: "):
        steps.begin_round(first.run.root, 1)


def test_without_a_probe_the_identity_says_none(project: Project, settings: Settings) -> None:
    (project.root / "public.csv").unlink()
    run = steps.prepare(project, asked(settings, {})).run
    assert run.info["parts"]["probe"] is None
    assert not (project.root / "public.csv").exists()


@pytest.mark.parametrize(("rounds", "share", "first"), [(100, 0.1, 91), (5, 0.1, 5), (1, 0.1, 1), (10, 1.0, 1)])
def test_curvature_is_for_the_last_rounds(rounds: int, share: float, first: int, settings: Settings) -> None:
    schedule = workspace.compose(asked(settings, {**CURVED, "curvature_rounds": share})).schedule
    assert [n for n in range(1, rounds + 1) if schedule.probes(n, rounds)] == list(range(first, rounds + 1))
    bare = workspace.compose(asked(settings, {"curvature_rounds": share})).schedule
    assert not any(bare.probes(n, rounds) for n in range(1, rounds + 1))


# What is refused, before anything runs


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"curvature": True}, "method.schedule.curvature: found true without a probe; expected probe: FILE"),
        ({"probe": "public.csv"}, "method.schedule.probe: found 'public.csv' with curvature off"),
        ({**CURVED, "curvature_rounds": 0.0}, "method.schedule.curvature_rounds"),
        ({**CURVED, "probe": "absent.csv"}, r"method.schedule.probe: .*absent.csv: no such file; expected"),
        ({**CURVED, "probe": ""}, r"method.schedule.probe: .*: no such file; expected"),
        ({**CURVED, "probe": "params.yaml"}, r"method.schedule.probe: .*unknown kind of file; expected"),
    ],
)
def test_a_probe_that_is_not_there_is_refused(
    project: Project, settings: Settings, schedule: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        steps.prepare(project, asked(settings, schedule))
    assert not list(project.root.glob("runs/*/run.json"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read"),
        ("text,label\n", "has no records"),
        ("text,sentiment\nfine,good\n", r"no column 'label' \(data.label\)"),
        ("label\ngood\n", r"no column 'text' \(data.text\)"),
        ("text,label\nfine,good\nwarm,godo\n", "label 'godo' is none of the federation's; did you mean 'good'"),
        ("text,label\nfine,good\n ,bad\nwarm,\n", "2 records have an empty text or label"),
    ],
)
def test_a_probe_of_other_records_is_refused(project: Project, settings: Settings, content: str, said: str) -> None:
    (project.root / "public.csv").write_text(content)
    with pytest.raises(SettingsError, match=rf"method.schedule.probe: .*public.csv.*{said}"):
        steps.prepare(project, settings)
    assert not list(project.root.glob("runs/*/run.json"))


def test_the_clients_own_file_is_refused(project: Project, settings: Settings) -> None:
    shutil.copy(settings.data.source, project.root / "public.csv")
    with pytest.raises(SettingsError, match="holds the clients' own records"):
        steps.prepare(project, settings)


@pytest.mark.parametrize("name", ["public.jsonl", "public.parquet"])
def test_the_kind_of_file_does_not_matter(project: Project, settings: Settings, name: str) -> None:
    records = [{"text": "fine warm film", "label": "good"}, {"text": "dull grim plot", "label": "bad"}]
    if name.endswith("jsonl"):
        (project.root / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pa.parquet.write_table(pa.Table.from_pylist(records), project.root / name)
    probe = Workspace(project, asked(settings, {**CURVED, "probe": name})).probe
    assert list(probe.records["text"]) == [record["text"] for record in records]
    assert list(probe.records["label"]) == ["good", "bad"]
    assert len(probe.digest) == 64
