"""An experiment and a result store brought together: which runs there are to be, how far each is, which choice won.

States, winners and estimates are read from the store each time, so that a sweep, `status` in another shell and a figure
drawn months later agree; only what finished runs score is remembered. This module starts nothing and writes nothing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kfacrnn import benched, config, discovery, search
from kfacrnn.errors import UserError
from kfacrnn.experiment import Experiment, Point, Select
from kfacrnn.overrides import refuse_own_keys
from kfacrnn.run import Run
from kfacrnn.search import Choice
from kfacrnn.store import CUT, FINISHED, RunFolder, Store


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A point of an experiment with its configuration and its place in the store."""

    point: Point
    overrides: tuple[str, ...]  # of the point, then those of the command line
    run: Run
    folder: RunFolder

    @property
    def finished(self) -> bool:
        return self.folder.status().get("state") in FINISHED

    @property
    def update(self) -> int:
        """Updates made, as of the last heartbeat; all of them for a finished run."""
        return self.run.budget.updates if self.finished else self.folder.status().get("update", 0)

    def columns(self, names: Sequence[str]) -> dict[str, list[float]]:
        """Those of its folder. Raises `UserError` for a run that is done and was cut: what is chosen or drawn by half
        a curve would be wrong without a word."""
        if self.folder.is_cut(self.run.budget):
            raise UserError(f"run {self.run.run_id}: {CUT}; delete {self.folder.path} to have it made again")
        return self.folder.metrics.columns(names)

    def score(self, select: Select) -> float:
        """What selection compares (nats): lower is better, infinite for a diverged run or one without the metric."""
        if self.folder.status()["state"] == "diverged":
            return math.inf
        updates = self.run.budget.updates
        first = 0 if select.early_stopping else updates - select.updates(self.run.task.batch_size)
        rows = zip(*self.columns(["update", select.metric]).values(), strict=True)
        nats = [value for update, value in rows if update > first and not math.isnan(value)]
        if not nats:
            return math.inf
        return min(nats) if select.early_stopping else statistics.fmean(nats)


class Plan:
    """The runs of an experiment. Composing checks every tuning run; `validate` checks the others too.

    `lines` are the names of its lines; `tuning` has, for each and for those that choose their settings, the trials that
    are known from the start.
    """

    def __init__(self, experiment: Experiment, results: str, overrides: Sequence[str] = (), only: Sequence[str] = ()):
        refuse_own_keys(overrides)
        for name in only:
            if name not in experiment.methods and name not in experiment.lines:
                known = dict.fromkeys([*experiment.methods, *experiment.lines])
                raise UserError(discovery.unknown(f"method or line in {experiment.name}", name, known))
        self.experiment = experiment
        self.store = Store(results)
        self.lines = [name for name, line in experiment.lines.items() if not only or {name, line.method} & {*only}]
        self._refuse_searched_keys(overrides)
        self.overrides = tuple(overrides)
        self._composer = config.Composer()
        self._composed: dict[tuple[str, ...], Run] = {}
        self._scores: dict[str, float] = {}  # by run_id; reading whole curves at every turn of a sweep takes seconds
        searched = dict.fromkeys([*(experiment.lines[line].tuned_as for line in self.lines), *self.lines])
        self.tuning = {line: [self._planned(point) for point in experiment.tuning(line)] for line in searched}

    def _planned(self, point: Point) -> PlannedRun:
        overrides = (*point.overrides, *self.overrides)
        seedless = tuple(override for override in overrides if override != f"seed={point.seed}")
        if seedless not in self._composed:  # seeds need no check of their own
            try:
                self._composed[seedless] = self._composer.compose(overrides)
            except UserError as error:
                where = f"{self.experiment.name}, method {point.line}, {point.role} {point}"
                raise UserError(f"{where}: {error}") from error
        run = dataclasses.replace(self._composed[seedless], seed=point.seed)
        return PlannedRun(point, overrides, run, self.store.folder(run))

    def _refuse_searched_keys(self, overrides: Sequence[str]) -> None:
        """All trials along an axis would be one run, and whatever is said of them untrue."""
        for line in self.lines:
            method = self.experiment.searched(line)
            for entry in overrides:
                if entry.split("=", 1)[0].lstrip("+~") in {**method.axes, **method.search}:
                    raise UserError(f"overrides: {entry}: is what {self.experiment.name} searches for {line}")

    def validate(self) -> None:
        """Composes the confirmation of every choice of every grid. Raises `UserError` for the first bad one."""
        for line in self.lines:
            for choice in self.experiment.choices(line):
                self._planned(self.experiment.confirmation(line, choice)[0])

    def trials(self, line: str) -> list[PlannedRun]:
        """The tuning runs of a line as far as they are known: once all of them are finished, a grid is extended by one
        more, beside the best so far, until it has had its extra trials or there is no place for one."""
        trials = list(self.tuning[line])
        for _ in range(self.experiment.extra_trials(line) if trials else 0):
            best = self._best(trials)
            extra = self._extra_trial(line, trials, best) if best else None
            if extra is None:
                break
            trials.append(extra)
        return trials

    def _extra_trial(self, line: str, trials: Sequence[PlannedRun], best: PlannedRun) -> PlannedRun | None:
        tried = [trial.point.choice for trial in trials]
        for choice in search.candidates(self.experiment.method(line).axes, tried, best.point.choice):
            try:
                self._planned(self.experiment.confirmation(line, choice)[0])
                return self._planned(self.experiment.trial(line, choice))
            except UserError:  # beyond what the setting may be, such as a momentum of 1.1
                continue
        return None

    def _best(self, trials: Sequence[PlannedRun]) -> PlannedRun | None:
        """None before all of them are finished, and when none of them can be chosen. Ties go to the first."""
        if not trials or not all(trial.finished for trial in trials):
            return None
        scores = [self._score(trial) for trial in trials]
        return trials[scores.index(min(scores))] if min(scores) < math.inf else None

    def _score(self, trial: PlannedRun) -> float:
        run_id = trial.folder.run_id  # of the folder: that of the run is a hash of its whole configuration
        if run_id not in self._scores:
            self._scores[run_id] = trial.score(self.experiment.judgement)
        return self._scores[run_id]

    def winner(self, line: str) -> PlannedRun | None:
        """The tuning run that chose the settings of a line, perhaps on another model; None while it is not known."""
        return self._best(self.trials(self.experiment.lines[line].tuned_as))

    def edges(self, line: str) -> list[str]:
        """The settings that the line's winner has the least or the greatest tried value of."""
        source = self.experiment.lines[line].tuned_as
        winner, tried = self.winner(line), [trial.point.choice for trial in self.trials(source)]
        return search.edges(self.experiment.searched(line).axes, tried, winner.point.choice) if winner else []

    def unequal_trials(self) -> dict[str, int]:
        """How many trials each tuned line has, if these are not the same for all of them; else nothing. A line without
        a search is not meant: it has the settings that it is shipped with."""
        counts = {line: self.trial_count(line) for line in self.lines if self.tuning[line]}
        return counts if len(set(counts.values())) > 1 else {}

    def trial_count(self, line: str) -> int:
        """How many trials the line will have in all."""
        return len(self._all_trials(line))

    def _all_trials(self, line: str) -> list[PlannedRun]:
        """The trials, with stand-ins for those that are not known yet."""
        trials = self.trials(line)
        if trials and not all(trial.finished for trial in trials):
            total = len(self.tuning[line]) + self.experiment.extra_trials(line)
            trials += [trials[0]] * (total - len(trials))
        return trials

    def confirmation(self, line: str) -> list[PlannedRun]:
        """The runs that the figure draws; none while the winner of the search is not known."""
        choice: Choice = {}
        if self.tuning[self.experiment.lines[line].tuned_as]:
            winner = self.winner(line)
            if winner is None:
                return []
            choice = winner.point.choice
        return [self._planned(point) for point in self.experiment.confirmation(line, choice)]

    def known(self) -> Iterator[PlannedRun]:
        """Every run that is known by now, tuning first."""
        for line in self.tuning:
            yield from self.trials(line)
        for line in self.lines:
            yield from self.confirmation(line)

    def unknown(self) -> Iterator[PlannedRun]:
        """Stand-ins, of equal length, for the runs that will be known when a search is further."""
        for line in self.tuning:
            yield from self._all_trials(line)[len(self.trials(line)) :]
        for line in self.lines:
            if not self.confirmation(line):
                first = self.experiment.choices(line)[0]
                yield from (self._planned(point) for point in self.experiment.confirmation(line, first))

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
        """Seconds of training still to be done, one run at a time: at the rate of the line's own runs, else at that of
        the benchmarks, else at that of the other lines. None where there is nothing of these."""
        measured: dict[str, list[float]] = {line: [] for line in self.tuning}
        left: list[tuple[PlannedRun, int]] = [(stand_in, stand_in.run.budget.updates) for stand_in in self.unknown()]
        for planned in self.known():
            left.append((planned, planned.run.budget.updates - planned.update))
            last = planned.folder.metrics.last_row()
            if last:
                measured[planned.point.line].append(last["time_wall_s"] / last["update"])
        rates = {line: statistics.fmean(own) for line, own in measured.items() if own}
        for planned, _ in left:
            if planned.point.line not in rates:
                estimate = benched.estimate(planned.run, self.store.root)
                if estimate is not None:
                    rates[planned.point.line] = estimate
        if not rates:
            return None
        other = statistics.fmean(rates.values())
        return sum(updates * rates.get(planned.point.line, other) for planned, updates in left)
