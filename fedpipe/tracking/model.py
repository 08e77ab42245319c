"""The adapter as an MLflow logged model, so that it can be found, compared and loaded by its id.

The PEFT directory is recorded as it is. MLflow's own flavour for transformers would bundle the
backbone, or save keys that stock PEFT cannot load.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fedpipe.tracking.description import LONGEST_MODEL_PARAM, LONGEST_TAG, NOTE_TAG, RunDescription

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

Entry = dict[str, Any]  # something to record: "kind", and what that kind needs


def find_model(client: MlflowClient, info: Mapping[str, str | None]) -> LoggedModel | None:
    """Return the logged model of the run that `info` names, if one was begun."""
    from mlflow.exceptions import MlflowException

    if info["model_id"] is not None:
        with contextlib.suppress(MlflowException):  # deleted by hand
            return client.get_logged_model(info["model_id"])
    hits = client.search_logged_models([str(info["experiment_id"])], f"source_run_id = '{info['run_id']}'")
    return hits[0] if hits else None


def log_model(
    client: MlflowClient,
    info: Mapping[str, str | None],
    description: RunDescription,
    entry: Entry,
    remember: Callable[[str], None],
) -> None:
    """Record a directory as the logged model of a run; after a crash, go on with the one begun.

    Parameters
    ----------
    client
        Of the store that holds the run.
    info
        The run: `experiment_id`, `run_id`, and `model_id` where one was made.
    description
        Gives the model its name, tags, parameters and the dataset that its metrics belong to.
    entry
        `source`: the directory; `names`, `step`: the run's points to link; `note`: Markdown.
    remember
        Called with the model's id as soon as there is one.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, RunTag

    run_id, note = str(info["run_id"]), {NOTE_TAG: entry["note"][:LONGEST_TAG]}
    client.log_batch(run_id, tags=[RunTag(*item) for item in note.items()])
    model = find_model(client, info) or _create(client, info, description, note)
    remember(model.model_id)
    if model.status == LoggedModelStatus.READY:
        return
    client.log_model_artifacts(model.model_id, entry["source"])
    client.log_batch(run_id, metrics=_linked_points(client, run_id, model.model_id, description, entry))
    outputs = client.get_run(run_id).outputs.model_outputs
    if all(output.model_id != model.model_id for output in outputs):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, entry["step"])])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _create(
    client: MlflowClient, info: Mapping[str, str | None], description: RunDescription, note: dict[str, str]
) -> LoggedModel:
    return client.create_logged_model(
        str(info["experiment_id"]),
        name=re.sub(r"[/:.%\"']", "-", description.run_id),
        source_run_id=info["run_id"],
        tags=description.tag_texts() | note,
        params=description.param_texts(LONGEST_MODEL_PARAM),
        model_type="peft-adapter",
    )


def _linked_points(
    client: MlflowClient, run_id: str, model_id: str, description: RunDescription, entry: Mapping[str, Any]
) -> list[Metric]:
    """Return points of the run as points of the model.

    They keep their time and value, by which MLflow knows that the run has them already.
    """
    from mlflow.entities import Metric

    histories = [client.get_metric_history(run_id, name) for name in entry["names"]]
    return [
        Metric(
            point.key,
            point.value,
            point.timestamp,
            point.step,
            model_id=model_id,
            dataset_name=description.dataset_name,
            dataset_digest=description.dataset_digest,
            run_id=run_id,
        )
        for history in histories
        for point in history
        if point.step == entry["step"]
    ]
