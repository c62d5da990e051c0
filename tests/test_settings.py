"""What a setting may be: ranges, choices, nesting and what a dataclass checks itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from kfacrnn.settings import problems, setting


@dataclass
class Inner:
    rate: float = setting("decay", above=0, at_most=1)

    def check(self) -> Iterator[str]:
        if self.rate == 0.5:
            yield "rate=0.5: not today"


@dataclass
class Outer:
    size: int = setting("units", at_least=1, at_most=2**31 - 1)
    momentum: float = setting("momentum", at_least=0, below=1)
    kind: str = setting("shape", choices=["round", "square"])
    clip: float | None = setting("norm", above=0)
    inner: Inner = setting("nested")
    count: int = setting("things", at_least=0)


def outer(**changes: Any) -> Outer:
    return Outer(
        **{"size": 1, "momentum": 0.0, "kind": "round", "clip": None, "inner": Inner(1.0), "count": 0, **changes}
    )


@pytest.mark.parametrize("changes", [{}, {"size": 2**31 - 1}, {"momentum": 0.999}, {"kind": "square"}, {"clip": 1e-9}])
def test_values_at_the_ends_of_closed_ranges_and_inside_pass(changes: dict[str, Any]) -> None:
    assert list(problems(outer(**changes))) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"size": 0}, "size=0: must be at least 1 (units)"),
        ({"size": 2**31}, "size=2147483648: must be at most 2147483647 (units)"),
        ({"size": 10**400}, f"size={10**400}: must be at most 2147483647 (units)"),
        ({"count": 2**63}, f"count={2**63}: must fit into 64 bits (things)"),
        ({"momentum": 1.0}, "momentum=1.0: must be below 1 (momentum)"),
        ({"momentum": -0.1}, "momentum=-0.1: must be at least 0 (momentum)"),
        ({"momentum": float("nan")}, "momentum=nan: must be finite (momentum)"),
        ({"clip": float("inf")}, "clip=inf: must be finite (norm)"),
        ({"clip": 0.0}, "clip=0.0: must be above 0 (norm)"),
        ({"kind": "oval"}, "kind=oval: must be one of round, square (shape)"),
        ({"inner": Inner(0.0)}, "inner.rate=0.0: must be above 0 (decay)"),
        ({"inner": Inner(1.5)}, "inner.rate=1.5: must be at most 1 (decay)"),
        ({"inner": Inner(0.5)}, "inner.rate=0.5: not today"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 99 else "",
)
def test_a_bad_value_gives_a_line_with_its_key_the_value_and_the_range(changes: dict[str, Any], problem: str) -> None:
    assert list(problems(outer(**changes), "group.")) == [f"group.{problem}"]


def test_every_bad_value_is_reported() -> None:
    assert len(list(problems(outer(size=0, kind="oval", inner=Inner(2.0))))) == 3
