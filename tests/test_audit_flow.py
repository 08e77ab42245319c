"""Audits from end to end: canaries, their coins, what attacks see of them, and what is done about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from commands import Fault, fedpipe, new_project, prefect
from report_sample import write_sample
from small import CPU, make_model, make_records, random_state
from tiny import make_backbone, tiny_values, write_records

from fedpipe import steps
from fedpipe.audits import verdict
from fedpipe.audits.membership import attacked, membership
from fedpipe.audits.preparing import prepare_audit
from fedpipe.audits.scores import Moves, white_box
from fedpipe.client import training
from fedpipe.client.audited import WithoutRecords
from fedpipe.client.engine import CohortEngine
from fedpipe.config import Settings, parse_settings
from fedpipe.data.canaries import AuditSettings, parse_audit
from fedpipe.data.federation import Federation, write_partition
from fedpipe.data.sources import fetch_data
from fedpipe.errors import AuditError, DataError, FedpipeError, SettingsError, StateError
from fedpipe.files import read_json, write_json
from fedpipe.models.source import fetch_backbone
from fedpipe.models.task import Encoded
from fedpipe.project import Project
from fedpipe.publish import publish
from fedpipe.report import write_report
from fedpipe.state import Run
from fedpipe.steps.canaries import coins_of
from fedpipe.workspace import Workspace, open_workspace

# Words that no ordinary record has, and a wide model: without noise, its moves tell the canaries apart.
WORDS = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in "bdgklmnprst"]
SHARP: dict[str, Any] = {
    "lora": {"rank": 8, "alpha": 16.0},
    "federation": {"rounds": 3, "local_steps": 1, "batch_size": 2000},
    "partition": {"scheme": "iid", "clients": 2, "min_records": 20},
    "method": {"name": "ffa-lora"},
    "privacy": {"epsilon": 0.5, "test_key": None},
}
AUDIT = AuditSettings(canaries=192)


def laid_over(*layers: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    return found


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "project"
    root.mkdir()
    write_records(root / "records.csv", records=160)
    make_backbone(root / "backbone", spread=0.3, hidden=64, words=WORDS)
    return root


def make(template: Path, root: Path, **sections: Any) -> tuple[Project, Settings]:
    """Make a project with a partition from the template."""
    shutil.copytree(template, root)
    settings = parse_settings(laid_over(tiny_values(root), SHARP, {"data": {"test_fraction": 0.5}}, sections))
    project = Project(root)
    fetch_data(settings.data, project.raw)
    fetch_backbone(settings.model.backbone, project.backbone)
    write_partition(settings, project.raw, project.partition)
    return project, settings


@pytest.fixture(scope="module")
def sharp(template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Settings]:
    return make(template, tmp_path_factory.mktemp("sharp") / "project")


def trained(run: Run) -> tuple[Run, Workspace]:
    for number in range(run.completed_rounds() + 1, run.plan.rounds + 1):
        steps.run_round(run.root, number)
    return open_workspace(run.root)


def audit(project: Project, settings: Settings, asked: AuditSettings = AUDIT) -> tuple[Run, dict[str, Any]]:
    """Run an audit without Prefect; return its run and result."""
    run, workspace = trained(prepare_audit(project, settings, asked).run)
    inferred = membership(*attacked(run, workspace), seed=0)
    return run, verdict.conclude(run.root, verdict.score(run.root), inferred)


class TestCanaries:
    def test_they_stand_behind_the_records_of_chosen_clients_and_nothing_else_changes(
        self, sharp: tuple[Project, Settings]
    ) -> None:
        project, settings = sharp
        opened = prepare_audit(project, settings, AuditSettings(canaries=40, clients=["c001"]))
        plain = Federation.open(project.partition)
        dealt = Federation.open(Project(opened.run.root.parents[1]).partition)
        assert dealt.canaries == {"c001": [plain.sizes["c001"], 40]}
        assert dealt.sizes == {"c000": plain.sizes["c000"], "c001": plain.sizes["c001"] + 40}
        assert dealt.client("c000").to_list() == plain.client("c000").to_list()
        assert dealt.client("c001").to_list()[:-40] == plain.client("c001").to_list()
        assert dealt.test().to_list() == plain.test().to_list()
        assert plain.canaries == {}
        texts = [record["text"] for record in dealt.client("c001").to_list()[-40:]]
        assert len(set(texts)) == 40
        assert not set(texts) & {record["text"] for record in plain.client("c001").to_list()}

    def test_they_are_a_function_of_their_seed(self, template: Path, tmp_path: Path) -> None:
        found = []
        for number, seed in enumerate([0, 0, 1]):
            project, settings = make(template, tmp_path / f"p{number}")
            run = prepare_audit(project, settings, AuditSettings(canaries=20, seed=seed)).run
            partition = Project(run.root.parents[1]).partition
            found.append([(partition / f"{name}.arrow").read_bytes() for name in ("c000", "c001", "test")])
        assert found[0] == found[1]
        assert found[0][0] != found[2][0]
        assert found[0][2] == found[2][2]

    def test_mislabelled_ones_leave_the_test(self, sharp: tuple[Project, Settings]) -> None:
        project, settings = sharp
        run = prepare_audit(project, settings, AuditSettings(canaries=16, kind="mislabelled")).run
        plain, dealt = Federation.open(project.partition), Federation.open(Project(run.root.parents[1]).partition)
        true = [(record["text"], record["label"]) for record in plain.test().to_list()]
        canaries = [r for c, (first, _) in dealt.canaries.items() for r in dealt.client(c).to_list()[first:]]
        assert len(canaries) == 16
        for canary in canaries:
            assert (canary["text"], {"good": "bad", "bad": "good"}[canary["label"]]) in true
        assert len(dealt.test()) == len(plain.test()) - 16

    def test_an_audit_and_a_run_never_meet(self, sharp: tuple[Project, Settings]) -> None:
        project, settings = sharp
        run = prepare_audit(project, settings, AUDIT).run
        inner = Project(run.root.parents[1])
        assert inner.root.is_relative_to(project.runs / "audits")
        with pytest.raises(DataError, match=r"found an audit's canaries, expected none"):
            steps.prepare(inner, settings)
        with pytest.raises(DataError, match=r"found no canaries, expected an audit's partition"):
            steps.prepare(project, settings, audit=True)
        with pytest.raises(StateError, match=r"canaries of an audit; its adapter is not released"):
            publish(run, inner)
        assert not inner.adapter.exists()
        other = prepare_audit(project, settings, AuditSettings(canaries=194))
        assert (
            other.run.info["identity"] != run.info["identity"] != steps.prepare(project, settings).run.info["identity"]
        )

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"canaries": 5}, "audit: canaries: found 5; expected .* 16"),
            ({"kind": "randon"}, "audit: kind: found 'randon'; did you mean 'random'"),
            ({"gueses": 3}, "audit: gueses: unknown key; did you mean 'guesses'"),
            ({"canaries": 40, "guesses": 21}, "found 21 for each answer; with 40 canaries expected 20 or fewer"),
        ],
    )
    def test_mistakes_in_the_options(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(SettingsError, match=said):
            parse_audit(options)

    @pytest.mark.parametrize(
        ("sections", "asked", "said"),
        [
            ({"privacy": {"unit": "none"}, "method": {"name": "fedit"}}, {}, "privacy.unit: found none; a canary is"),
            ({}, {"clients": ["c01"]}, "audit: no client 'c01'; did you mean"),
            ({}, {"canaries": 90, "kind": "mislabelled"}, "90 mislabelled canaries are asked of 80 test records"),
        ],
    )
    def test_mistakes_in_what_is_asked(
        self, sharp: tuple[Project, Settings], sections: dict[str, Any], asked: dict[str, Any], said: str
    ) -> None:
        project, settings = sharp
        changed = parse_settings(laid_over(settings.model_dump(), sections))
        with pytest.raises(FedpipeError, match=said):
            prepare_audit(project, changed, parse_audit(asked))


class TestCoins:
    def test_the_plan_does_not_know_them_and_the_seed_does_not_make_them(self, template: Path, tmp_path: Path) -> None:
        plans, coins = [], []
        for name in ("one", "two"):
            project, settings = make(template, tmp_path / name)
            run, workspace = open_workspace(prepare_audit(project, settings, AUDIT).run.root)
            plans.append((run.root / "plan.json").read_bytes())
            coins.append(np.concatenate(list(coins_of(run, workspace.federation.canaries).values())))
            own = Federation.open(project.partition)
            for client, (first, count) in workspace.federation.canaries.items():
                plan = run.plan.clients[client]
                assert (first, plan.records) == (own.sizes[client], own.sizes[client] + count)
                assert plan.sampling_rate == plan.expected_batch / plan.records
        assert plans[0] == plans[1]  # same seed, same everything public
        assert 0 < (coins[0] == coins[1]).mean() < 0.7  # but coins of their own
        assert 0.3 < coins[0].mean() < 0.7

    def test_who_is_out_is_never_computed_and_who_is_in_always_may_be(
        self, sharp: tuple[Project, Settings], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project, settings = sharp
        run, workspace = open_workspace(prepare_audit(project, settings, AuditSettings(canaries=60)).run.root)
        met, original = [], CohortEngine.clipped_sums

        def spying(self: CohortEngine, state: Any, records: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
            met.append([set(batch.tolist()) for batch in batches])
            return original(self, state, records, batches, *args, **kwargs)

        monkeypatch.setattr(CohortEngine, "clipped_sums", spying)
        trained(run)
        slots, coins = workspace.federation.canaries, coins_of(run, workspace.federation.canaries)
        assert len(met) == run.plan.rounds
        for batches in met:
            for batch, client in zip(batches, sorted(slots), strict=True):
                first, count = slots[client]
                out = {first + place for place in range(count) if not coins[client][place]}
                # The sampling rate is 1, so the batch is all that may ever be drawn.
                assert batch == set(range(first + count)) - out
                assert out

    def test_the_sums_are_those_of_data_without_the_records_that_are_out(self, tmp_path: Path) -> None:
        model = make_model(tmp_path / "backbone").to_batched()
        records, state = make_records(), random_state(model.specs)
        out = [np.array([1, 5]), np.zeros(0, dtype=np.int64), np.array([0, 10, 11])]
        batches = [np.arange(12), np.array([2, 3]), np.array([0, 4, 11])]
        engine = CohortEngine(model, CPU, "fp32", 64)
        found = WithoutRecords(engine, out).clipped_sums(state, records, batches, model.specs, 0.05)
        left = [
            [records[i].part(j, j + 1) for j in batch if j not in gone]
            for i, (batch, gone) in enumerate(zip(batches, out, strict=True))
        ]
        without = [Encoded.join(parts) for parts in left]
        expected = engine.clipped_sums(state, without, [np.arange(len(w)) for w in without], model.specs, 0.05)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
        full = engine.clipped_sums(state, records, batches, model.specs, 0.05)
        assert any((full[name][0] - found[name][0]).abs().max() > 1e-3 for name in full)

    def test_with_groups_each_canary_is_one_of_its_own(self, template: Path, tmp_path: Path) -> None:
        grouped = {"unit": "group", "group": "topic", "group_records": 40}
        project, settings = make(template, tmp_path / "project", privacy=grouped, data={"group": "topic"})
        run, workspace = open_workspace(prepare_audit(project, settings, AuditSettings(canaries=20)).run.root)
        before = Federation.open(project.partition).groups
        for client, (first, count) in workspace.federation.canaries.items():
            assert run.plan.clients[client].groups == before[client] + count
            mine = workspace.records(client).groups
            assert len(set(mine[first:])) == count
            assert not set(mine[first:]) & set(mine[:first])
        trained(run)
        assert np.isfinite(white_box(run, workspace)).all()


def faint(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Plant a bug: noise of a fraction of the standard deviation that is accounted."""
    original = training._add_noise

    def weaker(sums: Any, work: Any, plans: Any, keys: Any, step: int, clip_norm: float) -> None:
        original(sums, work, plans, keys, step, clip_norm * factor)

    monkeypatch.setattr(training, "_add_noise", weaker)


class TestVerdict:
    def test_a_correct_run_passes(self, sharp: tuple[Project, Settings]) -> None:
        run, result = audit(*sharp)
        assert result["epsilon_claimed"] <= 0.5 < result["ceiling"]
        assert result["epsilon_lower"] <= result["epsilon_claimed"]
        assert result["violated"] is False
        verdict.check(result)
        assert result["epsilon_claimed"] == run.round_record(run.plan.rounds)["epsilon_max"]

    def test_noise_that_is_too_weak_is_caught_by_the_white_box(
        self, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        faint(monkeypatch, 1 / 2000)  # divided by the batch size, as often happened
        _, result = audit(*make(template, tmp_path / "project"))
        assert result["scores"]["white-box"]["bound"] > result["epsilon_claimed"]
        assert result["scores"]["white-box"]["p_value"] < 0.01
        assert result["violated"] is True
        with pytest.raises(AuditError, match=r"epsilon is above \d\.\d+ with confidence 0\.95, but 0\.4\d+ is claimed"):
            verdict.check(result)
        assert AuditError.exit_code == 6

    def test_a_result_holds_no_coins_and_no_record(self, sharp: tuple[Project, Settings]) -> None:
        run, result = audit(*sharp)

        def leaves(value: Any) -> Sequence[Any]:
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
            return [value] if parts is None else [leaf for part in parts for leaf in leaves(part)]

        assert len(leaves(result)) < 60  # numbers of the whole audit, none for each record or canary
        revealed = read_json(run.root / "canaries.json")
        coins = coins_of(run, open_workspace(run.root)[1].federation.canaries)
        assert revealed["coins"] == np.concatenate(list(coins.values())).tolist()

    def test_the_documents_and_the_page_tell_of_it(self, sharp: tuple[Project, Settings], tmp_path: Path) -> None:
        _, result = audit(*sharp)
        text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
        assert all(f"`{name}`" in text for name in verdict.measures(result))
        assert all(
            f"`--{name.rstrip('s') if name == 'clients' else name}`" in text for name in AuditSettings.model_fields
        )
        project = write_sample(tmp_path)
        assert 'id="audit"' not in write_report(project).read_text(encoding="utf-8")
        for violated in (False, True):
            write_json(project.reports / "audit.json", {**result, "violated": violated})
            page = write_report(project).read_text(encoding="utf-8")
            assert 'id="audit"' in page
            assert ("The claimed epsilon is refuted" in page) is violated

    def test_scores_do_not_look_at_the_coins(
        self, sharp: tuple[Project, Settings], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, workspace = trained(prepare_audit(*sharp, AUDIT).run)
        monkeypatch.setattr("fedpipe.privacy.audit.draw_coins", lambda *a, **k: pytest.fail("looked"))
        monkeypatch.setattr("fedpipe.steps.canaries.draw_coins", lambda *a, **k: pytest.fail("looked"))
        assert np.isfinite(white_box(run, workspace)).all()

    @pytest.mark.parametrize("noise", [0.01, 0.3])
    def test_moves_made_of_known_gradients_are_told_apart(self, noise: float) -> None:
        draw = np.random.default_rng(5)
        gradients = draw.normal(size=(40, 600)) / 25 + draw.normal(size=600) / 10  # much in common
        coins = draw.integers(2, size=40).astype(bool)
        moves = 0.2 * coins @ gradients + 0.2 * noise * draw.normal(size=600)
        found = Moves(gradients @ moves, gradients @ gradients.T, 0.2).scores()
        order = np.argsort(found)
        assert coins[order[-10:]].all()
        assert not coins[order[:10]].any()
        if noise == 0.01:
            assert found[coins].min() > found[~coins].max()


def inferred(project: Project, settings: Settings) -> dict[str, Any]:
    return membership(*trained(steps.prepare(project, settings).run), seed=0)


class TestMembership:
    def test_noise_hides_members(self, template: Path, tmp_path: Path) -> None:
        found = inferred(*make(template, tmp_path / "project", privacy={"epsilon": 0.01}))
        assert abs(found["auc"]["value"] - 0.5) < 0.12
        assert found["auc"]["low"] < 0.5 < found["auc"]["high"]
        assert found["tpr"]["0.01"]["allowed"] == pytest.approx(0.0101, abs=1e-4)

    def test_a_model_that_memorised_its_records_shows_them(self, template: Path, tmp_path: Path) -> None:
        root = tmp_path / "project"
        shutil.copytree(template, root)
        lines = (root / "records.csv").read_text().splitlines()
        draw = np.random.default_rng(0)
        for place in range(1, len(lines)):  # labels that nothing but memory gives
            _, _, topic = lines[place].split(",")
            lines[place] = f"{' '.join(draw.choice(WORDS, 6))},{draw.choice(['good', 'bad'])},{topic}"
        (root / "records.csv").write_text("\n".join(lines) + "\n")
        found = inferred(
            *make(
                root,
                tmp_path / "memory",
                partition={"clients": 1},
                federation={"local_steps": 20},
                privacy={"unit": "none"},
                method={"name": "fedit"},
                optimizer={"name": "adamw", "lr": 0.01},
            )
        )
        assert found["auc"]["low"] > 0.6
        assert found["tpr"]["0.01"]["allowed"] is None


def sharp_project(root: Path, template: Path, tracked: bool = False) -> Path:
    """Make a project for commands, with the template's records and backbone."""
    sections = laid_over(SHARP, {"data": {**tiny_values(Path(""))["data"], "test_fraction": 0.5}})
    project = new_project(root, tracked, **sections)
    for name in ("records.csv", "backbone"):
        source, target = template / name, project / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return project


def state_of(project: Path) -> list[str]:
    found = prefect("flow_runs/filter", sort="START_TIME_ASC")
    return [r["state_type"] for r in found if r["parameters"]["params_file"] == str(project / "params.yaml")]


def mlflow_run(project: Path) -> Any:
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return run


class TestCommand:
    def test_a_correct_run_passes_and_goes_on_where_it_was_killed(self, template: Path, tmp_path: Path) -> None:
        project = sharp_project(tmp_path / "project", template, tracked=True)
        killed = fedpipe(project, "audit", "--canaries", "192", fault=Fault("fedpipe.steps", "aggregate", 2))
        assert killed.code == -9
        done = fedpipe(project, "audit", "--canaries", "192")
        assert done.code == 0, done.err
        assert "resumed from round 2" in done.err
        assert "passed: nothing that was tried shows more than the claim" in done.out
        result = read_json(project / "reports" / "audit.json")
        assert f"at least {result['epsilon_lower']:.4f} with confidence 0.95" in done.out
        run = mlflow_run(project)
        assert run.data.tags["fedpipe.audit"] == "passed"
        assert run.info.status == "FINISHED"
        assert run.data.metrics["audit/epsilon_lower"] == result["epsilon_lower"]
        assert run.data.metrics["audit/epsilon_claimed"] == result["epsilon_claimed"]
        assert run.data.metrics["mia/auc"] == result["membership"]["auc"]["value"]
        assert run.data.metrics["privacy/epsilon_max"] == pytest.approx(result["epsilon_claimed"])
        assert state_of(project)[-1] == "COMPLETED"
        assert not (project / "models" / "adapter").exists()
        assert not list(project.rglob("mlruns/**/*.safetensors"))
        assert not list(project.glob("runs/audits/*/runs/*/secrets/*"))
        again = fedpipe(project, "audit", "--canaries", "192")
        assert (again.code, again.out) == (0, done.out)
        assert "all 3 rounds were done before" in again.err

    def test_a_refuted_claim_fails_loudly(self, template: Path, tmp_path: Path) -> None:
        project = sharp_project(tmp_path / "project", template, tracked=True)
        for _ in range(2):  # and it stays refuted
            fault = Fault("fedpipe.client.training", "_add_noise", 1, "SKIP")
            done = fedpipe(project, "audit", "--canaries", "192", fault=fault)
            assert done.code == 6, done.err
            assert len(done.errors) == 1
            assert "must not be called private" in done.errors[0]
            assert "Traceback" not in done.err + done.out
            assert "VIOLATED: the canaries show more than the ledger claims" in done.out
            assert read_json(project / "reports" / "audit.json")["violated"] is True
            run = mlflow_run(project)
            assert (run.info.status, run.data.tags["fedpipe.audit"]) == ("FAILED", "violated")
        assert state_of(project) == ["FAILED", "FAILED"]

    def test_mistakes_are_told_before_anything_starts(self, template: Path, tmp_path: Path) -> None:
        project = sharp_project(tmp_path / "project", template)
        done = fedpipe(project, "audit", "--kind", "randon")
        assert (done.code, done.errors) == (2, ["error: audit: kind: found 'randon'; did you mean 'random'?"])
        assert not (project / "data").exists()
        assert json.loads((project / "params.yaml").read_text())
