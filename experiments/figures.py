"""How figures read in plots, tables and reports: three digits, a unit, and the spread over seeds."""

import math

from experiments.summary import Spread

__all__ = ["count", "number", "ratio", "seconds", "spread"]


def number(value: float) -> str:
    """Return ``value`` to three digits, or three places between .1 and 10."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size < 0.1:
        return f"{value:.3g}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"


def spread(found: Spread | None) -> str:
    """Return the mean and, of several seeds, the lowest and the highest."""
    if found is None:
        return "—"
    if found.n == 1 or found.low == found.high:
        return number(found.mean)
    return f"{number(found.mean)} ({number(found.low)} to {number(found.high)})"


def count(nbytes: float) -> str:
    """Return bytes in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}" if nbytes < 1000 * size else f"{nbytes / size:,.0f} {unit}"
    return f"{nbytes:.0f} B"


def seconds(value: float) -> str:
    """Return a time as milliseconds, seconds or minutes."""
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min"


def ratio(value: Spread | None, base: Spread | None) -> str:
    """Return how many times the base a figure is."""
    if value is None or base is None or not base.mean:
        return "—"
    return f"{value.mean / base.mean:.2f}×"
