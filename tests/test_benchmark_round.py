"""The benchmark of whole rounds: pins, the job that all contestants share, memory, and the table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BAD, GOOD, make_backbone

from benchmarks import round as benchmark
from benchmarks.rivals import environments, family, ours
from benchmarks.rivals import job as jobs
from fedpipe.config import parse_settings
from fedpipe.state import Run
from fedpipe.workspace import forget_workspaces

ROOT = Path(__file__).resolve().parents[1]
RIVALS = ("flower", "pfl")
SMALL = benchmark.Variant("small", 3, 2, 4, None)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The benchmark's project and job, with a tiny backbone and 60 made-up reviews."""
    backbone = make_backbone(tmp_path / "backbone")
    reviews = [(f"{(BAD, GOOD)[number % 2][number % 5]} film number {number}", number % 2) for number in range(60)]
    monkeypatch.setattr(benchmark, "demo_backbone", lambda: backbone)
    monkeypatch.setattr(benchmark, "demo_reviews", lambda: tuple(map(list, zip(*reviews, strict=True))))
    benchmark.make_project(tmp_path / "job", SMALL)
    yield tmp_path / "job"
    forget_workspaces()


def result(rounds: list[float], **values: Any) -> dict[str, Any]:
    rest = {"cpu": [2 * one for one in rounds], "norms": [0.5] * len(rounds), "peak_bytes": 2**20}
    return {"startup": 2.0, "rounds": rounds, **rest, **values}


# Environments


@pytest.mark.parametrize("rival", RIVALS)
def test_a_rival_computes_with_the_versions_that_fedpipe_is_tested_with(rival: str) -> None:
    path = environments.requirements(rival)
    theirs, known = environments.pins(path), environments.pins(ROOT / "constraints.txt")
    other = {name for name in theirs.keys() & known.keys() if theirs[name] != known[name]}
    head = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    computing = {"torch", "numpy", "transformers", "tokenizers", "peft", "opacus", "safetensors", "accelerate"}
    assert computing <= theirs.keys() - other
    assert other <= set(re.findall(r"[a-z][a-z-]+", head))  # what differs is told in the file's head


@pytest.mark.parametrize("rival", RIVALS)
def test_every_requirement_is_pinned(rival: str) -> None:
    lines = environments.requirements(rival).read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert len(environments.pins(environments.requirements(rival))) == len(wanted)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in wanted)


def test_an_environment_counts_only_while_its_pins_are_the_ones_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def succeed(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        python = environments.python_of("flower")
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environments, "RIVALS", tmp_path)
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path / ".envs")
    monkeypatch.setattr(subprocess, "run", succeed)
    environments.requirements("flower").write_text("flwr==1\n")
    assert not environments.is_made("flower")
    assert environments.make("flower") is None
    assert environments.is_made("flower")
    assert environments.make("flower") is None
    assert len(commands) == 2  # the second time nothing was done
    environments.requirements("flower").write_text("flwr==2\n")
    assert not environments.is_made("flower")


def test_an_environment_that_cannot_be_made_says_why_and_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\nWARNING: something else\n")

    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(subprocess, "run", fail)
    assert environments.make("flower") == "its environment could not be made: ERROR: no network"
    assert not environments.is_made("flower")


def test_in_a_hurry_no_environment_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path)
    reasons = {one.name: reason for one, reason in benchmark.available(benchmark.CONTESTANTS, quick=True)}
    assert reasons.pop(benchmark.OURS) is None
    assert set(reasons.values()) == {"its environment is not there; run without --quick once"}
    assert list(tmp_path.iterdir()) == []


# The job


@pytest.mark.parametrize("variant", [*benchmark.VARIANTS, *benchmark.QUICK], ids=lambda variant: variant.name)
def test_settings_say_what_the_variant_says(variant: benchmark.Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "demo_backbone", lambda: Path("backbone"))
    settings = parse_settings(benchmark.settings_of(variant, Path("reviews.csv")))
    federation = settings.federation
    assert (settings.partition.clients, federation.local_steps) == (variant.clients, variant.local_steps)
    assert (federation.batch_size, settings.lora.last_layers) == (variant.batch, variant.last_layers)
    assert settings.private
    assert settings.privacy.test_key is None


def test_all_contestants_get_the_same_records_noise_and_start(directory: Path) -> None:
    job = jobs.read_job(directory)
    jobs.encode(directory, job)
    clients = jobs.load_records(directory)
    run = start(directory, rounds=1)
    assert job.sigmas == tuple(plan.noise_multiplier for _, plan in sorted(run.plan.clients.items()))
    assert [len(client) for client in clients] == [plan.records for _, plan in sorted(run.plan.clients.items())]
    words = json.loads((directory / "texts.json").read_text())
    assert [sum(part) for part in words["labels"]] == [int(client.tensors[2].sum()) for client in clients]
    parameters, initial = jobs.trained(jobs.build_model(directory, job)), run.adapter(0)
    plain = {re.sub(r"\.(modules_to_save\.)?default\.", ".", name): value for name, value in parameters.items()}
    assert plain.keys() == initial.keys()
    assert all(torch.equal(plain[name], value) for name, value in initial.items())


def start(directory: Path, rounds: int) -> Run:
    ours.main(directory / "project", rounds)
    return Run(next(path for path in (directory / "project" / "runs").iterdir() if (path / "run.json").exists()))


def test_ours_runs_rounds_as_a_user_does_and_reports_each(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(directory, rounds=2)
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert run.completed_rounds() == 2
    assert run.ledger_path.exists()
    assert len(said["norms"]) == 2
    assert said["times"] == sorted(said["times"])
    assert len(said["times"]) == 3
    assert min(said["norms"]) > 0
    assert not run.round_record(2)["metrics"]  # no evaluation within the seconds


def test_a_rivals_losses_do_not_depend_on_the_padding(directory: Path) -> None:
    job = jobs.read_job(directory)
    jobs.encode(directory, job)
    model, (ids, mask, labels) = jobs.build_model(directory, job), jobs.load_records(directory)[0].tensors
    together = jobs.losses(model, ids, mask, labels)
    alone = torch.cat([jobs.losses(model, ids[[n]], mask[[n]], labels[[n]]) for n in range(len(labels))])
    torch.testing.assert_close(together, alone)


def test_distance_is_the_joint_norm_of_all_tensors() -> None:
    before = {"a": torch.zeros(2), "b": torch.zeros(1)}
    assert jobs.distance(before, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([2.0])}) == 3.0


# Memory and processor time


def test_memory_counts_processes_that_others_started() -> None:
    waits = "import sys; print('ready', flush=True); sys.stdin.read()"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {waits!r}])"
    with subprocess.Popen([sys.executable, "-c", starts], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = family.descendants(child.pid)
        sizes = [family.proportional_size(process) for process in found]
    assert len(found) == 1
    assert sizes[0] > 2**20
    assert family.resident_size(found[0]) == family.cpu_seconds(found[0]) == 0
    assert family.proportional_size(found[0]) == 0  # it has ended


def test_the_peak_is_that_of_children_only() -> None:
    size = 64 * 2**20
    holds = f"import time; block = bytearray(b'x') * {size}; time.sleep({5 * family.SECONDS})"
    # In a process of its own: this one may have children that other tests left running.
    watches = (
        "import subprocess, sys\nfrom benchmarks.rivals.family import Family\n"
        f"with Family() as peak: subprocess.run([sys.executable, '-c', {holds!r}], check=True)\nprint(peak.peak)"
    )
    printed = subprocess.run([sys.executable, "-c", watches], check=True, capture_output=True, text=True).stdout
    assert size < int(printed) < 2 * size


def test_processor_time_of_children_is_counted_where_it_was_used() -> None:
    works = "import time\nwhile time.process_time() < 1: pass\nprint(time.time(), flush=True); time.sleep(1)"
    with family.Family() as watched:
        said = subprocess.run([sys.executable, "-c", works], check=True, capture_output=True, text=True)
    end = float(said.stdout)
    assert watched.cpu_between(0.0, end + 1) > 0.9
    assert watched.cpu_between(end + 2 * family.SECONDS, end + 0.9) < 0.1


# The table


def test_rows_are_medians_without_the_first_round_of_each_process() -> None:
    runs = {benchmark.OURS: [result([9.0, 1.0, 3.0]), result([7.0, 2.0, 2.0])], "rival": [result([50.0, 8.0])]}
    first, second = benchmark.rows_of("v", runs)
    assert (first["seconds a round"], first["first round"], first["rounds"]) == (2.0, 8.0, 4)
    assert first["CPU seconds"] == 4.0
    assert (first["against fedpipe"], second["against fedpipe"]) == (1.0, 4.0)
    assert (second["seconds a round"], second["peak MiB"], second["update norm"]) == (8.0, 1, 0.5)


def test_a_contestant_that_fails_has_a_row_that_says_why() -> None:
    rows = benchmark.rows_of("v", {benchmark.OURS: [result([1.0, 1.0])], "rival": [{"error": "no environment"}]})
    assert rows[1] == {"variant": "v", "contestant": "rival", "note": "no environment"}
    assert rows[0]["note"] == ""


def test_of_a_failed_process_the_line_that_names_the_error_is_shown() -> None:
    said = "module: exit 1\nTraceback\n  File x\nValueError: no such layer\n  in here\n=====\n"
    assert benchmark.reason_of(said) == "ValueError: no such layer"
    assert benchmark.reason_of("module: exit 1\nkilled\n") == "killed"


def test_without_fedpipe_there_is_no_ratio() -> None:
    rows = benchmark.rows_of("v", {benchmark.OURS: [{"error": "broken"}], "rival": [result([1.0, 4.0])]})
    assert rows[1]["seconds a round"] == 4.0
    assert rows[1]["against fedpipe"] is None
