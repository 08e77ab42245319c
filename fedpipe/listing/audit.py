"""The result of an audit as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedpipe.report import numbers


def shown(result: Mapping[str, Any]) -> RenderableType:
    """Return a line for each number, and what they say together."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows(result):
        table.add_row(name, value)
    return Group(table, Text(), *map(Text, _said(result)))


def rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the (name, value) pairs of a result, in the order in which they are shown."""
    canaries, mia = result["canaries"], result["membership"]
    at = f"at delta {numbers.delta(result['delta'])}"
    listed = [
        ("run", str(result["run_id"])),
        ("canaries", f"{canaries['count']} ({canaries['kind']}) at {len(canaries['clients'])} clients"),
        ("epsilon claimed", f"{numbers.epsilon(result['epsilon_claimed'])} {at}, by the ledger"),
        ("epsilon shown", f"at least {result['epsilon_lower']:.4f} with confidence {result['confidence']:g}"),
        ("could have shown", f"{result['ceiling']:.4f}, had every guess been right"),
    ]
    for name, found in result["scores"].items():
        right = f"{found['correct']} of {found['guesses']} guesses right, at least {found['bound']:.4f}"
        listed.append((name, f"{right}, p-value {found['p_value']:.2g}"))
    listed.append(("membership", f"{mia['size']} members and as many others, of run {mia['run_id']}"))
    listed.append(("AUC", _interval(mia["auc"])))
    for fpr, found in mia["tpr"].items():
        allowed = "" if found["allowed"] is None else f"; differential privacy allows {found['allowed']:.4f}"
        listed.append((f"TPR at FPR {fpr}", f"{_interval(found)}{allowed}"))
    return listed


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.4f} ({estimate['low']:.4f} to {estimate['high']:.4f})"


def _said(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if not result["dp_valid"]:
        lines.append("NOT PRIVATE: the noise is fixed by privacy.test_key, so the claim does not hold in any case")
    if result["violated"]:
        return [*lines, "VIOLATED: the canaries show more than the ledger claims"]
    lines.append("passed: nothing that was tried shows more than the claim; other attacks may do better")
    if result["ceiling"] <= result["epsilon_claimed"]:
        lines.append("this audit could not have failed: more guesses, or a smaller epsilon, would let it")
    return lines
