"""What `kfacrnn bench` says an update of a run costs: for a seconds axis, and for an estimate of hours."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfacrnn import config
from kfacrnn.config import Run


@dataclass(frozen=True)
class Cost:
    """Seconds of an update, over a whole cycle of an optimiser's kinds of step, and where they come from."""

    seconds: float
    file: str
    commit: str
    hardware: dict[str, Any]


def cost(run: Run, results: Path, experiment: str, line: str) -> Cost | None:
    """What was measured of a run of an experiment's line, on a machine that did nothing else: of that very line by
    `kfacrnn bench experiment`, or else of its optimiser by `kfacrnn bench step-cost`, if the run's task has its default
    sizes. Precision and number of threads are the run's. None where nothing was measured."""
    measured = {"task": run.task.name, "optimizer": run.optimizer.name, "dtype": run.precision, "threads": run.threads}
    found = _find(results, f"experiment-{experiment}", measured | {"line": line})
    if found is None and run.task == _default_task(run.task.name):
        found = _find(results, f"step-cost-{run.task.name}-{run.precision}", measured)
    return found


def _find(results: Path, name: str, measured: dict[str, Any]) -> Cost | None:
    """The cost in the row of a quiet benchmark, at shipped settings, that has these values."""
    bench = _read(results / "bench" / f"{name}.json")
    if not bench or bench["machine"]["busy"] or bench["overrides"]:
        return None
    for row in bench["rows"]:
        if measured.items() <= row.items():
            return Cost(row["ms_mean_cycle"] / 1000, f"bench/{name}.json", bench["commit"], bench["hardware"])
    return None


def estimate(run: Run, results: Path) -> float | None:
    """Roughly the seconds of an update: of its optimiser, or else the fastest one, in proportion to the batch, the
    inverse of the threads, and the power 3/2 of the width, between the recurrence's 2 and the softmax's 1. None without
    a benchmark of the task."""
    bench = _read(results / "bench" / f"step-cost-{run.task.name}-{run.precision}.json")
    if not bench:
        return None
    times = {row["optimizer"]: row["ms_mean_cycle"] / 1000 for row in bench["rows"]}
    default = _default_task(run.task.name)
    batch, width = (getattr(run.task, key, 1) / getattr(default, key, 1) for key in ("batch_size", "hidden"))
    threads = bench["threads"] / run.threads
    return times.get(run.optimizer.name, min(times.values())) * batch * width**1.5 * threads


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


@functools.cache
def _default_task(name: str) -> Any:
    return config.compose([f"task={name}"]).task
