"""How the pictures of the report look: one restrained style, named colours, shared axes.

The colours are those of Okabe and Ito, which people with any colour vision can tell
apart, each with a twin for dark pages. The page swaps them, so a figure names its colours
once, in the light form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PALETTE = {  # name: (on a light page, on a dark page)
    "ink": ("#1d2733", "#e4e9ee"),
    "muted": ("#566370", "#9fabb7"),
    "grid": ("#dde3e8", "#313c47"),
    "c0": ("#0072b2", "#5aaee6"),
    "c1": ("#d55e00", "#f2914a"),
    "c2": ("#009e73", "#37c79b"),
    "c3": ("#b5558c", "#dd8dbb"),
    "c4": ("#4aa3d8", "#9ad6f7"),
    "c5": ("#d99600", "#f2c35c"),
    "c6": ("#7d6240", "#c2a37c"),
    "c7": ("#87929d", "#75818d"),
}
INK, MUTED, GRID, *SERIES = (light for light, _ in PALETTE.values())
STYLE: dict[str, Any] = {
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,  # a label with dollar signs is a label
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "font.size": 9,
    "svg.fonttype": "none",
}
SIZE = (4.4, 2.8)  # inches; half the page, and all of a phone, so that the text is readable on both
_ROOM_FOR_MARKS = 40


def by_round(ylabel: str) -> tuple[Figure, Axes]:
    """Return an empty picture whose horizontal axis is the round."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="round", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="x", visible=False)
    return figure, axes


def line(axes: Axes, places: Sequence[float], values: Sequence[float], marker: str = "o", **style: Any) -> None:
    """Plot by round, with marks only where there is room for them."""
    axes.plot(places, values, marker=marker if len(places) <= _ROOM_FOR_MARKS else "", **style)


def legend(axes: Axes) -> None:
    """Put the legend above the picture, in rows that read from left to right and fit its width."""
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    longest = max(len(label) for _, label in entries)
    columns = min(len(entries), max(1, int(280 / (36 + 5.0 * longest))))
    by_column = [entry for column in range(columns) for entry in entries[column::columns]]
    axes.legend(
        *zip(*by_column, strict=True), loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False,
        borderaxespad=0.2, handlelength=1.6, columnspacing=1.4, labelcolor=INK,
    )  # fmt: skip


def shown(name: Any, length: int) -> str:
    """Make a name of unknown origin fit for a picture: printable, and not too long."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(name))
    text = text if len(text) <= length else text[: length - 1] + "…"
    return f" {text}" if text.startswith("_") else text  # matplotlib hides labels that start with an underscore
