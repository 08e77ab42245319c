"""What a run would spend, as people read it: tables, and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedpipe.config import Settings
from fedpipe.errors import SettingsError
from fedpipe.files import write_atomic
from fedpipe.privacy.accounting import delta_auto, epsilon_prv, epsilon_rdp
from fedpipe.privacy.neighbours import ZERO_OUT, neighbours
from fedpipe.privacy.planning import Cost, calibrated, cost, largest_batch, most_steps, sigmas
from fedpipe.report import numbers

TARGETS = (1.0, 3.0, 8.0)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Budget:
    """The question: settings, clients' numbers of records, the wanted epsilon, and sigma if it is given.

    Where groups are the unit, `sizes` are the clients' numbers of groups. Where clients are, there is
    one population, which `units` has the size of: the clients themselves.
    """

    settings: Settings
    sizes: tuple[int, ...]
    target: float
    sigma: float | None = None

    @property
    def of_clients(self) -> bool:
        return self.settings.privacy.unit == "client"

    @property
    def in_shares(self) -> bool:
        """Whether each client adds noise of its own: no sampling hides it then, and RDP alone accounts for it."""
        return self.of_clients and self.settings.privacy.noise == "distributed"

    @property
    def units(self) -> tuple[int, ...]:
        """How many units each population has."""
        return (len(self.sizes),) if self.of_clients else self.sizes

    @property
    def batch(self) -> int:
        """How many units a noisy step takes on average, at most."""
        federation = self.settings.federation
        if self.in_shares:
            return len(self.sizes)
        return federation.clients_per_round or len(self.sizes) if self.of_clients else federation.batch_size

    @property
    def local(self) -> int:
        """Noisy steps of a round."""
        return 1 if self.of_clients else self.settings.federation.local_steps

    @property
    def rounds(self) -> int:
        """The most rounds that a client takes part in."""
        federation = self.settings.federation
        return min(federation.max_participations or federation.rounds, federation.rounds)

    @property
    def steps(self) -> int:
        return self.rounds * self.local

    @property
    def counted(self) -> str:
        """What `sizes` are numbers of."""
        return f"{self.settings.privacy.unit}s"

    @property
    def delta(self) -> float:
        given = self.settings.privacy.delta
        return delta_auto(self.units) if given == "auto" else float(given)

    def shown_sizes(self) -> dict[str, int]:
        """Return the smallest, the median and the largest client; fewer where they are the same."""
        ordered = sorted(self.units)
        named = {"smallest": ordered[0], "median": ordered[len(ordered) // 2], "largest": ordered[-1]}
        alike = named["median"] in (named["smallest"], named["largest"])
        if named["smallest"] == named["largest"]:
            return {"all": ordered[0]}
        return {name: size for name, size in named.items() if name != "median" or not alike}

    def cost(self, records: int) -> Cost:
        """Return what a client of this many records spends: at `sigma`, or at the smallest that will do."""
        batch, privacy = self.batch, self.settings.privacy
        if self.sigma is not None:
            found = cost(records, batch, self.steps, self.sigma, self.delta, privacy.adjacency)
            return replace(found, prv=found.rdp) if self.in_shares else found
        found = calibrated(records, batch, self.steps, self.target, self.delta, privacy.accountant, privacy.adjacency)
        return replace(found, prv=found.rdp) if self.in_shares else found


def shown(budget: Budget) -> RenderableType:
    """Return the tables.

    Raises
    ------
    SettingsError
        The settings are those of a run without privacy.
    PrivacyError
        No noise reaches the epsilon.
    """
    if not budget.settings.private:
        raise SettingsError("privacy.unit: found 'none'; a run without privacy has no budget, set it to record")
    privacy = budget.settings.privacy
    average = "noise in shares" if budget.in_shares else f"{budget.batch} clients on average"
    batch = average if budget.of_clients else f"batch {budget.batch}"
    words = neighbours(privacy.unit, ZERO_OUT if budget.in_shares else privacy.adjacency)
    intro = (
        f"unit {privacy.unit}, {words}; delta {numbers.delta(budget.delta)}; "
        f"{budget.rounds} rounds of {_plural(budget.local, 'noisy step')}, {batch}"
    )
    wanted = f"sigma {budget.sigma:g}" if budget.sigma is not None else f"epsilon {budget.target:g}"
    costs = {name: budget.cost(size) for name, size in budget.shown_sizes().items()}
    whom = "every client" if budget.of_clients else "a client that takes part in all rounds"
    parts = [Text(intro), Text(), Text(f"At {wanted}, for {whom}:", style="bold")]
    parts += [_costs(costs, budget.counted), Text()]
    least = min(budget.units)
    if budget.sigma is not None:
        parts += [Text(line) for line in _within(budget, least)]
    smallest = "" if budget.of_clients else ", for the smallest client"
    parts += [Text(f"The noise multiplier that other choices need{smallest}:", style="bold")]
    return Group(*parts, _grid(budget, least))


def _costs(costs: dict[str, Cost], counted: str) -> RenderableType:
    table = _table("client", counted, "sampling rate", "sigma", "noise / clip norm", "epsilon (PRV)", "epsilon (RDP)")
    for name, spent in costs.items():
        cells = (f"{spent.records:,}", f"{spent.q:.4g}", f"{spent.sigma:.4g}", f"{spent.noise:.3g}")
        table.add_row(name, *cells, numbers.epsilon(spent.prv), numbers.epsilon(spent.rdp))
    return Padding(table, (0, 0, 0, 2))


def _within(budget: Budget, records: int) -> list[str]:
    """Say what the given sigma leaves room for within the wanted epsilon, for the smallest client."""
    privacy = budget.settings.privacy
    by = privacy.accountant, privacy.adjacency
    assert budget.sigma is not None
    q = min(budget.batch, records) / records
    steps = most_steps(budget.target, budget.delta, q, budget.sigma, *by)
    batch = largest_batch(budget.target, budget.delta, records, budget.steps, budget.sigma, *by)
    few, many = f"batch size, or for a batch of {batch:,}", f"number of clients, or for {batch:,} of them"
    return [
        f"Within epsilon {budget.target:g} it leaves room for {_plural(steps // budget.local, 'round')} at this",
        f"{many if budget.of_clients else few} in {budget.rounds} rounds.",
        "",
    ]


def _grid(budget: Budget, records: int) -> RenderableType:
    targets = sorted({*TARGETS, budget.target})
    counts = _counts(budget)
    found = sigmas(
        targets,
        counts,
        records,
        budget.batch,
        budget.delta,
        budget.settings.privacy.accountant,
        budget.settings.privacy.adjacency,
    )
    table = _table("epsilon", *(f"{count:,} steps" for count in counts))
    for target, row in zip(targets, found, strict=True):
        table.add_row(f"{target:g}", *(numbers.NONE if sigma is None else f"{sigma:.4g}" for sigma in row))
    return Padding(table, (0, 0, 0, 2))


def _counts(budget: Budget) -> list[int]:
    """Return numbers of steps around the settings', in whole rounds."""
    local = budget.local
    return sorted({max(1, round(budget.rounds * factor)) * local for factor in FACTORS})


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def write_picture(budget: Budget, path: Path) -> None:
    """Draw epsilon by round for the smallest client, by both accountants, as an SVG file."""
    import matplotlib
    from matplotlib.figure import Figure

    from fedpipe.report.style import INK, MUTED, SERIES, STYLE

    spent = budget.cost(min(budget.units))
    local = budget.local
    rounds = _ticks(budget.rounds)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "budget", "figure.facecolor": "white"}):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        accountants = ((epsilon_prv, "PRV", SERIES[0]), (epsilon_rdp, "RDP", SERIES[1]))[budget.in_shares :]
        for accountant, label, colour in accountants:
            adjacency = budget.settings.privacy.adjacency
            values = [accountant([(spent.sigma, spent.q, count * local)], budget.delta, adjacency) for count in rounds]
            axes.plot(rounds, values, color=colour, label=label)
        axes.axhline(budget.target, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.3, label="wanted")
        axes.set(xlabel="round", ylabel=f"epsilon at delta {numbers.delta(budget.delta)}", ylim=(0, None))
        whose = f"{'every' if budget.of_clients else 'smallest'} client, {spent.records:,} {budget.counted}"
        title = f"{whose}: sigma {spent.sigma:.4g}, sampling rate {spent.q:.3g}"
        axes.set_title(title, fontsize=9, color=INK)
        axes.legend(frameon=False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", facecolor="white", metadata={"Date": None})
    write_atomic(path, drawn.getvalue())


def _ticks(rounds: int) -> Sequence[int]:
    """Return at most forty rounds from the first to the last."""
    return np.unique(np.linspace(1, rounds, min(rounds, 40)).round().astype(int)).tolist()
