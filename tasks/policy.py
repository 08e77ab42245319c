"""When a task is tried again, and how its result is kept."""

from __future__ import annotations

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

from fedpipe.errors import FedpipeError, StorageError

RETRIES = 2


def worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Say whether a failure may pass: a wrong key or a missing column fails the same way every time."""
    try:
        state.result()
    except StorageError:
        return True
    except FedpipeError:
        return False
    except Exception:
        return True
    return False


# The run's own state decides what is computed again, so Prefect's cache would only be a second opinion.
# A result has a key of its own all the same: with neither, Prefect would announce results that it never writes.
STEP: dict[str, Any] = {
    "persist_result": True,
    "result_serializer": "json",
    "result_storage_key": "{task_run.id}.json",
}
RETRIED: dict[str, Any] = {
    **STEP,
    "retries": RETRIES,
    "retry_delay_seconds": 1,
    "retry_condition_fn": worth_retrying,
}
