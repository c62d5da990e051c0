"""What a task calls its loss: perplexity, bits or nats. By name, so that figures need neither the task nor its data."""

from __future__ import annotations

import math
from collections.abc import Callable


def from_nats(metric: str) -> Callable[[float], float]:
    """From nats per unit to the metric: the identity for anything but perplexity and bits."""
    if metric == "perplexity":
        return _exp
    if metric.startswith("bits "):
        return lambda nats: nats / math.log(2)
    return lambda nats: nats


def to_nats(metric: str, value: float) -> float:
    """The inverse of `from_nats`."""
    if metric == "perplexity":
        return math.log(value) if value > 0 else -math.inf
    return value * math.log(2) if metric.startswith("bits ") else value


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # of a diverged run
        return math.inf
