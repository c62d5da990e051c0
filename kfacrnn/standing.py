"""How far an experiment is, in words: for `kfacrnn sweep` before and after its runs, and for `kfacrnn status`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from kfacrnn import tables
from kfacrnn.overrides import override
from kfacrnn.plan import Plan
from kfacrnn.progress import duration


def summary(plan: Plan) -> str:
    """`37/60 done, 2 failed, 1 diverged, 3 running, ETA 3 h 10 m`."""
    counts, total = plan.counts()
    parts = [f"{counts['done']}/{total} done"]
    parts += [f"{counts[state]} {state}" for state in ("failed", "diverged", "interrupted", "running") if counts[state]]
    if counts["running"]:
        seconds = plan.seconds_left()
        parts.append("ETA unknown" if seconds is None else f"ETA {duration(seconds / counts['running'])}")
    return ", ".join(parts)


def estimate(plan: Plan, jobs: int) -> str:
    """`about 3 h 10 m to go with --jobs 1`."""
    seconds = plan.seconds_left()
    if seconds is None:
        return "no estimate before the first rows of the first run"
    return f"about {duration(seconds / jobs)} to go with --jobs {jobs}"


def runs(plan: Plan) -> str:
    """A table of all runs, those that are not known yet by what they will be."""
    rows: list[tuple[Any, ...]] = []
    for planned in plan.known():
        point, state = planned.point, planned.folder.state()
        progress = f"{planned.update}/{planned.run.budget.updates}"
        rows.append((point.line, point.role, str(point), planned.run.run_id, state or "to do", progress))
    for planned in plan.unknown():
        point, updates = planned.point, planned.run.budget.updates
        what = "beside the best of the grid" if point.role == "tune" else "the winner"
        rows.append((point.line, point.role, f"{what}, seed={point.seed}", "", "to do", f"0/{updates}"))
    return tables.plain(("line", "role", "settings", "run", "state", "updates"), rows)


def lines(plan: Plan) -> str:
    """A table of the lines: trials, choice, runs that the figure draws."""
    header = ("line", "tuning", "chosen", "runs", "last train/metric")
    return tables.plain(header, [_line(plan, line) for line in plan.lines])


def remarks(plan: Plan) -> Iterator[str]:
    """What whoever reads the results has to know of how the settings were found."""
    for line in plan.tuning:
        edges = plan.edges(line) if plan.tuning[line] else []
        if edges:
            yield f"{line}: the winner is on an edge of what was tried: {', '.join(edges)}"
    unequal = plan.unequal_trials()
    if unequal:
        counts = ", ".join(f"{line} {count}" for line, count in unequal.items())
        yield f"the numbers of trials are not equal: {counts}"


def unfinished(plan: Plan) -> Iterator[str]:
    """Why an experiment that nothing is running of any more is not complete."""
    counts, _ = plan.counts()
    if counts["failed"]:
        yield f"{counts['failed']} failed; --retry-failed runs them again"
    if counts["interrupted"] or counts["missing"]:
        yield f"{counts['interrupted'] + counts['missing']} stopped or not started; the same command continues them"
    for line in plan.tuning:
        trials = plan.trials(line)
        if trials and all(trial.finished for trial in trials) and not plan.winner(line):
            yield f"method {line}: no tuning run can be chosen, all of them diverged; mend its grid"


def _line(plan: Plan, line: str) -> tuple[Any, ...]:
    trials, confirmation, winner = plan.trials(line), plan.confirmation(line), plan.winner(line)
    choice, described = winner.point.choice if winner else {}, plan.experiment.lines[line]
    tuning = f"{sum(trial.finished for trial in trials)}/{plan.trial_count(line)}" if trials else None
    if plan.tuning[described.tuned_as] and described.tuned_as != line:
        tuning = f"as {described.tuned_as}"
    rows = [run.folder.metrics.last_row() for run in confirmation]
    last = [row["train/metric"] for row in rows if row]
    return (
        line,
        tuning,
        " ".join(override(key, value) for key, value in choice.items()),
        f"{sum(run.finished for run in confirmation)}/{len(described.seeds)}",
        f"{statistics.median(last):.4g}" if last else None,
    )
