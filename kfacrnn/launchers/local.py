"""The runs of a sweep in processes of this machine, one process per run. One that dies takes nothing with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kfacrnn import signals
from kfacrnn.errors import UserError
from kfacrnn.launchers.pending import LOOK, Pending, ending, title
from kfacrnn.overrides import override
from kfacrnn.plan import Plan, PlannedRun
from kfacrnn.progress import Progress

POLL = 0.2  # seconds


def run(plan: Plan, pending: Pending, jobs: int) -> bool:
    """Returns when nothing is left to start, here or elsewhere, or when all processes have ended after a signal;
    whether there was one."""
    received: list[int] = []  # for the processes, too: every one is passed on
    made, total = plan.updates()
    with (
        signals.handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), lambda number, _: received.append(number)),
        Progress(plan.experiment.name, total, made) as progress,
    ):
        Launcher(plan, pending, jobs).run(received, progress)
    return bool(received)


@dataclass
class Child:
    """A run in its process."""

    planned: PlannedRun
    process: subprocess.Popen[bytes]
    signals: int = 0  # forwarded so far


class Launcher:
    """Keeps `jobs` processes busy with the unfinished runs of a plan, also with those that results decide on."""

    def __init__(self, plan: Plan, pending: Pending, jobs: int):
        self._plan, self._pending, self._jobs = plan, pending, jobs
        self._results = str(plan.store.root)
        self._children: list[Child] = []
        self._look()

    def _look(self) -> None:
        """What there is to start, what is under way elsewhere, and the updates of all that is not under way here."""
        own = [child.planned for child in self._children]
        self._queue, self._elsewhere = self._pending.runs(), self._pending.elsewhere(own)
        self._updates_of_the_others = self._plan.updates()[0] - sum(planned.update for planned in own)
        self._looked = time.monotonic()

    def run(self, received: list[int], progress: Progress) -> None:
        """Returns when nothing is left to start, here or elsewhere, or when all processes have ended after a signal was
        `received`."""
        total = self._plan.updates()[1]
        try:
            while self._children or (not received and (self._queue or self._elsewhere)):
                while self._queue and not received and len(self._children) < self._jobs:
                    self._start(self._queue.pop(0))
                for child in self._children:
                    while child.signals < len(received):
                        child.signals += 1
                        child.process.terminate()
                idle = not self._queue and len(self._children) < self._jobs
                if self._reap(stopping=bool(received)) or (idle and time.monotonic() > self._looked + LOOK):
                    self._look()
                if self._children or self._elsewhere:
                    made = self._updates_of_the_others + sum(child.planned.update for child in self._children)
                    if made < total:
                        elsewhere = f", {self._elsewhere} elsewhere" if self._elsewhere else ""
                        progress.show(made, f"{len(self._children)} running{elsewhere}")
                    time.sleep(POLL)
        finally:
            for child in self._children:  # only after an error in here: no orphans
                child.process.terminate()

    def _start(self, planned: PlannedRun) -> None:
        self._pending.take([planned])
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
            code = 0 if stopping else child.process.returncode
            if code != 0 and _is_anothers(child.planned, code):
                self._pending.put_back([child.planned])
                pid = child.planned.folder.status().get("pid")
                print(f"left to another process, {pid}: {title(child.planned)}", flush=True)
            else:
                print(_ending(child.planned, code), flush=True)
        return bool(ended)


def _log(planned: PlannedRun) -> Path:
    return planned.folder.path / "log.txt"


def _is_anothers(planned: PlannedRun, code: int) -> bool:
    """Of a run whose process ended with this error: whether it was for another's sake."""
    return planned.folder.state() == "running" or (code > 0 and planned.finished)


def _ending(planned: PlannedRun, code: int) -> str:
    """One line on a process that has ended: how, and for a bad end where to read on."""
    if code == 0:
        return ending(planned)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = _log(planned).read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return f"FAILED: {title(planned)}: {how}; {_log(planned)} ends: {last}"
