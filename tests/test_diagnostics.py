"""Training losses under `privacy.diagnostics`: right, apart from all else, marked everywhere, and absent without it."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fedpipe, new_project
from mlflow import MlflowClient
from small import CPU, make_records
from test_steps import finish
from tiny import make_backbone

from fedpipe import identity, steps, workspace
from fedpipe.client.audited import WithoutRecords
from fedpipe.client.batching import Budget
from fedpipe.client.diagnostics import StepLosses, TrainingLosses
from fedpipe.client.engine import CohortEngine
from fedpipe.client.reference import OpacusEngine
from fedpipe.config import LoraSettings, Settings, parse_settings
from fedpipe.files import read_json, read_sealed, read_tensors
from fedpipe.methods import compose
from fedpipe.models.lora import AdaptedModel, build_model
from fedpipe.models.source import Backbone
from fedpipe.models.task import TextClassification
from fedpipe.project import Project
from fedpipe.report import write_report
from fedpipe.report.final import evaluate_adapter
from fedpipe.report.summary import RunHeader, header_lines, summary_rows
from flows.describe import describe, header, round_metrics, summarise

pytestmark = pytest.mark.usefixtures("fresh_process")

BATCHES = [np.array([0, 2, 5]), np.array([], dtype=np.int64), np.array([1, 3, 4, 6])]


@pytest.fixture(scope="module")
def settings(tiny: tuple[Project, Settings]) -> Settings:
    return changed(tiny[1], accountant="rdp")


def changed(settings: Settings, **privacy: Any) -> Settings:
    values = settings.model_dump(mode="json")
    values["privacy"] |= privacy
    values["federation"]["rounds"] = 2
    return parse_settings(values)


def copied(tiny: tuple[Project, Settings], path: Path) -> Project:
    shutil.copytree(tiny[0].root, path)
    return Project(path)


@pytest.fixture
def project(tiny_copy: Project) -> Project:
    return tiny_copy


# The engines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    directory = make_backbone(tmp_path_factory.mktemp("backbone") / "model", spread=0.3)
    backbone = Backbone(directory, "0" * 64, "tiny", {})
    return build_model(backbone, TextClassification(("bad", "good")), LoraSettings(rank=2, alpha=4.0), 0)


def random_state(model: AdaptedModel, clients: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {s.name: 0.3 * torch.randn(clients, *s.shape, generator=generator) for s in model.specs}


def naive_losses(model: AdaptedModel, state: dict[str, torch.Tensor], row: int, records: Any) -> np.ndarray:
    """Each record alone, through the plain model with the client's adapter put into it."""
    with torch.no_grad():
        for spec in model.specs:
            model.model.get_submodule(spec.module).get_parameter(spec.parameter).copy_(state[spec.name][row])
        found = []
        for record in range(len(records)):
            inputs, labels = records.batch(np.array([record]), CPU)
            logits = model.model(**inputs).logits[0].double()
            found.append(float(torch.logsumexp(logits, 0) - logits[labels[0]]))
    return np.array(found)


@pytest.mark.parametrize("engine", ["cohort", "cohort in threads", "opacus"])
@pytest.mark.parametrize("tokens", [8, 512])
def test_each_records_loss_is_that_of_its_own_clients_model(model: AdaptedModel, engine: str, tokens: int) -> None:
    records, state = make_records(3), random_state(model, 3)
    if engine == "opacus":
        computing: Any = OpacusEngine(model, CPU, "fp32", Budget(tokens))
    else:
        models = [model.to_batched() for _ in range(3 if "threads" in engine else 1)]
        computing = CohortEngine(models, CPU, "fp32", Budget(tokens))
    losses, specs = StepLosses(), list(model.specs)
    with_losses = computing.clipped_sums(state, records, BATCHES, specs, 0.5, losses=losses)
    without = computing.clipped_sums(state, records, BATCHES, specs, 0.5)
    assert all(torch.equal(with_losses[name], without[name]) for name in without)
    assert [len(values) for values in losses.by_client] == [3, 0, 4]
    for row, (batch, values) in enumerate(zip(BATCHES, losses.by_client, strict=True)):
        np.testing.assert_allclose(values, naive_losses(model, state, row, records[row])[batch], rtol=0, atol=2e-6)


def test_they_cost_no_second_forward_pass(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    records, state, passes = make_records(3), random_state(model, 3), []
    forward = AdaptedModel.forward
    monkeypatch.setattr(AdaptedModel, "forward", lambda self, inputs: passes.append(1) or forward(self, inputs))
    engine = CohortEngine(model.to_batched(), CPU, "fp32", 64)
    engine.clipped_sums(state, records, BATCHES, list(model.specs), 0.5)
    once = len(passes)
    engine.clipped_sums(state, records, BATCHES, list(model.specs), 0.5, losses=StepLosses())
    assert (once > 0, len(passes)) == (True, 2 * once)


def test_records_that_an_audit_leaves_out_have_none(model: AdaptedModel) -> None:
    records, state, losses = make_records(3), random_state(model, 3), StepLosses()
    absent = [np.array([2]), np.array([], dtype=np.int64), np.array([1, 6])]
    engine = WithoutRecords(CohortEngine(model.to_batched(), CPU, "fp32", 64), absent)
    engine.clipped_sums(state, records, BATCHES, list(model.specs), 0.5, losses=losses)
    assert [len(values) for values in losses.by_client] == [2, 0, 2]
    assert all(np.isfinite(values).all() for values in losses.by_client)


def test_the_mean_is_over_records_and_not_over_steps() -> None:
    total = TrainingLosses(3)
    for batches, values in (([3, 0, 1], [1.0, 2.0, 3.0, 9.0]), ([1, 0, 1], [10.0, np.inf])):
        step = StepLosses()
        step.begin([np.arange(n) for n in batches])
        step.at(np.arange(len(values))[::-1].copy())(torch.tensor(values[::-1]))
        total.add(step)
    assert [total.mean(row) for row in range(3)] == [4.0, None, None]  # not 6; nothing drawn; not finite


# The run


def test_they_do_not_touch_the_training_and_make_another_run_of_the_same_query(
    tiny: tuple[Project, Settings], settings: Settings, tmp_path: Path
) -> None:
    runs, projects = [], [copied(tiny, tmp_path / name) for name in ("off", "on")]
    for project, wanted in zip(projects, (False, True), strict=True):
        runs.append(finish(project, changed(settings, diagnostics=wanted)))
        workspace.forget_workspaces()
    off, on = runs
    assert off.info["run_id"] != on.info["run_id"]
    assert off.info["query"] == on.info["query"]
    assert identity.changed_keys(off.info["parts"], on.info["parts"]) == ["diagnostics: False -> True"]
    for number in (1, 2):
        assert off.round_record(number)["query"] == on.round_record(number)["query"]
        for client in off.plan.clients:
            file = f"updates/{client}.safetensors"
            assert (off.round_dir(number) / file).read_bytes() == (on.round_dir(number) / file).read_bytes()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (projects[0].adapter / name).read_bytes() == (projects[1].adapter / name).read_bytes()
    assert [e.release for e in off.ledger.entries()] == [e.release for e in on.ledger.entries()]


@pytest.mark.parametrize(("unit", "engine"), [("record", "cohort"), ("record", "opacus"), ("none", "cohort")])
def test_a_round_records_the_losses_of_the_records_that_its_steps_drew(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, unit: str, engine: str
) -> None:
    """Against all losses that the task computed while a client trained, by whatever way."""
    values = changed(settings, diagnostics=True, unit=unit).model_dump(mode="json")
    values["runtime"] |= {"cohort_size": 1, "engine": engine}
    values["method"]["name"] = "la-lora" if unit == "record" else "fedit"
    run = steps.prepare(project, parse_settings(values)).run
    seen: list[float] = []
    original = TextClassification.losses

    def watched(self: TextClassification, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        losses = original(self, outputs, labels)
        found = losses.detach().double().tolist()
        alone = len(found) == 2 and len(set(found)) == 1  # a batch of one record is computed as two
        seen.extend(found[:1] if alone else found)
        return losses

    plan, expected, listed = steps.begin_round(run.root, 1), {}, []
    for cohort, (client,) in enumerate(plan["cohorts"]):
        workspace.open_workspace(run.root)[1].budget  # noqa: B018 (found by trying, with losses of its own)
        monkeypatch.setattr(TextClassification, "losses", watched)
        listed.append(steps.train(run.root, 1, cohort))
        monkeypatch.setattr(TextClassification, "losses", original)
        expected[client] = sum(seen) / len(seen)
        seen.clear()
    aggregated = steps.aggregate(run.root, 1, listed)
    record = steps.finish_round(run.root, 1, aggregated, steps.evaluate_round(run.root, 1, aggregated), 0.1)
    assert record["diagnostics"]["clients"] == pytest.approx(expected, rel=1e-12)
    own = list(record["diagnostics"]["clients"].values())
    assert record["diagnostics"]["metrics"] == {
        "diagnostics/train_loss": pytest.approx(sum(own) / len(own)),
        "diagnostics/train_loss_max": max(own),
    }
    assert not any("diagnostics" in key for key in record["metrics"])
    logged = round_metrics(record)
    assert logged["nonprivate/train_loss"] == record["diagnostics"]["metrics"]["diagnostics/train_loss"]
    assert [name for name in logged if "train_loss" in name] == ["nonprivate/train_loss", "nonprivate/train_loss_max"]


def test_a_round_trained_again_after_a_crash_has_the_same_ones(project: Project, settings: Settings) -> None:
    wanted = changed(settings, diagnostics=True)
    first = finish(project, wanted).round_record(2)["diagnostics"]
    shutil.rmtree(project.runs)
    workspace.forget_workspaces()
    run = steps.prepare(project, wanted).run
    steps.run_round(run.root, 1)
    plan = steps.begin_round(run.root, 2)
    steps.train(run.root, 2, 0)
    workspace.forget_workspaces()
    assert len(plan["cohorts"]) >= 1
    assert steps.run_round(run.root, 2)["diagnostics"] == first


def test_the_run_is_marked_wherever_its_guarantee_is_shown(project: Project, settings: Settings) -> None:
    run = finish(project, changed(settings, diagnostics=True, test_key=None))
    assert run.dp_valid  # the adapter's guarantee holds, against who does not see the losses
    for name in ("metrics", "ledger"):
        content = read_json(project.reports / f"{name}.json")
        assert (content["dp_valid"], content["diagnostics"]) == (True, True)
    rounds = read_json(project.reports / "run.json")["diagnostics"]
    assert [row["round"] for row in rounds] == [1, 2]
    assert sorted(rounds[0]["clients"]) == ["c000", "c001", "c002"]
    described = describe(run)
    assert (described.tags["dp_valid"], described.tags["fedpipe.diagnostics"]) == ("true", "true")
    metrics = read_json(project.reports / "metrics.json")
    assert "epsilon does not cover them" in summarise(run, metrics)
    assert header_lines(header(run))[-1].startswith("DIAGNOSTICS: ")
    assert "no epsilon covers them" in dict(summary_rows(header(run), metrics))["diagnostics"]
    evaluate_adapter(project)
    page = write_report(project).read_text()
    box = re.search(r'<div class="alarm" id="diagnostics".*?</table>', page, re.DOTALL)[0]
    assert "not protected by epsilon" in box
    assert box.count("<tr>") == 3
    assert 'href="#diagnostics"' in page
    assert "This run is NOT private" not in page


def spelled(losses: list[float]) -> list[bytes]:
    texts = [form for loss in losses for form in (repr(loss), f"{loss:.6f}", f"{loss:.6g}")]
    return [text.encode() for text in texts] + [struct.pack(order, loss) for loss in losses for order in ("<d", ">d")]


def test_without_them_no_file_holds_a_training_loss(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that keeps them tells what to look for: the other one computes the same numbers."""
    on = finish(project, changed(settings, diagnostics=True))
    losses = [loss for number in (1, 2) for loss in on.round_record(number)["diagnostics"]["clients"].values()]
    losses += [on.round_record(number)["diagnostics"]["metrics"]["diagnostics/train_loss"] for number in (1, 2)]
    assert len(set(losses)) == 8
    present = [path for path in on.root.rglob("*.json") if repr(losses[0]).encode() in path.read_bytes()]
    assert {path.name for path in present} == {"round.json", "cohort-00.json"}  # the search finds them
    shutil.rmtree(project.runs)
    workspace.forget_workspaces()
    off = finish(project, settings)
    evaluate_adapter(project)
    write_report(project)
    for path in (*off.root.rglob("*"), *project.reports.rglob("*"), *project.adapter.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            assert not any(form in content for form in spelled(losses)), path
            assert b"train_loss" not in content, path
    for path in off.root.rglob("cohort-*.json"):
        assert all("diagnostics" not in entry for entry in read_sealed(path)["updates"].values())
    for number in (0, 1, 2):
        assert "diagnostics" not in off.round_record(number)
        assert not [name for name in round_metrics(off.round_record(number)) if "nonprivate" in name]
    for path in off.root.rglob("*.safetensors"):
        assert not [name for name in read_tensors(path) if "loss" in name]
    assert read_json(project.reports / "run.json")["diagnostics"] is None
    assert read_json(project.reports / "ledger.json")["diagnostics"] is False
    assert 'id="diagnostics"' not in (project.reports / "report.html").read_text()
    assert describe(off).tags["fedpipe.diagnostics"] == "false"


def test_the_setting_binds_no_noise_and_names_a_run(tiny: tuple[Project, Settings]) -> None:
    settings = tiny[1]
    off, on = (
        identity.identify(changed(settings, diagnostics=value), compose(settings), "d", "b") for value in (False, True)
    )
    assert (off.query == on.query, off.run == on.run) == (True, False)


@pytest.mark.parametrize("wanted", [True, False])
def test_mlflow_has_them_under_names_of_their_own_or_not_at_all(tmp_path: Path, wanted: bool) -> None:
    project = new_project(
        tmp_path / "project", tracked=True, federation={"rounds": 1}, privacy={"test_key": None, "diagnostics": wanted}
    )
    done = fedpipe(project, "run")
    assert done.code == 0, done.err
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.tags["fedpipe.diagnostics"] == json.dumps(wanted)
    assert run.data.tags["dp_valid"] == "true"
    named = {name for name in run.data.metrics if "train_loss" in name}
    assert named == ({"nonprivate/train_loss", "nonprivate/train_loss_max"} if wanted else set())
    assert ("DIAGNOSTICS: " in done.err) is wanted
    assert ("diagnostics " in done.out) is wanted


def test_the_header_says_nothing_of_what_is_off() -> None:
    assert len(header_lines(RunHeader("r", "m", 4, 12, 0, 8.0, "cpu", True))) == 1
