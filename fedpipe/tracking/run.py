"""The MLflow run of one fedpipe run: found or created, described, fed round by round, ended.

Every call names the run by its id, because MLflow's active run belongs to a thread.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.errors import StateError
from fedpipe.files import read_json, write_json
from fedpipe.tracking.description import RUN_TAG, RunDescription
from fedpipe.tracking.model import find_model, log_model
from fedpipe.tracking.pending import Entry, Pending
from fedpipe.tracking.store import Store, reason
from fedpipe.tracking.tracker import Status, Tracker
from fedpipe.tracking.updates import few_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)


class MlflowTracker(Tracker):
    """A tracker that records one run in an open store; made by `Tracker.open`."""

    def __init__(self, store: Store, description: RunDescription, memo: Path) -> None:
        self._client, self._description, self._memo = store.client, description, memo
        self._pending = Pending(memo.with_name(f"{memo.stem}-pending.jsonl"))
        known = _read_memo(memo)
        run = _find(self._client, known.get("run_id"), store.experiment_id, description.run_id)
        run = run or _create(self._client, store.experiment_id, description.run_id)
        self._run_id: str = run.info.run_id
        self._info: dict[str, str | None] = {
            "uri": store.uri,
            "experiment_id": run.info.experiment_id,
            "run_id": self._run_id,
            "model_id": None,
        }
        if known.get("run_id") == self._run_id:
            self._info["model_id"] = known.get("model_id")
        elif (model := find_model(self._client, self._info)) is not None:
            self._info["model_id"] = model.model_id
        if self._info != known:
            write_json(memo, self._info)
        if run.info.status != "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        self._describe(run)
        self._points = self._recorded(run)
        self._pending.process([], self._perform)

    @property
    def info(self) -> dict[str, str | None]:
        return dict(self._info)

    @property
    def run_url(self) -> str | None:
        uri = str(self._info["uri"])
        if not uri.startswith("http"):
            return None
        return f"{uri.rstrip('/')}/#/experiments/{self._info['experiment_id']}/runs/{self._run_id}"

    def log_round(self, round: int, metrics: Mapping[str, float | None], directory: Path | None = None) -> None:
        entries = self._new_points(round, metrics)
        if directory is not None:
            entries.append(_artifacts(directory, f"rounds/{round:04d}"))
        self._pending.process(entries, self._perform)

    def log_final(self, metrics: Mapping[str, float | None], adapter: Path, description: str) -> None:
        step = max((step for _, step in self._points), default=0)
        points = self._new_points(step, metrics)
        model = {
            "kind": "model",
            "source": str(adapter.absolute()),
            "names": [_name(key) for key in metrics],
            "step": step,
            "note": description,
        }
        self._pending.process([*points, _artifacts(adapter, "adapter"), model], self._perform)

    def log_reports(self, directory: Path) -> None:
        self._pending.process([_artifacts(directory, "reports")], self._perform)

    def tag(self, tags: Mapping[str, str]) -> None:
        self._pending.process([{"kind": "tags", "tags": dict(tags)}], self._perform)

    def close(self, status: Status) -> dict[str, str | None]:
        if not self._pending.process([], self._perform):
            log.warning(
                "MLflow lacks %d entries of run %s; they wait in %s and are recorded when the run is started again",
                len(self._pending.entries),
                self._description.run_id,
                self._pending.path,
            )
        try:
            self._client.set_terminated(self._run_id, status)
        except Exception as error:  # the run itself is complete; only its record lacks the end
            log.warning("MLflow did not take the end of run %s: %s", self._description.run_id, reason(error))
        return self.info

    def _describe(self, run: Run) -> None:
        """Record parameters, tags and the dataset, as far as they are not there."""
        from mlflow.entities import DatasetInput, InputTag, Param, RunTag

        given = self._description
        params = [Param(key, text) for key, text in given.param_texts().items() if key not in run.data.params]
        tags = [RunTag(key, text) for key, text in given.tag_texts().items() if run.data.tags.get(key) != text]
        self._client.log_batch(self._run_id, params=params, tags=tags)
        if all(item.dataset.digest != given.dataset_digest for item in run.inputs.dataset_inputs):
            context = InputTag("mlflow.data.context", "training")
            self._client.log_inputs(self._run_id, datasets=[DatasetInput(given.dataset(), [context])])

    def _recorded(self, run: Run) -> set[tuple[str, int]]:
        """Return the (metric, round) pairs that MLflow has, or that wait for it."""
        histories = (self._client.get_metric_history(self._run_id, key) for key in run.data.metrics)
        points = {(point.key, point.step) for history in histories for point in history}
        for entry in self._pending.entries:
            points.update((key, step) for key, _, _, step in entry.get("points", []))
        return points

    def _new_points(self, step: int, metrics: Mapping[str, float | None]) -> list[Entry]:
        now = int(time.time() * 1000)
        points: list[tuple[str, float, int, int]] = []
        for key, value in metrics.items():
            name = _name(key)
            if value is not None and math.isfinite(value) and (name, step) not in self._points:
                self._points.add((name, step))
                points.append((name, float(value), now, step))
        return [{"kind": "metrics", "points": points}] if points else []

    def _perform(self, entry: Entry) -> None:
        from mlflow.entities import Metric, RunTag

        if entry["kind"] == "metrics":
            self._client.log_batch(self._run_id, metrics=[Metric(*point) for point in entry["points"]])
        elif entry["kind"] == "tags":
            self._client.log_batch(self._run_id, tags=[RunTag(*item) for item in entry["tags"].items()])
        elif not Path(entry["source"]).is_dir():
            log.warning("%s is gone; MLflow is left without it", entry["source"])
        elif entry["kind"] == "artifacts":
            with few_files(Path(entry["source"])) as source:
                self._client.log_artifacts(self._run_id, str(source), entry["target"])
        else:
            log_model(self._client, self._info, self._description, entry, self._remember_model)

    def _remember_model(self, model_id: str) -> None:
        self._info["model_id"] = model_id
        write_json(self._memo, self._info)


def _read_memo(path: Path) -> dict[str, Any]:
    with contextlib.suppress(StateError):  # missing or damaged: the run is found by its tag
        return dict(read_json(path))
    return {}


def _find(client: MlflowClient, run_id: str | None, experiment_id: str, name: str) -> Run | None:
    """Return the MLflow run by its id, else the oldest one that carries fedpipe's run id, else nothing."""
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        with contextlib.suppress(MlflowException):  # another store; a tag may still lead to a run there
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "active":
                return run
    filter_string = f"tags.`{RUN_TAG}` = '{name}'"
    hits = client.search_runs([experiment_id], filter_string, order_by=["attributes.start_time ASC"], max_results=1)
    return hits[0] if hits else None


def _create(client: MlflowClient, experiment_id: str, name: str) -> Run:
    # The run tag is made together with the run: a crash before the memo leaves nothing that cannot be found.
    tags = {RUN_TAG: name, "mlflow.source.name": "fedpipe", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(KeyError, OSError):  # a user id without a name
        tags["mlflow.user"] = getpass.getuser()
    return client.create_run(experiment_id, run_name=name, tags=tags)


def _artifacts(directory: Path, target: str) -> Entry:
    return {"kind": "artifacts", "source": str(directory.absolute()), "target": target}


def _name(key: str) -> str:
    """Replace what MLflow does not allow in the name of a metric."""
    return re.sub(r"[^\w./ -]", "_", key, flags=re.ASCII)
