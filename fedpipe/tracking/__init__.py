"""The record of a run in MLflow, and nothing else about MLflow anywhere else.

One fedpipe run is one MLflow run, however often the process is killed and started again.
What was recorded is looked up before anything is added, so that no (metric, round) appears
twice. A store that is away, at the start or later, does not stop the run: what MLflow lacks
follows from the run's state, and is recorded when the store is back, or by `fedpipe sync`.

`tracker` is what the rest of fedpipe sees, `background` the same beside the training,
`recorder` waits for the store, `run` is the MLflow run behind it, `model` its adapter as a
logged model, `updates` what many clients send in few files, `description` what is told about
a run at its start, `notes` what is remembered beside the run's state, `store` finds and opens
the store, and `reach` says whether it is there. MLflow is imported on first use only: without
`tracking.uri`, it need not be installed.
"""

from fedpipe.tracking.background import BackgroundTracker
from fedpipe.tracking.description import RunDescription
from fedpipe.tracking.tracker import Status, Tracker

__all__ = ["BackgroundTracker", "RunDescription", "Status", "Tracker"]
