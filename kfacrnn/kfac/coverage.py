"""The coverage table: which parameter is trained how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A line of the coverage table."""

    block: str
    parameters: str
    approximation: str
    factors: str


class Coverage(list[Row]):
    """Parameter → block → approximation → factor sizes, printable."""

    def __str__(self) -> str:
        header = Row("block", "parameters", "approximation", "factors")
        lines = [(row.block, row.parameters, row.approximation, row.factors) for row in (header, *self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )
