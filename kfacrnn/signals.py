"""Ctrl-C and SIGTERM as a wish to stop between two updates, not in the middle of one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def name(number: int) -> str:
    """`SIGTERM`."""
    return signal.Signals(number).name


@contextmanager
def collected() -> Iterator[list[int]]:
    """The numbers of those that have come. A second one stops at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
