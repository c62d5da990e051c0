"""The arithmetic of costs: what an update costs on average, though every fifth or twentieth costs more.

Statistics come every k updates and inverses every r. A median over steps would hide both, a mean would let one
disturbance of the machine decide. So steps are sorted by kind, each kind is taken by its median over rounds, and the
kinds are weighted by how often they come in a cycle of the steady state:

    cost = Σ_kind frequency(kind) · median_rounds(milliseconds of that kind)

A round holds one step of every kind of every optimiser, side by side in time. Intervals are percentile bootstraps over
rounds: whole rounds are drawn with replacement, for numerator and denominator alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import NamedTuple

import numpy as np

from kfacrnn.kfac.cadence import EARLY_INTERVAL, is_due

SAMPLES = 2000
LEVEL = 0.95
METHOD = (
    "cost: median over rounds of each kind of step, weighted by the kind's frequency in a cycle of the steady state; "
    f"interval: {LEVEL:.0%} percentile bootstrap over rounds, numerator and denominator drawn together; "
    "median and p95: over steps, weighted the same way"
)


class Kind(NamedTuple):
    """What a step does beside its training step."""

    statistics: bool = False
    refresh: bool = False

    @property
    def label(self) -> str:
        return "+".join(name for name in self._fields if getattr(self, name)) or "plain"


PLAIN = Kind()
Weights = Mapping[Kind, float]
Rounds = Sequence[Mapping[Kind, float]]
"""Of one optimiser: the milliseconds of every kind in every round."""


def frequencies(statistics_every: int, refresh_every: int) -> dict[Kind, float]:
    """How often each kind comes once statistics and refreshes, more frequent at first, have settled. Sums to 1."""
    cycle, settled = _periods(statistics_every, refresh_every)
    counts = Counter(islice(schedule(statistics_every, refresh_every), settled, settled + cycle))
    return {kind: counts[kind] / cycle for kind in sorted(counts)}


def unsettled(statistics_every: int, refresh_every: int, early_interval: float) -> list[Kind]:
    """The kind of each of the updates before that."""
    intervals = statistics_every, refresh_every, early_interval
    return [*islice(schedule(*intervals), _periods(*intervals)[1])]


def schedule(statistics_every: int, refresh_every: int, early_interval: float = EARLY_INTERVAL) -> Iterator[Kind]:
    """The kind of every update of a run, from its first on."""
    newest = refreshed = -1
    for update in count():
        statistics = is_due(update, newest, statistics_every, early_interval)
        newest = update if statistics else newest
        refresh = newest > refreshed and is_due(update, refreshed, refresh_every, early_interval)
        refreshed = update if refresh else refreshed
        yield Kind(statistics, refresh)


def _periods(statistics_every: int, refresh_every: int, early_interval: float = EARLY_INTERVAL) -> tuple[int, int]:
    """Updates of a cycle, and before the first one of the steady state."""
    rarer = max(statistics_every, refresh_every)
    cycle = math.lcm(statistics_every, rarer)
    return cycle, cycle * math.ceil(2 * rarer / early_interval / cycle)


def cost(rounds: Rounds, weights: Weights) -> float:
    """The mean over a cycle, of kinds' medians."""
    return float(sum(weight * np.median([one[kind] for one in rounds]) for kind, weight in weights.items()))


def quantile(rounds: Rounds, weights: Weights, share: float) -> float:
    """Of the steps of a cycle: the least value that at least `share` of them do not exceed."""
    steps = sorted((one[kind], weight / len(rounds)) for one in rounds for kind, weight in weights.items())
    reached = np.cumsum([weight for _, weight in steps])
    return steps[min(int(np.searchsorted(reached, share - 1e-9)), len(steps) - 1)][0]


def ratio(above: Rounds, above_weights: Weights, below: Rounds, below_weights: Weights) -> tuple[float, float, float]:
    """Cost of `above` by that of `below`, and the ends of its interval. Round i of both was side by side in time."""
    chosen = np.random.default_rng(0).integers(len(above), size=(SAMPLES, len(above)))
    ratios = _resampled(above, above_weights, chosen) / _resampled(below, below_weights, chosen)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return cost(above, above_weights) / cost(below, below_weights), float(low), float(high)


def _resampled(rounds: Rounds, weights: Weights, chosen: np.ndarray) -> np.ndarray:
    table = np.array([[one[kind] for kind in weights] for one in rounds])
    return np.median(table[chosen], axis=1) @ np.array(list(weights.values()))
