"""Numbers as people read them, the same in the report and in the terminal.

Epsilon and delta are upper bounds, so they are rounded up: a rounded guarantee must not
promise more than the exact one.
"""

from __future__ import annotations

import math

NONE = "-"


def percent(share: float | None) -> str:
    """Return a share as a percentage.

    >>> percent(0.7431)
    '74.3 %'
    """
    return NONE if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Return a measured value with `digits` significant digits.

    >>> number(0.55217), number(1234.5), number(0.0000123)
    ('0.552', '1,234', '1.23e-5')
    """
    if value is None or not math.isfinite(value):
        return NONE if value is None else str(value)
    if value == 0 or 1e-3 <= abs(value) < 10**digits:
        decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
        return f"{value:.{max(decimals, 0)}f}"
    return f"{value:,.0f}" if 1 <= abs(value) < 1e9 else _exponent(f"{value:.{digits - 1}e}")


def epsilon(value: float | None) -> str:
    """Return an epsilon, rounded up to two decimals.

    >>> epsilon(7.9812), epsilon(8.0), epsilon(None)
    ('7.99', '8.00', '-')
    """
    if value is None or not math.isfinite(value):
        return NONE if value is None else "infinite"
    return f"{math.ceil(value * 100 - 1e-6) / 100:.2f}"


def delta(value: float | None) -> str:
    """Return a delta, rounded up to two significant digits.

    >>> delta(1e-5), delta(3.9194e-05)
    ('1e-5', '4e-5')
    """
    if not value:
        return NONE if value is None else "0"
    scale = 10.0 ** (1 - math.floor(math.log10(value)))
    return _exponent(f"{math.ceil(value * scale - 1e-6) / scale:.1e}")


def count(value: float | None) -> str:
    """Return a whole number with its thousands marked.

    >>> count(12808)
    '12,808'
    """
    return NONE if value is None else f"{int(value):,}"


def size(value: float | None) -> str:
    """Return a number of bytes in the decimal units of networks.

    >>> size(950), size(1_234_567)
    ('950 B', '1.2 MB')
    """
    if value is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float | None) -> str:
    """Return a length of time in its two largest units.

    >>> duration(12.34), duration(125), duration(3780)
    ('12.3 s', '2 min 5 s', '1 h 3 min')
    """
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _exponent(text: str) -> str:
    """Shorten Python's `1.0e-05` to `1e-5`."""
    mantissa, power = text.split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"
