"""A whole run on disk: repeated, interrupted, tampered with, and what it must never do then."""

from __future__ import annotations

import csv
import io
import json
import shutil
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEST_KEY

from fedpipe import identity, state, steps, workspace
from fedpipe.budget import Price
from fedpipe.client import training
from fedpipe.config import Settings, parse_settings
from fedpipe.data.federation import write_partition
from fedpipe.errors import PrivacyError, StateError, TrainingError
from fedpipe.files import file_digest, read_json, read_sealed, read_tensors, write_json, write_sealed, write_tensors
from fedpipe.plan import make_plan
from fedpipe.privacy import ledger as ledger_module
from fedpipe.privacy.accounting import epsilon_rdp
from fedpipe.privacy.ledger import Ledger, LedgerEntry
from fedpipe.privacy.noise import key_id
from fedpipe.project import Project
from fedpipe.publish import publish
from fedpipe.state import Run
from fedpipe.steps import beginning, preparing
from fedpipe.steps import training as step_training

pytestmark = pytest.mark.usefixtures("fresh_process")

ROUNDS, STEPS = 3, 2
OTHER_KEY = "cd" * 32


class Killed(BaseException):
    """Stands for a process that ends here; nothing catches it."""


def changed(settings: Settings, **keys: Any) -> Settings:
    """Settings with `section__key` replaced."""
    values = settings.model_dump(mode="json")
    for path, value in keys.items():
        section, _, key = path.partition("__")
        if key:
            values[section][key] = value
        else:
            values[section] = value
    return parse_settings(values)


@pytest.fixture(scope="module")
def settings(tiny: tuple[Project, Settings]) -> Settings:
    return changed(tiny[1], privacy__accountant="rdp", runtime__cohort_size=2)


@pytest.fixture
def project(tiny: tuple[Project, Settings], tmp_path: Path) -> Project:
    """A copy of the tiny project, to run in."""
    return copied(tiny[0], tmp_path / "copy")


def copied(project: Project, path: Path) -> Project:
    shutil.copytree(project.root, path)
    return Project(path)


def restart() -> None:
    """Forget all that a process keeps in memory."""
    workspace.forget_workspaces()


def finish(project: Project, settings: Settings) -> Run:
    """Start or go on, to the end, and publish."""
    run = steps.prepare(project, settings).run
    for number in range(run.completed_rounds() + 1, run.plan.rounds + 1):
        steps.run_round(run.root, number)
    run.finish(publish(run, project))
    return run


def results(project: Project, run: Run) -> dict[str, bytes]:
    """All that a run is compared by, seconds left out."""
    rows = list(csv.DictReader(io.StringIO((project.reports / "rounds.csv").read_text())))
    return {
        "adapter": (project.adapter / "adapter_model.safetensors").read_bytes(),
        "ledger.json": (project.reports / "ledger.json").read_bytes(),
        "ledger.jsonl": run.ledger_path.read_bytes(),
        "rounds": json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode(),
    }


@pytest.fixture(scope="module")
def reference(
    tiny: tuple[Project, Settings], settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The results of a run that nothing disturbed."""
    project = copied(tiny[0], tmp_path_factory.mktemp("reference") / "copy")
    return results(project, finish(project, settings))


def started(project: Project, settings: Settings, rounds: int = 0) -> Run:
    run = steps.prepare(project, settings).run
    for number in range(1, rounds + 1):
        steps.run_round(run.root, number)
    return run


def spent(run: Run) -> Counter[str]:
    return Counter(entry.client for entry in Ledger(run.ledger_path).entries())


def on_another_device(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """Make the process believe that it computes on another kind of device."""
    _, opened = workspace.open_workspace(run.root)
    monkeypatch.setitem(opened.__dict__, "device", torch.device("meta"))


# Repeated


def test_the_same_run_elsewhere_gives_the_same_bytes(
    project: Project, settings: Settings, reference: dict[str, bytes]
) -> None:
    assert results(project, finish(project, settings)) == reference


def test_another_key_gives_other_bytes_at_the_same_cost(
    project: Project, settings: Settings, reference: dict[str, bytes]
) -> None:
    run = finish(project, changed(settings, privacy__test_key=OTHER_KEY))
    other = results(project, run)
    assert other["adapter"] != reference["adapter"]
    ours, theirs = (json.loads(content["ledger.json"]) for content in (other, reference))
    assert ours["clients"] == theirs["clients"]


@pytest.mark.parametrize("change", [{"cohort_size": 1}, {"cohort_size": "auto"}, {"tokens_per_batch": 64}])
def test_how_it_is_computed_changes_rounding_only(
    project: Project, settings: Settings, change: dict[str, Any], reference: dict[str, bytes]
) -> None:
    """Of a round. The next one starts from other bits, which makes it another query, with noise of its own."""
    first = started(project, settings, rounds=1)
    expected = first.adapter(1)
    shutil.rmtree(project.runs)
    run = finish(project, changed(settings, **{f"runtime__{key}": value for key, value in change.items()}))
    for name, tensor in run.adapter(1).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    clients = [
        json.loads(content)["clients"] for content in (results(project, run)["ledger.json"], reference["ledger.json"])
    ]
    assert clients[0] == clients[1]


def test_cohorts_are_smaller_where_adapters_are_large(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = steps.prepare(project, changed(settings, runtime__cohort_size="auto")).run
    clients = len(run.plan.clients)
    numbers = sum(tensor.numel() for tensor in run.adapter(0).values())
    assert len(steps.begin_round(run.root, 1)["cohorts"]) == 1
    for fitting in (2, 1, 0):
        (run.round_dir(1) / "plan.json").unlink()
        monkeypatch.setattr(beginning, "COHORT_BYTES", 32 * numbers * fitting)
        assert len(steps.begin_round(run.root, 1)["cohorts"]) == -(-clients // max(1, fitting))


def test_every_step_may_be_taken_again(project: Project, settings: Settings, reference: dict[str, bytes]) -> None:
    run = steps.prepare(project, settings).run
    for number in range(1, ROUNDS + 1):
        for _ in range(2):
            plan = steps.begin_round(run.root, number)
            cohorts = [steps.train(run.root, number, cohort) for cohort in (1, 0, 1)][:2]
            aggregated = steps.aggregate(run.root, number, cohorts)
            metrics = steps.evaluate_round(run.root, number, aggregated)
            steps.finish_round(run.root, number, aggregated, metrics, 1.0)
        assert steps.begin_round(run.root, number) == plan
    publish(run, project)
    found = results(project, run)
    assert {k: v for k, v in found.items() if k != "ledger.jsonl"} == {
        k: v for k, v in reference.items() if k != "ledger.jsonl"
    }


# Interrupted


def kill_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, call: int, after: bool = False) -> None:
    """End the process at the `call`-th call of a function, before it or after it."""
    real, count = getattr(target, name), Counter[str]()

    def dying(*args: Any, **kwargs: Any) -> Any:
        count["calls"] += 1
        if count["calls"] == call and not after:
            raise Killed
        result = real(*args, **kwargs)
        if count["calls"] == call:
            raise Killed
        return result

    monkeypatch.setattr(target, name, dying)


BOUNDARIES: dict[str, tuple[Any, str, int, bool]] = {
    "the key is there, run.json is not": (state, "_write_runtime", 1, False),
    "run.json is there, no round is": (state, "open_run", 1, True),
    "before the start state": (preparing, "evaluate", 1, False),
    "a round was planned": (steps, "begin_round", 2, True),
    "the entries of the first step are there": (Ledger, "append", 1, True),
    "the entries of a last step are there": (Ledger, "append", 6, True),
    "before the entries of a step": (Ledger, "append", 6, False),
    "the noise of a step was drawn": (training, "add_step_noise", 5, True),
    "an update was written, the next not": (step_training, "write_tensors", 2, False),
    "all updates of a cohort were written": (step_training, "write_tensors", 2, True),
    "a cohort is done, the next is not": (steps, "train", 3, True),
    "all cohorts are done": (steps, "train", 4, True),
    "a round was aggregated": (steps, "aggregate", 2, True),
    "a round was evaluated": (steps, "evaluate_round", 2, True),
    "a round is complete": (steps, "finish_round", 2, True),
    "the last round is complete": (steps, "finish_round", 3, True),
}


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    project: Project, settings: Settings, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, boundary: str
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, *BOUNDARIES[boundary])
        if boundary.startswith("run.json"):
            patch.setattr(preparing, "open_run", state.open_run)
        with pytest.raises(Killed):
            finish(project, settings)
    restart()
    assert results(project, finish(project, settings)) == reference


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    project: Project, settings: Settings, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = 0
    for _ in range(20):
        restart()
        with monkeypatch.context() as patch:
            # A cohort takes two steps: every process gets one cohort further.
            kill_at(patch, Ledger, "append", 3, after=True)
            try:
                run = finish(project, settings)
                break
            except Killed:
                killed += 1
    assert killed >= ROUNDS
    assert results(project, run) == reference


def test_entries_are_never_written_twice_and_never_missing(project: Project, settings: Settings) -> None:
    run = finish(project, settings)
    entries = run.ledger.entries()
    expected = {(c, r, k) for r in range(1, ROUNDS + 1) for c in run.plan.participants[r - 1] for k in (1, 2)}
    assert Counter((e.client, e.round, e.step) for e in entries) == Counter(expected)
    for entry in entries:
        client = run.plan.clients[entry.client]
        assert (entry.sigma, entry.q) == (client.noise_multiplier, client.sampling_rate)
    assert len({entry.query for entry in entries}) == ROUNDS, "each round is a query of its own"


# Which run


def test_a_changed_setting_is_a_new_run_that_says_what_changed(project: Project, settings: Settings) -> None:
    first = steps.prepare(project, settings)
    assert first.changes == ()
    again = steps.prepare(project, settings)
    assert again.resumed
    assert again.run.root == first.run.root
    second = steps.prepare(project, changed(settings, optimizer__lr=0.25))
    assert not second.resumed
    assert second.run.root != first.run.root
    assert second.changes == ("optimizer.lr: 0.5 -> 0.25",)
    assert second.previous == first.run.root.name
    assert second.run.info["query"] != first.run.info["query"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method__name": "dp-lora"}, "method.name: la-lora -> dp-lora"),
        ({"lora__rank": 3}, "lora.rank: 2 -> 3"),
        ({"privacy__clip_norm": 2.0}, "privacy.clip_norm: 1.0 -> 2.0"),
        ({"runtime__precision": "bf16"}, "precision: fp32 -> bf16"),
        ({"data__max_length": 12}, "data.max_length: 16 -> 12"),
    ],
)
def test_what_defines_the_query_changes_the_query(
    project: Project, settings: Settings, change: dict[str, Any], said: str
) -> None:
    first = steps.prepare(project, settings)
    second = steps.prepare(project, changed(settings, **change))
    assert said in second.changes
    assert second.run.info["query"] != first.run.info["query"]


@pytest.mark.parametrize("change", [{"runtime__engine": "opacus"}, {"evaluation__every": 2}])
def test_what_only_changes_the_results_is_a_new_run_of_the_same_query(
    project: Project, settings: Settings, change: dict[str, Any]
) -> None:
    first, second = (steps.prepare(project, s).run for s in (settings, changed(settings, **change)))
    assert first.root != second.root
    assert first.info["query"] == second.info["query"]


@pytest.mark.parametrize(
    "change", [{"runtime__tokens_per_batch": 99}, {"runtime__cohort_size": 1}, {"tracking__experiment": "other"}]
)
def test_what_only_changes_how_it_is_computed_goes_on_with_the_run(
    project: Project, settings: Settings, change: dict[str, Any]
) -> None:
    first = started(project, settings, rounds=1)
    second = steps.prepare(project, changed(settings, **change))
    assert second.resumed
    assert second.run.root == first.root
    if "runtime" in next(iter(change)):
        assert second.run.settings.runtime != first.settings.runtime
    steps.run_round(second.run.root, 2)


def test_another_partition_or_code_is_another_run(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = steps.prepare(project, settings).run
    other = changed(settings, partition__min_records=21)
    write_partition(other, project.raw, project.partition)
    second = steps.prepare(project, other)
    assert not second.resumed
    assert any(line.startswith("dataset: ") for line in second.changes)
    monkeypatch.setattr(identity, "code_digest", lambda: "0" * 64)
    third = steps.prepare(project, other)
    assert [line.split(":")[0] for line in third.changes] == ["code"]
    assert len({first.info["query"], second.run.info["query"], third.run.info["query"]}) == 3


def test_the_code_digest_covers_what_computes_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of fedpipe but what shows, tracks and starts; so that no change of a computation keeps old noise."""
    root = Path(identity.__file__).parent
    shown = {"cli.py", "terminal.py", "project.py", "errors.py", "mistakes.py", "publish.py", "__init__.py"}
    packages = ("audits", "claims", "disk", "doctor", "listing", "report", "tracking")
    files = {str(path.relative_to(root)) for path in root.rglob("*.py")}
    expected = {f for f in files if f not in shown and f.split("/")[0] not in packages}
    read: set[str] = set()
    monkeypatch.setattr(
        identity, "file_digest", lambda path: read.add(str(path.relative_to(root))) or file_digest(path)
    )
    identity.code_digest.cache_clear()
    identity.code_digest()
    identity.code_digest.cache_clear()
    assert read == expected


# Privacy of the files


def test_a_secret_key_is_nowhere_else_and_is_destroyed_at_the_end(project: Project, settings: Settings) -> None:
    secret = changed(settings, privacy__test_key=None)
    run = started(project, secret, rounds=2)
    assert run.dp_valid
    key = run.key
    assert stat.S_IMODE(run.key_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(run.key_path.parent.stat().st_mode) == 0o700
    finish(project, secret)
    assert not run.key_path.exists()
    for path in project.root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert key not in content, path
            assert key.hex().encode() not in content.lower(), path
    assert read_json(project.reports / "metrics.json")["dp_valid"] is True
    assert read_json(project.reports / "ledger.json")["dp_valid"] is True
    assert read_json(project.reports / "run.json")["dp_valid"] is True


def test_two_runs_with_secret_keys_differ(tiny: tuple[Project, Settings], settings: Settings, tmp_path: Path) -> None:
    secret = changed(settings, privacy__test_key=None)
    found = []
    for name in ("one", "two"):
        run = started(copied(tiny[0], tmp_path / name), secret, rounds=1)
        found.append(run.adapter_path(1).read_bytes())
    assert found[0] != found[1]


@pytest.mark.parametrize("unit", ["record", "none"])
def test_a_run_with_a_test_key_or_without_privacy_is_marked_everywhere(
    project: Project, settings: Settings, unit: str
) -> None:
    run = finish(project, changed(settings, privacy__unit=unit))
    assert run.dp_valid is False
    for name in ("metrics", "ledger", "run"):
        assert read_json(project.reports / f"{name}.json")["dp_valid"] is False
    shown = read_json(project.reports / "run.json")["settings"]
    assert shown["privacy.test_key"] == "set"
    for path in (*run.root.rglob("*"), *project.reports.rglob("*"), *project.adapter.rglob("*")):
        assert not path.is_file() or TEST_KEY.encode() not in path.read_bytes().lower(), path


def test_a_run_leaves_no_record_behind(project: Project, settings: Settings) -> None:
    run = finish(project, settings)
    texts = [workspace.open_workspace(run.root)[1].federation.client(c)["text"] for c in run.plan.clients]
    sentences = [text.encode() for own in texts for text in own if len(text) > 20]
    assert len(sentences) > 50
    for root in (run.root, project.reports, project.adapter):
        for path in root.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert not any(sentence in content for sentence in sentences), path


def test_without_privacy_there_is_no_ledger_no_key_and_no_epsilon(project: Project, settings: Settings) -> None:
    run = finish(project, changed(settings, privacy__unit="none"))
    assert not run.ledger_path.exists()
    assert not run.key_path.exists()
    metrics = read_json(project.reports / "metrics.json")
    assert metrics["epsilon_max"] is None
    assert metrics["unit"] == "none"
    for number in range(1, ROUNDS + 1):
        assert run.round_record(number)["epsilon_max"] is None


def test_epsilon_of_the_whole_run_is_that_of_the_ledger_and_within_the_target(
    project: Project, settings: Settings
) -> None:
    run = finish(project, settings)
    history = {client: run.ledger.history(client) for client in run.plan.clients}
    assert all(sum(steps for *_, steps in own) == ROUNDS * STEPS for own in history.values())
    largest = max(epsilon_rdp(own, run.plan.delta) for own in history.values())
    assert run.round_record(ROUNDS)["epsilon_max"] == largest <= run.plan.epsilon
    so_far = [run.round_record(number)["epsilon_max"] for number in range(1, ROUNDS + 1)]
    assert so_far == sorted(so_far)
    assert read_json(project.reports / "ledger.json")["epsilon_max"] == largest


# Damaged


def damage(path: Path) -> None:
    """Change the least of the last number: only a digest can tell."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 0xFF
    path.write_bytes(content)


def tear(path: Path) -> None:
    """Leave what a power failure leaves of a file that was renamed and not flushed: its length, and zeros."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("pattern", ["updates/c001.safetensors", "cohort-00.json", "cohort-01.json", "plan.json"])
@pytest.mark.parametrize("how", [damage, Path.unlink, tear, empty])
def test_what_a_round_is_made_of_is_computed_again(
    project: Project,
    settings: Settings,
    reference: dict[str, bytes],
    pattern: str,
    how: Callable[[Path], None],
) -> None:
    run = started(project, settings, rounds=1)
    plan = steps.begin_round(run.root, 2)
    listed = [steps.train(run.root, 2, cohort) for cohort in (0, 1)]
    how(run.round_dir(2) / pattern)
    with pytest.raises(StateError):
        steps.aggregate(run.root, 2, listed)
    assert run.round_record(2) is None
    restart()
    assert steps.begin_round(run.root, 2) == plan
    assert results(project, finish(project, settings)) == reference


@pytest.mark.parametrize("how", [damage, Path.unlink, lambda path: path.write_text("[]")])
def test_a_damaged_evaluation_is_done_again(
    project: Project, settings: Settings, reference: dict[str, bytes], how: Callable[[Path], None]
) -> None:
    run = started(project, settings, rounds=1)
    plan = steps.begin_round(run.root, 2)
    listed = [steps.train(run.root, 2, cohort) for cohort in range(len(plan["cohorts"]))]
    aggregated = steps.aggregate(run.root, 2, listed)
    steps.evaluate_round(run.root, 2, aggregated)
    how(run.round_dir(2) / "evaluation.json")
    restart()
    assert results(project, finish(project, settings)) == reference


def test_a_damaged_state_is_found_and_computed_again_at_no_cost(
    project: Project, settings: Settings, reference: dict[str, bytes]
) -> None:
    run = started(project, settings, rounds=2)
    before = spent(run)
    damage(run.adapter_path(2))
    with pytest.raises(StateError, match=r"damaged.*delete .*0002 and run again"):
        steps.run_round(run.root, 3)
    shutil.rmtree(run.round_dir(2))
    shutil.rmtree(run.round_dir(3), ignore_errors=True)
    restart()
    steps.run_round(run.root, 2)
    assert spent(run) == before
    assert results(project, finish(project, settings)) == reference


def spoil(run: Run, listed: list[dict[str, str]], clients: list[str]) -> None:
    """Put a NaN into these clients' updates of round 1, as if they had sent them so."""
    for number, cohort in enumerate(listed):
        path = run.round_dir(1) / cohort["file"]
        listing = read_json(path)
        for client in set(clients) & set(listing["updates"]):
            update = read_tensors(run.round_dir(1) / "updates" / f"{client}.safetensors")
            update[next(iter(update))].view(-1)[0] = float("nan")
            file = run.round_dir(1) / "updates" / f"{client}.safetensors"
            listing["updates"][client]["sha256"] = write_tensors(file, update)
        listed[number]["sha256"] = write_json(path, listing)


def test_an_update_that_is_not_finite_is_left_out_and_the_record_says_so(project: Project, settings: Settings) -> None:
    run = started(project, settings)
    steps.begin_round(run.root, 1)
    listed = [steps.train(run.root, 1, cohort) for cohort in (0, 1)]
    spoil(run, listed, ["c000"])
    aggregated = steps.aggregate(run.root, 1, listed)
    assert list(aggregated["refused"]) == ["c000"]
    assert "not finite" in aggregated["refused"]["c000"]
    assert set(aggregated["clients"]) == {"c000", "c001", "c002"}  # it has spent its steps all the same
    left = [read_tensors(run.round_dir(1) / "updates" / f"{c}.safetensors") for c in ("c001", "c002")]
    found = read_tensors(run.adapter_path(1), aggregated["state"])
    for name in left[0]:
        torch.testing.assert_close(found[name], (left[0][name].double() + left[1][name]).div(2).float())
    record = steps.finish_round(run.root, 1, aggregated, steps.evaluate_round(run.root, 1, aggregated), 1.0)
    assert record["refused"] == aggregated["refused"]


def test_a_round_without_a_usable_update_is_not_aggregated(project: Project, settings: Settings) -> None:
    run = started(project, settings)
    steps.begin_round(run.root, 1)
    listed = [steps.train(run.root, 1, cohort) for cohort in (0, 1)]
    spoil(run, listed, ["c000", "c001", "c002"])
    with pytest.raises(TrainingError, match=r"round 1: 0 usable updates.* c000: .* not finite"):
        steps.aggregate(run.root, 1, listed)


def test_a_round_is_not_aggregated_without_all_its_clients(project: Project, settings: Settings) -> None:
    run = started(project, settings)
    steps.begin_round(run.root, 1)
    listed = [steps.train(run.root, 1, cohort) for cohort in (0, 1)]
    with pytest.raises(StateError, match="not all there"):
        steps.aggregate(run.root, 1, listed[:1])
    steps.aggregate(run.root, 1, listed)


@pytest.mark.parametrize("weights", ["uniform", "samples"])
def test_the_next_state_is_the_mean_of_the_updates(project: Project, settings: Settings, weights: str) -> None:
    run = started(project, changed(settings, privacy__unit="none", method__weights=weights), rounds=1)
    updates = {c: read_tensors(run.round_dir(1) / "updates" / f"{c}.safetensors") for c in run.plan.clients}
    sizes = {c: run.plan.clients[c].records if weights == "samples" else 1 for c in updates}
    for name, tensor in run.adapter(1).items():
        expected = sum(sizes[c] * update[name].double() for c, update in updates.items()) / sum(sizes.values())
        torch.testing.assert_close(tensor, expected.float())


# Lost


def test_a_lost_ledger_ends_the_run(project: Project, settings: Settings) -> None:
    run = started(project, settings, rounds=1)
    run.ledger_path.unlink()
    for step in (lambda: steps.begin_round(run.root, 2), lambda: finish(project, settings)):
        restart()
        with pytest.raises(StateError, match=r"ledger\.jsonl: the privacy ledger cannot be read"):
            step()
    assert not run.ledger_path.exists()
    assert run.round_record(2) is None


def test_a_ledger_lost_in_the_middle_of_a_round_ends_the_run(project: Project, settings: Settings) -> None:
    run = started(project, settings, rounds=1)
    steps.begin_round(run.root, 2)
    steps.train(run.root, 2, 0)
    run.ledger_path.unlink()
    with pytest.raises(StateError, match="cannot be read"):
        steps.train(run.root, 2, 1)
    assert not run.ledger_path.exists()


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_ledger_without_its_end_ends_the_run(project: Project, settings: Settings, rounds: int) -> None:
    """An older copy put back, or a file system rolled back: every chain holds, and epsilon would be too small."""
    run = started(project, settings, rounds=rounds)
    lines = run.ledger_path.read_bytes().splitlines(keepends=True)
    run.ledger_path.write_bytes(b"".join(lines[:-1]))
    restart()
    with pytest.raises(PrivacyError, match=rf"holds 1 of the 2 noisy steps that c002 took in round {rounds}"):
        finish(project, settings)


def test_a_ledger_cut_off_before_a_round_is_recorded_ends_the_run(project: Project, settings: Settings) -> None:
    run = started(project, settings)
    plan = steps.begin_round(run.root, 1)
    listed = [steps.train(run.root, 1, cohort) for cohort in range(len(plan["cohorts"]))]
    lines = run.ledger_path.read_bytes().splitlines(keepends=True)
    run.ledger_path.write_bytes(b"".join(lines[:3]))
    aggregated = steps.aggregate(run.root, 1, listed)
    with pytest.raises(PrivacyError, match="epsilon is not known"):
        steps.finish_round(run.root, 1, aggregated, {}, 1.0)
    assert run.round_record(1) is None


def test_the_ledger_of_another_run_is_refused(project: Project, settings: Settings) -> None:
    run = started(project, settings, rounds=1)
    other = started(project, changed(settings, optimizer__lr=0.25))
    shutil.copy(other.ledger_path, run.ledger_path)
    with pytest.raises(StateError, match=f"is the ledger of {other.root.name}"):
        steps.begin_round(run.root, 2)


def test_a_lost_key_ends_the_run(project: Project, settings: Settings) -> None:
    run = started(project, settings, rounds=1)
    run.key_path.unlink()
    restart()
    with pytest.raises(StateError, match="the key of the noise cannot be read"):
        finish(project, settings)
    assert not run.key_path.exists()
    assert run.completed_rounds() == 1


def test_rounds_without_their_run_json_are_not_taken_for_free(project: Project, settings: Settings) -> None:
    """A new ledger beside old rounds would leave out what they spent."""
    run = started(project, settings, rounds=2)
    (run.root / "run.json").unlink()
    restart()
    before = run.ledger_path.read_bytes(), run.key_path.read_bytes()
    with pytest.raises(StateError, match=r"has lost its run\.json, but privacy was spent in it; move it away"):
        steps.prepare(project, settings)
    assert (run.ledger_path.read_bytes(), run.key_path.read_bytes()) == before


@pytest.mark.parametrize("unit", ["record", "none"])
def test_rounds_without_their_ledger_and_run_json_are_not_taken_for_free(
    project: Project, settings: Settings, unit: str
) -> None:
    chosen = changed(settings, privacy__unit=unit)
    run = started(project, chosen, rounds=1)
    (run.root / "run.json").unlink()
    run.ledger_path.unlink(missing_ok=True)
    restart()
    with pytest.raises(StateError, match=r"has lost its run\.json"):
        steps.prepare(project, chosen)
    assert not run.ledger_path.exists()


def test_a_ledger_with_entries_is_not_replaced(project: Project, settings: Settings) -> None:
    run = started(project, settings, rounds=1)
    (run.root / "run.json").unlink()
    shutil.rmtree(run.root / "rounds")
    before = run.ledger_path.read_bytes()
    with pytest.raises(StateError, match=r"has lost its run\.json"):
        steps.prepare(project, settings)
    assert run.ledger_path.read_bytes() == before


# Changed underneath


def test_an_edited_setting_of_a_run_is_refused(project: Project, settings: Settings) -> None:
    run = started(project, settings, rounds=1)
    info = read_sealed(run.root / "run.json")
    info["settings"]["optimizer"]["lr"] = 0.75
    write_sealed(run.root / "run.json", info)
    with pytest.raises(StateError, match=r"is not what it was begun as: optimizer\.lr: 0\.5 -> 0\.75"):
        steps.begin_round(run.root, 2)


@pytest.mark.parametrize("key", ["query", "identity"])
def test_an_edited_digest_of_a_run_is_refused(project: Project, settings: Settings, key: str) -> None:
    run = started(project, settings, rounds=1)
    write_sealed(run.root / "run.json", {**read_sealed(run.root / "run.json"), key: "0" * 64})
    with pytest.raises(StateError, match=r"run\.json was edited"):
        steps.begin_round(run.root, 2)


def test_an_edited_plan_is_refused(project: Project, settings: Settings) -> None:
    run = started(project, settings, rounds=1)
    plan = read_sealed(run.root / "plan.json")
    plan["clients"]["c000"]["noise_multiplier"] /= 2
    write_sealed(run.root / "plan.json", plan)
    with pytest.raises(StateError, match=r"plan\.json: damaged"):
        steps.begin_round(run.root, 2)


def test_a_partition_replaced_under_a_run_stops_it_unspent(project: Project, settings: Settings) -> None:
    """Other records under the old noise; and a record that changed its client would be counted at neither."""
    run = started(project, settings, rounds=1)
    steps.begin_round(run.root, 2)
    before = spent(run)
    write_partition(changed(settings, seed=99), project.raw, project.partition)
    for step in (lambda: steps.train(run.root, 2, 0), lambda: steps.begin_round(run.root, 2)):
        with pytest.raises(StateError, match="is not what it was begun as: dataset"):
            step()
    assert spent(run) == before


def test_code_replaced_under_a_run_stops_it(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(project, settings, rounds=1)
    steps.begin_round(run.root, 2)
    monkeypatch.setattr(identity, "code_digest", lambda: "0" * 64)
    for step in (lambda: steps.train(run.root, 2, 0), lambda: steps.begin_round(run.root, 2)):
        with pytest.raises(StateError, match="is not what it was begun as: code"):
            step()


def test_a_precision_smuggled_into_the_runtime_file_is_refused(project: Project, settings: Settings) -> None:
    run = started(project, settings, rounds=1)
    runtime = read_sealed(run.root / "runtime.json")
    runtime["runtime"]["precision"] = "bf16"
    write_sealed(run.root / "runtime.json", runtime)
    with pytest.raises(StateError, match="precision: fp32 -> bf16"):
        steps.begin_round(run.root, 2)


def test_every_round_start_and_plan_is_a_query_of_its_own(project: Project, settings: Settings) -> None:
    """Also two rounds from equal states; and a round after one that came out otherwise draws fresh noise."""
    run = started(project, settings, rounds=1)
    _, opened = workspace.open_workspace(run.root)
    queries = [beginning.decide(run, opened, 2)["query"]]
    record = run.round_record(1)
    for start in (run.round_record(0)["state"], "0" * 64):
        write_sealed(run.round_dir(1) / "round.json", {**record, "state": start})
        queries.append(beginning.decide(run, opened, 2)["query"])
    queries.append(beginning.decide(run, opened, 1)["query"])
    # A plan edited together with its digest: less noise is another query.
    plan = read_sealed(run.root / "plan.json")
    plan["clients"]["c000"]["noise_multiplier"] /= 2
    digest = write_sealed(run.root / "plan.json", plan)
    write_sealed(run.root / "run.json", {**read_sealed(run.root / "run.json"), "plan_sha256": digest})
    queries.append(beginning.decide(Run(run.root), opened, 1)["query"])
    assert len(set(queries)) == len(queries)


def replace_key(run: Run, key: bytes) -> None:
    """Give a run another key, as nobody should: also where it says which one it has."""
    run.key_path.write_bytes(key)
    write_sealed(run.root / "run.json", {**read_sealed(run.root / "run.json"), "key": key_id(key)})


def test_another_key_in_the_middle_of_a_round_stops_the_cohort(project: Project, settings: Settings) -> None:
    run = started(project, settings)
    plan = steps.begin_round(run.root, 1)
    before = spent(run)
    run.key_path.write_bytes(bytes(32))
    with pytest.raises(StateError, match=r"noise\.key: damaged: is not the key that the run began with; restore it"):
        steps.train(run.root, 1, 0)
    replace_key(run, bytes(32))
    with pytest.raises(StateError, match="was planned for another start, device or key"):
        steps.train(run.root, 1, 0)
    assert spent(run) == before
    assert steps.begin_round(run.root, 1)["query"] != plan["query"]


def test_another_device_in_the_middle_of_a_round_stops_the_cohort(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(project, settings)
    steps.begin_round(run.root, 1)
    on_another_device(monkeypatch, run)
    with pytest.raises(StateError, match="was planned for another start, device or key"):
        steps.train(run.root, 1, 0)
    assert not spent(run)


def test_the_updates_of_an_earlier_plan_are_not_used(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a slow worker writes its listing after the round was planned anew."""
    run = started(project, settings)
    steps.begin_round(run.root, 1)
    listed = [steps.train(run.root, 1, cohort) for cohort in (0, 1)]
    stale = {path: path.read_bytes() for path in run.round_dir(1).glob("cohort-*.json")}
    replace_key(run, bytes.fromhex(OTHER_KEY))
    monkeypatch.setattr(beginning, "price_of", lambda *args: Price({}, {}))
    steps.begin_round(run.root, 1)
    for path, content in stale.items():
        path.write_bytes(content)
    with pytest.raises(StateError, match="earlier plan"):
        steps.aggregate(run.root, 1, listed)
    again = [steps.train(run.root, 1, cohort) for cohort in (0, 1)]
    assert [entry["sha256"] for entry in again] != [entry["sha256"] for entry in listed]
    steps.aggregate(run.root, 1, again)


# Budget


def test_a_client_over_its_cap_is_excluded_with_the_reason(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last round, repeated on another device after one of two cohorts had trained: a new release for those."""
    run = started(project, settings, rounds=2)
    first = steps.begin_round(run.root, 3)
    assert first["excluded"] == {}
    steps.train(run.root, 3, 0)
    on_another_device(monkeypatch, run)
    again = steps.begin_round(run.root, 3)
    assert again["query"] != first["query"]
    assert again["excluded"] == dict.fromkeys(("c000", "c001"), "6 of 6 noisy steps are spent; a round takes 2")
    assert again["cohorts"] == [["c002"]]


def test_where_everyone_is_over_the_cap_nobody_trains(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(project, settings, rounds=2)
    steps.begin_round(run.root, 3)
    for cohort in (0, 1):
        steps.train(run.root, 3, cohort)
    on_another_device(monkeypatch, run)
    plan = steps.begin_round(run.root, 3)
    assert (plan["cohorts"], plan["skipped"]) == ([], "no client has budget left for it")


def test_later_rounds_that_were_deleted_still_count(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(project, settings, rounds=3)
    for number in (2, 3):
        shutil.rmtree(run.round_dir(number))
    on_another_device(monkeypatch, run)
    assert steps.begin_round(run.root, 2)["skipped"] == "no client has budget left for it"


def test_deleted_rounds_are_repeated_at_no_cost_by_the_same_query(
    project: Project, settings: Settings, reference: dict[str, bytes]
) -> None:
    run = started(project, settings, rounds=3)
    epsilon = run.round_record(3)["epsilon_max"]
    for number in (2, 3):
        shutil.rmtree(run.round_dir(number))
    restart()
    found = results(project, finish(project, settings))
    assert all(found[name] == reference[name] for name in ("adapter", "ledger.json", "ledger.jsonl"))
    # What was spent stays spent: round 3 was released before round 2 was repeated.
    assert run.round_record(2)["epsilon_max"] == epsilon


def test_an_overspent_ledger_ends_the_run_before_the_round_is_recorded(project: Project, settings: Settings) -> None:
    run = started(project, settings)
    plan = steps.begin_round(run.root, 1)
    listed = [steps.train(run.root, 1, cohort) for cohort in range(len(plan["cohorts"]))]
    own = run.plan.clients["c000"]
    more = [LedgerEntry("c000", 9, k, own.noise_multiplier, own.sampling_rate, "elsewhere") for k in range(1, 60)]
    run.ledger.append(more)
    aggregated = steps.aggregate(run.root, 1, listed)
    with pytest.raises(PrivacyError, match="above the target 8; stopped"):
        steps.finish_round(run.root, 1, aggregated, {}, 1.0)
    assert run.round_record(1) is None


# Two processes


def test_a_run_in_use_is_not_opened(project: Project, settings: Settings) -> None:
    run = started(project, settings, rounds=1)
    before = (run.root / "runtime.json").read_bytes()
    with run.lock(), pytest.raises(StateError, match=r"in use by process \d+"):
        steps.prepare(project, changed(settings, runtime__tokens_per_batch=99))
    assert (run.root / "runtime.json").read_bytes() == before
    assert steps.prepare(project, settings).resumed


def test_the_slower_of_two_starters_keeps_the_key_and_the_ledger_of_the_faster(
    project: Project, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning takes seconds, in which another process may have begun and spent."""
    secret, inside = changed(settings, privacy__test_key=None), []

    def slow(*args: Any) -> Any:
        if not inside:
            inside.append("begun")
            run = started(project, secret, rounds=1)
            inside.append((run.key, spent(run)))
        return make_plan(*args)

    monkeypatch.setattr(preparing, "make_plan", slow)
    opened = steps.prepare(project, secret)
    assert opened.resumed
    assert (opened.run.key, spent(opened.run)) == inside[1]
    assert spent(opened.run)["c000"] == STEPS


def test_a_plan_that_fails_leaves_no_directory(project: Project, settings: Settings) -> None:
    with pytest.raises(PrivacyError, match="cannot be reached"):
        steps.prepare(project, changed(settings, privacy__epsilon=1e-6))
    assert not project.runs.exists()


def test_a_torn_ledger_line_is_dropped_and_the_step_counted_once(
    project: Project, settings: Settings, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ledger_module._write
    calls = Counter[str]()

    def torn(handle: int, content: bytes) -> None:
        calls["writes"] += bool(content)
        if calls["writes"] == 5:
            real(handle, content[: len(content) // 2])
            raise Killed
        real(handle, content)

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "_write", torn)
        with pytest.raises(Killed):
            finish(project, settings)
    restart()
    assert results(project, finish(project, settings)) == reference


# Evaluation and traffic


def test_rounds_that_are_left_out_are_not_evaluated_and_the_last_always_is(
    project: Project, settings: Settings
) -> None:
    run = finish(project, changed(settings, evaluation__every=2))
    evaluated = [bool(run.round_record(number)["metrics"]) for number in range(ROUNDS + 1)]
    assert evaluated == [True, False, True, True]


def test_bytes_are_those_of_what_is_sent(project: Project, settings: Settings) -> None:
    run = finish(project, changed(settings, method__name="rolora"))
    specs = workspace.open_workspace(run.root)[1].model.specs
    size = {factor: 4 * sum(s.numel for s in specs if s.factor == factor) for factor in ("A", "B", "head")}
    for number in range(1, ROUNDS + 1):
        record, sent = run.round_record(number), size["head"] + size["B" if number % 2 else "A"]
        assert record["bytes_up"] == 3 * sent
        before = sum(size.values()) if number == 1 else size["head"] + size["A" if number % 2 else "B"]
        assert record["bytes_down"] == 3 * before
        up = sum(t.numel() * 4 for t in read_tensors(run.round_dir(number) / "updates" / "c000.safetensors").values())
        assert up == sent


def test_who_is_not_available_is_named_and_spends_nothing(project: Project, settings: Settings) -> None:
    chosen = changed(settings, federation__dropout=0.5, method={"name": "dp-lora"})
    run = finish(project, chosen)
    away = {number: run.round_record(number)["away"] for number in (1, 2, 3)}
    assert any(away.values())
    for number, names in away.items():
        assert sorted([*run.round_record(number)["clients"], *names]) == ["c000", "c001", "c002"]
    assert read_json(project.reports / "run.json")["away"] == {str(n): names for n, names in away.items() if names}
    spent = Counter(entry.client for entry in Ledger(run.ledger_path).entries())
    steps_each = run.plan.local_steps
    assert spent == {
        name: steps_each * sum(name not in names for names in away.values()) for name in ("c000", "c001", "c002")
    }
