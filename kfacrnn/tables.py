"""Tables as text: for the terminal, for Markdown, for LaTeX, for programs. Nothing is wrapped or cut; None is an empty
cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

LATEX = str.maketrans(
    {mark: rf"\{mark}" for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"∞": r"$\infty$", "×": r"$\times$", "†": r"$\dagger$", "–": "--", "\n": " "}
)


def plain(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """For the terminal: columns as wide as their widest cell, readable in a log."""
    cells = _text([header, *rows])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The first column to the left, the others to the right."""
    first, *rest = _text([header, *rows])
    lines = [first, ["---", *["---:"] * (len(first) - 1)], *rest]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def latex(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A `tabular` with the rules of the package booktabs."""
    first, *rest = [f"{' & '.join(map(escape_latex, line))} \\\\" for line in _text([header, *rows])]
    columns = "l" + "r" * (len(header) - 1)
    lines = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        first,
        r"\midrule",
        *rest,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """All digits, under the keys of the first record."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def escape_latex(text: str) -> str:
    return text.translate(LATEX)


def _text(lines: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [["" if cell is None else str(cell) for cell in line] for line in lines]
