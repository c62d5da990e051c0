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
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kfacrnn import experiment, standing
from kfacrnn.errors import UserError
from kfacrnn.overrides import override
from kfacrnn.plan import Plan, PlannedRun
from kfacrnn.progress import Progress

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
    print(standing.runs(plan))
    print(f"{standing.summary(plan)}; {standing.estimate(plan, jobs)}", flush=True)
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
    print("\n".join([standing.summary(plan), *standing.remarks(plan)]))
    problems = list(standing.unfinished(plan))
    for problem in problems:
        print(f"kfacrnn: {problem}", file=sys.stderr)
    return 1 if problems else 0


def status(name: str, *, results: str, overrides: Sequence[str] = ()) -> int:
    """Prints how far an experiment is; works from any shell while a sweep runs."""
    plan = Plan(experiment.load(name), results, overrides)
    print("\n".join([standing.summary(plan), standing.lines(plan), *standing.remarks(plan)]))
    return 0


@dataclass
class Child:
    """A run in its process."""

    planned: PlannedRun
    process: subprocess.Popen[bytes]
    signals: int = 0  # forwarded so far


class Launcher:
    """Keeps `jobs` processes busy with the unfinished runs of a plan, also with those that results decide on."""

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
    title = f"{planned.point.line}, {planned.point.role} {planned.point} (run {planned.run.run_id})"
    if code == 0:
        value = f", train/metric {float(rows[-1]['train/metric']):.4g}" if rows else ""
        return f"{status.get('state', 'not started')}: {title} at update {status.get('update', 0)}{value}"
    if planned.folder.state() == "running":
        return f"left to another process, {status.get('pid')}: {title}"
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = _log(planned).read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return f"FAILED: {title}: {how}; {_log(planned)} ends: {last}"
