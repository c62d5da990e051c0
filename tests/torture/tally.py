"""How often a fault was tried and how often nothing was lost: the numbers of docs/reliability.md.

They are appended to a CSV, one row for every fault of every session; the table adds up what was counted.
"""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kfacrnn import provenance

COLUMNS = ("date", "commit", "seed", "fault", "tried", "survived", "lost", "seconds", "note")
BEGIN, END = "<!-- the table of make torture -->", "<!-- the end of the table -->"


@dataclass
class Tally:
    """Trials of one `fault`. `lost` has a line for every one that was not survived, `note` what was measured."""

    fault: str
    tried: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)
    note: str = ""
    begun: float = field(default_factory=time.monotonic)

    @contextmanager
    def trial(self, what: object, times: int = 1) -> Iterator[None]:
        """A trial, or several that are judged together: survived unless something is raised inside.
        `what` it was, or a function that says it afterwards."""
        self.tried += times
        try:
            yield
        except Exception as error:  # of whatever kind: that is what is counted
            said = " ".join(str(error).split())[:300]
            self.lost.append(f"{what() if callable(what) else what}: {type(error).__name__}: {said}")
        else:
            self.survived += times

    def __str__(self) -> str:
        seconds = f"{time.monotonic() - self.begun:.0f} s"
        parts = [f"{self.fault}: {self.survived} of {self.tried} survived in {seconds}", self.note, *self.lost]
        return "\n  ".join(part for part in parts if part)


def record(tally: Tally, path: Path, seed: int) -> None:
    """Appends the tally to the CSV at `path`."""
    commit = provenance.commit()
    cells = (
        provenance.now(),
        f"{(commit['commit'] or '')[:12]}{' and changes' if commit['dirty'] else ''}",
        seed,
        tally.fault,
        tally.tried,
        tally.survived,
        tally.tried - tally.survived,
        f"{time.monotonic() - tally.begun:.1f}",
        tally.note,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, cells] if new else [cells])


def table(path: Path) -> str:
    """The counts in the CSV as Markdown, sums over sessions; the note is the last one."""
    sums: dict[str, list[int]] = {}
    notes: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO(path.read_text())):
        counts = [int(row[key]) for key in ("tried", "survived", "lost")]
        sums[row["fault"]] = [a + b for a, b in zip(sums.get(row["fault"], [0, 0, 0]), counts, strict=True)]
        notes[row["fault"]] = row["note"] or notes.get(row["fault"], "")
    lines = ["| fault | tried | survived | lost | |", "|---|---:|---:|---:|---|"]
    lines += [f"| {fault} | {t:,} | {s:,} | {lost:,} | {notes[fault]} |" for fault, (t, s, lost) in sums.items()]
    return "\n".join(lines)


def write_table(path: Path, page: Path) -> None:
    """Puts the table between its two marks on the page."""
    text = page.read_text()
    inside = f"{BEGIN}\n{table(path)}\n{END}"
    page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: inside, text, flags=re.DOTALL))
