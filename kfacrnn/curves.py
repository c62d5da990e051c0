"""Several runs as one line with a band: median and spread over seeds, against updates and against seconds.

Spread is taken of nats and only then turned into the task's metric. A run that diverged counts as infinitely bad from
there on. Nothing is extrapolated: against seconds, a line ends where its fastest run ends. Plain numbers only; this
module knows neither files nor pictures.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

PANELS = ("updates", "seconds", "benched", "trials", "diverged")
SEEDS_FOR_QUARTILES = 5  # with fewer, the band is from the least to the greatest


@dataclass(frozen=True)
class Curve:
    """One run: nats per unit, or the values of another column, after `updates` and after `seconds` of training; `paces`
    are seconds per update between all of its rows, those without a value too."""

    updates: tuple[int, ...]
    seconds: tuple[float, ...]
    nats: tuple[float, ...]
    diverged: bool = False
    paces: tuple[float, ...] = ()

    def at_update(self, update: int) -> float | None:
        index = bisect.bisect_left(self.updates, update)
        if index < len(self.updates) and self.updates[index] == update:
            return self.nats[index]
        return math.inf if self.diverged and index == len(self.updates) else None

    def at_second(self, second: float) -> float | None:
        """Linear between two rows; None outside them."""
        after = bisect.bisect_left(self.seconds, second)
        if after == len(self.seconds):
            return math.inf if self.diverged else None
        if self.seconds[after] == second:
            return self.nats[after]
        if after == 0:
            return None
        (t0, t1), (y0, y1) = self.seconds[after - 1 : after + 1], self.nats[after - 1 : after + 1]
        return y0 + (y1 - y0) * (second - t0) / (t1 - t0)


@dataclass(frozen=True)
class Row:
    """One row of a figure's CSV. `benched` is against seconds too, of a benchmark instead of the runs. In `diverged`
    there is a row per diverged run, x the update it reached; in `trials`, if lines had different numbers of trials, one
    per line, x their number."""

    panel: str
    line: str
    x: float
    median: float | None
    low: float | None
    high: float | None
    n: int


def columns_for(metric: str) -> list[str]:
    """The columns of metrics.csv that `of_run` wants: updates, seconds, what is averaged."""
    return ["update", "time_train_s", nats_of(metric) or metric]


def nats_of(metric: str) -> str | None:
    """The column to average, where the metric is one that comes from nats."""
    split, _, kind = metric.partition("/")
    return f"{split}/nats" if kind == "metric" else None


def of_run(columns: Mapping[str, Sequence[float]], metric: str, diverged: bool) -> Curve:
    """The rows that have the metric."""
    updates, seconds, values = (columns[name] for name in columns_for(metric))
    kept = [index for index, value in enumerate(values) if not math.isnan(value)]
    points = itertools.pairwise([(0.0, 0.0), *zip(updates, seconds, strict=True)])
    return Curve(
        updates=tuple(int(updates[index]) for index in kept),
        seconds=tuple(seconds[index] for index in kept),
        nats=tuple(values[index] for index in kept),
        diverged=diverged,
        paces=tuple((now - before) / (update - since) for (since, before), (update, now) in points if update > since),
    )


def over_updates(line: str, curves: Sequence[Curve], convert: Callable[[float], float]) -> list[Row]:
    """A row at every update that any of the runs has a row for."""
    updates = sorted({update for curve in curves for update in curve.updates})
    return [_row("updates", line, x, (curve.at_update(x) for curve in curves), convert) for x in updates]


def over_benched_seconds(over_updates: Sequence[Row], seconds_after: Callable[[float], float]) -> list[Row]:
    """The same rows against seconds, by how many there are after so many updates."""
    return [dataclasses.replace(row, panel="benched", x=seconds_after(row.x)) for row in over_updates]


def over_seconds(line: str, curves: Sequence[Curve], convert: Callable[[float], float]) -> list[Row]:
    """Rows at equal distances between the last first row and the first last row of the runs."""
    begun = [curve for curve in curves if curve.seconds]
    lasting = [curve for curve in begun if not curve.diverged] or begun
    if not begun:
        return []
    start, end = max(curve.seconds[0] for curve in begun), min(curve.seconds[-1] for curve in lasting)
    steps = min(len(curve.seconds) for curve in lasting) - 1
    if end < start:
        return []
    seconds = [start + (end - start) * step / steps for step in range(steps)] + [end]
    return [_row("seconds", line, x, (curve.at_second(x) for curve in curves), convert) for x in seconds]


def _row(panel: str, line: str, x: float, nats: Iterable[float | None], convert: Callable[[float], float]) -> Row:
    values = sorted(value for value in nats if value is not None)
    band = (0.0, 1.0) if len(values) < SEEDS_FOR_QUARTILES else (0.25, 0.75)
    median, low, high = (convert(quantile(values, q)) for q in (0.5, *band))
    return Row(panel, line, x, median, low, high, len(values))


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of ascending values, linear between neighbours as numpy's, but with infinities among them."""
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    share = position - below
    if share == 0:
        return ordered[below]
    return (1 - share) * ordered[below] + share * ordered[below + 1]
