"""The page itself: pictures as inline SVG, sentences chosen by what the run can promise.

Nothing on the page is fetched from anywhere and nothing runs in it. Labels, client names
and settings come from outside, so the template escapes everything but the pictures, whose
text matplotlib escapes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from fedpipe.report import figures, numbers
from fedpipe.report.data import ReportData, client_name
from fedpipe.report.style import PALETTE
from fedpipe.report.svg import picture

_FIGURES: tuple[Callable[[ReportData], Figure | None], ...] = (
    figures.accuracy,
    figures.loss,
    figures.privacy,
    figures.partition,
    figures.update_norm,
    figures.snr,
    figures.confusion,
)
_TIMES = "\N{MULTIPLICATION SIGN}"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_FILTERS = ("percent", "number", "epsilon", "delta", "count", "size", "duration")


@dataclass(frozen=True)
class Spending:
    """One client's line in the privacy table."""

    client: str
    name: str
    records: int | None
    sampling_rate: float | None
    sigma: str
    steps: int
    participations: int | None
    epsilon_prv: float | None
    epsilon_rdp: float | None
    groups: int | None = None


def render(data: ReportData) -> str:
    """Return the report as one HTML document; the same data always gives the same text."""
    environment = Environment(
        loader=PackageLoader("fedpipe.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: _typeset(getattr(numbers, name)) for name in _FILTERS})
    return environment.get_template("report.html.j2").render(
        data=data,
        metrics=data.metrics,
        ledger=data.ledger,
        run=data.run,
        pictures={draw.__name__: picture(draw, data) for draw in _FIGURES},
        not_private=why_not_private(data),
        attacker=_attacker(data),
        ratio=_likelihood_ratio(data),
        spending=_spending(data),
        settings=_settings(data),
        lineage=_lineage(data),
        palette=PALETTE,
    )


def why_not_private(data: ReportData) -> str | None:
    """Return why the run gives no privacy, None if it does."""
    if data.private:
        return None
    if data.without_dp:
        return (
            "It was trained without differential privacy (privacy.unit: none): nothing was clipped and no noise was "
            "added. Whoever sees the updates, or the adapter, may learn about single records."
        )
    if data.test_key:
        return (
            "Its noise was fixed by a test key (privacy.test_key), so it can be computed again and taken away. "
            "The epsilon on this page describes the mechanism; it does not hold for this adapter."
        )
    return "Its own records mark its guarantee as not valid (dp_valid: false). The epsilon on this page does not hold."


def _typeset(write: Callable[[Any], str]) -> Callable[[Any], str]:
    """Make a number fit for a page: never broken over two lines, powers of ten raised."""

    def typeset(value: Any) -> str:
        text = re.sub(r"e(-?\d+)$", lambda power: f" {_TIMES} 10{power[1].translate(_RAISED)}", write(value))
        return text.removeprefix(f"1 {_TIMES} ").replace(" ", "\N{NO-BREAK SPACE}")

    return typeset


def _likelihood_ratio(data: ReportData) -> str | None:
    """Return e^epsilon, rounded up."""
    epsilon = data.ledger.get("epsilon_max")
    if epsilon is None or epsilon > 20:
        return None
    return f"{math.ceil(math.exp(epsilon)):,}" if epsilon > 3 else f"{math.ceil(math.exp(epsilon) * 100) / 100:.2f}"


def _attacker(data: ReportData) -> str | None:
    """Return how often, at most, a guess about one record's membership is right.

    For (epsilon, delta) and even odds, the best guesser is right with probability
    (e^epsilon + delta) / (1 + e^epsilon) (Kairouz, Oh, Viswanath 2015). Rounded up.
    """
    epsilon = data.ledger.get("epsilon_max")
    if not data.private or epsilon is None:
        return None
    odds = math.exp(-epsilon)
    bound = (1 + (data.ledger.get("delta") or 0) * odds) / (1 + odds)
    return f"{math.ceil(bound * 1e4) / 100:.2f} %"


def _spending(data: ReportData) -> list[Spending]:
    names = {str(client["id"]): client_name(client) for client in data.manifest["clients"]}
    table = []
    for client, entry in sorted(data.ledger["clients"].items()):
        entries = entry.get("entries") or []
        sigmas = dict.fromkeys(numbers.number(float(sigma), 4) for sigma, _, _ in entries)
        table.append(
            Spending(
                client=client,
                name=names.get(client, client),
                records=entry.get("records"),
                sampling_rate=entry.get("sampling_rate"),
                sigma=", ".join(sigmas) or numbers.NONE,
                steps=sum(int(steps) for _, _, steps in entries),
                participations=entry.get("participations"),
                epsilon_prv=entry.get("epsilon_prv"),
                epsilon_rdp=entry.get("epsilon_rdp"),
                groups=entry.get("groups"),
            )
        )
    return table


def _settings(data: ReportData) -> dict[str, list[tuple[str, str]]]:
    """Group the flat settings by section, each value as it would stand in `params.yaml`."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for path, value in data.run["settings"].items():
        section, _, key = path.rpartition(".")
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        groups.setdefault(section or "general", []).append((key, text))
    return groups


def _lineage(data: ReportData) -> list[tuple[str, str]]:
    """Return what made this adapter, as (name, value) pairs; what is unknown says so."""
    run = data.run
    backbone, mlflow, source = run.get("backbone") or {}, run.get("mlflow") or {}, data.manifest.get("source") or {}
    head = data.ledger.get("head")
    pairs = [
        ("run", run["run_id"]),
        ("dataset (DVC hash)", run.get("dataset_digest")),
        ("data source", ", ".join(f"{key}: {value}" for key, value in source.items() if isinstance(value, str | int))),
        ("backbone", backbone.get("name")),
        ("backbone digest", backbone.get("digest")),
        ("code digest", run.get("code_digest")),
        ("git commit", run.get("git_commit")),
        ("ledger head", head if isinstance(head, str | None) else json.dumps(head, ensure_ascii=False)),
        ("MLflow run", mlflow.get("run_id")),
        ("MLflow model", mlflow.get("model_id")),
        ("MLflow store", mlflow.get("uri")),
        ("started", run.get("started")),
        ("finished", run.get("finished")),
        ("versions", ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items())),
    ]
    return [(name, str(value) if value else "not recorded") for name, value in pairs]
