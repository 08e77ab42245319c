"""`runtime.keep_rounds`: what is deleted changes no result, and nothing is deleted that is still read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import fedpipe, new_project
from tiny import make_project, tiny_values

from fedpipe.audits.preparing import prepare_audit
from fedpipe.audits.scores import black_box, white_box
from fedpipe.config import Settings, parse_settings
from fedpipe.data.canaries import AuditSettings
from fedpipe.errors import StateError
from fedpipe.identity import identify
from fedpipe.methods import compose
from fedpipe.project import Project
from fedpipe.publish import publish
from fedpipe.state import Run
from fedpipe.steps import forget_rounds, forgetting, prepare, run_round
from fedpipe.workspace import forget_workspaces, open_workspace

ROUNDS = 6
METHODS: dict[str, dict[str, Any]] = {
    "dp-lora": {},
    "clients that keep their own": {"method": {"name": "fedsa-lora"}},
    "some clients only, who remember": {
        "method": {"name": "interpolate-own"},
        "federation": {"clients_per_round": 2},
    },
    "controls, without privacy": {"method": {"name": "scaffold"}, "privacy": {"unit": "none", "test_key": None}},
    "late updates": {"method": {"name": "fedbuff", "rounds": {"size": 1}}},
    "weights that grow": {"method": {"name": "fedex-lora"}},
    "a secure sum": {"federation": {"secure_aggregation": True}},
    "whole clients": {"privacy": {"unit": "client", "epsilon": 50.0}},
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "project"
    make_project(root)
    return root


def project_of(template: Path, path: Path) -> Project:
    shutil.copytree(template, path)
    return Project(path)


def settings_of(template: Path, keep: int | None, **sections: Any) -> Settings:
    merged = {"method": {"name": "dp-lora"}, **sections}
    merged["federation"] = {"rounds": ROUNDS, "local_steps": 1, "batch_size": 24, **sections.get("federation", {})}
    merged["privacy"] = {"accountant": "rdp", "test_key": "ab" * 32, "epsilon": 8.0, **sections.get("privacy", {})}
    merged["runtime"] = {"device": "cpu", "tokens_per_batch": 256, "keep_rounds": keep}
    return parse_settings(tiny_values(template, **merged))


def finish(project: Project, settings: Settings, last: int = ROUNDS) -> Run:
    run = prepare(project, settings).run
    for number in range(run.completed_rounds() + 1, last + 1):
        run_round(run.root, number)
    return run


def outcome(run: Run, project: Project) -> dict[str, Any]:
    """All that two runs are compared by: what is published, and the rounds' records, seconds left out."""
    records = [run.round_record(number) for number in range(ROUNDS + 1)]
    publish(run, project)
    return {
        "adapter": (project.adapter / "adapter_model.safetensors").read_bytes(),
        "ledger": run.ledger_path.read_bytes() if run.plan.private else b"",
        "records": [{**record, "seconds": None} for record in records],
    }


def tensors(run: Run) -> set[str]:
    return {str(path.relative_to(run.root)) for path in run.root.rglob("*.safetensors")}


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize("name", METHODS)
def test_what_is_deleted_changes_nothing(template: Path, tmp_path: Path, name: str) -> None:
    """Two rounds are kept; the process is a new one in the middle."""
    whole, short = (project_of(template, tmp_path / word) for word in ("whole", "short"))
    run = finish(whole, settings_of(template, None, **METHODS[name]))
    settings = settings_of(template, 2, **METHODS[name])
    finish(short, settings, last=3)
    forget_workspaces()
    forgetting._clean.clear()
    again = finish(short, settings)
    assert tensors(again) < tensors(run)
    assert {place.split("/")[1] for place in tensors(again) if place.startswith("rounds/")} == {"0000", "0005", "0006"}
    named = {entry["file"] for number in (5, 6) for entry in run.round_record(number).get("kept", {}).values()}
    assert {place for place in tensors(again) if place.startswith("clients/") and "kept" in place} == named
    others = {path.relative_to(run.root) for path in run.root.rglob("*.json")}
    assert {path.relative_to(again.root) for path in again.root.rglob("*.json")} == others
    assert outcome(again, short) == outcome(run, whole)


@pytest.mark.usefixtures("fresh_process")
def test_a_state_that_a_late_job_starts_from_is_kept_until_then(template: Path, tmp_path: Path) -> None:
    late = {"method": {"name": "fedbuff", "rounds": {"size": 1, "spread": 2.0}}, "federation": {"rounds": 12}}
    project = project_of(template, tmp_path / "project")
    run = prepare(project, settings_of(template, 2, **late)).run
    until = run.plan.started_until
    assert any(last - start > 3 for start, last in until.items())
    for number in range(1, 13):
        run_round(run.root, number)
        there = {start for start in range(1, number - 1) if run.adapter_path(start).exists()}
        assert there == {start for start, last in until.items() if 0 < start < number - 1 and last > number}


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize("call", range(1, 12, 2))
def test_killed_on_the_way_it_goes_on(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    settings = settings_of(template, 2, method={"name": "fedsa-lora"})
    project = project_of(template, tmp_path / "project")
    calls, unlink = 0, Path.unlink

    def dying(path: Path, missing_ok: bool = False) -> None:
        nonlocal calls
        if path.suffix == ".safetensors" and "updates" not in path.parts:
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            finish(project, settings)
    forget_workspaces()
    forgetting._clean.clear()
    run = finish(project, settings)
    rounds = {place.split("/")[1] for place in tensors(run) if place.startswith("rounds/")}
    assert rounds == {"0000", "0005", "0006"}
    assert len([place for place in tensors(run) if "kept" in place]) == 2 * 3
    publish(run, project)


@pytest.mark.usefixtures("fresh_process")
def test_it_may_be_changed_in_a_run_that_goes_on(template: Path, tmp_path: Path) -> None:
    project = project_of(template, tmp_path / "project")
    first = finish(project, settings_of(template, None), last=4)
    assert len(list(first.root.glob("rounds/*/adapter.safetensors"))) == 5
    run = finish(project, settings_of(template, 3))
    assert run.root == first.root
    assert [path.parent.name for path in sorted(run.root.glob("rounds/*/adapter.safetensors"))] == [
        "0000",
        "0004",
        "0005",
        "0006",
    ]


def test_it_is_no_part_of_a_runs_identity(template: Path) -> None:
    found = {identify(s, compose(s), "data", "backbone").run for s in (settings_of(template, k) for k in (None, 2, 9))}
    assert len(found) == 1


@pytest.mark.usefixtures("fresh_process")
def test_no_round_is_touched_that_is_still_to_be_recorded(template: Path, tmp_path: Path) -> None:
    project = project_of(template, tmp_path / "project")
    run = finish(project, settings_of(template, None))
    finish(project, settings_of(template, 2))  # a complete run: nothing is computed
    for through, left in ((-1, 7), (1, 6), (3, 4), (ROUNDS, 3), (None, 3)):
        forget_rounds(run.root, ROUNDS, through)
        assert len(list(run.root.glob("rounds/*/adapter.safetensors"))) == left


@pytest.mark.usefixtures("fresh_process")
def test_what_is_gone_is_said_to_be(template: Path, tmp_path: Path) -> None:
    project = project_of(template, tmp_path / "project")
    run = finish(project, settings_of(template, 2))
    with pytest.raises(StateError, match=r"0003/adapter\.safetensors: is not kept: runtime\.keep_rounds is 2$"):
        run.state(3)
    kept = run.adapter_path(5)
    kept.unlink()
    with pytest.raises(StateError, match=r"restore it from a copy"):  # of round 4 nothing is left
        run.state(5)
    kept.write_bytes(b"damaged")
    run.adapter_path(6).write_bytes(b"damaged")
    with pytest.raises(StateError, match=r"delete .*0006 and run again: it is computed anew"):
        run.state(6)
    (run.round_dir(4) / "round.json").write_text("damaged")
    with pytest.raises(StateError, match="restore it from a copy: the state before it is no longer kept"):
        run.round_record(4)


@pytest.mark.usefixtures("fresh_process")
def test_a_damaged_last_round_is_computed_anew(template: Path, tmp_path: Path) -> None:
    project = project_of(template, tmp_path / "project")
    settings = settings_of(template, 2, method={"name": "fedsa-lora"})
    run = finish(project, settings)
    state = run.adapter_path(6).read_bytes()
    shutil.rmtree(run.round_dir(6))
    assert finish(project, settings).adapter_path(6).read_bytes() == state


@pytest.mark.usefixtures("fresh_process")
def test_an_audited_run_keeps_all_that_its_audit_reads(template: Path, tmp_path: Path) -> None:
    project = project_of(template, tmp_path / "project")
    run = prepare_audit(project, settings_of(template, 2), AuditSettings(canaries=20)).run
    for number in range(1, ROUNDS + 1):
        run_round(run.root, number)
    assert len(list(run.root.glob("rounds/*/updates/*"))) == 3 * ROUNDS
    _, workspace = open_workspace(run.root)
    assert len(white_box(run, workspace)) == len(black_box(run, workspace)) == 20


@pytest.mark.parametrize("artifacts", [True, False])
def test_mlflow_has_every_round_before_it_goes(tmp_path: Path, artifacts: bool) -> None:
    project = new_project(tmp_path / "project", tracked=True, federation={"rounds": ROUNDS}, runtime={"keep_rounds": 2})
    values = json.loads((project / "params.yaml").read_text())
    values["tracking"]["artifacts"] = artifacts
    (project / "params.yaml").write_text(json.dumps(values))
    done = fedpipe(project, "run")
    assert done.code == 0, done.err
    here = {path.parent.name for path in project.glob("runs/*/rounds/*/adapter.safetensors")}
    assert here == {"0000", "0005", "0006"}
    there = {path.parent.name for path in project.glob("mlruns/**/rounds/*/adapter.safetensors")}
    assert there == ({f"{number:04d}" for number in range(ROUNDS + 1)} if artifacts else set())
    updates = list(project.glob("mlruns/**/rounds/*/updates/*.safetensors"))
    assert len(updates) == (3 * ROUNDS if artifacts else 0)
    assert len(list(project.glob("mlruns/**/adapter/adapter_model.safetensors"))) == 1
    assert fedpipe(project, "run").code == 0
