"""The pictures of the report: functions from a run's data to a matplotlib figure.

Few clients are drawn one by one; many as their median and spread, so that a picture stays
readable, and small, from 2 clients to hundreds. A function returns None where the run has
nothing to show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import StrMethodFormatter

from fedpipe.report.data import ReportData, client_name
from fedpipe.report.style import MUTED, SERIES, SIZE, by_round, legend, line, shown

_MANY_CLIENTS = 8  # more than this are drawn as a median and its spread
_MANY_BARS = 16
_MANY_LABELS = 24


def accuracy(data: ReportData) -> Figure:
    """Accuracy on the test records by round, with the share of the most frequent label."""
    figure, axes = by_round("accuracy on test records (%)")
    rounds, values = data.column("accuracy")
    label = "mean of the clients' own models" if data.personal else "accuracy"
    line(axes, rounds, [100 * value for value in values], color=SERIES[0], label=label)
    rounds, worst = data.column("accuracy_worst")
    if worst:
        line(axes, rounds, [100 * value for value in worst], marker="s", color=SERIES[1], label="worst client's")
    share = data.metrics["majority_share"]
    if share is not None:
        axes.axhline(100 * share, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.3, label="majority share")
    axes.margins(y=0.12)
    legend(axes)
    return figure


def loss(data: ReportData) -> Figure:
    """Mean cross-entropy on the test records by round."""
    figure, axes = by_round("loss on test records (nats)")
    line(axes, *data.column("loss"), color=SERIES[0])
    axes.margins(y=0.12)
    return figure


def privacy(data: ReportData) -> Figure | None:
    """Epsilon spent by round: the largest of all clients, by each accountant, and the target."""
    if data.without_dp:
        return None
    figure, axes = by_round("epsilon, largest of all clients")
    if data.accountant != "rdp":
        line(axes, *data.column("epsilon_max"), color=SERIES[0], label=data.accountant.upper())
    line(axes, *data.column("epsilon_rdp"), marker="s", linestyle="--", color=SERIES[1], label="RDP")
    if data.target is not None:
        axes.axhline(data.target, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.3, label="target")
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def partition(data: ReportData) -> Figure | None:
    """How many records of each label every client holds."""
    if data.ledger["unit"] == "client":
        return None  # it is what is protected
    clients, labels = data.manifest["clients"], [str(label) for label in data.manifest["labels"]]
    counts = np.array([[client["histogram"].get(label, 0) for label in labels] for client in clients])
    names, counts = _fold_labels(labels, counts)
    return _bars(clients, names, counts) if len(clients) <= _MANY_BARS else _skyline(names, counts)


def update_norm(data: ReportData) -> Figure | None:
    """L2 norm of the update that each client sent, by round."""
    return _by_client(data, "update_norm", "L2 norm of the update")


def snr(data: ReportData) -> Figure | None:
    """Estimated signal over noise in each client's update, by round."""
    figure = _by_client(data, "snr", "signal / noise (ratio of norms)")
    if figure is not None:
        axes = figure.axes[0]
        axes.axhline(1, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.3)
    return figure


def confusion(data: ReportData) -> Figure | None:
    """What the exported adapter answered for the test records of each label."""
    if data.evaluation is None:
        return None
    labels = [shown(label, 14) for label in data.evaluation["confusion"]["labels"]]
    matrix = np.array(data.evaluation["confusion"]["matrix"], dtype=float)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(2.4 + 0.25 * len(labels), 5.4)
    figure = Figure(figsize=(side + 1.4, side), layout="constrained")
    axes = figure.add_subplot()
    _shade(axes, shares)
    if len(labels) <= 10:
        for row, column in np.ndindex(*matrix.shape):
            text = f"{matrix[row, column]:,.0f}\n{100 * shares[row, column]:.0f} %"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", linespacing=1.4)
    named = len(labels) <= _MANY_LABELS
    ticks = np.arange(len(labels)) + 0.5 if named else []
    axes.set_xticks(ticks, labels if named else [], rotation=0 if len(labels) <= 4 else 90)
    axes.set_yticks(ticks, labels if named else [])
    order = "" if named else ", in the order of the table"
    axes.set(xlim=(0, len(labels)), ylim=(len(labels), 0), xlabel=f"answered label{order}", ylabel=f"true label{order}")
    axes.grid(False)
    axes.tick_params(length=0)
    return figure


def _shade(axes: Axes, shares: np.ndarray) -> None:
    """Fill a unit square for every entry of (labels, labels), darker for larger shares.

    One path for all squares of a shade: a page with hundreds of labels stays small.
    """
    shades = np.round(shares * 20) / 20
    for shade in np.unique(shades[shades > 0]):
        squares = [
            Path([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1), (x, y)], closed=True)
            for y, x in np.argwhere(shades == shade)
        ]
        # Opacity below 0.6 keeps the number readable on light and dark pages alike.
        axes.add_patch(PathPatch(Path.make_compound_path(*squares), facecolor=SERIES[0], alpha=0.58 * shade, lw=0))


def _by_client(data: ReportData, name: str, ylabel: str) -> Figure | None:
    clients = data.by_client(name)
    if not clients:
        return None
    figure, axes = by_round(ylabel)
    rounds = sorted({number for values in clients.values() for number in values})
    table = np.array([[values.get(number, np.nan) for number in rounds] for values in clients.values()])
    if len(clients) <= _MANY_CLIENTS:
        for index, (client, row) in enumerate(zip(clients, table, strict=True)):
            line(axes, rounds, row, color=SERIES[index], linewidth=1.4, label=shown(client, 12))
    else:
        low, middle, high = np.nanpercentile(table, [10, 50, 90], axis=0)
        axes.fill_between(rounds, low, high, color=SERIES[0], alpha=0.25, linewidth=0, label="10 to 90 % of clients")
        line(axes, rounds, middle, color=SERIES[0], label="median client")
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def _fold_labels(labels: list[str], counts: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Keep the most frequent labels, as many as there are colours; add the others up."""
    if len(labels) <= len(SERIES):
        return labels, counts
    order = np.argsort(-counts.sum(axis=0), kind="stable")
    kept, rest = order[: len(SERIES) - 1], order[len(SERIES) - 1 :]
    folded = np.column_stack([counts[:, kept], counts[:, rest].sum(axis=1)])
    return [*(labels[index] for index in kept), f"{len(rest)} other labels"], folded


def _bars(clients: list[dict[str, Any]], labels: list[str], counts: np.ndarray) -> Figure:
    """A few clients: one horizontal bar each, with its name."""
    figure = Figure(figsize=(SIZE[0], max(SIZE[1], 1.0 + 0.28 * len(clients))), layout="constrained")
    axes = figure.add_subplot()
    places, left = np.arange(len(clients)), np.zeros(len(clients))
    for index, label in enumerate(labels):
        axes.barh(places, counts[:, index], left=left, height=0.68, color=SERIES[index], label=shown(label, 16))
        left += counts[:, index]
    axes.set_yticks(places, [shown(client_name(client), 22) for client in clients])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="records")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", visible=False)
    legend(axes)
    return figure


def _skyline(labels: list[str], counts: np.ndarray) -> Figure:
    """Many clients: their bars side by side, largest first. One path per label keeps the page small."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    counts = counts[np.argsort(-counts.sum(axis=1), kind="stable")]
    edges, bottom = np.arange(len(counts) + 1) + 0.5, np.zeros(len(counts))
    for index, label in enumerate(labels):
        top = bottom + counts[:, index]
        axes.stairs(top, edges, baseline=bottom, fill=True, color=SERIES[index], label=shown(label, 16))
        bottom = top
    axes.set(xlabel=f"{len(counts)} clients, largest first", ylabel="records", xlim=(0.5, len(counts) + 0.5))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="x", visible=False)
    legend(axes)
    return figure
