"""A run in a few lines of text: its header, a line per round, and the summary at the end.

The lines are ASCII with a fixed layout, for logs that are searched.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpipe.report import numbers

_DIAGNOSTICS = "training losses are recorded (privacy.diagnostics), and no epsilon covers them"


@dataclass(frozen=True)
class RunHeader:
    """What is known before the first round.

    Attributes
    ----------
    clients, rounds : int
        How many in all.
    completed_rounds : int
        Rounds that an earlier process finished; above 0 the run is resumed.
    epsilon_target : float or None
        None without differential privacy.
    adjacency : str or None
        How neighbouring data sets differ, for which an epsilon holds.
    diagnostics : bool
        Training losses are recorded, which no epsilon covers.
    """

    run_id: str
    method: str
    clients: int
    rounds: int
    completed_rounds: int
    epsilon_target: float | None
    device: str
    dp_valid: bool
    adjacency: str | None = None
    diagnostics: bool = False


def header_lines(header: RunHeader) -> list[str]:
    """Return the lines that stand before the first round."""
    privacy = "no privacy" if header.epsilon_target is None else f"epsilon at most {header.epsilon_target:g}"
    if header.adjacency is not None:
        privacy = f"{privacy} ({header.adjacency})"
    rounds, clients = _plural(header.rounds, "round"), _plural(header.clients, "client")
    lines = [f"run {header.run_id}: {header.method}, {clients}, {rounds}, {privacy}, on {header.device}"]
    if header.completed_rounds >= header.rounds:
        lines.append(f"resumed: all {rounds} were done before")
    elif header.completed_rounds:
        lines.append(f"resumed from round {header.completed_rounds + 1}: {header.completed_rounds} done before")
    if not header.dp_valid:
        lines.append(f"NOT PRIVATE: {_why_not_private(header)}")
    if header.diagnostics:
        lines.append(f"DIAGNOSTICS: {_DIAGNOSTICS}")
    return lines


def round_line(
    header: RunHeader | None, round: int, metrics: Mapping[str, float | None], left: float | None = None
) -> str:
    """Return the line of one finished round; `left` is the seconds to the end of the run."""
    rounds = str(header.rounds) if header else "?"
    parts = [
        f"round {round:>{len(rounds)}}/{rounds}",
        f"accuracy {numbers.number(metrics.get('accuracy')):<5}",
        f"loss {numbers.number(metrics.get('loss')):<5}",
    ]
    if header is None or header.epsilon_target is not None:
        parts.append(f"epsilon {numbers.epsilon(metrics.get('epsilon_max')):<5}")
    parts.append(numbers.duration(metrics.get("seconds")))
    if left:
        parts.append(f"left {numbers.duration(left)}")
    return "  ".join(parts).rstrip()


def cost_line(header: RunHeader | None, round: int, before: float, after: float) -> str:
    """Return the line before a round: the largest epsilon of its clients without it, and with it."""
    rounds = str(header.rounds) if header else "?"
    taken = f"epsilon {numbers.epsilon(before)}, with it {numbers.epsilon(after)}"
    return f"before round {round:>{len(rounds)}}/{rounds}  {taken} (largest of its clients)"


def summary_rows(header: RunHeader | None, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the (name, value) pairs of the summary, in the order in which they are shown."""
    get = summary.get
    rows = [("run", header.run_id if header else str(get("run_id", numbers.NONE)))]
    if get("dp_valid") is not True:
        rows.append(("privacy", f"NOT PRIVATE: {_why_not_private(header)}"))
    if get("diagnostics"):
        rows.append(("diagnostics", _DIAGNOSTICS))
    share, worst = numbers.number(get("majority_share")), get("accuracy_worst")
    own = "" if worst is None else f"mean of the clients' own models, the worst {numbers.number(worst)}; "
    rows += [
        ("accuracy", f"{numbers.number(get('accuracy'))} ({own}majority share {share})"),
        ("loss", numbers.number(get("loss"))),
    ]
    if get("epsilon_max") is not None:
        both = f"{numbers.epsilon(get('epsilon_max'))}, by RDP {numbers.epsilon(get('epsilon_rdp'))}"
        rows.append(("epsilon", f"{both} (largest of all clients)"))
        rows.append(("delta", numbers.delta(get("delta"))))
        if get("adjacency") is not None:
            rows.append(("neighbours", str(get("adjacency"))))
    resumed = f" (resumed from round {header.completed_rounds + 1})" if header and header.completed_rounds else ""
    if header and header.completed_rounds >= header.rounds:
        resumed = " (all done before)"
    rows.append(("rounds", f"{numbers.count(get('rounds'))}{resumed}"))
    if get("skipped"):
        rows.append(("skipped", _skipped(get("skipped"))))
    if get("clients_excluded"):
        rows.append(("left out", f"{_plural(get('clients_excluded'), 'client')} without budget for some round"))
    if get("updates_refused"):
        rows.append(("not used", f"{_plural(get('updates_refused'), 'update')}; reports/run.json says why"))
    if get("attack"):
        rows.append(("attack", f"{get('attack')} by {_plural(get('attackers'), 'client')}, simulated"))
    rows.append(("time", numbers.duration(get("seconds"))))
    rows.append(("traffic", f"{numbers.size(get('bytes_up'))} up, {numbers.size(get('bytes_down'))} down"))
    for name in ("adapter", "report", "ledger", "run_directory"):
        if get(name) is not None:
            rows.append((name.replace("_", " "), str(get(name))))
    return rows + _mlflow_rows(get("mlflow"))


def print_summary(header: RunHeader | None, summary: Mapping[str, Any]) -> None:
    """Print the summary to stdout: a table on a terminal, aligned lines elsewhere."""
    rows = summary_rows(header, summary)
    if not sys.stdout.isatty():
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), flush=True)
        return
    table = Table(box=box.ROUNDED, show_header=False, border_style="dim")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value, style="bold red" if value.startswith("NOT PRIVATE") else ""))
    Console(file=sys.stdout, highlight=False).print(table)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _why_not_private(header: RunHeader | None) -> str:
    if header is None or header.epsilon_target is None:
        return "trained without differential privacy (privacy.unit: none)"
    return "the noise is fixed by privacy.test_key, so the epsilon does not hold"


def _skipped(rounds: Mapping[str, str]) -> str:
    numbered, why = ", ".join(rounds), "; ".join(dict.fromkeys(rounds.values()))
    return f"{_plural(len(rounds), 'round')} ({numbered}), the state carried over: {why}"


def _mlflow_rows(mlflow: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not mlflow:
        return []
    uri = str(mlflow.get("uri"))
    look = uri if uri.startswith(("http://", "https://")) else f"mlflow ui --backend-store-uri {uri}"
    return [("MLflow run", str(mlflow.get("run_id"))), ("to see it", look)]
