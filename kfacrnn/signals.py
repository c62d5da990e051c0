"""Ctrl-C and SIGTERM as a wish to stop between two updates, not in the middle of one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def name(number: int) -> str:
    """`SIGTERM`."""
    return signal.Signals(number).name


@contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, these signals go to the handler, but for those that are ignored, as under nohup; afterwards to those that
    had them before."""
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def collected() -> Iterator[list[int]]:
    """The numbers of those that have come. A second one stops at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    with handled((signal.SIGINT, signal.SIGTERM), note):
        yield received
