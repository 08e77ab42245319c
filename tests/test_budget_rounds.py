"""What a round costs is told before it, who cannot afford it is left out, and the run goes on."""

from __future__ import annotations

import csv
import io
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import fedpipe, new_project
from rich.console import Console

from fedpipe import steps, workspace
from fedpipe.budget import price_of
from fedpipe.config import Settings, parse_settings
from fedpipe.data.federation import write_partition
from fedpipe.files import file_digest, read_json, read_sealed, write_sealed
from fedpipe.methods.catalogue import CATALOGUE
from fedpipe.plan import ClientPlan, Plan
from fedpipe.privacy.accounting import epsilon
from fedpipe.privacy.ledger import Ledger, LedgerEntry
from fedpipe.privacy.neighbours import neighbours
from fedpipe.privacy.noise import key_id
from fedpipe.project import Project
from fedpipe.publish import publish, round_row
from fedpipe.report import write_report
from fedpipe.report.final import evaluate_adapter
from fedpipe.report.summary import RunHeader, cost_line, summary_rows
from fedpipe.server.scheduling import Job
from fedpipe.state import Run
from fedpipe.steps.skipping import skip_reason
from fedpipe.terminal import LiveProgress
from flows.describe import exclusions, round_metrics, skipped_rounds

pytestmark = pytest.mark.usefixtures("fresh_process")

DELTA = 1e-5
GONE = "no client has budget left for it"
CAP = "6 of 6 noisy steps are spent; a round takes 2"


@pytest.fixture(scope="module")
def settings(tiny: tuple[Project, Settings]) -> Settings:
    values = tiny[1].model_dump(mode="json")
    values["privacy"]["accountant"] = "rdp"
    values["runtime"]["cohort_size"] = 2
    return parse_settings(values)


@pytest.fixture
def project(tiny_copy: Project) -> Project:
    return tiny_copy


def started(project: Project, settings: Settings, rounds: int) -> Run:
    run = steps.prepare(project, settings).run
    for number in range(1, rounds + 1):
        steps.run_round(run.root, number)
    return run


def spent_elsewhere(run: Run, *clients: str, steps: int = 6) -> None:
    """Let the ledger hold what clients spent under another query, as after a change of the device."""
    plans = run.plan.clients
    run.ledger.append(
        [
            LedgerEntry(c, 1, k, plans[c].noise_multiplier, plans[c].sampling_rate, "elsewhere")
            for c in clients
            for k in range(1, steps + 1)
        ]
    )


def entry(client: str, round: int, step: int, sigma: float, q: float, query: str = "q") -> LedgerEntry:
    return LedgerEntry(client, round, step, sigma, q, query)


# The price


def made(path: Path, rates: list[float], sigmas: list[float], target: float, **changes: Any) -> SimpleNamespace:
    """A run whose clients took the first of three rounds of two steps, all of them by the name of round 1."""
    clients = {
        f"c{i:03d}": ClientPlan(100, q, 100 * q, sigma, max_steps=6, local_steps=2)
        for i, (q, sigma) in enumerate(zip(rates, sigmas, strict=True))
    }
    ledger = Ledger(path / "ledger.jsonl", run_id="run")
    ledger.append(
        [entry(c, 1, k, own.noise_multiplier, own.sampling_rate) for c, own in clients.items() for k in (1, 2)]
    )
    jobs = tuple(tuple(Job(client, before, True) for client in clients) for before in range(3))
    values = {"unit": "record", "adjacency": neighbours("record", "add-remove"), "accountant": "prv", **changes}
    values |= {"epsilon": target, "delta": DELTA, "clip_norm": 1.0, "rounds": 3, "local_steps": 2}
    plan = Plan(clients=clients, jobs=jobs, seconds=(0.0,) * 3, **values)
    return SimpleNamespace(plan=plan, ledger=ledger, ledger_path=ledger.path)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_price_is_epsilon_without_the_round_and_with_it(tmp_path: Path, accountant: str) -> None:
    run = made(tmp_path, [0.1, 0.3], [1.0, 1.5], 50.0, accountant=accountant)
    price = price_of(run, 2, "q")
    assert price.excluded == {}
    for client, own in run.plan.clients.items():
        expected = [epsilon([(own.noise_multiplier, own.sampling_rate, n)], DELTA, accountant) for n in (2, 4)]
        assert list(price.clients[client]) == expected
    values = price.to_json()
    assert values["epsilon_after"] == max(after for _, after in price.clients.values())
    assert values["epsilon_before"] == max(before for before, _ in price.clients.values())


def test_what_was_taken_of_this_round_is_not_paid_twice(tmp_path: Path) -> None:
    run = made(tmp_path, [0.1], [1.0], 50.0)
    first = price_of(run, 2, "q")
    run.ledger.append([entry("c000", 2, 1, 1.0, 0.1)])  # a crash after the first of two steps
    assert price_of(run, 2, "q") == first
    other = price_of(run, 2, "another query")
    assert other.clients["c000"] == tuple(epsilon([(1.0, 0.1, n)], DELTA, "prv") for n in (3, 5))


def test_a_client_is_left_out_by_epsilon_where_its_steps_would_do(tmp_path: Path) -> None:
    """More noise was planned than some steps of an earlier query had: few steps, and much epsilon."""
    limit = epsilon([(1.0, 0.1, 6)], DELTA, "prv")
    run = made(tmp_path, [0.1, 0.1], [1.0, 1.0], limit)
    run.ledger.append([entry("c001", 1, 1, 0.4, 0.1, "loud")])
    price = price_of(run, 2, "q")
    before, after = price.clients["c001"]
    assert after == epsilon([(0.4, 0.1, 1), (1.0, 0.1, 4)], DELTA, "prv") > limit
    assert price.excluded == {"c001": f"epsilon {before:.4g} would become {after:.4g}; the target is {limit:g}"}
    assert price.to_json()["epsilon_after"] == price.clients["c000"][1]  # of those that take part


def test_the_cap_is_hard_however_little_the_steps_cost(tmp_path: Path) -> None:
    run = made(tmp_path, [0.01], [5.0], 50.0)
    run.ledger.append([entry("c000", 1, k, 5.0, 0.01, "again") for k in (1, 2, 3)])
    assert price_of(run, 2, "q").excluded == {"c000": "5 of 6 noisy steps are spent; a round takes 2"}


def test_the_last_round_of_a_plan_is_affordable_to_the_last_digit(tmp_path: Path) -> None:
    limit = epsilon([(1.0, 0.1, 6)], DELTA, "prv")
    for target, out in ((limit, False), (limit * (1 - 1e-9), True)):
        run = made(tmp_path / str(out), [0.1], [1.0], target)
        run.ledger.append([entry("c000", 2, k, 1.0, 0.1) for k in (1, 2)])
        assert ("c000" in price_of(run, 3, "q").excluded) is out


def test_many_histories_are_accounted_by_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [0.05 + 0.001 * i for i in range(80)]
    sigmas = [1.0 if i < 40 else 1.4 for i in range(80)]
    run, asked = made(tmp_path, rates, sigmas, 50.0), []
    monkeypatch.setattr(Plan, "accounted", lambda plan, h: asked.append(h) or epsilon(h, plan.delta, plan.accountant))
    price = price_of(run, 2, "q")
    assert len(asked) == 4  # two classes, before and after
    for client, own in run.plan.clients.items():
        exact = [epsilon([(own.noise_multiplier, own.sampling_rate, n)], DELTA, "prv") for n in (2, 4)]
        assert all(bound >= value for bound, value in zip(price.clients[client], exact, strict=True))
    last = max(rates[:40])
    assert price.clients["c000"] == tuple(epsilon([(1.0, last, n)], DELTA, "prv") for n in (2, 4))


# The decision


@pytest.mark.parametrize(
    ("rule", "left", "excluded", "skipped"),
    [
        ("fedit", 2, 1, None),
        ("fedit", 0, 3, GONE),
        ("fedit", 0, 0, None),  # nobody was sampled, which is no matter of budget
        ("krum", 5, 1, None),
        ("krum", 4, 1, "it has too few clients with budget for it: 4, and method.aggregation krum needs 5"),
        ("krum", 4, 0, "it has too few clients: 4, and method.aggregation krum needs 5"),
    ],
)
def test_when_a_round_is_skipped(rule: str, left: int, excluded: int, skipped: str | None) -> None:
    clients = [f"c{i:03d}" for i in range(left + excluded)]
    assert skip_reason(CATALOGUE[rule], clients, dict.fromkeys(clients[left:], "why"), []) == skipped


def test_late_updates_do_not_make_up_the_number() -> None:
    clients = [f"c{i:03d}" for i in range(6)]
    assert skip_reason(CATALOGUE["krum"], clients, {}, clients[5:]) is None
    assert "4, and" in skip_reason(CATALOGUE["krum"], clients, {}, clients[4:])


# The run


def test_every_rounds_price_is_what_the_ledger_then_says(project: Project, settings: Settings) -> None:
    run = started(project, settings, 3)
    for number in (1, 2, 3):
        cost = read_sealed(run.round_dir(number) / "plan.json")["cost"]
        record = run.round_record(number)
        assert record["cost"] == cost
        assert cost["epsilon_after"] == record["epsilon_max"]
        assert cost["epsilon_before"] == (run.round_record(number - 1).get("epsilon_max") or 0.0)
        assert set(cost["clients"]) == set(run.plan.clients)
        metrics = round_metrics(record)
        assert metrics["privacy/epsilon_after"] == cost["epsilon_after"]
        assert (metrics["privacy/excluded"], metrics["privacy/skipped"]) == (0, 0)


def test_without_privacy_there_is_no_price(project: Project, settings: Settings) -> None:
    values = settings.model_dump(mode="json")
    values["privacy"]["unit"] = "none"
    run = started(project, parse_settings(values), 1)
    assert run.round_record(1)["cost"] is None
    assert round_row(run.round_record(1))["epsilon_after"] is None


def test_a_client_without_budget_is_left_out_and_the_others_go_on(project: Project, settings: Settings) -> None:
    run = started(project, settings, 1)
    spent_elsewhere(run, "c001", steps=4)
    for number in (2, 3):
        record = steps.run_round(run.root, number)
        assert record["excluded"] == {"c001": CAP}
        assert sorted(record["clients"]) == ["c000", "c002"]
        assert record["skipped"] is None
    metrics = publish(run, project)
    assert (metrics["clients_excluded"], metrics["rounds_skipped"], metrics["rounds"]) == (1, 0, 3)
    facts = read_json(project.reports / "run.json")["budget"]
    assert facts == {"skipped": {}, "excluded": {"c001": {"round": 2, "rounds": 2, "reason": CAP}}}
    evaluate_adapter(project)
    page = write_report(project).read_text()
    assert 'id="budget"' in page
    assert f"c001 from round 2 on, in 2 rounds: {CAP}" in page


def test_where_nobody_has_budget_the_state_is_carried_over(project: Project, settings: Settings) -> None:
    run = started(project, settings, 1)
    spent_elsewhere(run, *run.plan.clients, steps=4)
    ledger = run.ledger_path.read_bytes()
    for number in (2, 3):
        record = steps.run_round(run.root, number)
        assert record["skipped"] == GONE
        assert record["clients"] == {}
        assert record["metrics"] == run.round_record(1)["metrics"]
        assert (record["bytes_up"], record["bytes_down"]) == (0, 0)
        assert file_digest(run.adapter_path(number)) == file_digest(run.adapter_path(1)) == record["state"]
    assert run.ledger_path.read_bytes() == ledger
    assert run.last_trained(3) == 1
    metrics = publish(run, project)
    run.finish(metrics)
    assert (metrics["rounds_skipped"], metrics["dp_valid"]) == (2, run.dp_valid)
    assert metrics["accuracy"] == run.round_record(1)["metrics"]["accuracy"]
    assert skipped_rounds(run) == {"2": GONE, "3": GONE}
    rows = list(csv.DictReader(io.StringIO((project.reports / "rounds.csv").read_text())))
    assert [row["skipped"] for row in rows] == ["", "0", "1", "1"]
    assert [row["excluded"] for row in rows] == ["", "0", "3", "3"]
    evaluate_adapter(project)
    assert f"Round 2 was skipped: {GONE}" in write_report(project).read_text()


def test_a_skipped_round_begun_again_is_the_same(project: Project, settings: Settings) -> None:
    run = started(project, settings, 1)
    spent_elsewhere(run, *run.plan.clients, steps=4)
    plan = steps.begin_round(run.root, 2)
    (run.round_dir(2) / "plan.json").unlink()
    workspace.forget_workspaces()
    assert steps.begin_round(run.root, 2) == plan
    once = steps.aggregate(run.root, 2, [])
    assert steps.aggregate(run.root, 2, []) == once
    steps.finish_round(run.root, 2, once, steps.evaluate_round(run.root, 2, once), 0.1)
    workspace.forget_workspaces()
    assert steps.begin_round(run.root, 2) == plan
    assert Run(run.root).completed_rounds() == 2


def test_training_goes_on_after_a_skipped_round(project: Project, settings: Settings) -> None:
    """A cap on rounds: only some clients are at it, and those of a later round are not."""
    values = settings.model_dump(mode="json")
    values["federation"] |= {"clients_per_round": 1, "rounds": 6}
    run = started(project, parse_settings(values), 0)
    by_round = [members[0] for members in run.plan.participants]
    poor = by_round[1]
    other = next(n for n in itertools.count(2) if by_round[n] != poor)
    spent_elsewhere(run, poor, steps=run.plan.clients[poor].max_steps)
    records = [steps.run_round(run.root, number) for number in range(1, 7)]
    assert [record["skipped"] is not None for record in records] == [client == poor for client in by_round]
    after = records[other]
    assert sorted(after["clients"]) == [by_round[other]]
    assert after["state"] != records[other - 1]["state"]
    assert after["bytes_down"] > 0


def test_a_rule_that_needs_more_clients_skips_before_anything_is_spent(project: Project, settings: Settings) -> None:
    values = settings.model_dump(mode="json")
    values["method"] = {"name": "dp-lora", "aggregation": {"name": "trimmed-mean", "trim": 0.3}}
    values["partition"] |= {"clients": 6}
    chosen = parse_settings(values)
    write_partition(chosen, project.raw, project.partition)
    run = started(project, chosen, 0)
    poor = list(run.plan.clients)[3:]
    spent_elsewhere(run, *poor, steps=6)
    before = run.ledger_path.read_bytes()
    record = steps.run_round(run.root, 1)
    expected = "it has too few clients with budget for it: 3, and method.aggregation trimmed-mean needs 4"
    assert record["skipped"] == expected
    assert run.ledger_path.read_bytes() == before
    before, after = run.adapter(0), run.adapter(1)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# What people see


def test_each_client_is_told_of_once() -> None:
    told: set[str] = set()
    plan = {"excluded": {"c000": CAP}, "skipped": None}
    assert exclusions(2, plan, told) == [f"round 2: left out, since their budget would be exceeded: c000 ({CAP})"]
    assert exclusions(3, plan, told) == []
    plan = {"excluded": {f"c{i:03d}": CAP for i in range(9)}, "skipped": GONE}
    first, last = exclusions(4, plan, told)
    assert first.endswith(f"c001, c002, c003, c004, c005 and 3 more (c001: {CAP})")
    assert last == f"round 4: skipped: {GONE}; the state is carried over"


def test_the_lines_of_the_terminal() -> None:
    header = RunHeader("r", "m", 4, 12, 0, 8.0, "cpu", True)
    expected = "before round  3/12  epsilon 1.24, with it 2.50 (largest of its clients)"
    assert cost_line(header, 3, 1.234, 2.5) == expected
    rows = dict(summary_rows(header, {"rounds": 12, "skipped": {"3": GONE, "7": GONE}, "clients_excluded": 4}))
    assert rows["skipped"] == f"2 rounds (3, 7), the state carried over: {GONE}"
    assert rows["left out"] == "4 clients without budget for some round"


def test_the_bar_shows_what_the_round_will_have_cost() -> None:
    progress = LiveProgress(Console(file=io.StringIO(), force_terminal=True, width=120))
    progress.start(RunHeader("r", "m", 4, 12, 0, 8.0, "cpu", True))
    try:
        progress.round_begins(1, 0.0, 2.5)
        assert "of 8, 2.50 after this round" in progress._measures()
        progress.round_done(1, {"epsilon_max": 2.5})
        assert progress._measures().endswith("epsilon 2.50 of 8")
    finally:
        progress.close()


def test_a_whole_run_says_so_and_ends_well(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", tracked=True)
    done = fedpipe(project, "run")
    assert done.code == 0
    assert "before round 1/3  epsilon 0.00, with it " in done.err
    (run,) = (Run(path.parent) for path in project.glob("runs/*/run.json"))
    # All rounds again with another key, on top of what was spent: nobody can afford any.
    for path in run.round_dir(1).parent.glob("000[123]"):
        shutil.rmtree(path)
    (run.root / "complete.json").unlink()
    run.key_path.write_bytes(key := bytes(range(32)))
    run.key_path.chmod(0o600)
    write_sealed(run.root / "run.json", {**read_sealed(run.root / "run.json"), "key": key_id(key)})
    again = fedpipe(project, "run")
    assert again.code == 0, again.err
    assert again.err.count("left out, since their budget would be exceeded: c000, c001, c002 (c000: ") == 1
    assert all(f"round {number}: skipped: {GONE}" in again.err for number in (1, 2, 3))
    assert f"skipped        3 rounds (1, 2, 3), the state carried over: {GONE}" in again.out
    metrics = read_json(project / "reports" / "metrics.json")
    assert (metrics["rounds_skipped"], metrics["clients_excluded"]) == (3, 3)
