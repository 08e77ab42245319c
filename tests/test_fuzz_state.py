"""Any file of a run or a partition changed: it is found, or the run ends as it would have; nothing else moves."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator

import pytest
from fuzzing import EXPLORED, changed_bytes, changed_tree, only_told, snapshot, tried
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_project

from fedpipe import steps
from fedpipe.config import Settings
from fedpipe.data.federation import Federation
from fedpipe.errors import FedpipeError, StateError
from fedpipe.files import digest, read_json, read_sealed, write_sealed
from fedpipe.project import Project
from fedpipe.publish import publish
from fedpipe.state import Run
from fedpipe.workspace import forget_workspaces

Made = tuple[Project, Settings]
# Kept for times only, for the process that holds the run, or written anew at every start.
HARMLESS = ("lock",)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A run that was stopped in its second round, with all the cohorts of that round trained."""
    made = make_project(tmp_path_factory.mktemp("stopped") / "made", **SECTIONS)
    run = steps.prepare(*made).run
    steps.run_round(run.root, 1)
    for cohort in range(len(steps.begin_round(run.root, 2)["cohorts"])):
        steps.train(run.root, 2, cohort)
    yield made
    forget_workspaces()


SECTIONS = {
    "method": {"name": "fedsa-lora"},  # clients keep something, so that there is every kind of file
    "federation": {"rounds": 2, "local_steps": 1},
    "privacy": {"accountant": "rdp"},
    "runtime": {"cohort_size": 2},
}


def run_of(project: Project) -> Run:
    (path,) = project.runs.glob("*/plan.json")
    return Run(path.parent)


def finish(project: Project, settings: Settings) -> dict[str, object]:
    """Go on to the end; return all that people get, times left out."""
    run = steps.prepare(project, settings).run
    for number in range(run.completed_rounds() + 1, run.plan.rounds + 1):
        steps.run_round(run.root, number)
    publish(run, project)
    rows = csv.DictReader(io.StringIO((project.reports / "rounds.csv").read_text()))
    facts = read_json(project.reports / "run.json")
    return {
        "adapter": (project.adapter / "adapter_model.safetensors").read_bytes(),
        "ledger": run.ledger_path.read_bytes(),
        "summary": read_json(project.reports / "ledger.json"),
        "rounds": [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
        "metrics": {k: v for k, v in read_json(project.reports / "metrics.json").items() if k != "seconds"},
        "facts": {key: value for key, value in facts.items() if key != "finished"},
    }


class Scene:
    """The stopped run, put back before each example, in the place where its workspace is warm."""

    def __init__(self, made: Made) -> None:
        self.project, self.settings = made
        self.root = self.project.root
        self._kept = self.root.with_name("kept")
        shutil.copytree(self.root, self._kept, dirs_exist_ok=True)
        self.files = [
            str(path.relative_to(self.root))
            for path in sorted(self.project.runs.rglob("*"))
            if path.is_file() and "secrets" not in path.parts and path.name not in HARMLESS
        ]
        self.expected = finish(self.project, self.settings)

    def reset(self) -> None:
        for part in (self.project.runs, self.project.reports, self.project.adapter):
            shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self._kept / "runs", self.project.runs)

    def outside(self) -> dict[str, tuple[int, int, int]]:
        found = snapshot(self.root.parent)
        ours = tuple(f"{self.root.name}/{part}/" for part in ("runs", "reports", "models/adapter"))
        return {name: stamp for name, stamp in found.items() if not name.startswith(ours)}

    def check(self, name: str, change: Callable[[bytes], bytes]) -> str:
        """Change one file, go on, and say whether that was refused or led to the same end."""
        self.reset()
        path = self.root / name
        content = change(path.read_bytes())
        if content == path.read_bytes():
            return "same bytes"
        path.write_bytes(content)
        before = self.outside()
        try:
            assert finish(self.project, self.settings) == self.expected, f"{name} was changed, and so was the result"
            return "harmless"
        except FedpipeError:
            return "refused"
        finally:
            assert self.outside() == before


@pytest.fixture(scope="module")
def scene(stopped: Made) -> Scene:
    return Scene(stopped)


def test_there_is_every_kind_of_file(scene: Scene) -> None:
    names = " ".join(scene.files)
    for part in ("run.json", "runtime.json", "ledger.jsonl", "0001/round.json", "0002/plan.json", "cohort-00.json"):
        assert part in names
    for part in ("updates/c000.safetensors", "0001/adapter.safetensors", "kept-0001.safetensors", "evaluation.json"):
        assert part in names


def fuzz(scene: Scene, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(scene.files))
    scene.check(name, lambda content: data.draw(changed_bytes(content)))


@tried(15)
@given(data=st.data())
def test_a_changed_file_is_found_or_harmless(scene: Scene, data: st.DataObject) -> None:
    fuzz(scene, data)


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def other_digits(content: bytes) -> bytes:
    """Change the last digit of every number with a point: an accuracy, an epsilon, a norm."""
    return re.sub(rb"(\.\d*)(\d)(?=[,\s\]}])", lambda m: m[1] + str((int(m[2]) + 3) % 10).encode(), content)


@pytest.mark.parametrize("change", [halved, other_digits])
def test_no_kind_of_file_can_change_unnoticed(scene: Scene, change: Callable[[bytes], bytes]) -> None:
    for name in scene.files:
        if not any(other in name for other in ("c001", "c002", "cohort-01")):  # one of each kind
            scene.check(name, change)


def _can_be_written(tree: object) -> bool:
    try:
        digest(tree)
    except ValueError:
        return False
    return isinstance(tree, dict)


@tried(60)
@given(data=st.data())
def test_manifests(scene: Scene, data: st.DataObject) -> None:
    """A manifest that somebody else sealed: refused, or one whose files are what it says."""
    path = scene.project.partition / "manifest.json"
    kept = path.read_bytes()
    try:
        write_sealed(path, data.draw(changed_tree(read_sealed(path)).filter(_can_be_written)))
        before = snapshot(scene.root.parent)
        with only_told():
            federation = Federation.open(scene.project.partition)
            federation.verify()
            with only_told():
                federation.check_fresh(scene.settings, scene.project.raw)
            tables = [federation.client(name) for name in federation.clients]
            assert [len(table) for table in tables] == list(federation.sizes.values())
            assert {label for table in (*tables, federation.test()) for label in table["label"]} <= set(
                federation.labels
            )
        assert snapshot(scene.root.parent) == before
    finally:
        path.write_bytes(kept)


@tried(60)
@given(data=st.data())
def test_bytes_of_manifests_and_origins(scene: Scene, data: st.DataObject) -> None:
    name = data.draw(
        st.sampled_from(["data/partition/manifest.json", "data/raw/origin.json", "models/backbone/origin.json"])
    )
    path = scene.root / name
    kept = path.read_bytes()
    meant = read_sealed(path)
    try:
        path.write_bytes(data.draw(changed_bytes(kept)))
        with only_told():
            assert read_sealed(path) == meant
    finally:
        path.write_bytes(kept)


@pytest.mark.slow
@tried(EXPLORED // 4)
@given(data=st.data())
def test_many_more(scene: Scene, data: st.DataObject) -> None:
    fuzz(scene, data)


def test_a_name_that_leads_out_is_refused(scene: Scene) -> None:
    scene.reset()
    run = run_of(scene.project)
    path = run.round_dir(2) / "cohort-00.json"
    listing = read_sealed(path)
    for name in ("../../run.json", "/etc/hostname", "updates/../../../run.json", "", ".", "a\\b", None, 3):
        listing["updates"]["c000"]["file"] = name
        sha256 = write_sealed(path, listing)
        with pytest.raises(StateError):
            steps.aggregate(run.root, 2, [{"file": "cohort-00.json", "sha256": sha256}, {"file": "../x", "sha256": ""}])


def test_a_changed_manifest_ends_in_one_line_at_the_command_line(scene: Scene) -> None:
    from click.testing import CliRunner

    from fedpipe.cli import main

    path = scene.project.partition / "manifest.json"
    kept = path.read_bytes()
    try:
        path.write_text(json.dumps({**json.loads(kept), "labels": ["x"]}))
        done = CliRunner().invoke(main, ["budget", "--params", str(scene.root / "params.yaml")])
    finally:
        path.write_bytes(kept)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "manifest.json: damaged" in done.stderr
