"""What a run left behind, read and checked: all that the report knows."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe.errors import StateError
from fedpipe.files import read_json
from fedpipe.project import Project

_NEEDED = {
    "metrics.json": (
        "accuracy",
        "loss",
        "rounds",
        "dp_valid",
        "unit",
        "seconds",
        "bytes_up",
        "bytes_down",
        "majority_share",
    ),
    "ledger.json": ("unit", "adjacency", "delta", "epsilon_max", "dp_valid", "clients"),
    "run.json": ("run_id", "method", "settings", "dp_valid", "clients_by_round"),
    "evaluation.json": ("accuracy", "loss", "records", "confusion", "recall"),
    "manifest.json": ("labels", "clients", "test"),
    "audit.json": ("run_id", "violated", "epsilon_lower", "epsilon_claimed", "scores", "membership"),
}


@dataclass(frozen=True)
class ReportData:
    """The files of one run.

    Attributes
    ----------
    metrics, ledger, run, manifest : dict
        The content of the JSON files of the same names.
    rounds : list of dict
        One dictionary per row of `rounds.csv`; an empty cell is None. Row 0 is the start model.
    evaluation : dict or None
        The final evaluation of the exported adapter, where there was one.
    audit : dict or None
        What `fedpipe audit` found last, of these settings or of others.
    """

    metrics: dict[str, Any]
    ledger: dict[str, Any]
    run: dict[str, Any]
    manifest: dict[str, Any]
    rounds: list[dict[str, float | None]]
    evaluation: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None

    @property
    def without_dp(self) -> bool:
        return "none" in (self.metrics["unit"], self.ledger["unit"])

    @property
    def private(self) -> bool:
        """True only if every file says so; one doubt is enough to say no."""
        valid = all(part["dp_valid"] is True for part in (self.metrics, self.ledger, self.run))
        return valid and not self.without_dp

    @property
    def test_key(self) -> bool:
        return self.run["settings"].get("privacy.test_key") is not None

    @property
    def accountant(self) -> str:
        return str(self.ledger.get("accountant") or self.run["settings"].get("privacy.accountant") or "prv")

    @property
    def target(self) -> float | None:
        """The epsilon that was asked for, None without differential privacy."""
        return None if self.without_dp else self.run["settings"].get("privacy.epsilon")

    @property
    def personal(self) -> bool:
        """True if every client has a model of its own; accuracy and loss are then means over these."""
        return bool(self.run.get("personal"))

    @property
    def measured(self) -> dict[str, Any]:
        """What holds accuracy and loss of the result: the exported adapter's if it is all of it and was measured."""
        return self.metrics if self.personal or self.evaluation is None else self.evaluation

    @property
    def accuracy(self) -> float | None:
        """The accuracy of the exported adapter if it was measured, else of the last round."""
        return self.measured["accuracy"]

    @property
    def at_majority(self) -> bool:
        """True if the accuracy cannot be told from always answering the most frequent label.

        The bar is the majority share plus two standard errors of a share on that many test records.
        """
        share, records = self.metrics["majority_share"], self.manifest["test"]["records"]
        if self.accuracy is None or share is None or not records:
            return False
        return self.accuracy <= share + 2 * math.sqrt(share * (1 - share) / records)

    @property
    def adapter_differs(self) -> bool:
        """True if the exported adapter does not score as the last round did."""
        last = self.metrics["accuracy"]
        if self.personal or self.evaluation is None or last is None:
            return False
        return abs(self.evaluation["accuracy"] - last) > 1e-3

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Return the rounds in which a column of `rounds.csv` has a value, and the values."""
        rows = [(int(row["round"] or 0), value) for row in self.rounds if (value := row.get(name)) is not None]
        return [row[0] for row in rows], [row[1] for row in rows]

    def by_client(self, name: str) -> dict[str, dict[int, float]]:
        """Return, for each client, a quantity of `clients_by_round` by round."""
        found: dict[str, dict[int, float]] = {}
        for entry in self.run["clients_by_round"]:
            for client, value in (entry.get(name) or {}).items():
                if value is not None:
                    found.setdefault(client, {})[int(entry["round"])] = float(value)
        return {client: found[client] for client in sorted(found)}


def client_name(client: dict[str, Any]) -> str:
    """Return the natural name of a client of the manifest, or its id."""
    name = client.get("name")
    if isinstance(name, list):
        name = ", ".join(map(str, name))
    return str(name) if name else str(client["id"])


def load(project: Project) -> ReportData:
    """Read the files of a run.

    Raises
    ------
    StateError
        A file is missing, is damaged, or lacks a key.
    """
    reports = project.reports
    evaluation, audit = reports / "evaluation.json", reports / "audit.json"
    return ReportData(
        metrics=_read(reports / "metrics.json"),
        ledger=_read(reports / "ledger.json"),
        run=_read(reports / "run.json"),
        manifest=_read(project.partition / "manifest.json"),
        rounds=_read_rounds(reports / "rounds.csv"),
        evaluation=_read(evaluation) if evaluation.exists() else None,
        audit=_read(audit) if audit.exists() else None,
    )


def _require(path: Path) -> None:
    if not path.exists():
        raise StateError(f"{path}: missing, and the report needs it; run 'fedpipe run' or 'dvc repro' first")


def _read(path: Path) -> dict[str, Any]:
    _require(path)
    content = read_json(path)
    missing = [key for key in _NEEDED[path.name] if not isinstance(content, dict) or key not in content]
    if missing:
        raise StateError(f"{path}: expected the key '{missing[0]}', which is not there; run 'fedpipe run' again")
    return content


def _read_rounds(path: Path) -> list[dict[str, float | None]]:
    _require(path)
    try:
        table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        rows = [{key: float(cell) if cell else None for key, cell in row.items()} for row in table]
    except (ValueError, TypeError) as error:
        raise StateError(f"{path}: is not a table of numbers: {error}; run 'fedpipe run' again") from error
    if any("round" not in row for row in rows):
        raise StateError(f"{path}: expected a column 'round', which is not there; run 'fedpipe run' again")
    return rows
