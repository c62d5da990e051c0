"""Learning-rate schedules: a factor on the base learning rate as a function of the update, counted from 0."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kfacrnn.settings import setting


@dataclass
class Schedule:
    """kind          factor at update k

    constant      1
    exponential   rate^k
    step          1 before update `start`, then multiplied by `rate` there and again every `every` updates
    cosine        from 1 at update 0 to `final` at the end of the budget

    A warm-up multiplies the first `warmup` updates by (k+1)/warmup. Zaremba et al. (2014), medium model: step, rate
    1/1.2, from the seventh epoch on, every epoch.
    """

    kind: str = setting("shape of the schedule", choices=["constant", "exponential", "step", "cosine"])
    warmup: int = setting("updates of linear warm-up", at_least=0)
    rate: float = setting("factor of exponential and step decay", above=0, at_most=1)
    start: int = setting("update of the first step", at_least=0)
    every: int = setting("updates between steps", at_least=1)
    final: float = setting("factor at the end of a cosine", at_least=0, at_most=1)

    def factor(self, update: int, updates: int) -> float:
        """`updates` is the length of the budget."""
        warm = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        if self.kind == "exponential":
            return warm * self.rate**update
        if self.kind == "step" and update >= self.start:
            return warm * self.rate ** (1 + (update - self.start) // self.every)
        if self.kind == "cosine":
            progress = min(1.0, update / updates)
            return warm * (self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2)
        return warm
