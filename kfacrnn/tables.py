"""Tables for the terminal: columns as wide as their widest cell, nothing wrapped or cut, readable in a log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def plain(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """One line for the header and one for every row; None is an empty cell."""
    cells = [list(header), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)
