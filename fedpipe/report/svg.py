"""Figures as SVG elements that stand next to each other in one page, always the same bytes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from fedpipe.report.data import ReportData
from fedpipe.report.style import PALETTE, STYLE


def picture(draw: Callable[[ReportData], Figure | None], data: ReportData) -> Markup | None:
    """Draw a picture in the style of the report; None if there is nothing to show."""
    name = draw.__name__.replace("_", "-")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = draw(data)
        return None if figure is None else to_svg(figure, name)


def to_svg(figure: Figure, name: str) -> Markup:
    """Return a figure as an SVG element that can stand in a page next to others.

    Its identifiers are prefixed with `name`, and the colours of the palette become CSS
    variables, so that the page can swap them.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that matplotlib's font lacks is drawn by the browser's
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#|href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    for colour, (light, _) in PALETTE.items():
        svg = re.sub(rf"((?:fill|stroke|stop-color): ?){light}", rf"\1var(--{colour})", svg)
    return Markup(svg)
