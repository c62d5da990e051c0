"""`KEY=PATTERN`: which runs are meant, by any key of their configuration.

`task.hidden=128`, `optimizer.name=kfac_*`, `optimizer.lr=1e-3..0.1` with either end open, `seed=1,2,3` for any of
these, `state!=diverged` for all others. A key may have globs too: `optimizer.*=0.9`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfacrnn.discovery import unknown
from kfacrnn.errors import UserError


@dataclass(frozen=True)
class Condition:
    """One `KEY=PATTERN`, or `KEY!=PATTERN`."""

    text: str
    key: str
    patterns: tuple[str, ...]
    negated: bool = False

    @classmethod
    def parse(cls, text: str) -> Condition:
        found = re.fullmatch(r"\s*([^=!\s]+)\s*(!?)=\s*(.*?)\s*", text)
        if not found:
            raise UserError(f"{text}: must be KEY=PATTERN, such as optimizer.name=kfac_* or optimizer.lr=0.01..0.1")
        key, negation, patterns = found.groups()
        return cls(text, key, tuple(part.strip() for part in patterns.split(",")), bool(negation))

    def keys(self, there_are: Collection[str]) -> list[str]:
        """The keys that are meant. Raises `UserError`, with the nearest, if there are none."""
        keys = fnmatch.filter(there_are, self.key)
        if not keys:
            raise UserError(f"{self.text}: {unknown('key of a configuration', self.key, sorted(there_are))}")
        return keys

    def holds(self, values: Mapping[str, Any], keys: Sequence[str]) -> bool:
        """Whether any of the run's own `keys` has a value that is meant; a run without such a key is not."""
        found = any(_is(values[key], pattern) for key in keys if key in values for pattern in self.patterns)
        return found != self.negated


def text_of(value: Any) -> str:
    """A value as one writes it on the command line, whatever its source made of it: 1.0 is 1."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:.12g}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(text_of, value))}]"
    return str(value)


def _is(value: Any, pattern: str) -> bool:
    low, dots, high = pattern.partition("..")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if dots and (low or high):
        bounds = [_number(bound) if bound else None for bound in (low, high)]
        if all(bound is not None or not text for bound, text in zip(bounds, (low, high), strict=True)):
            below, above = bounds
            return number and (below is None or value >= below) and (above is None or value <= above)
    if number and _number(pattern) is not None:
        return value == _number(pattern)
    return fnmatch.fnmatchcase(text_of(value), pattern)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
