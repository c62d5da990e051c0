"""metrics.csv of a run: one row per log point. It grows row by row, and a torn last line is dropped on reading.

What somebody else has changed is noticed by who writes the file, and a cell that is no number by who reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kfacrnn.errors import UserError
from kfacrnn.files import explained, write_atomic

COLUMNS = (
    "update", "epoch", "tokens",
    "time_train_s", "time_eval_s", "time_wall_s", "cpu_s",
    "train/nats", "train/metric", "valid/nats", "valid/metric",
    "lr", "step_size", "grad_norm", "damping", "staleness", "updates_per_s", "memory_mb",
)  # fmt: skip
HEAD = ",".join(COLUMNS)
TAIL = 4096  # bytes; several rows
DIGITS = 10  # of the greatest number of updates


class Stamp(NamedTuple):
    """What tells that a file was changed."""

    size: int = 0
    modified: int = 0  # ns


def _stamp(path: Path) -> Stamp:
    """Of no file, zeros."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return Stamp()
    return Stamp(found.st_size, found.st_mtime_ns)


def _line(row: Mapping[str, Any]) -> str:
    """Floats are written so that they read back exactly; what is not known is an empty cell."""
    return ",".join("" if row.get(name) is None else str(row[name]) for name in COLUMNS)


def _cells(line: str) -> dict[str, str]:
    return dict(zip(COLUMNS, line.split(","), strict=True))


def _update(line: str) -> int | None:
    """Of a row; None for a line that is none."""
    first = line.partition(",")[0]
    is_row = line.count(",") == len(COLUMNS) - 1 and len(first) <= DIGITS and first.isascii() and first.isdigit()
    return int(first) if is_row else None


class Metrics:
    """The metrics.csv in a folder, whether or not it is there. Read, or written by one process."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.csv"
        self._written: int | None = None  # rows, and what the file was like then: known to who writes it
        self._stamp = Stamp()

    # ---- writing

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row. Raises `UserError` if somebody else has changed the file since this process wrote it."""
        with explained(self.path):
            found = _stamp(self.path)
            if self._written is not None and found != self._stamp:
                raise UserError(f"{self.path} was changed by somebody else; the same command continues the run")
            with self.path.open("a", newline="") as file:
                file.write(f"{_line(row)}\n" if found.size else f"{HEAD}\n{_line(row)}\n")
            self._stamp = _stamp(self.path)
        self._written = None if self._written is None else self._written + 1

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes all rows anew."""
        self._replace([_line(row) for row in rows])

    def truncate(self, update: int) -> None:
        """Drops the rows after `update`: they will be made again."""
        self._replace([line for made, line in self._lines() if made <= update])

    def _replace(self, lines: list[str]) -> None:
        write_atomic(self.path, "".join(f"{line}\n" for line in (HEAD, *lines)).encode())
        self._written, self._stamp = len(lines), _stamp(self.path)

    def sync(self) -> int | None:
        """Waits until the rows are on the disk. Returns their number; None unless this process has written them all."""
        with explained(self.path):
            if self.path.exists():
                with self.path.open("rb+") as file:
                    os.fsync(file.fileno())
        return self._written

    # ---- reading

    def _lines(self) -> Iterator[tuple[int, str]]:
        """The complete rows as they are written there, each with its update; no cell has quotes."""
        try:
            file = self.path.open(errors="replace", newline="\n")
        except OSError:
            return
        with file:
            for line in file:
                update = _update(line) if line.endswith("\n") else None
                if update is not None:
                    yield update, line[:-1]

    def updates(self) -> list[int]:
        """That there are rows of, in the file's order."""
        return [update for update, _ in self._lines()]

    def rows(self) -> list[dict[str, str]]:
        """The complete rows as text."""
        return [_cells(line) for _, line in self._lines()]

    def numbers(self) -> Iterator[dict[str, float]]:
        """The rows as numbers, without their empty cells. Raises `UserError` for a cell that is no number."""
        for row in self.rows():
            yield self._numbers(row)

    def _numbers(self, row: dict[str, str]) -> dict[str, float]:
        return {name: self._number(row["update"], name, cell) for name, cell in row.items() if cell}

    def _number(self, update: str, name: str, cell: str) -> float:
        try:
            return float(cell)
        except ValueError as error:
            folder = self.path.parent
            problem = f"{self.path}, update {update}: {name} is no number: {cell!r}"
            raise UserError(f"{problem}; delete {folder} to have it made again") from error

    def columns(self, names: Sequence[str]) -> dict[str, list[float]]:
        """Columns as numbers, NaN for an empty cell. Raises `UserError` for a cell that is no number."""
        places = {name: COLUMNS.index(name) for name in names}
        last = max(places.values(), default=0) + 1  # there is no need to split further
        rows = [line.split(",", last) for _, line in self._lines()]
        try:
            return {name: [float(cells[place] or "nan") for cells in rows] for name, place in places.items()}
        except ValueError:
            for cells in rows:
                for name, place in places.items():
                    self._number(cells[0], name, cells[place] or "nan")
            raise

    def last_row(self) -> dict[str, float] | None:
        """The last of `numbers`, without reading the others."""
        try:
            with self.path.open("rb") as file:
                begin = max(0, file.seek(0, os.SEEK_END) - TAIL)
                file.seek(begin)
                *whole, _ = file.read().decode(errors="replace").split("\n")
        except OSError:
            return None
        lines = reversed(whole[1 if begin else 0 :])
        found = next((line for line in lines if _update(line) is not None), None)
        if found is None:  # nothing yet, or more garbage than that
            *_, found = [None, *(line for _, line in self._lines())]
        return None if found is None else self._numbers(_cells(found))
