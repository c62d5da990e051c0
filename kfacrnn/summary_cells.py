"""What the cells of a figure's table say, column by column; an empty text is nothing to say."""

from __future__ import annotations

import math
from collections.abc import Callable

from kfacrnn.summary import Entry, Ratio


def significant(value: float, digits: int = 4) -> str:
    """So many significant digits, all of those before the point; powers of ten for what is very small or very large."""
    if math.isinf(value):
        return "∞"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding
    places = digits - 1 - exponent
    return f"{value:,.{max(0, places)}f}"


def _final(entry: Entry) -> str:
    return _with_range(significant, entry.final, entry.final_low, entry.final_high)


def _reached(entry: Entry) -> str:
    return "" if entry.reached is None else f"{entry.reached}/{len(entry.line.runs)}"


def _updates(entry: Entry) -> str:
    return "" if entry.updates is None else significant(entry.updates, 1)


def quotient(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return _with_range(lambda value: "∞" if math.isinf(value) else f"{value:.2f}", ratio.value, ratio.low, ratio.high)


def _with_range(text: Callable[[float], str], value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    if low is None or high is None or text(low) == text(high) == text(value):
        return text(value)
    return f"{text(value)} ({text(low)}–{text(high)})"


def _seconds(entry: Entry, value: float | None) -> str:
    return "" if value is None else significant(value, 3) + _dagger(entry)


def _pace(entry: Entry) -> str:
    p95 = entry.seconds_per_update_p95
    return _seconds(entry, entry.seconds_per_update) + ("" if p95 is None else f" ({significant(p95, 3)})")


def _dagger(entry: Entry) -> str:
    return "†" if entry.line.benched else ""


COLUMNS: dict[str, Callable[[Entry], str]] = {
    "line": lambda entry: entry.line.label,
    "runs": lambda entry: str(len(entry.line.runs)),
    "final value": _final,
    "reached": _reached,
    "updates to target": _updates,
    "ratio of updates": lambda entry: quotient(entry.updates_ratio),
    "seconds to target": lambda entry: _seconds(entry, entry.seconds),
    "ratio of seconds": lambda entry: quotient(entry.seconds_ratio) + (_dagger(entry) if entry.seconds_ratio else ""),
    "seconds per update (p95)": _pace,
}
