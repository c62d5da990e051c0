"""How often curvature is renewed, rarely in the long run, often while the model is young; and on which sequences."""

from __future__ import annotations

from typing import Any

EARLY_INTERVAL = 1 / 16


def is_due(update: int, newest: int, every: int, early_interval: float) -> bool:
    """Whether curvature last renewed before update `newest` (-1: never) is to be renewed before `update`: at multiples
    of `every`, and whenever `every` updates have passed or, if that is sooner, `early_interval` times as many as had
    been made before the last renewal.

    The first updates change a model most. A new language model predicts all words alike and learns within ten updates
    how often each comes, which multiplies the curvature of the common ones by hundreds: inverses that are ten updates
    old would then overshoot.
    """
    interval = min(every, max(1, int(early_interval * newest)))
    return newest < update and (update % every == 0 or update - newest >= interval)


class Passes:
    """When statistics are taken, and on which of a batch's sequences: a `fraction` of them, in rotation."""

    def __init__(self, every: int, fraction: float, early_interval: float):
        self.newest = -1  # the update before which they were taken
        self._every = every
        self._fraction = fraction
        self._early_interval = early_interval
        self._next_case = 0

    def is_due(self, update: int) -> bool:
        return is_due(update, self.newest, self._every, self._early_interval)

    def next_cases(self, cases: int) -> slice:
        """See `KFAC.statistics_cases`."""
        count = max(1, round(cases * self._fraction))
        start = min(self._next_case, cases - count) if self._next_case < cases else 0
        self._next_case = start + count
        return slice(start, start + count)

    def state_dict(self) -> dict[str, Any]:
        return {"newest": self.newest, "next_case": self._next_case}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.newest, self._next_case = state["newest"], state["next_case"]
