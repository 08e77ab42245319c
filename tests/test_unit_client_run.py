"""A run of unit `client` on disk: what it releases, what it tells nobody, and what a crash or a change does to it."""

from __future__ import annotations

import json
import logging
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_project

from fedpipe import steps, workspace
from fedpipe.client import training
from fedpipe.client.engine import CohortEngine
from fedpipe.config import Settings, parse_settings
from fedpipe.errors import PrivacyError, StateError
from fedpipe.files import read_sealed, read_tensors, write_sealed
from fedpipe.listing.ledger import shown as ledger_table
from fedpipe.listing.overview import printed
from fedpipe.privacy.accounting import epsilon_rdp
from fedpipe.privacy.ledger import EVERY, Ledger
from fedpipe.privacy.noise import KeyedStream, client_key
from fedpipe.privacy.recompute import verify_ledger
from fedpipe.project import Project
from fedpipe.publish import publish, round_row
from fedpipe.report import write_report
from fedpipe.report.final import evaluate_adapter
from fedpipe.server.central import Release
from fedpipe.state import Run
from fedpipe.steps import aggregating, beginning, drawing, releasing
from flows.describe import describe, round_metrics, summarise

pytestmark = pytest.mark.usefixtures("fresh_process")

CLIENTS, ROUNDS, EXPECTED, C = 6, 3, 3, 0.05
NAMES = tuple(f"c{number:03d}" for number in range(CLIENTS))


class Killed(BaseException):
    """Stands for a process that ends here; nothing catches it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Settings]:
    return make_project(
        tmp_path_factory.mktemp("whole") / "project",
        spread=0.3,
        partition={"clients": CLIENTS},
        federation={"clients_per_round": EXPECTED},
        privacy={"unit": "client", "accountant": "rdp", "delta": 0.01, "clip_norm": C},
        runtime={"cohort_size": 2},
    )


@pytest.fixture(scope="module")
def settings(base: tuple[Project, Settings]) -> Settings:
    return base[1]


@pytest.fixture
def project(base: tuple[Project, Settings], tmp_path: Path) -> Project:
    shutil.copytree(base[0].root, tmp_path / "copy")
    return Project(tmp_path / "copy")


def finish(project: Project, settings: Settings) -> Run:
    """Start or go on, to the end, and publish."""
    workspace.forget_workspaces()
    run = steps.prepare(project, settings).run
    for number in range(run.completed_rounds() + 1, ROUNDS + 1):
        steps.run_round(run.root, number)
    run.finish(publish(run, project))
    return run


def results(project: Project, run: Run) -> dict[str, bytes]:
    files = {name: project.reports / name for name in ("ledger.json", "rounds.csv", "metrics.json")}
    files |= {"adapter": project.adapter / "adapter_model.safetensors", "ledger.jsonl": run.ledger_path}
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.fixture(scope="module")
def reference(
    base: tuple[Project, Settings], settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The results of a run that nothing disturbed."""
    shutil.copytree(base[0].root, (root := tmp_path_factory.mktemp("reference") / "copy"))
    return results(Project(root), finish(Project(root), settings))


def trained(run: Run, number: int) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Begin a round and train it; return what the cohorts returned, and the plan that the server keeps to itself."""
    shown = steps.begin_round(run.root, number)
    cohorts = [steps.train(run.root, number, cohort) for cohort in range(len(shown["cohorts"]))]
    return cohorts, read_sealed(run.work_dir(number) / "plan.json")


def test_a_whole_round_is_the_formula(project: Project, settings: Settings) -> None:
    """From the updates as they lie at the server to the state after the round, written anew."""
    run = steps.prepare(project, settings).run
    for number in (1, 2):
        cohorts, plan = trained(run, number)
        start, updates = run.adapter(number - 1), {}
        for client in sorted(client for members in plan["cohorts"] for client in members):
            updates[client] = read_tensors(run.work_dir(number) / "updates" / f"{client}.safetensors")
        names = sorted(updates[min(updates)]) if updates else sorted(start)
        total = {name: np.zeros(start[name].shape) for name in names}
        for own in updates.values():
            moves = {name: own[name].double().numpy() - start[name].double().numpy() for name in names}
            length = np.sqrt(sum((move**2).sum() for move in moves.values()))
            assert length > C  # or nothing would be clipped here
            for name in names:
                total[name] += moves[name] * (C / length)
        key, sigma = client_key(run.key, EVERY), run.plan.central.noise_multiplier
        expected = {}
        for name in names:
            stream = KeyedStream(key, "noise", plan["query"], number, EVERY, 1, name)
            noisy = total[name] + sigma * C * stream.gaussian(total[name].shape)
            expected[name] = start[name].double().numpy() + noisy / EXPECTED
        aggregated = steps.aggregate(run.root, number, cohorts)
        after = read_tensors(run.adapter_path(number), aggregated["state"])
        for name in names:
            assert after[name].numpy() == pytest.approx(expected[name], abs=1e-6)
        steps.finish_round(run.root, number, aggregated, {}, 1.0)


def test_a_client_trains_without_clipping_and_without_noise(project: Project, settings: Settings) -> None:
    """What it sends is what the same settings without privacy would have trained, on the batches of its own key."""
    run = steps.prepare(project, settings).run
    seen: list[float | None] = []
    usual = CohortEngine.clipped_sums

    def watched(self: CohortEngine, *args: Any, **options: Any) -> Any:
        seen.append(args[4])
        return usual(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CohortEngine, "clipped_sums", watched)
        patch.setattr(training, "_add_noise", lambda *args: pytest.fail("a local step was noised"))
        patch.setattr(drawing, "taking_part", lambda key, query, number, clients, rate: tuple(clients))
        trained(run, 1)
    assert set(seen) == {None}
    assert Ledger(run.ledger_path).entries() == ()


class TestSecrecy:
    """Whoever takes part, and however many: what leaves the server looks the same."""

    def leaves(self, root: Path, settings: Settings, drawn: Sequence[Sequence[str]]) -> dict[str, Any]:
        """Run with these participants; return all that is handed on or lies where it is published from."""
        project, told = Project(root), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drawing, "taking_part", lambda key, query, number, clients, rate: tuple(drawn[number - 1]))
            handler = logging.Handler()
            handler.emit = lambda record: told.append(record.getMessage())
            logging.getLogger("fedpipe").addHandler(handler)
            run = steps.prepare(project, settings).run
            told += [describe(run).param_texts(), describe(run).tag_texts()]
            for number in range(1, ROUNDS + 1):
                begun = steps.begin_round(run.root, number)
                cohorts = [steps.train(run.root, number, cohort) for cohort in range(len(begun["cohorts"]))]
                aggregated = steps.aggregate(run.root, number, cohorts)
                metrics = steps.evaluate_round(run.root, number, aggregated)
                record = steps.finish_round(run.root, number, aggregated, metrics, 0.1)
                # What the flow hands to MLflow: these metrics, and this directory.
                told += [sorted(path.name for path in run.round_dir(number).iterdir())]
                told += [begun, cohorts, aggregated, metrics, record, round_row(record), round_metrics(record)]
            told += [publish(run, project), summarise(run, publish(run, project))]
            evaluate_adapter(project)
            write_report(project)
            told += [printed(lambda width: ledger_table(verify_ledger(run.root)))]
            run.finish({})
            logging.getLogger("fedpipe").removeHandler(handler)
        files = {path for path in root.rglob("*") if path.is_file() and "data" not in path.parts}
        assert not (run.root / "confidential").exists()
        return {
            "exact": [
                {
                    name: record[name]
                    for name in ("seconds", "simulated_seconds", "bytes_up", "bytes_down", "epsilon_max")
                }
                for record in map(run.round_record, range(1, ROUNDS + 1))
            ],
            "told": skeleton(json.loads(json.dumps(told))),
            "files": sorted(str(path.relative_to(root)) for path in files),
            "texts": {
                str(path.relative_to(root)): skeleton(path.read_text())
                for path in files
                if path.suffix in (".json", ".jsonl", ".csv", ".html")
            },
            "naming": {
                str(path.relative_to(root))
                for path in files
                if re.search(rb"(?<![0-9a-f])c00[0-5](?![0-9a-f])", path.read_bytes())
            },
            "run": run.root.relative_to(root),
        }

    def test_nothing_tells_who_took_part(
        self, base: tuple[Project, Settings], settings: Settings, tmp_path: Path
    ) -> None:
        some, other = [NAMES[:2], NAMES[1:2], NAMES[4:]], [NAMES, (), NAMES[:5]]
        found = []
        for place, drawn in enumerate((some, other)):
            shutil.copytree(base[0].root, tmp_path / str(place) / "copy")
            found.append(self.leaves(tmp_path / str(place) / "copy", settings, drawn))
            workspace.forget_workspaces()
        assert found[0]["told"] == found[1]["told"]
        assert found[0]["exact"] == found[1]["exact"]
        assert found[0]["files"] == found[1]["files"]
        assert found[0]["texts"] == found[1]["texts"]
        # The run's plan lists all clients, whoever takes part.
        for each in found:
            assert each["naming"] <= {str(each["run"] / "plan.json")}

    def test_what_tells_it_is_for_the_owner_only_and_gone_afterwards(
        self, project: Project, settings: Settings
    ) -> None:
        run = steps.prepare(project, settings).run
        cohorts, _ = trained(run, 1)
        directory = run.work_dir(1)
        assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700
        assert {path.name for path in directory.iterdir()} >= {"plan.json", "cohort-00.json", "cohort-01.json"}
        assert not run.round_dir(1).exists()
        steps.finish_round(run.root, 1, steps.aggregate(run.root, 1, cohorts), {}, 1.0)
        assert not directory.exists()
        assert sorted(path.name for path in run.round_dir(1).iterdir()) == ["adapter.safetensors", "round.json"]

    def test_a_directory_that_others_may_enter_is_refused(self, project: Project, settings: Settings) -> None:
        run = steps.prepare(project, settings).run
        (run.root / "confidential").mkdir(mode=0o700)
        (run.root / "confidential").chmod(0o755)
        with pytest.raises(PrivacyError, match="others may enter"):
            steps.begin_round(run.root, 1)

    def test_a_cohorts_digest_cannot_be_found_by_trying(self, project: Project, settings: Settings) -> None:
        """An empty cohort's file would be known but for its salt."""
        run = steps.prepare(project, settings).run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drawing, "taking_part", lambda key, query, number, clients, rate: ())
            trained(run, 1)
        salts = {read_sealed(run.work_dir(1) / f"cohort-{cohort:02d}.json")["salt"] for cohort in (0, 1)}
        assert len(salts) == 2
        assert min(map(len, salts)) == 64


def skeleton(value: Any) -> Any:
    """What is left of a value without its numbers and digests."""
    if isinstance(value, dict):
        return {key: skeleton(item) for key, item in value.items()}
    if isinstance(value, list):
        return [skeleton(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return "N"
    # Paths of pictures differ in length with what they draw.
    text = re.sub(r"<svg.*?</svg>", "SVG", str(value), flags=re.DOTALL)
    return re.sub(
        r"[0-9a-f]{8,}|-?\d[\d.e,:-]*|<strong>.*?</strong>",
        "N",
        re.sub(r"The accuracy cannot.*?</p>", "", text, flags=re.DOTALL),
    )


class TestDiverged:
    """A client that is no number counts as nothing, stops nothing, and moves nobody else."""

    def poisoned(self, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
        usual = training.Optimizer.step
        cohorts: list[tuple[str, ...]] = []
        begun = training._check_planned
        monkeypatch.setattr(
            training, "_check_planned", lambda work, *args: (cohorts.append(work.clients), begun(work, *args))
        )

        def step(self: Any, state: Any, gradients: Any, active: Any) -> None:
            usual(self, state, gradients, active)
            if victim in cohorts[-1]:
                state[active[0].name][cohorts[-1].index(victim)] = torch.nan

        monkeypatch.setattr(training.Optimizer, "step", step)

    @pytest.mark.parametrize("filter", ["binomial5", "precondition"])
    def test_others_send_what_they_would_have_sent(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: Any, filter: str
    ) -> None:
        values = settings.model_dump(mode="json")
        values["method"]["filter"] = filter
        values["runtime"]["cohort_size"] = 6
        run = steps.prepare(project, parse_settings(values)).run
        monkeypatch.setattr(drawing, "taking_part", lambda key, query, number, clients, rate: tuple(clients))
        trained(run, 1)
        updates = run.work_dir(1) / "updates"
        sound = {path.stem: path.read_bytes() for path in updates.iterdir()}
        shutil.rmtree(run.work_dir(1))
        self.poisoned(monkeypatch, "c002")
        cohorts, _ = trained(run, 1)
        after = {path.stem: path.read_bytes() for path in updates.iterdir()}
        assert {name for name in NAMES if after[name] != sound[name]} == {"c002"}
        assert all(t.isnan().all() for t in read_tensors(updates / "c002.safetensors").values())
        record = steps.finish_round(run.root, 1, steps.aggregate(run.root, 1, cohorts), {}, 1.0)
        assert record["refused"] == {}
        assert not [entry for entry in caplog.records if "c002" in entry.getMessage()]


class TestLedger:
    def test_one_line_a_round_that_adds_up(
        self, project: Project, settings: Settings, reference: dict[str, bytes]
    ) -> None:
        run = finish(project, settings)
        central = run.plan.central
        entries = Ledger(run.ledger_path).entries()
        assert [(e.client, e.round, e.step) for e in entries] == [(EVERY, number, 1) for number in (1, 2, 3)]
        assert {(e.sigma, e.q) for e in entries} == {(central.noise_multiplier, EXPECTED / CLIENTS)}
        spent = epsilon_rdp([(central.noise_multiplier, EXPECTED / CLIENTS, ROUNDS)], 0.01)
        verified = verify_ledger(run.root)
        assert verified.largest[1] == spent == run.round_record(ROUNDS)["epsilon_max"] <= 8
        assert (verified.unit, verified.adjacency, verified.kept) == (
            "client",
            "add/remove one client with all its records",
            True,
        )
        assert results(project, run) == reference

    def test_the_line_is_on_disk_before_the_sum(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = steps.prepare(project, settings).run
        cohorts, _ = trained(run, 1)
        assert Ledger(run.ledger_path).entries() == ()

        def killed(*args: Any) -> None:
            assert len(Ledger(run.ledger_path).entries()) == 1
            raise Killed

        monkeypatch.setattr(Release, "of", killed)
        with pytest.raises(Killed):
            steps.aggregate(run.root, 1, cohorts)

    def test_a_ledger_that_lacks_a_round_stops_the_run(self, project: Project, settings: Settings) -> None:
        run = steps.prepare(project, settings).run
        before = run.ledger_path.read_bytes()
        steps.run_round(run.root, 1)
        run.ledger_path.write_bytes(before)
        with pytest.raises(PrivacyError):
            steps.begin_round(run.root, 2)

    def test_a_round_under_another_query_is_counted_and_the_budget_is_the_runs(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = steps.prepare(project, settings).run
        cohorts, first = trained(run, 1)
        steps.aggregate(run.root, 1, cohorts)
        monkeypatch.setattr(beginning, "key_id", lambda key: "another query")
        with pytest.raises(StateError, match="run the same command again"):
            steps.aggregate(run.root, 1, cohorts)  # its noise is for the query that was planned
        again = steps.begin_round(run.root, 1)
        assert again["query"] != first["query"]
        for number in range(1, ROUNDS + 1):
            record = steps.run_round(run.root, number)
        assert len(Ledger(run.ledger_path).entries()) == ROUNDS
        assert record["skipped"] == "no client has budget left for it"
        assert record["state"] == run.round_record(ROUNDS - 1)["state"]
        assert record["epsilon_max"] <= run.plan.epsilon
        assert (record["bytes_up"], record["clients"]) == (0, {})


class TestResume:
    @pytest.mark.parametrize(
        ("module", "name", "call"),
        [
            (beginning, "write_sealed", 1),
            (steps.training, "write_tensors", 2),
            (releasing, "released_round", 0),
            (releasing, "write_tensors", 0),
            (aggregating, "write_sealed", 0),
            (aggregating, "forget_work", 0),
        ],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )
    def test_the_same_bytes_after_a_crash(
        self,
        project: Project,
        settings: Settings,
        reference: dict[str, bytes],
        module: Any,
        name: str,
        call: int,
    ) -> None:
        usual: Callable[..., Any] = getattr(module, name)
        left = [call]

        def killed(*args: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return usual(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(Killed):
                finish(project, settings)
        run = finish(project, settings)
        assert results(project, run) == reference
        assert not (run.root / "confidential").exists()

    def test_a_step_that_is_called_again_changes_nothing(
        self, project: Project, settings: Settings, reference: dict[str, bytes]
    ) -> None:
        run = steps.prepare(project, settings).run
        for number in range(1, ROUNDS + 1):
            (cohorts, _), again = trained(run, number), trained(run, number)
            assert again[0] == cohorts
            aggregated = steps.aggregate(run.root, number, cohorts)
            assert steps.aggregate(run.root, number, cohorts) == aggregated
            metrics = steps.evaluate_round(run.root, number, aggregated)
            record = steps.finish_round(run.root, number, aggregated, metrics, 1.0)
            assert steps.finish_round(run.root, number, aggregated, metrics, 2.0) == record
        run.finish(publish(run, project))
        assert results(project, run) == reference

    @pytest.mark.parametrize("size", [1, 6])
    def test_cohorts_of_another_size_take_the_same_clients(
        self, project: Project, settings: Settings, size: int
    ) -> None:
        """More may be drawn than fit a cohort; they are trained one after the other."""
        values = settings.model_dump(mode="json")
        members = []
        for each in (2, size):
            values["runtime"]["cohort_size"] = each
            run = steps.prepare(project, parse_settings(values)).run
            _, plan = trained(run, 1)
            members.append(sorted(client for cohort in plan["cohorts"] for client in cohort))
            assert len(plan["cohorts"]) == -(-EXPECTED // each)
            shutil.rmtree(run.work_dir(1))
            workspace.forget_workspaces()
        assert members[0] == members[1]


def test_a_plan_that_was_edited_is_refused(project: Project, settings: Settings) -> None:
    """Other participants under the same noise would be a second sum."""
    run = steps.prepare(project, settings).run
    cohorts, plan = trained(run, 1)
    listed = [client for members in plan["cohorts"] for client in members]
    for name in NAMES:  # one more, or one less
        changed = sorted({*listed} ^ {name})
        write_sealed(run.work_dir(1) / "plan.json", {**plan, "cohorts": [changed, []]})
        with pytest.raises(StateError):
            steps.aggregate(run.root, 1, cohorts)
        (run.work_dir(1) / "cohort-00.json").unlink(missing_ok=True)
        with pytest.raises(StateError, match="was edited: cohorts"):
            steps.train(run.root, 1, 0)
    assert Ledger(run.ledger_path).entries() == ()
