"""A figure in numbers: when each line came to the target, how that compares with the best baseline, where it ended.

Everything is taken of the same smoothed curve: at every row the mean over the rows of the last `select.last` updates,
as selection has it, or with early stopping the least so far. Its last value is a run's *final value*. The *target* is
the least final value among the baselines that the experiment names, where a line's final value is the median over its
seeds, and of two middle ones the higher: so most seeds of the best baseline reach the target, whatever their number. It
is not below `solved`, the loss with which the experiment is content: how many zeros the loss of a solved task has is no
comparison. Or somebody *names* the target, whatever the baselines attain. A run *arrives* at its first row at or below
the target; one that diverged never does. Plain numbers only; this module knows neither files nor pictures.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from operator import neg
from typing import Protocol

from kfacrnn.curves import Curve, quantile

DRAWS, LEVEL = 10_000, 0.95


@dataclass(frozen=True)
class Run:
    """One seed: its smoothed curve, and seconds per update between its rows, none if it shared the machine."""

    seed: int
    curve: Curve
    paces: tuple[float, ...] = ()

    @property
    def final(self) -> float:
        return math.inf if self.curve.diverged or not self.curve.nats else self.curve.nats[-1]

    def arrival(self, target: float, axis: str) -> float:
        """The update, or second, of the first row at or below the target (nats); infinite for never."""
        times: Sequence[float] = getattr(self.curve, axis)
        first = bisect_left(self._lowest, -target, key=neg)
        return times[first] if first < len(times) and not self.curve.diverged else math.inf

    @cached_property
    def _lowest(self) -> tuple[float, ...]:
        return lowest(self.curve).nats


class Benched(Protocol):
    @property
    def seconds(self) -> float:
        """Of an update, in the long run."""

    @property
    def p95(self) -> float | None:
        """The 95th percentile over single updates."""

    def after(self, updates: float) -> float:
        """Seconds of a run's first so many updates; infinite for infinitely many."""


@dataclass(frozen=True)
class Line:
    """One line of the figure, compared with the baselines of the same model.

    `benched`: what updates cost by `kfacrnn bench`, where the seconds of runs do not count.
    """

    name: str
    method: str
    optimizer: str
    label: str
    runs: tuple[Run, ...]
    model: str = ""
    benched: Benched | None = None

    @property
    def final(self) -> float:
        """Nats: what most seeds attain. Infinite if that is none."""
        return statistics.median_high(run.final for run in self.runs) if self.runs else math.inf

    def on(self, axis: str) -> list[Run]:
        """The runs whose `axis`, updates or seconds, counts."""
        return [run for run in self.runs if axis == "updates" or run.paces or self.benched]

    def arrival(self, run: Run, target: float, axis: str) -> float:
        if axis == "seconds" and self.benched:
            return self.benched.after(run.arrival(target, "updates"))
        return run.arrival(target, axis)

    def median_arrival(self, target: float, axis: str) -> float | None:
        times = [self.arrival(run, target, axis) for run in self.on(axis)]
        return quantile(sorted(times), 0.5) if times else None


@dataclass(frozen=True)
class Ratio:
    """Of a line's median arrival to that of the best baseline, with its interval; None without two seeds of each."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Entry:
    """One row of the table. Values are in the task's metric; None where there is nothing to say."""

    line: Line
    final: float | None
    final_low: float | None
    final_high: float | None
    target: float | None = None
    solved: bool = False  # the target is where the experiment is content, above the best baseline's final value
    baseline: str | None = None  # name of the best one
    reached: int | None = None
    updates: float | None = None
    updates_ratio: Ratio | None = None
    seconds: float | None = None
    seconds_ratio: Ratio | None = None
    seconds_per_update: float | None = None
    seconds_per_update_p95: float | None = None


@dataclass(frozen=True)
class Goal:
    """How a target comes from the best baseline's final value. Everything in nats."""

    solved: float = -math.inf
    named: float | None = None

    def target(self, final: float) -> float:
        return max(final, self.solved) if self.named is None else self.named


def smoothed(curve: Curve, last: int) -> Curve:
    """Means over the rows of the last `last` updates, from the first row with so many behind it; of a shorter run,
    one mean over all of it."""
    begin = min(last, curve.updates[-1]) if curve.updates else 0
    kept = [index for index, update in enumerate(curve.updates) if update >= begin]
    first = 0
    means = []
    for index in kept:
        while curve.updates[first] <= curve.updates[index] - last:
            first += 1
        means.append(statistics.fmean(curve.nats[first : index + 1]))
    return replace(
        curve,
        updates=tuple(curve.updates[index] for index in kept),
        seconds=tuple(curve.seconds[index] for index in kept),
        nats=tuple(means),
    )


def lowest(curve: Curve) -> Curve:
    """The least nats up to every row: what early stopping would have kept."""
    return replace(curve, nats=tuple(accumulate(curve.nats, min)))


def summarise(
    lines: Sequence[Line],
    baselines: Collection[str],
    convert: Callable[[float], float],
    solved: float = -math.inf,
    named: float | None = None,
) -> list[Entry]:
    """A row for every line, model after model. `baselines` are methods, `convert` turns nats into the metric,
    `solved` and `named`, a target that does not depend on the baselines, are in nats."""
    goal = Goal(solved, named)
    entries = []
    for model in dict.fromkeys(line.model for line in lines):
        group = [line for line in lines if line.model == model]
        best = _best([line for line in group if line.method in baselines], goal)
        for line in group:
            entry = _ending(line, convert)
            if line.runs and (best or named is not None):
                entry = _against(entry, best, convert, goal)
            entries.append(entry)
    return entries


def _best(baselines: Sequence[Line], goal: Goal) -> Line | None:
    """The one with the least final value; among those that solve the task, or have a named target to reach, the first
    to do so."""

    def order(line: Line) -> tuple[float, float]:
        target = goal.target(line.final)
        return target, line.median_arrival(target, "updates") or 0.0

    return min((line for line in baselines if math.isfinite(line.final)), key=order, default=None)


def _ending(line: Line, convert: Callable[[float], float]) -> Entry:
    finals = sorted(run.final for run in line.runs)
    low, middle, high = (convert(quantile(finals, q)) for q in (0.0, 0.5, 1.0)) if finals else (None, None, None)
    paces = sorted(pace for run in line.runs for pace in run.paces)
    median, p95 = (quantile(paces, 0.5), quantile(paces, 0.95)) if paces else (None, None)
    if line.benched:
        median, p95 = line.benched.seconds, line.benched.p95
    return Entry(line, middle, low, high, seconds_per_update=median, seconds_per_update_p95=p95)


def _against(entry: Entry, best: Line | None, convert: Callable[[float], float], goal: Goal) -> Entry:
    line, final = entry.line, best.final if best else math.inf
    target = goal.target(final)
    return replace(
        entry,
        target=convert(target),
        solved=target > final,
        baseline=best.name if best else None,
        reached=sum(math.isfinite(run.arrival(target, "updates")) for run in line.runs),
        updates=line.median_arrival(target, "updates"),
        updates_ratio=_ratio(line, best, "updates", goal) if best else None,
        seconds=line.median_arrival(target, "seconds"),
        seconds_ratio=_ratio(line, best, "seconds", goal) if best else None,
    )


def _ratio(line: Line, best: Line, axis: str, goal: Goal) -> Ratio | None:
    above, below = (each.median_arrival(goal.target(best.final), axis) for each in (line, best))
    if above is None or below is None or math.isinf(below):
        return None
    if line is best:
        return Ratio(1.0)
    return Ratio(above / below, *(interval(line, best, axis, goal) or ()))


def interval(line: Line, best: Line, axis: str, goal: Goal = Goal()) -> tuple[float, float] | None:
    """Percentile bootstrap over seeds of the ratio of median arrivals, the target being taken anew from every draw.

    Seeds that both lines have run are drawn together, since an equal seed means equal weights, and equal batches where
    they are of one size; lines with different seeds are drawn independently. Draws in which most runs of the baseline
    diverged have no target, and those in which it does not reach a named one have no ratio: neither counts. None with
    fewer than two seeds on either side.
    """
    import numpy as np

    rivals = sorted(best.on(axis), key=lambda run: (run.final, run.seed))
    runs = sorted(line.on(axis), key=lambda run: run.seed)
    if min(len(runs), len(rivals)) < 2:
        return None
    generator = np.random.default_rng(0)
    rival = generator.integers(len(rivals), size=(DRAWS, len(rivals)))
    if {run.seed for run in runs} == {run.seed for run in rivals}:
        order = [run.seed for run in rivals]
        runs, own = sorted(runs, key=lambda run: order.index(run.seed)), rival
    else:
        own = generator.integers(len(runs), size=(DRAWS, len(runs)))
    finals = np.array([run.final for run in rivals])
    target = np.sort(rival, axis=1)[:, len(rivals) // 2]  # ascending finals: the higher median is the middle index
    above, below = (
        np.array([[each.arrival(run, goal.target(final), axis) for run in of] for final in finals])  # [target, seed]
        for each, of in ((line, runs), (best, rivals))
    )
    numerator, denominator = (
        np.median(times[target[:, None], drawn], axis=1) for times, drawn in ((above, own), (below, rival))
    )
    counts = np.isfinite(finals[target]) & np.isfinite(denominator)
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    ratios = numerator[counts] / denominator[counts]
    low, high = np.quantile(ratios, tails, method="inverted_cdf")  # no mean of a number and ∞
    return float(low), float(high)
