"""Tables of a study as CSV."""

from __future__ import annotations

import csv
from pathlib import Path

from fisher_study.measures import Rows


def write(path: Path, rows: Rows) -> Rows:
    """Four digits of every number, and the rows as they can then be read."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    return read(path)


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return [{key: _number(cell) for key, cell in row.items()} for row in csv.DictReader(file)]


def _number(cell: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell
