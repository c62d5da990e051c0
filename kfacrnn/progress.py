"""How far a run is: a bar on a terminal, a plain line every now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Self

PLAIN_EVERY = 15.0  # seconds


def duration(seconds: float) -> str:
    """`3 h 10 m`, `4 m 05 s`, `12 s`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {secs:02d} s" if minutes else f"{secs} s"


class Silence:
    """Shows nothing, where another process shows how far the run is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, done: int, note: str) -> None:
        pass


class Progress:
    """`with Progress("ptb_char sgd", 300, start=100) as progress: progress.show(101, "2.31 bits")`."""

    def __init__(self, title: str, total: int, start: int = 0):
        self._title, self._total, self._start = title, total, start
        self._began = self._spoke = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, done: int, note: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._spoke >= PLAIN_EVERY or done == self._total:
            self._spoke = now
            made, left = done - self._start, self._total - done
            rest = f", {duration((now - self._began) / made * left)} left" if made else ""
            print(f"{self._title}: {done}/{self._total}, {note}{rest}", file=sys.stderr, flush=True)
