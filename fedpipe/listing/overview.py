"""The list of all methods as people read it.

Everything shown is derived from the methods themselves, so that a new one is shown like all others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedpipe.listing.traffic import Model
from fedpipe.methods.method import AXES, Method
from fedpipe.methods.sums import not_summed
from fedpipe.methods.whole import not_for_clients
from fedpipe.parts import Part
from fedpipe.report import numbers

WIDE = 110  # columns of a terminal, from which on the list is a table
PIPED = 200
HEADINGS = ("up", "down", "record", "client", "sec. agg.")
PLAIN: Mapping[str, Part] = {field.name: field.default for field in fields(Method) if field.name in AXES}
_ENTRIES = "fedpipe.methods.entries."


def differing(method: Method) -> dict[str, Part]:
    """Return the parts that are not the plain ones, by their axes."""
    return {axis: part for axis, part in method.parts.items() if part != PLAIN[axis]}


def families(catalogue: Mapping[str, Method]) -> dict[str, list[Method]]:
    """Return the methods by family: the module of entries that each is in, named by its first line."""
    groups: dict[str, list[Method]] = {}
    modules = [module for name, module in sys.modules.items() if name.startswith(_ENTRIES)]
    for method in catalogue.values():
        home = next((module for module in modules if method in getattr(module, "METHODS", ())), None)
        title = (home.__doc__ or home.__name__).splitlines()[0].rstrip(".") if home else "Registered in this process"
        groups.setdefault(title, []).append(method)
    return groups


def overview(catalogue: Mapping[str, Method], model: Model | None, width: int) -> RenderableType:
    """Return the list of all methods: a table, or in a narrow terminal a paragraph each."""
    rows = {name: [*both_ways(method, model), *_allowed(method)] for name, method in catalogue.items()}
    parts: list[RenderableType] = []
    for title, members in families(catalogue).items():
        shown = _table(members, rows) if width >= WIDE else _paragraphs(members, rows)
        parts += [Text(title, style="bold"), shown, Text()]
    return Group(*parts, *(Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in _legend(model)))


def _allowed(method: Method) -> list[str]:
    facts = (method.private, not_for_clients(method) is None, not_summed(method) is None)
    return ["yes" if fact else "no" for fact in facts]


def _headings(cells: Sequence[str]) -> tuple[str, ...]:
    return HEADINGS[-len(cells) :]


def _legend(model: Model | None) -> list[str]:
    lines = [
        "record, client: may run under this privacy.unit. sec. agg.: may run with federation.secure_aggregation.",
        "fedpipe methods NAME shows a method's card: idea, paper, options, and what differs here.",
    ]
    if model is None:
        return lines
    rank, clients = model.settings.lora.rank, model.settings.federation.clients_per_round or len(model.clients)
    counted = f"up, down: bytes of a client and a round, at lora.rank {rank} with {clients} clients a round"
    return [f"{counted}; least - most where rounds or clients differ.", *lines]


def _table(members: Sequence[Method], rows: Mapping[str, Sequence[str]]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", width=2)
    table.add_column("method", no_wrap=True, min_width=max(map(len, rows)))
    for heading, *cells in zip(_headings(next(iter(rows.values()))), *rows.values(), strict=True):
        table.add_column(heading, no_wrap=True, min_width=max(map(len, cells)))
    table.add_column("what it does", ratio=1)
    for method in members:
        what = Text.assemble(method.summary, "\n", (_axes(method), "dim"))
        table.add_row("", Text(method.name, style="bold"), *rows[method.name], what)
    return table


def _paragraphs(members: Sequence[Method], rows: Mapping[str, Sequence[str]]) -> RenderableType:
    parts: list[RenderableType] = []
    for method in members:
        cells = rows[method.name]
        facts = ", ".join(f"{heading} {cell}" for heading, cell in zip(_headings(cells), cells, strict=True))
        body = Text.assemble(method.summary, "\n", (f"{_axes(method)}\n{facts}", "dim"))
        parts += [Padding(Text(method.name, style="bold"), (0, 0, 0, 2)), Padding(body, (0, 0, 0, 4))]
    return Group(*parts)


def _axes(method: Method) -> str:
    own = differing(method)
    return "; ".join(f"{axis} {spelled(part)}" for axis, part in own.items()) or "plain on every axis"


def spelled(part: Part, all_options: bool = False) -> str:
    """Return a part with the options that are not its defaults, or all of them, as the settings file spells them."""
    usual = type(part)().model_dump()
    options = {key: value for key, value in part.model_dump().items() if all_options or value != usual[key]}
    inside = ", ".join(f"{key}: {as_yaml(value)}" for key, value in options.items())
    return f"{part.name} {{{inside}}}" if inside else part.name


def as_yaml(value: object) -> str:
    """Return an option's value as the settings file spells it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def both_ways(method: Method, model: Model | None) -> list[str]:
    """Return the bytes up and down, as people read them; nothing without a model."""
    if model is None:
        return []
    counted = model.traffic(method)
    return [span(counted.up), span(counted.down)]


def span(sizes: tuple[int, int] | None) -> str:
    """Return bytes as people read them, from the least to the most.

    >>> span((950, 950)), span((12_300, 24_600)), span(None)
    ('950 B', '12.3 kB - 24.6 kB', '-')
    """
    if sizes is None:
        return numbers.NONE
    least, most = map(numbers.size, sizes)
    return least if least == most else f"{least} - {most}"


def printed(shown: Callable[[int], RenderableType]) -> str:
    """Return what is to be shown, for the width of the terminal; without one, in lines that are easily searched."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED
    with console.capture() as capture:
        console.print(shown(console.width))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
