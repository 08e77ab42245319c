"""Clients that fail: the others do not notice, reasons are kept, and below the quorum a round is tried again."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fedpipe, new_project
from tiny import make_project
from torch import Tensor

from fedpipe import steps, workspace
from fedpipe.client.engine import CohortEngine
from fedpipe.config import FaultSettings, Settings, parse_settings
from fedpipe.errors import DataError, PrivacyError, QuorumError, SettingsError, SumStoppedError, TrainingError
from fedpipe.files import read_sealed, read_tensors
from fedpipe.methods import compose
from fedpipe.privacy.ledger import Ledger
from fedpipe.project import Project
from fedpipe.publish import publish, round_row
from fedpipe.server.faults import KINDS, STAGES, faults_of, job_seconds, spoilt
from fedpipe.server.scheduling import Demand, Synchronous
from fedpipe.state import Run
from fedpipe.steps import sending
from fedpipe.steps import training as step_training

pytestmark = pytest.mark.usefixtures("fresh_process")

CLIENTS = tuple(f"c{number:03d}" for number in range(4))
HIT = "c001"  # who has the fault


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Settings]:
    return make_project(
        tmp_path_factory.mktemp("faults") / "project",
        partition={"clients": 4},
        federation={"rounds": 2},
        method={"name": "dp-lora"},
        privacy={"accountant": "rdp"},
        runtime={"cohort_size": 2},
    )


def changed(settings: Settings, **sections: dict[str, Any]) -> Settings:
    values = settings.model_dump(mode="json")
    for section, keys in sections.items():
        values[section] |= keys
    return parse_settings(values)


@pytest.fixture
def project(base: tuple[Project, Settings], tmp_path: Path) -> Project:
    """The project's data under another root, so that runs do not meet."""
    for name in ("data", "models", "records.csv", "params.yaml"):
        (tmp_path / name).symlink_to(base[0].root / name)
    return Project(tmp_path)


@pytest.fixture(scope="module")
def settings(base: tuple[Project, Settings]) -> Settings:
    return base[1]


def only(kind: str, monkeypatch: pytest.MonkeyPatch, stage: str = "upload", attempts: int = 99) -> None:
    """Let one client have a fault of this kind, in so many attempts at each round."""

    def drawn(faults: FaultSettings, seed: int, round: int, attempt: int, clients: Any) -> dict[str, sending.Fault]:
        return {HIT: sending.Fault(kind, stage)} if attempt <= attempts and HIT in set(clients) else {}

    monkeypatch.setattr(sending, "faults_of", drawn)


def trained(run: Run, number: int = 1) -> list[dict[str, str]]:
    plan = steps.begin_round(run.root, number)
    return [steps.train(run.root, number, cohort) for cohort in range(len(plan["cohorts"]))]


def sent(run: Run, number: int = 1) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (run.round_dir(number) / "updates").glob("*.safetensors")}


def spent(run: Run) -> Counter[str]:
    return Counter(entry.client for entry in Ledger(run.ledger_path).entries())


class TestDrawn:
    faults = FaultSettings(**dict.fromkeys(KINDS, 0.1))

    def test_the_same_seed_has_the_same_faults_and_another_attempt_others(self) -> None:
        names = [f"c{number:04d}" for number in range(400)]
        first = faults_of(self.faults, 3, 1, 1, names)
        assert faults_of(self.faults, 3, 1, 1, reversed(names)) == first
        assert {c: f for c, f in first.items() if c in names[:9]} == faults_of(self.faults, 3, 1, 1, names[:9])
        for other in ((4, 1, 1), (3, 2, 1), (3, 1, 2)):
            assert faults_of(self.faults, *other, names) != first

    def test_the_probabilities_are_those_asked_for(self) -> None:
        found = faults_of(self.faults, 3, 1, 1, [str(number) for number in range(5000)])
        counts = Counter(fault.kind for fault in found.values())
        assert set(counts) == set(KINDS)
        assert all(abs(count - 500) < 120 for count in counts.values())
        assert {fault.stage for fault in found.values()} == set(STAGES)
        assert faults_of(FaultSettings(), 3, 1, 1, ["c000"]) == {}
        assert faults_of(FaultSettings(nan=1.0), 3, 1, 1, ["c000"])["c000"].kind == "nan"

    def test_more_than_one_fault_for_a_client_is_refused(self) -> None:
        with pytest.raises(SettingsError, match=r"federation\.faults.*add up to 1\.2"):
            parse_settings(
                {"data": {"source": "x"}, "model": {"backbone": "x"}}
                | {"federation": {"faults": {"nan": 0.6, "shape": 0.6}}}
            )

    def test_who_is_late_follows_from_the_speeds_of_the_schedule(self) -> None:
        demand = Demand(CLIENTS, 1, 4, 2, 1, seed=3)
        seconds = job_seconds(Synchronous(), dict.fromkeys(CLIENTS, 2), 3)
        assert max(seconds.values()) == Synchronous().plan(demand).seconds[0]

    def test_a_spoilt_update_leaves_what_it_was_made_of(self) -> None:
        update = {"a": torch.ones(2, 3), "b": torch.ones(4)}
        for kind in ("nan", "shape", "digest", "norm"):
            assert spoilt(update, kind).keys() == update.keys()
            assert all((tensor == 1).all() for tensor in update.values())


REASONS = {
    "exception": r"its training failed \(simulated\)",
    "nan": "not finite",
    "shape": "has shape",
    "digest": "another sha256",
    "norm": "has moved by",
    "vanish": r"sent nothing \(simulated\)",
}


@pytest.mark.parametrize("kind", REASONS)
def test_one_failing_client_costs_its_update_and_nothing_else(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = steps.prepare(project, settings).run
    trained(run)
    honest = sent(run)
    workspace.forget_workspaces()
    for path in run.round_dir(1).glob("cohort-*.json"):
        path.unlink()
    only(kind, monkeypatch)
    listed = trained(run)
    assert trained(run) == listed  # what is complete is not trained again
    assert {c: own for c, own in sent(run).items() if c != HIT} == {c: own for c, own in honest.items() if c != HIT}
    aggregated = steps.aggregate(run.root, 1, listed)
    assert list(aggregated["refused"]) == [HIT]
    assert re.search(REASONS[kind], aggregated["refused"][HIT])
    others = [read_tensors(run.round_dir(1) / "updates" / f"{c}.safetensors") for c in CLIENTS if c != HIT]
    state = read_tensors(run.adapter_path(1))
    for name in others[0]:
        mean = sum(own[name].double() for own in others) / 3
        assert (state[name].double() - mean).abs().max() < 1e-6
    record = steps.finish_round(run.root, 1, aggregated, {"accuracy": 0.5, "loss": 1.0}, 1.0)
    assert spent(run) == dict.fromkeys(CLIENTS, 2)  # it has trained
    assert (round_row(record)["participants"], round_row(record)["refused"]) == (4, 1)
    steps.begin_round(run.root, 2)  # the ledger holds what the record says


def test_a_client_whose_values_are_not_finite_is_left_out(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = steps.prepare(project, settings).run
    trained(run)
    honest = sent(run)
    usual, row, armed = CohortEngine.clipped_sums, CLIENTS.index(HIT) % 2, [True]

    def exploding(self: CohortEngine, *args: Any, **options: Any) -> dict[str, Tensor]:
        sums = usual(self, *args, **options)
        for tensor in sums.values() if armed else ():
            tensor[row] = torch.nan
        armed.clear()  # in the first of its steps; it takes the others, too
        return sums

    for path in run.round_dir(1).glob("cohort-*.json"):
        path.unlink()
    monkeypatch.setattr(CohortEngine, "clipped_sums", exploding)
    aggregated = steps.aggregate(run.root, 1, trained(run))
    assert sent(run) == {c: own for c, own in honest.items() if c != HIT}
    assert "is no longer finite" in aggregated["refused"][HIT]
    assert aggregated["clients"][HIT] == {"weight": 0.0}
    assert spent(run)[HIT] == 2
    steps.finish_round(run.root, 1, aggregated, {}, 1.0)


def test_where_all_diverge_the_run_says_what_to_lower(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exploding(self: CohortEngine, state: dict[str, Tensor], *args: Any, **options: Any) -> dict[str, Tensor]:
        active = args[2]
        return {spec.name: torch.full_like(state[spec.name], torch.inf) for spec in active}

    run = steps.prepare(project, settings).run
    monkeypatch.setattr(CohortEngine, "clipped_sums", exploding)
    found = r"0 usable updates.*c000: diverged: .* no longer finite.*lower optimizer\.lr"
    with pytest.raises(TrainingError, match=found):
        steps.run_round(run.root, 1)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, everybody: bool = False) -> None:
    """Let training raise, of one client or of all."""
    usual = step_training.train_cohort

    def raising(engine: Any, model: Any, work: Any, *args: Any) -> Any:
        if everybody or HIT in work.clients:
            raise error
        return usual(engine, model, work, *args)

    monkeypatch.setattr(step_training, "train_cohort", raising)


def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one client's records be damaged."""
    usual = step_training.records_of

    def damaged(run: Run, opened: Any, client: str) -> Any:
        if client == HIT:
            raise DataError("c001.arrow: damaged")
        return usual(run, opened, client)

    monkeypatch.setattr(step_training, "records_of", damaged)


class TestRealFailures:
    def test_training_that_raises_is_one_clients(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing(monkeypatch, ValueError("a record's words"))
        run = steps.prepare(project, settings).run
        record = steps.run_round(run.root, 1)
        assert record["refused"] == {HIT: "its training failed (ValueError)"}  # and not what the error says
        assert HIT not in record["clients"]
        assert set(sent(run)) == set(CLIENTS) - {HIT}

    def test_records_that_cannot_be_read(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unreadable(monkeypatch)
        run = steps.prepare(project, settings).run
        assert steps.run_round(run.root, 1)["refused"] == {HIT: "its records cannot be read (DataError)"}
        assert spent(run)[HIT] == 0
        steps.run_round(run.root, 2)

    @pytest.mark.parametrize("error", [MemoryError(), OSError("no space"), PrivacyError("x"), torch.OutOfMemoryError()])
    def test_what_is_no_clients_fault_stops(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        failing(monkeypatch, error)
        run = steps.prepare(project, settings).run
        with pytest.raises((type(error), TrainingError)):  # which says what to do about memory
            steps.run_round(run.root, 1)

    def test_what_all_fail_with_is_raised(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing(monkeypatch, ValueError("a mistake in the code"), everybody=True)
        run = steps.prepare(project, settings).run
        with pytest.raises(ValueError, match="a mistake in the code"):
            steps.run_round(run.root, 1)


class TestQuorum:
    def test_a_round_below_it_is_tried_again_with_the_same_noise(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = steps.prepare(project, changed(settings, federation={"quorum": 1.0})).run
        trained(run)
        honest = sent(run)
        for path in run.round_dir(1).glob("cohort-*.json"):
            path.unlink()
        only("vanish", monkeypatch, attempts=2)
        record = steps.run_round(run.root, 1)
        assert (record["attempts"], record["refused"]) == (3, {})
        assert sent(run) == honest
        assert spent(run) == dict.fromkeys(CLIENTS, 2)
        reason = read_sealed(run.round_dir(1) / "short-01.json")["reason"]
        assert "3 usable updates, and federation.quorum needs 4; c001: sent nothing" in reason

    def test_then_the_run_stops_and_the_same_command_goes_on(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = steps.prepare(project, changed(settings, federation={"quorum": 0.9, "retries": 1})).run
        only("nan", monkeypatch, attempts=3)
        with pytest.raises(QuorumError, match=r"needs 4.*run the same command again"):
            steps.run_round(run.root, 1)
        assert len(list(run.round_dir(1).glob("short-*.json"))) == 2
        assert run.completed_rounds() == 0
        ledger = run.ledger_path.read_bytes()
        workspace.forget_workspaces()
        assert steps.run_round(run.root, 1)["attempts"] == 4
        assert run.ledger_path.read_bytes() == ledger

    def test_without_one_the_rule_is_content_with_what_it_needs(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = steps.prepare(project, changed(settings, federation={"faults": {"vanish": 1.0}})).run
        with pytest.raises(TrainingError, match=r"0 usable updates, and method\.aggregation mean needs 1; c000: sent"):
            steps.run_round(run.root, 1)
        assert not list(run.round_dir(1).glob("short-*.json"))

    def test_who_misses_the_deadline_has_spent_and_counts_for_nothing(
        self, project: Project, settings: Settings
    ) -> None:
        known = job_seconds(Synchronous(), dict.fromkeys(CLIENTS, 2), settings.seed)
        seconds = sorted(known.items(), key=lambda item: item[1])
        deadline = (seconds[1][1] + seconds[2][1]) / 2
        run = steps.prepare(project, changed(settings, federation={"deadline": deadline})).run
        record = steps.run_round(run.root, 1)
        assert set(record["refused"]) == {seconds[2][0], seconds[3][0]}
        assert "came after the deadline: it takes" in record["refused"][seconds[3][0]]
        assert record["simulated_seconds"] == deadline
        assert spent(run) == dict.fromkeys(CLIENTS, 2)

    @pytest.mark.parametrize(
        ("sections", "key"),
        [
            ({"federation": {"quorum": 0.5, "secure_aggregation": True}}, "quorum"),
            ({"federation": {"quorum": 0.5}, "privacy": {"unit": "client"}}, "quorum"),
            ({"federation": {"deadline": 3.0}, "method": {"name": "fedbuff"}}, "deadline"),
            ({"federation": {"faults": {"straggle": 0.5}}}, r"faults\.straggle"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, settings: Settings, sections: dict[str, Any], key: str) -> None:
        with pytest.raises(SettingsError, match=rf"federation\.{key}: "):
            compose(changed(settings, **sections))


class TestSecureSum:
    @pytest.mark.parametrize("kind", [*REASONS, "straggle"])
    def test_a_fault_is_a_message_that_is_not_sent(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        only(kind, monkeypatch)
        # A deadline that nobody misses by itself.
        run = steps.prepare(project, changed(settings, federation={"secure_aggregation": True, "deadline": 1e9})).run
        record = steps.run_round(run.root, 1)
        assert list(record["refused"]) == [HIT]
        assert record["secure_aggregation"]["survivors"] == 3
        assert spent(run) == dict.fromkeys(CLIENTS, 2)

    def test_a_sum_that_stops_is_tried_again(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only("vanish", monkeypatch, attempts=1)
        federation = {"secure_aggregation": True, "secure_threshold": 1.0, "faults": {"vanish": 0.1}}
        run = steps.prepare(project, changed(settings, federation=federation)).run
        record = steps.run_round(run.root, 1)
        assert (record["attempts"], record["refused"]) == (2, {})

    def test_and_stops_the_run_in_the_end(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only("vanish", monkeypatch, attempts=3)
        federation = {"secure_aggregation": True, "secure_threshold": 1.0, "faults": {"vanish": 0.1}}
        run = steps.prepare(project, changed(settings, federation=federation)).run
        with pytest.raises(SumStoppedError, match="run the same command again"):
            steps.run_round(run.root, 1)
        assert steps.run_round(run.root, 1)["attempts"] == 4


class TestWholeClients:
    def test_what_became_of_a_client_is_told_to_nobody(
        self, project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every fault is the same zero move, and the record has no more than that of a round without one."""
        privacy = {"unit": "client", "delta": 0.01}
        open_ = steps.prepare(project, changed(settings, privacy=privacy)).run
        states, records = {}, []
        for kind in (*KINDS, "unreadable", "failing"):
            workspace.forget_workspaces()
            if kind == "unreadable":
                unreadable(monkeypatch)
            elif kind == "failing":
                failing(monkeypatch, ValueError("c001 fails"))
            else:
                only(kind, monkeypatch)
            for path in (open_.round_dir(1), open_.work_dir(1)):
                for file in sorted(path.rglob("*"), reverse=True):
                    file.unlink() if file.is_file() else file.rmdir()
            if kind == "straggle":
                monkeypatch.setattr(sending, "trouble_of", lambda *args, **options: sending.Trouble({}, {HIT: "late"}))
            record = steps.run_round(open_.root, 1)
            states[kind] = open_.adapter(1)
            records.append(record)
            monkeypatch.undo()
        for kind, state in states.items():
            # Who really fails is not in the others' batches, which may change their last bits.
            near = 0.0 if kind in KINDS else 1e-6
            for name, tensor in states["nan"].items():
                torch.testing.assert_close(state[name], tensor, rtol=near, atol=near)
        assert all(record["refused"] == {} and list(record["clients"]) == ["every client"] for record in records)


def test_a_whole_run_with_faults_is_the_same_twice_and_says_what_it_left_out(
    project: Project, settings: Settings
) -> None:
    faulty = changed(
        settings,
        federation={"faults": dict.fromkeys(KINDS, 0.07), "deadline": 1e9, "quorum": 0.25, "rounds": 2},
    )
    results = []
    for _ in range(2):
        workspace.forget_workspaces()
        run = steps.prepare(project, faulty).run
        for number in (1, 2):
            steps.run_round(run.root, number)
        metrics = publish(run, project)
        records = [run.round_record(number) for number in (1, 2)]
        results.append([(record["state"], record["refused"]) for record in records])
        assert metrics["updates_refused"] == sum(len(record["refused"]) for record in records)
        run.root.rename(run.root.with_name(f"moved-{len(results)}"))
    assert results[0] == results[1]


def test_the_flow_tries_again_then_stops_and_the_same_command_goes_on(tmp_path: Path) -> None:
    chances = FaultSettings(vanish=0.4)
    needed = {
        seed: next(a for a in itertools.count(1) if not faults_of(chances, seed, 1, a, CLIENTS[:3]))
        for seed in range(3, 40)
    }
    seed = next(seed for seed, attempts in needed.items() if attempts == 3)
    faulty = {"rounds": 1, "quorum": 1.0, "retries": 1, "faults": {"vanish": 0.4}}
    root = new_project(tmp_path / "project", seed=seed, federation=faulty)
    done = fedpipe(root, "run")
    assert done.code == 5
    assert re.search(r"error: round 1: \d usable updates, and federation\.quorum needs 3; .*run the same", done.err)
    assert "tried again: round 1: " in done.err
    assert fedpipe(root, "run").code == 0
