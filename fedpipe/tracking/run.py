"""The MLflow run of one fedpipe run: found or created, described, fed, ended.

Every call names the run by its id, because MLflow's active run belongs to a thread.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.errors import StateError
from fedpipe.files import read_json, write_json
from fedpipe.tracking.description import RUN_TAG, RunDescription
from fedpipe.tracking.model import Entry, find_model, log_model
from fedpipe.tracking.store import Store
from fedpipe.tracking.tracker import Status
from fedpipe.tracking.updates import few_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)


class MlflowRun:
    """One run in an open store. What is wrong with the store is raised as MLflow raises it.

    An entry may be performed again until it succeeds, and twice is the same as once: metric points
    are compared with those that MLflow has, by name and step, and carry the time at which they were
    first offered: MLflow drops a point that it has, which covers an answer lost on its way back.
    """

    def __init__(self, store: Store, description: RunDescription, memo: Path) -> None:
        self.client, self.address = store.client, store.address
        self._description, self._memo = description, memo
        known = read_memo(memo)
        run = _find(self.client, known.get("run_id"), store.experiment_id, description.run_id)
        run = run or _create(self.client, store.experiment_id, description.run_id)
        self.id: str = run.info.run_id
        self.info: dict[str, str | None] = {
            "uri": store.uri,
            "experiment_id": run.info.experiment_id,
            "run_id": self.id,
            "model_id": None,
        }
        if known.get("run_id") == self.id:
            self.info["model_id"] = known.get("model_id")
        elif (model := find_model(self.client, self.info)) is not None:
            self.info["model_id"] = model.model_id
        if self.info != known:
            write_json(memo, self.info)
        if run.info.status != "RUNNING":
            self.client.update_run(self.id, status="RUNNING")
        self._describe(run)
        self._points = self._recorded(run)

    def perform(self, entry: Entry) -> None:
        """Record an entry: `kind` is metrics, tags, artifacts or model; the rest is what that kind needs."""
        from mlflow.entities import RunTag

        if entry["kind"] == "metrics":
            self._log_points(entry)
        elif entry["kind"] == "tags":
            self.client.log_batch(self.id, tags=[RunTag(*item) for item in entry["tags"].items()])
        elif not Path(entry["source"]).is_dir():
            log.warning("%s is gone; MLflow is left without it", entry["source"])
        elif entry["kind"] == "artifacts":
            with few_files(Path(entry["source"])) as source:
                self.client.log_artifacts(self.id, str(source), entry["target"])
        else:
            names = [_name(key) for key in entry["names"]]
            entry = {**entry, "names": names, "step": self._last_step()}
            log_model(self.client, self.info, self._description, entry, self._remember_model)

    def end(self, status: Status) -> None:
        self.client.set_terminated(self.id, status)

    def _describe(self, run: Run) -> None:
        """Record parameters, tags and the dataset, as far as they are not there."""
        from mlflow.entities import DatasetInput, InputTag, Param, RunTag

        given = self._description
        params = [Param(key, text) for key, text in given.param_texts().items() if key not in run.data.params]
        tags = [RunTag(key, text) for key, text in given.tag_texts().items() if run.data.tags.get(key) != text]
        self.client.log_batch(self.id, params=params, tags=tags)
        if all(item.dataset.digest != given.dataset_digest for item in run.inputs.dataset_inputs):
            context = InputTag("mlflow.data.context", "training")
            self.client.log_inputs(self.id, datasets=[DatasetInput(given.dataset(), [context])])

    def _recorded(self, run: Run) -> set[tuple[str, int]]:
        """Return the (metric, round) pairs that MLflow has."""
        histories = (self.client.get_metric_history(self.id, key) for key in run.data.metrics)
        return {(point.key, point.step) for history in histories for point in history}

    def _last_step(self) -> int:
        return max((step for _, step in self._points), default=0)

    def _log_points(self, entry: Entry) -> None:
        """Record what is a number and not there yet, at the entry's round, or at the last one where it has none."""
        from mlflow.entities import Metric

        step = self._last_step() if entry["round"] is None else entry["round"]
        found = {_name(key): value for key, value in entry["values"].items()}
        points = {
            name: float(value)
            for name, value in found.items()
            if value is not None and math.isfinite(value) and (name, step) not in self._points
        }
        if points:
            metrics = [Metric(name, value, entry["time"], step) for name, value in points.items()]
            self.client.log_batch(self.id, metrics=metrics)
        self._points.update((name, step) for name in points)

    def _remember_model(self, model_id: str) -> None:
        self.info["model_id"] = model_id
        write_json(self._memo, self.info)


def read_memo(path: Path) -> dict[str, Any]:
    """Return what an earlier process noted of its MLflow run; empty where it noted nothing."""
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


def _name(key: str) -> str:
    """Replace what MLflow does not allow in the name of a metric."""
    return re.sub(r"[^\w./ -]", "_", key, flags=re.ASCII)
