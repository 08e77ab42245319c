"""What a run takes on disk is known before it begins: the prediction holds, and a run that does not fit is refused."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import fedpipe, new_project
from synthetic import make_specs
from tiny import make_backbone, tiny_values, write_records

from fedpipe.client.schedule import Decision
from fedpipe.config import Settings, parse_settings
from fedpipe.data.federation import write_partition
from fedpipe.data.sources import fetch_data
from fedpipe.disk import Needs, check_room, needs_of, room
from fedpipe.disk.rehearsal import Rehearsal
from fedpipe.doctor import examine
from fedpipe.errors import StorageError
from fedpipe.methods import CATALOGUE, compose
from fedpipe.models.source import fetch_backbone
from fedpipe.project import Project
from fedpipe.publish import publish
from fedpipe.steps import prepare, preparing, run_round
from fedpipe.workspace import Workspace, forget_workspaces

SLOW = pytest.mark.slow
LEAST, MOST = 0.8, 1.5  # of what is really written
ROUNDS = 5
METHODS: dict[str, dict[str, Any]] = {
    "dp-lora": {},
    "no privacy": {"method": {"name": "fedit"}, "privacy": {"unit": "none", "test_key": None}},
    "kept by clients": {"method": {"name": "fedsa-lora"}},
    "kept by clients and server": {
        "method": {"name": "scaffold"},
        "privacy": {"unit": "none", "test_key": None},
    },
    "two adapters": {"method": {"name": "fedalt"}},
    "moments": {"method": {"name": "fedadam"}},
    "one factor at a time": {"method": {"name": "rolora"}},
    "residuals in the weights": {"method": {"name": "fedex-lora"}},
    "stacks in the weights": {"method": {"name": "flora"}},
    "adapters merged": {"method": {"name": "fr-lora"}},
    "a rest at the server": {"method": {"name": "fedhl"}},
    "late updates": {"method": {"name": "fedbuff", "rounds": {"size": 1}}},
    "a secure sum": {"federation": {"secure_aggregation": True}},
    "whole clients": {"privacy": {"unit": "client", "epsilon": 50.0}},
    "frozen layers": {"lora": {"rank": 8, "alpha": 8.0, "last_layers": 1}, "runtime": {"cache_frozen_prefix": True}},
}
SHORT = {"dp-lora", "two adapters", "stacks in the weights", "a secure sum"}  # the others with few rounds kept are slow


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 64 x 64 at rank 8: tensors of some blocks."""
    root = tmp_path_factory.mktemp("template") / "project"
    root.mkdir()
    write_records(root / "records.csv")
    make_backbone(root / "backbone", hidden=64)
    settings, project = settings_of(root), Project(root)
    fetch_data(settings.data, project.raw)
    fetch_backbone(settings.model.backbone, project.backbone)
    write_partition(settings, project.raw, project.partition)
    return root


def settings_of(root: Path, keep: int | None = None, **sections: Any) -> Settings:
    merged = {"method": {"name": "dp-lora"}, "lora": {"rank": 8, "alpha": 8.0}, **sections}
    merged["federation"] = {"rounds": ROUNDS, "local_steps": 2, "batch_size": 24, **sections.get("federation", {})}
    merged["privacy"] = {"accountant": "rdp", "test_key": "ab" * 32, "epsilon": 8.0, **sections.get("privacy", {})}
    usual = {"device": "cpu", "tokens_per_batch": 256, "keep_rounds": keep}
    merged["runtime"] = {**usual, **sections.get("runtime", {})}
    return parse_settings(tiny_values(root, **merged))


def copied(template: Path, path: Path) -> Project:
    shutil.copytree(template, path)
    return Project(path)


def blocks(directory: Path) -> int:
    """What the files and folders below take in blocks of 4 KiB, whatever the file system makes of them."""
    found = 0
    for where, folders, files in os.walk(directory):
        found += 4096 * len(folders)
        found += sum(-(-os.path.getsize(os.path.join(where, name)) // 4096) * 4096 for name in files)
    return found


def noted(monkeypatch: pytest.MonkeyPatch) -> list[Needs]:
    """Note what runs that are prepared from now on are said to need."""
    found: list[Needs] = []
    monkeypatch.setattr(preparing, "needs_of", lambda *a, **k: found.append(needs_of(*a, **k)) or found[-1])
    return found


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize(
    ("name", "keep"),
    [
        pytest.param(name, keep, marks=[] if keep is None or name in SHORT else SLOW)
        for name in METHODS
        for keep in (None, 2)
    ],
)
def test_the_prediction_holds(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, keep: int | None
) -> None:
    project, found = copied(template, tmp_path / "project"), noted(monkeypatch)
    run = prepare(project, settings_of(template, keep, **METHODS[name])).run
    (needs,), most = found, blocks(run.root)
    for number in range(1, ROUNDS + 1):
        run_round(run.root, number)
        most = max(most, blocks(run.root))
    publish(run, project)
    assert LEAST <= needs.run / max(most, blocks(run.root)) <= MOST
    prefix = list(project.runs.glob("prefix/*.npy"))
    if prefix:
        assert LEAST <= needs.prefix / prefix[0].stat().st_size <= MOST
    else:
        assert needs.prefix == 0


@pytest.mark.parametrize("artifacts", [True, False])
def test_the_prediction_holds_for_all_that_a_flow_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifacts: bool
) -> None:
    project = new_project(tmp_path / "project", tracked=True, federation={"rounds": ROUNDS}, lora={"rank": 8})
    values = json.loads((project / "params.yaml").read_text())
    values["tracking"]["artifacts"] = artifacts
    (project / "params.yaml").write_text(json.dumps(values))
    before = blocks(project)
    done = fedpipe(project, "run")
    assert done.code == 0, done.err
    written = {name: blocks(project / name) for name in ("runs", "mlruns", "reports", "models/adapter")}
    grown = (project / "mlflow.db").stat().st_size
    monkeypatch.chdir(project)
    settings = parse_settings(values)
    workspace = Workspace(Project(project), settings)
    needs = needs_of(settings, workspace.method, workspace.model.specs, workspace.trained, [3] * ROUNDS, 3)
    assert LEAST <= needs.run / written["runs"] <= MOST
    assert LEAST <= needs.published / (written["reports"] + written["models/adapter"]) <= MOST
    assert LEAST <= needs.mlflow / (written["mlruns"] + grown) <= MOST
    total = needs.run + needs.published + needs.mlflow
    assert LEAST <= total / (blocks(project) - before + grown) <= MOST


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage._replace(free=free))


@pytest.mark.usefixtures("fresh_process")
class TestRefused:
    def test_before_anything_is_written(self, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        project, found = copied(template, tmp_path / "project"), noted(monkeypatch)
        with_free(monkeypatch, 100_000)
        with pytest.raises(StorageError) as caught:
            prepare(project, settings_of(template))
        (needs,), message = found, str(caught.value)
        assert re.fullmatch(
            rf"{re.escape(str(project.root))}: 100 kB are free, and the run needs about \d+ kB more \(the run \d+ kB, "
            r"adapter and reports \d+ kB\); free some, keep the tensors of fewer rounds \(runtime.keep_rounds: 2\), or "
            r"work in a directory on a larger disk",
            message,
        )
        assert room.shown(needs.run) in message
        assert not list(project.runs.glob("*"))
        assert caught.value.exit_code == 4

    def test_fewer_rounds_fit(self, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        project, found = copied(template, tmp_path / "project"), noted(monkeypatch)
        rounds = {"federation": {"rounds": 40}}
        for keep in (None, 2):
            with_free(monkeypatch, 0)
            with pytest.raises(StorageError):
                prepare(project, settings_of(template, keep, **rounds))
        whole, short = (needs.run + needs.published for needs in found)
        assert short < 0.6 * whole
        with_free(monkeypatch, (whole + short) // 2)
        with pytest.raises(StorageError, match="keep_rounds: 2"):
            prepare(project, settings_of(template, **rounds))
        prepare(project, settings_of(template, 2, **rounds))

    def test_what_is_there_does_not_count_again(
        self, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project, settings = copied(template, tmp_path / "project"), settings_of(template)
        found = noted(monkeypatch)
        run = prepare(project, settings).run
        for number in range(1, 4):
            run_round(run.root, number)
        forget_workspaces()
        left = found[0].run - room.used(run.root) + found[0].published
        files = sorted(path for path in run.root.rglob("*") if path.is_file() and path.name != "lock")
        before = [path.read_bytes() for path in files]
        with_free(monkeypatch, left - 1)
        with pytest.raises(StorageError, match="are free"):
            prepare(project, settings)
        assert [path.read_bytes() for path in files] == before
        with_free(monkeypatch, left)
        assert prepare(project, settings).resumed

    def test_a_complete_run_needs_nothing(
        self, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project, settings = copied(template, tmp_path / "project"), settings_of(template, federation={"rounds": 1})
        run = prepare(project, settings).run
        run_round(run.root, 1)
        run.finish(publish(run, project))
        with_free(monkeypatch, 0)
        assert prepare(project, settings).run.complete


def test_mlflow_alone_on_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on without its store; on the same disk, it would be next."""
    store = tmp_path / "store"
    store.mkdir()
    settings = parse_settings(tiny_values(tmp_path, tracking={"uri": f"sqlite:///{store}/mlflow.db"}))
    needs = Needs(rounds=10, clients=0, records=10, prefix=0, published=10, mlflow=10**9, prefect=0)
    with_free(monkeypatch, 10**6)
    with pytest.raises(StorageError, match=r"\(MLflow 1 GB\); .* out of MLflow \(tracking.artifacts: false"):
        check_room(Project(tmp_path), settings, needs)
    monkeypatch.setattr(room, "_device", lambda path: int(path == store))
    check_room(Project(tmp_path), settings, needs)


def rehearsal(name: str, clients: int, shapes: tuple[tuple[int, int], ...] = ((80, 90), (60, 60)), **more: Any) -> Any:
    values = {"data": {"source": "x"}, "model": {"backbone": "y"}, "lora": {"rank": 4}, "privacy": {"unit": "none"}}
    values |= {"method": {"name": name, **more}, "federation": {"local_steps": 2}, "partition": {"clients": clients}}
    settings = parse_settings(values)
    method = compose(settings)
    start = method.initialisation
    specs = make_specs(4, shapes, start.context, start.mixer, start.core, start.sparse)
    trained = frozenset(spec.name for spec in specs if spec.adapter == "default")
    return Rehearsal(method, specs, trained, settings, clients)


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_method_can_be_rehearsed(name: str) -> None:
    """An update is as large as the method itself says that it is."""
    played = rehearsal(name, 12)
    sent = [sum(size for _, size in played.sizes(round.update.tensors)) for round in played.rounds]
    method, specs = played.method, played.specs
    for number, size in enumerate(sent, start=1):
        modes = method.schedule.modes(Decision(number, 10, 17, specs))
        own = method.sends([spec for spec in specs if spec.name in played.trained], number, 2, modes)
        exact = 4 * sum(spec.numel for spec in [*own, *method.objective.extra_specs(own)])
        # Which entries a sparse change has is drawn for each layer.
        assert size == pytest.approx(exact, rel=0.1 if method.initialisation.sparse else 0)
    needs = needs_of(played.settings, method, specs, played.trained, [12] * 10, 12)
    assert needs.run > 10 * 12 * min(sent)


@pytest.mark.parametrize("clients", [1, 2, 3, 40])
@pytest.mark.parametrize(
    ("name", "options", "added"),
    [
        ("fedex-lora", {}, lambda clients: 4 * (clients - 1)),
        ("fedex-lora", {"aggregation": {"residual_rank": 3}}, lambda clients: min(3, 4 * (clients - 1))),
        ("flora", {}, lambda clients: 4 * clients),
        ("fr-lora", {}, lambda clients: 8),
        ("dp-lora", {}, lambda clients: 0),
    ],
)
def test_what_grows_in_the_weights(name: str, options: dict[str, Any], added: Any, clients: int) -> None:
    assert rehearsal(name, clients, **options).growth("base")[1] == added(clients)


def test_it_grows_no_further_than_the_weights() -> None:
    """Of full rank, a product is the weight's own size, and one side squared."""
    played = rehearsal("flora", 4, shapes=((80, 90),))
    states = [
        needs_of(played.settings, played.method, played.specs, played.trained, [4] * rounds, 4, audited=True).rounds
        for rounds in (20, 21, 22)
    ]
    update = 4 * 4096 + 4096
    assert states[2] - states[1] == states[1] - states[0]
    assert states[2] - states[1] - update <= 4 * (80 * 80 + 80 * 90) + 4 * 4096


def test_doctor_tells_what_a_run_needs(template: Path, tmp_path: Path) -> None:
    project = copied(template, tmp_path / "project")
    (check,) = [found for found in examine(project, settings_of(template)) if found.name == "disk"]
    assert check.ok
    assert re.search(
        r"GB free; a run needs about 0\.5 GB \(the run \d+ kB, Prefect \d[\d.]* MB, adapter and", check.found
    )
    shutil.rmtree(project.partition)
    (check,) = [found for found in examine(project, settings_of(template)) if found.name == "disk"]
    assert check.found.endswith("a run needs about 0.5 GB; more is known with a partition")


@pytest.mark.usefixtures("fresh_process")
def test_what_cannot_be_rehearsed_is_trained(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Needs:
        raise IndexError("a part of somebody's own")

    monkeypatch.setattr(preparing, "needs_of", fails)
    monkeypatch.setattr(logging.getLogger("fedpipe"), "propagate", True)
    run_round(prepare(copied(template, tmp_path / "project"), settings_of(template)).run.root, 1)
    assert "what the run needs on disk is not known (IndexError: a part of somebody's own)" in caplog.text
