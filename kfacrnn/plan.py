"""An experiment and a result store brought together: which runs there are to be, how far each is, which choice won.

Nothing here is remembered: states, winners and estimates are read from the store each time, so that a sweep, `status`
in another shell and a figure drawn months later agree. This module starts nothing and writes nothing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kfacrnn import config, discovery
from kfacrnn.errors import UserError
from kfacrnn.experiment import Experiment, Point, Select, refuse_own_keys
from kfacrnn.store import FINISHED, RunFolder, Store


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A point of an experiment with its configuration and its place in the store."""

    point: Point
    overrides: tuple[str, ...]  # of the point, then those of the command line
    run: config.Run
    folder: RunFolder

    @property
    def finished(self) -> bool:
        return self.folder.status().get("state") in FINISHED

    @property
    def update(self) -> int:
        """Updates made, as of the last heartbeat; all of them for a finished run."""
        return self.run.budget.updates if self.finished else self.folder.status().get("update", 0)

    def score(self, select: Select) -> float:
        """What selection compares (nats): lower is better, infinite for a diverged run or one without the metric."""
        if self.folder.status()["state"] == "diverged":
            return math.inf
        first = self.run.budget.updates - select.last
        rows = [row for row in self.folder.rows() if int(row["update"]) > first and row[select.metric]]
        return statistics.fmean(float(row[select.metric]) for row in rows) if rows else math.inf


class Plan:
    """The runs of an experiment. Composing checks every tuning run; `validate` checks the others too."""

    def __init__(self, experiment: Experiment, results: str, overrides: Sequence[str] = (), only: Sequence[str] = ()):
        refuse_own_keys(overrides)
        for method in only:
            if method not in experiment.methods:
                raise UserError(discovery.unknown(f"method in {experiment.name}", method, experiment.methods))
        self.experiment = experiment
        self.store = Store(results)
        self.methods = [method for method in experiment.methods if not only or method in only]
        self._overrides = tuple(overrides)
        self._composed: dict[tuple[str, ...], config.Run] = {}
        self.tuning = {method: [self._planned(point) for point in experiment.tuning(method)] for method in self.methods}

    def _planned(self, point: Point) -> PlannedRun:
        overrides = (*point.overrides, *self._overrides)
        seedless = tuple(override for override in overrides if override != f"seed={point.seed}")
        if seedless not in self._composed:  # composing takes Hydra some 50 ms, and seeds need no check of their own
            try:
                self._composed[seedless] = config.compose(overrides)
            except UserError as error:
                where = f"{self.experiment.name}, method {point.method}, {point.role} {point}"
                raise UserError(f"{where}: {error}") from error
        run = dataclasses.replace(self._composed[seedless], seed=point.seed)
        return PlannedRun(point, overrides, run, self.store.folder(run))

    def validate(self) -> None:
        """Composes the confirmation of every choice of every grid. Raises `UserError` for the first bad one."""
        for method in self.methods:
            for choice in self.experiment.methods[method].points:
                self._planned(self.experiment.confirmation(method, choice)[0])

    def winner(self, method: str) -> PlannedRun | None:
        """The best tuning run of a method; None before all of them are finished, and when none of them can be chosen.
        Ties go to the first in the grid."""
        trials = self.tuning[method]
        if not trials or not all(trial.finished for trial in trials):
            return None
        scores = [trial.score(self.experiment.select) for trial in trials]
        return trials[scores.index(min(scores))] if min(scores) < math.inf else None

    def confirmation(self, method: str) -> list[PlannedRun]:
        """The runs that the figure draws; none while the winner of the grid is not known."""
        if not self.tuning[method]:
            return [self._planned(point) for point in self.experiment.confirmation(method, {})]
        winner = self.winner(method)
        if winner is None:
            return []
        return [self._planned(point) for point in self.experiment.confirmation(method, winner.point.choice)]

    def known(self) -> Iterator[PlannedRun]:
        """Every run that is known by now, tuning first."""
        for method in self.methods:
            yield from self.tuning[method]
        for method in self.methods:
            yield from self.confirmation(method)

    def unknown(self) -> Iterator[PlannedRun]:
        """Stand-ins, of equal length, for the runs that will be known when a grid has its winner."""
        for method in self.methods:
            if not self.confirmation(method):
                first = self.experiment.methods[method].points[0]
                yield from (self._planned(point) for point in self.experiment.confirmation(method, first))

    def counts(self) -> tuple[Counter[str], int]:
        """How many known runs are in each state (`missing` for none), and how many runs there will be in all."""
        states = Counter(planned.folder.state() or "missing" for planned in self.known())
        return states, states.total() + sum(1 for _ in self.unknown())

    def updates(self) -> tuple[int, int]:
        """Updates made and updates in all."""
        known = list(self.known())
        total = sum(planned.run.budget.updates for planned in (*known, *self.unknown()))
        return sum(planned.update for planned in known), total

    def seconds_left(self) -> float | None:
        """Seconds of training still to be done, one run at a time; None before the first row of the first run."""
        rates: dict[str, list[float]] = {method: [] for method in self.methods}
        left: Counter[str] = Counter()
        for planned in self.known():
            method = planned.point.method
            left[method] += planned.run.budget.updates - planned.update
            rows = planned.folder.rows()
            if rows:
                rates[method].append(float(rows[-1]["time_wall_s"]) / int(rows[-1]["update"]))
        for planned in self.unknown():
            left[planned.point.method] += planned.run.budget.updates
        measured = [rate for known_rates in rates.values() for rate in known_rates]
        if not measured:
            return None
        return sum(left[m] * statistics.fmean(rates[m] or measured) for m in self.methods)
