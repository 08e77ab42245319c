"""What the fork server of `commands` does once, for all commands: imports, and the noise of the tiny project."""

from __future__ import annotations

import importlib

from fedpipe.privacy.accounting import calibrate

# In the order in which the command imports them: opacus and MLflow set up logging, unless Prefect has.
for name in ("prefect.main", "flows.federated", "mlflow", "fedpipe.tracking.run", "fedpipe.report.html"):
    importlib.import_module(name)

# Takes seconds, and stays in a cache that forks inherit.
for records in (106, 107):
    calibrate(8.0, 1e-5, 24 / records, 6, "prv")
