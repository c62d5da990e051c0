"""What `kfacrnn bench` says an update of a run costs: for a seconds axis, and for an estimate of hours."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfacrnn import config, settings
from kfacrnn.errors import UserError
from kfacrnn.run import Run

if TYPE_CHECKING:
    from kfacrnn.bench.cycle import Kind


@dataclass(frozen=True)
class Cost:
    """Seconds of an update, over a whole cycle of an optimiser's kinds of step, and where they come from. With
    `intervals`, of statistics, of inverses and early ones, the first updates are of other `kinds`."""

    seconds: float
    file: str
    commit: str
    hardware: dict[str, Any]
    kinds: dict[str, float] = field(default_factory=dict)  # seconds by label
    intervals: tuple[int, int, float] | None = None
    p95: float | None = None  # over single updates
    command: str = ""

    def after(self, updates: float) -> float:
        """Seconds of a run's first so many updates."""
        young = self._young
        if updates < len(young):
            return young[int(updates)]
        return young[-1] + (updates - len(young) + 1) * self.seconds

    @functools.cached_property
    def _young(self) -> list[float]:
        """After none of the updates, the first, the second, … until the steady state."""
        if self.intervals is None:
            return [0.0]
        from kfacrnn.bench.cycle import unsettled

        return [*accumulate(map(self._seconds_of, unsettled(*self.intervals)), initial=0.0)]

    def _seconds_of(self, kind: Kind) -> float:
        """Of a kind that the steady state does not have: statistics and inverses cost together what they cost alone."""
        if kind.label in self.kinds:
            return self.kinds[kind.label]
        other, one, two = (
            self.kinds.get(kind._replace(**{name: not getattr(kind, name) for name in flipped}).label)
            for flipped in (kind._fields, kind._fields[:1], kind._fields[1:])
        )
        if other is None or one is None or two is None:
            return max(self.kinds.values())
        return one + two - other


def cost(run: Run, results: Path, experiment: str, line: str) -> Cost | None:
    """What was measured of a run of an experiment's line, on a machine that did nothing else: of that very line by
    `kfacrnn bench experiment`, or else of its optimiser on its task by `kfacrnn bench step-cost`, which may have been
    given other settings of the task, such as task.hidden=1024. Precision, number of threads and whatever an update's
    cost depends on are the run's. None where nothing was measured."""
    measured = {"task": run.task.name, "optimizer": run.optimizer.name, "dtype": run.precision, "threads": run.threads}
    measured["settings"] = settings.costly(run.optimizer)
    own = file(results, f"experiment-{experiment}", run)
    found = None if _read(own).get("overrides") else _find(own, measured | {"line": line})
    if found is None:
        found = next(filter(None, (_find(path, measured) for path in _step_costs(results, run))), None)
    if found is None or not hasattr(run.optimizer, "intervals"):
        return found
    return replace(found, intervals=run.optimizer.intervals)


def _step_costs(results: Path, run: Run) -> Iterator[Path]:
    """What `kfacrnn bench step-cost` wrote of the run's task, at its precision and threads."""
    default = file(results, f"step-cost-{run.task.name}", run)
    for path in sorted(default.parent.glob(f"{default.stem}*.json")):
        overrides = _read(path).get("overrides", [])
        is_of_task = all(entry.startswith("task.") for entry in overrides)
        is_by_name = path.stem == "-".join([default.stem, *overrides])  # and not of another machine
        if is_of_task and is_by_name and run.task == _task(run.task.name, *overrides):
            yield path


def file(results: Path, name: str, run: Run) -> Path:
    """Where `kfacrnn bench` writes what it measured at a run's precision and threads, without overrides."""
    return results / "bench" / f"{name}-{run.precision}-threads={run.threads}.json"


def _find(path: Path, measured: dict[str, Any]) -> Cost | None:
    """The cost in the row of a quiet benchmark that has these values."""
    bench = _read(path)
    if not bench or bench["machine"]["busy"]:
        return None
    for row in bench["rows"]:
        if measured.items() <= (row | {"settings": settings.without_none(row["settings"])}).items():
            source = (f"bench/{path.name}", bench["commit"], bench["hardware"])
            own = {"p95": row["ms_p95"] / 1000, "command": bench["command"]}
            return Cost(row["ms_mean_cycle"] / 1000, *source, _kinds(row), **own)
    return None


def first_updates(row: dict[str, Any], run: Run) -> float:
    """How many times its cost in the steady state, a benchmark's row, an update of a run costs on average, as its first
    ones renew curvature more often."""
    cost = Cost(row["ms_mean_cycle"] / 1000, "", "", {}, _kinds(row), run.optimizer.intervals)
    updates = run.budget.updates
    return cost.after(updates) / (updates * cost.seconds)


def nearest(results: Path, name: str, run: Run) -> dict[str, Any] | None:
    """What was measured without overrides, on a quiet machine if there is such, by as many threads as a run's or else
    by others."""
    own = file(results, name, run)
    others = sorted(own.parent.glob(f"{name}-{run.precision}-*.json"))
    found = [bench for bench in map(_read, [own, *others]) if bench and not bench["overrides"]]
    return min(found, key=lambda bench: bench["machine"]["busy"], default=None)


def estimate(run: Run, results: Path) -> float | None:
    """Roughly the seconds of an update: of its optimiser, or else the fastest one, in proportion to the batch, the
    inverse of the threads, and the power 3/2 of the width, between the recurrence's 2 and the softmax's 1. None without
    a benchmark of the task."""
    bench = nearest(results, f"step-cost-{run.task.name}", run)
    if bench is None:
        return None
    times = {row["optimizer"]: row["ms_mean_cycle"] / 1000 for row in bench["rows"]}
    default = _task(run.task.name)
    batch, width = (getattr(run.task, key, 1) / getattr(default, key, 1) for key in ("batch_size", "hidden"))
    threads = bench["threads"] / run.threads
    return times.get(run.optimizer.name, min(times.values())) * batch * width**1.5 * threads


def _kinds(row: dict[str, Any]) -> dict[str, float]:
    return {label: kind["ms_median"] / 1000 for label, kind in row["kinds"].items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


@functools.cache
def _task(name: str, *overrides: str) -> Any:
    """None for overrides that there are no more."""
    try:
        return config.compose([f"task={name}", *overrides]).task
    except UserError:
        return None
