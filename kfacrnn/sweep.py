"""Runs what is missing of an experiment, one process per run, and says how far it is.

A run that is done or has diverged is skipped, one that was stopped is continued, one that failed is left until it is
asked for. A run that dies takes nothing with it. The sweep itself can be stopped and started at any moment: it keeps no
state but the store's.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfacrnn import experiment, tables
from kfacrnn.errors import UserError
from kfacrnn.experiment import override
from kfacrnn.plan import Plan, PlannedRun
from kfacrnn.progress import Progress, duration

POLL = 0.2  # seconds


def sweep(
    name: str,
    *,
    results: str,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    dry_run: bool = False,
    only: Sequence[str] = (),
    retry_failed: bool = False,
) -> int:
    """Trains every run of an experiment that is not finished. Exit code: 0 when all of them are, 1 when some are not,
    130 when it was stopped. Raises `UserError`, before the first run, for a point of a grid that cannot be run."""
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    plan = Plan(experiment.load(name), results, overrides, only)
    plan.validate()
    print(_runs(plan))
    print(f"{_line(plan)}; {_estimate(plan, jobs)}", flush=True)
    if dry_run:
        return 0
    launcher = Launcher(plan, results, jobs, retry_failed)
    with _signals() as received, Progress(plan.experiment.name, plan.updates()[1], plan.updates()[0]) as progress:
        launcher.run(received, progress)
    if received:
        flags = [*(f"--only={method}" for method in only), *([f"--jobs={jobs}"] if jobs > 1 else [])]
        command = shlex.join(["kfacrnn", "sweep", name, *flags, f"--results={results}", *overrides])
        print(f"stopped; every run has a checkpoint. Continue with: {command}")
        return 130
    print(_line(plan))
    for problem in _unfinished(plan):
        print(f"kfacrnn: {problem}", file=sys.stderr)
    return 1 if any(_unfinished(plan)) else 0


def status(name: str, *, results: str, overrides: Sequence[str] = ()) -> int:
    """Prints how far an experiment is; works from any shell while a sweep runs."""
    plan = Plan(experiment.load(name), results, overrides)
    print(_line(plan))
    print(tables.plain(("method", "tuning", "chosen", "runs", "last train/metric"), [*_methods(plan)]))
    return 0


@dataclass
class Child:
    """A run in its process."""

    planned: PlannedRun
    process: subprocess.Popen[bytes]
    signals: int = 0  # forwarded so far


class Launcher:
    """Keeps `jobs` processes busy with the unfinished runs of a plan; a grid's winner is confirmed once it is known."""

    def __init__(self, plan: Plan, results: str, jobs: int, retry_failed: bool):
        self._plan, self._results, self._jobs = plan, results, jobs
        self._startable = {None, "interrupted", "failed"} if retry_failed else {None, "interrupted"}
        self._attempted: set[str] = set()
        self._children: list[Child] = []

    def run(self, received: list[int], progress: Progress) -> None:
        """Returns when nothing is left to start, or when all processes have ended after a signal was `received`."""
        queue, ended, total = self._startable_runs(), self._updates_of_the_others(), self._plan.updates()[1]
        try:
            while (queue and not received) or self._children:
                while queue and not received and len(self._children) < self._jobs:
                    self._start(queue.pop(0))
                for child in self._children:
                    while child.signals < len(received):
                        child.signals += 1
                        child.process.terminate()
                if self._reap(stopping=bool(received)):
                    queue, ended = self._startable_runs(), self._updates_of_the_others()
                if self._children:
                    made = ended + sum(child.planned.update for child in self._children)
                    if made < total:
                        progress.show(made, f"{len(self._children)} running")
                    time.sleep(POLL)
        finally:
            for child in self._children:  # only after an error in here: no orphans
                child.process.terminate()

    def _startable_runs(self) -> list[PlannedRun]:
        runs = {planned.run.run_id: planned for planned in self._plan.known()}
        fresh = [planned for run_id, planned in runs.items() if run_id not in self._attempted]
        return [planned for planned in fresh if planned.folder.state() in self._startable]

    def _updates_of_the_others(self) -> int:
        return self._plan.updates()[0] - sum(child.planned.update for child in self._children)

    def _start(self, planned: PlannedRun) -> None:
        self._attempted.add(planned.run.run_id)
        log = _log(planned)
        command = [sys.executable, "-m", "kfacrnn.child", "train", *planned.overrides]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [*command, override("results", self._results)],
                    stdin=subprocess.PIPE,  # kfacrnn.child: its end is this launcher's end
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the launcher only, which passes it on once
                    env={**os.environ, "KFACRNN_JOBS": str(self._jobs)},
                )
        except OSError as error:
            raise UserError(f"cannot write --results {self._results}: {error.strerror} ({error.filename})") from error
        self._children.append(Child(planned, process))

    def _reap(self, *, stopping: bool) -> bool:
        """Reports the processes that have ended. Whether there were any."""
        ended = [child for child in self._children if child.process.poll() is not None]
        for child in ended:
            self._children.remove(child)
            assert child.process.stdin is not None
            child.process.stdin.close()
            code = child.process.returncode
            print(_ending(child.planned, code if not stopping else 0), flush=True)
        return bool(ended)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects what asks the sweep to stop, for the launcher to pass on."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log(planned: PlannedRun) -> Path:
    return planned.folder.path / "log.txt"


def _ending(planned: PlannedRun, code: int) -> str:
    """One line on a process that has ended: how, and for a bad end where to read on."""
    status, rows = planned.folder.status(), planned.folder.rows()
    title = f"{planned.point.method}, {planned.point.role} {planned.point} (run {planned.run.run_id})"
    if code == 0:
        value = f", train/metric {float(rows[-1]['train/metric']):.4g}" if rows else ""
        return f"{status.get('state', 'not started')}: {title} at update {status.get('update', 0)}{value}"
    if planned.folder.state() == "running":
        return f"left to another process, {status.get('pid')}: {title}"
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = _log(planned).read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return f"FAILED: {title}: {how}; {_log(planned)} ends: {last}"


def _unfinished(plan: Plan) -> Iterator[str]:
    """Why an experiment that nothing is running of any more is not complete."""
    counts, _ = plan.counts()
    if counts["failed"]:
        yield f"{counts['failed']} failed; --retry-failed runs them again"
    if counts["interrupted"] or counts["missing"]:
        yield f"{counts['interrupted'] + counts['missing']} stopped or not started; the same command continues them"
    if counts["running"]:
        yield f"{counts['running']} are being written by another process; the same command takes up what it leaves"
    for method in plan.methods:
        if not plan.confirmation(method) and all(trial.finished for trial in plan.tuning[method]):
            yield f"method {method}: no tuning run can be chosen, all of them diverged; mend its grid"


def _line(plan: Plan) -> str:
    """`37/60 done, 2 failed, 1 diverged, 3 running, ETA 3 h 10 m`."""
    counts, total = plan.counts()
    parts = [f"{counts['done']}/{total} done"]
    parts += [f"{counts[state]} {state}" for state in ("failed", "diverged", "interrupted", "running") if counts[state]]
    if counts["running"]:
        seconds = plan.seconds_left()
        parts.append("ETA unknown" if seconds is None else f"ETA {duration(seconds / counts['running'])}")
    return ", ".join(parts)


def _estimate(plan: Plan, jobs: int) -> str:
    seconds = plan.seconds_left()
    if seconds is None:
        return "no estimate before the first rows of the first run"
    return f"about {duration(seconds / jobs)} to go with --jobs {jobs}"


def _runs(plan: Plan) -> str:
    rows: list[tuple[Any, ...]] = []
    for planned in plan.known():
        point, state = planned.point, planned.folder.state()
        progress = f"{planned.update}/{planned.run.budget.updates}"
        rows.append((point.method, point.role, str(point), planned.run.run_id, state or "to do", progress))
    for planned in plan.unknown():
        point, updates = planned.point, planned.run.budget.updates
        rows.append((point.method, point.role, f"the winner, seed={point.seed}", "", "to do", f"0/{updates}"))
    return tables.plain(("method", "role", "settings", "run", "state", "updates"), rows)


def _methods(plan: Plan) -> Iterator[tuple[Any, ...]]:
    for method in plan.methods:
        trials, confirmation, winner = plan.tuning[method], plan.confirmation(method), plan.winner(method)
        choice = winner.point.choice if winner else {}
        last = [float(p.folder.rows()[-1]["train/metric"]) for p in confirmation if p.folder.rows()]
        yield (
            method,
            f"{sum(trial.finished for trial in trials)}/{len(trials)}" if trials else None,
            " ".join(override(key, value) for key, value in choice.items()),
            f"{sum(p.finished for p in confirmation)}/{len(plan.experiment.seeds)}",
            f"{statistics.median(last):.4g}" if last else None,
        )
