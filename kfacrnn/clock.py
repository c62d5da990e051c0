"""Where the seconds went: every moment of a run belongs to exactly one account."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ACCOUNTS = ("train", "eval", "log", "checkpoint", "setup")


class Ledger:
    """Wall and process-CPU seconds by account. Starts in `setup`; `with ledger("train"):` books what happens inside.

    `synchronise` waits for the device; it is called only where an account begins or ends.
    """

    def __init__(self, synchronise: Callable[[], None] = lambda: None):
        self.wall = dict.fromkeys(ACCOUNTS, 0.0)
        self.cpu = dict.fromkeys(ACCOUNTS, 0.0)
        self._synchronise = synchronise
        self._account = "setup"
        self._since = (time.perf_counter(), time.process_time())

    @contextmanager
    def __call__(self, account: str) -> Iterator[None]:
        outer = self._switch(account)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, account: str) -> str:
        self._synchronise()
        now = (time.perf_counter(), time.process_time())
        self.wall[self._account] += now[0] - self._since[0]
        self.cpu[self._account] += now[1] - self._since[1]
        previous, self._account, self._since = self._account, account, now
        return previous

    @property
    def total(self) -> float:
        self._switch(self._account)
        return sum(self.wall.values())

    def state_dict(self) -> dict[str, dict[str, float]]:
        self._switch(self._account)
        return {"wall": dict(self.wall), "cpu": dict(self.cpu)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Adds the seconds of earlier sessions of the same run."""
        for account in ACCOUNTS:
            self.wall[account] += state["wall"][account]
            self.cpu[account] += state["cpu"][account]
